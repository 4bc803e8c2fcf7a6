"""Options of GCPOTrainer: those of the method, on top of those of TRL's GRPOConfig."""

import warnings
from dataclasses import dataclass
from typing import Any

from trl import GRPOConfig

from gcpo.causal.options import CausalOptions, option
from gcpo.run.processes import explained_groups
from gcpo_kernels.options import LOSS_TYPES, check_choice, check_number

# Options of TRL's whose whole numbers must not be floats.
_COUNTS = (
    "num_generations",
    "num_iterations",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",  # by default the one before
    "max_steps",
)


@dataclass
class GCPOConfig(CausalOptions, GRPOConfig):
    r"""
    Options of [`GCPOTrainer`]: all of TRL's [`~trl.GRPOConfig`], those of the method ([`~gcpo.CausalOptions`]), and
    those that concern the trainer alone. n is `num_generations`. `kappa=0` with `estimator="none"` is GRPO, at GRPO's
    cost.

    Parameters:
        fused_loss (`bool`, *optional*):
            Make the policy's loss, second KL included, from hidden states ([`~gcpo_kernels.linear_gcpo_loss`]): three
            products with the output layer where TRL's path takes four, and TRL's metrics as they are. Not with an
            entropy bonus or quantile, `off_policy_mask_threshold`, a router's auxiliary loss, prompt tuning, images, or
            `torch_compile`. True raises where it cannot hold; None: where it can and GCPO's parts are on, with a line
            in the log where it cannot.
        padding_free (`bool`, *optional*):
            Let the policy's forward with gradient, and the scoring passes before it, read packed rows without padding,
            in which a prompt that several completions have stands once: the same loss and gradients within float error,
            from fewer tokens. Rows of a prompt are brought together in micro-batches, within an optimizer step. Needs
            `attn_implementation` sdpa, eager or flex_attention and a model whose layers take a mask; True and None as
            for `fused_loss`.
        overlap_rewards (`bool`, *optional*, defaults to `False`):
            Run the reward functions while colliders are decoded, which a thread of its own does: the reward functions
            stay in the main thread, where time limits by signals work. The numbers are the same as without, unless a
            reward function draws from torch's global random stream. Not with FSDP, DeepSpeed ZeRO-3, or vLLM other than
            `vllm_mode="colocate"` without sleep mode and with one GPU each.
        share_prompt (`bool`, *optional*):
            The old name of `padding_free`.
    """

    fused_loss: bool | None = option(None, "Make the loss from hidden states. None: where that is possible.")
    padding_free: bool | None = option(None, "Train on packed rows without padding. None: where that is possible.")
    overlap_rewards: bool = option(False, "Run the reward functions while colliders are decoded.")
    share_prompt: bool | None = option(None, "The old name of `padding_free`.")

    def __post_init__(self) -> None:
        with explained_groups(self):
            GRPOConfig.__post_init__(self)
        self._check_late_refusals()
        CausalOptions.__post_init__(self)
        # As a run's record shows them.
        self.baseline = self.group_baseline
        self.collider_max_completion_length = self.collider_limit(self.max_completion_length)

    @classmethod
    def paper(cls, **overrides: Any) -> "GCPOConfig":
        """
        The paper's settings (arXiv 2508.05428), as far as it gives them.

        The method: alpha 2, kappa 0.06, L = n, whole candidates in every prompt, colliders as long as candidates, fresh
        outputs sampled under every context, zbar over the whole group, pi_theta conditioned on x_i in the second KL
        term, every candidate and context scored, neither KL term clipped, c_0 sampled
        as the other colliders are. The objective (eq. 10): `loss_type="grpo"`,
        and `use_bias_correction_kl=False`, because the reference KL is printed without the ratio that TRL multiplies it
        by. The run: learning rate 1e-6, weight decay 0.01, at most 16,384 tokens per completion.

        Left to you: `beta`, which the printed objective has without a value known here (TRL's default is 0: no
        reference model), and the batch, in the paper 256 completions per step, which is `per_device_train_batch_size`
        x processes x `gradient_accumulation_steps`.

        Args:
            **overrides: any option, which then wins over the paper's.
        """
        settings: dict[str, Any] = {
            "alpha": 2.0,
            "kappa": 0.06,
            "estimator": "sampled",
            "causal_policy_context": "context",
            "representation": "last",
            "baseline": "mean",
            "similarity": "cosine",
            "candidate_context_tokens": None,
            "context_attention": "full",
            "num_kl_contexts": None,
            "kl_fraction": 1.0,
            "kl_clip": None,
            "collider_choice": "sample",
            "collider_attention": "full",
            "kl_target": "projection",
            "weight_scale": "alpha",
            "loss_type": "grpo",
            "use_bias_correction_kl": False,
            "learning_rate": 1e-6,
            "weight_decay": 0.01,
            "max_completion_length": 16384,
        }
        settings.update(overrides)
        settings.setdefault("collider_max_completion_length", settings["max_completion_length"])
        config = cls(**settings)
        if "num_colliders" not in overrides:
            config.num_colliders = config.num_generations
        return config

    def _check_late_refusals(self) -> None:
        """What TRL fails on as well, but only once a model is loaded and a step has begun."""
        for name in _COUNTS:
            if isinstance(getattr(self, name), float):
                raise TypeError(f"`{name}` must be an integer, got {getattr(self, name)}.")
        check_number("temperature", self.temperature, above=0.0)
        check_number("repetition_penalty", self.repetition_penalty, above=0.0)
        check_number("top_p", self.top_p, low=0.0)
        if self.min_p is not None:
            check_number("min_p", self.min_p, low=0.0, high=1.0)
        if self.max_completion_length is None and self.is_causal:
            raise ValueError("`max_completion_length` must be an integer: GCPO shows candidates in prompts, got None.")
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise ValueError(f"`max_completion_length` must be at least 1, got {self.max_completion_length}.")
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        if self.share_prompt is not None:
            warnings.warn(
                "`share_prompt` is now `padding_free`, which does more: give that.", FutureWarning, stacklevel=4
            )
            if self.padding_free not in (None, self.share_prompt):
                raise ValueError(
                    f"`share_prompt` is the old name of `padding_free`: leave it out, got {self.share_prompt} beside "
                    f"{self.padding_free}."
                )
            self.padding_free = self.share_prompt
            self.share_prompt = None
        if not isinstance(self.overlap_rewards, bool):
            raise TypeError(f"`overlap_rewards` must be True or False, got {self.overlap_rewards!r}.")
        for name in ("fused_loss", "padding_free"):
            if not isinstance(getattr(self, name), bool | None):
                raise TypeError(f"`{name}` must be True, False or None, got {getattr(self, name)!r}.")
