"""GCPOTrainer: TRL's GRPOTrainer with causal weights on the advantages and a second KL term."""

import inspect
import math
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import ProcessorMixin
from trl import GRPOTrainer

from gcpo._trl import (
    check_version,
    disable_gradient_checkpointing,
    explained_server,
    get_config_model_id,
    refuse_wrapped_head,
)
from gcpo.causal.contexts import Prompt, check_length, longest_prompt
from gcpo.causal.step import WEIGHT_COLUMNS, CausalStep
from gcpo.config import GCPOConfig
from gcpo.forward.generation import GenerationRecorder, Rollout, RolloutStates, padded_width, read_repeated_prompts_once
from gcpo.forward.representations import HiddenRecorder
from gcpo.forward.scoring import without_dropout
from gcpo.forward.shared_prompt import logps_sharing_prompts, repeats_prompts
from gcpo.run.guard import SkipNonFiniteSteps
from gcpo.run.lengths import check_prompt_lengths
from gcpo.run.meter import AccountedGRPOTrainer
from gcpo.run.processes import check_processes_agree, explained_loss_of_process
from gcpo.run.prompts import check_prompts
from gcpo_kernels import gcpo_loss

_OWN_ARGUMENTS = ("self", "model", "reward_funcs", "args")

# How each of TRL's loss types reduces its tokens, in terms of the four that gcpo_loss knows.
_REDUCTION = {
    "grpo": "grpo",
    "sapo": "grpo",
    "bnpo": "bnpo",
    "dr_grpo": "dr_grpo",
    "luspo": "luspo",
    "dapo": "dapo",
    "cispo": "dapo",
    "vespo": "dapo",
}


class GCPOTrainer(AccountedGRPOTrainer):
    """
    Trainer for Group Causal Policy Optimization (GCPO, https://huggingface.co/papers/2508.05428).

    Takes exactly [`~trl.GRPOTrainer`]'s arguments, with `args` a [`GCPOConfig`]. Every training step adds to GRPO's:

    1. integrated answers (colliders), which the policy writes after seeing all candidates of a prompt;
    2. representations of candidates and colliders, from forwards that also score them;
    3. advantages multiplied by the causal weight Upsilon (eq. 11), a constant;
    4. scores of the candidates under the contexts x_{i,l}, from which `gcpo_kernels.gcpo_loss` forms the causal
       reference and a second KL term, kappa * k3 (eqs. 10, 12, 13), added to TRL's own loss.

    With `kappa=0` and `estimator="none"` it is GRPOTrainer, and logs and writes what that does (checkpoints hold one
    file more, for exact resuming), unless `keeps_account` is set to True. All that concerns a group is computed on
    gathered rows, before TRL shuffles and splits them. Evaluation reports GRPO's metrics; the causal parts run in
    training only.
    """

    keeps_account = False

    _tag_names = ["trl", "gcpo"]
    _name = "GCPO"
    _paper = {
        "title": "Group Causal Policy Optimization for Post-Training Large Language Models",
        "id": "2508.05428",
        "citation": textwrap.dedent("""\
            @article{gcpo2025,
                title  = {{Group Causal Policy Optimization for Post-Training Large Language Models}},
                year   = 2025,
                eprint = {arXiv:2508.05428},
            }"""),
    }

    # Defaults of what a step sets, for those who make a trainer without `__init__` to call one of its methods.
    max_positions: int | None = None
    _recorder: HiddenRecorder | None = None
    _rollout: Rollout | None = None
    _generated: RolloutStates | None = None  # what the last generation left, where it is watched
    _scoring = ("scoring", "scored_query")  # phase and kind of tokens of the scoring passes that follow
    _loss_inputs: dict[str, Any] | None = None  # of TRL's loss, from its call to its forward
    _policy_logps: torch.Tensor | None = None  # of that forward
    _has_causal_kl = False  # whether the loss being computed holds the second KL term
    _warned_of_causal_kl = False
    _has_clipped = False  # whether its reference KL is within `kl_clip`
    _warned_of_clip = False

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: GCPOConfig | None = None, *others: Any, **kwargs: Any
    ):
        check_version()
        # By TRL's own names, and its own TypeError for what it does not take.
        given = inspect.signature(GRPOTrainer.__init__).bind(self, model, reward_funcs, args, *others, **kwargs)
        kwargs = {name: value for name, value in given.arguments.items() if name not in _OWN_ARGUMENTS}
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GCPOConfig(f"{name.split('/')[-1]}-GCPO")
        if not isinstance(args, GCPOConfig):
            raise TypeError(
                f"`args` must be a GCPOConfig, which takes every option of GRPOConfig, got {type(args).__name__}."
            )
        if args.is_causal or args.kl_clip is not None:
            self.keeps_account = True
        if args.is_causal:
            _refuse_unsupported(kwargs)
            kwargs |= _checked_datasets(kwargs)
        size = len(kwargs["train_dataset"]) if hasattr(kwargs.get("train_dataset"), "__len__") else None
        check_processes_agree(args, train_dataset_size=size)
        with explained_server(args, model):
            super().__init__(model, reward_funcs, args=args, **kwargs)
        refuse_wrapped_head(self.model)
        if args.is_causal and self._is_vlm:
            raise ValueError("`processing_class` must be a tokenizer: GCPO shows candidates as text, without images.")
        if self._tokenizer.eos_token_id is None:
            raise ValueError("`processing_class` must have an `eos_token`: without one, no completion ever ends.")
        self.add_callback(SkipNonFiniteSteps(self._log))
        config = self.model.config.get_text_config()
        self.max_positions = getattr(config, "max_position_embeddings", None)
        if args.is_causal:
            longest = longest_prompt(args, self.generation_limit or 0)
            check_length(longest, self.max_positions, "Showing the candidates and colliders of one prompt")
        self._causal = CausalStep(self)
        if args.is_causal:
            check_prompt_lengths(self)
        if args.share_prompt and (not self._causal.scorer.can_continue or self._is_vlm or self.aux_loss_enabled):
            raise ValueError(
                "`share_prompt` needs a text model whose every layer keeps the keys and values of all tokens, without "
                f"sliding windows or an auxiliary loss, got {self.model.config.model_type}."
            )
        if args.share_prompt and (self._dist.is_fsdp or self._dist.is_zero3):
            # Gradients reach a layer through the keys and values it leaves, which neither watches: its parameters
            # would not be gathered for them.
            raise ValueError("`share_prompt` must be False where parameters are sharded (FSDP, DeepSpeed ZeRO-3).")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with explained_loss_of_process(self.args.ddp_timeout):
            return super().train(*args, **kwargs)

    # -----------------------------------------------------------------------------------------------------------------
    # What TRL does, watched
    # -----------------------------------------------------------------------------------------------------------------

    def _generate(self, prompts: list[Prompt]) -> tuple:
        self._generated = None
        result = super()._generate(prompts)
        self._rollout = Rollout(prompts, result[0], result[1], self._generated)
        self._generated = None
        return result

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple:
        call = super()._generate_single_turn
        in_house = not (self.use_vllm or self.use_transformers_continuous_batching or self.rollout_func)
        if not (in_house and self.args.is_causal):
            return call(prompt_ids, *args, **kwargs)
        backbone, scorer = self._backbone(), self._causal.scorer
        # Every process must take the same path, whatever its own share of the prompts.
        repeats = scorer.shares and scorer.most(len(prompt_ids) - len(set(map(tuple, prompt_ids)))) > 0
        with ExitStack() as stack:
            # Candidates and their states are the policy's, as their scores are (TRL leaves dropout on here).
            stack.enter_context(without_dropout(self.model))
            if repeats:
                stack.enter_context(read_repeated_prompts_once(backbone))
            if self._recorder is None or not (self.args.reuse_rollout and self.args.uses_rollout_states):
                return call(prompt_ids, *args, **kwargs)
            recorder = GenerationRecorder(
                self.args.representation,
                self.eos_token_ids,
                self.generation_limit,
                padded_width(prompt_ids, self.pad_to_multiple_of),
            )
            stack.enter_context(recorder.attached(backbone))
            result = call(prompt_ids, *args, **kwargs)
            with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                self._generated = recorder.finish(self, prompt_ids, result[0])
        return result

    @property
    def generation_limit(self) -> int | None:
        """Most tokens of a candidate: `max_completion_length`, unless `generation_kwargs` says otherwise."""
        if self.use_vllm:
            return self.vllm_generation.generation_kwargs.get("max_tokens", self.vllm_generation.max_completion_length)
        return self.generation_config.max_new_tokens

    def _all_share_prompts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int) -> bool:
        """Whether prompts are read once: as many forwards on every process, whatever its own share of the prompts."""
        width = input_ids.shape[1] - logits_to_keep
        most = self._causal.scorer.most
        return not most(int(width < 2)) and most(int(repeats_prompts(input_ids, attention_mask, width))) > 0

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if not self.args.is_causal:
            return rewards
        # An infinite reward would make its group's mean, and then its advantages, infinite: no reward, as NaN is.
        rewards = torch.where(torch.isfinite(rewards), rewards, torch.nan)
        mode = "train" if self.model.training else "eval"
        n = self.num_generations if mode == "train" else self.num_generations_eval
        lost = rewards.isnan().all(dim=1).view(-1, n).all(dim=1)
        self._log("groups_without_reward", lost.float().mean(), mode)
        return rewards

    def _collider_texts(self) -> list[list[str]] | None:
        groups = self._causal.groups
        texts = [self._tokenizer.batch_decode(g.colliders, skip_special_tokens=True) for g in groups]
        return texts or super()._collider_texts()

    def _scored(self) -> tuple[str, str]:
        return self._scoring

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple:
        call = super()._get_per_token_logps_and_entropies
        if torch.is_grad_enabled():
            if self.args.share_prompt and self._all_share_prompts(input_ids, attention_mask, logits_to_keep):
                entropy = kwargs.get("compute_entropy", False)
                result = logps_sharing_prompts(self, model, input_ids, attention_mask, logits_to_keep, entropy)
            else:
                result = call(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
            return self._keep_for_loss(result)
        if self._recorder is None or model is not self.model:
            return self._keep_for_loss(call(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs))
        # A scoring pass of the policy's also gives the representations.
        with self._recorder.attached(self._backbone(), logits_to_keep):
            return call(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    def _keep_for_loss(self, result: tuple) -> tuple:
        """The policy's log-probabilities, where this forward is the one that a loss is being computed from."""
        if self._loss_inputs is not None:
            inputs, self._loss_inputs = self._loss_inputs, None
            self._policy_logps = result[0]
            if "ref_per_token_logps" in inputs:
                inputs["ref_per_token_logps"] = self.clipped_reference(inputs, result[0])
        return result

    # -----------------------------------------------------------------------------------------------------------------
    # What GCPO adds to a rollout
    # -----------------------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not (self.args.is_causal and self.model.training):
            if self.args.uses_weights:  # rows of the completions table whose columns only training fills
                for column in WEIGHT_COLUMNS:
                    self._log_completion_extra(column, [None] * len(inputs))
            return super()._generate_and_score_completions(inputs)
        with self._recording(HiddenRecorder(self.args.representation)) as recorder:
            output = super()._generate_and_score_completions(inputs)
        assert self._rollout is not None
        self._rollout.inputs = inputs
        z = None if self._rollout.states is None else self._rollout.states.z
        # Where TRL scores the rollout under the policy itself, its pass gives the representations too; a PEFT reference
        # pass over the same model comes after. It hides truncated completions when they are masked: then it is no use.
        if z is None and recorder.rows and "old_per_token_logps" in output and not self.mask_truncated_completions:
            z = recorder.result()[: len(self._rollout.prompts)]
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            self._causal.extend(output, self._rollout, z)
        self._rollout = None  # with it go keys and values
        return output

    @contextmanager
    def _recording(self, recorder: HiddenRecorder) -> Iterator[HiddenRecorder]:
        """The policy's scoring passes inside also give the representations of what they score."""
        self._recorder = recorder
        try:
            yield recorder
        finally:
            self._recorder = None

    @contextmanager
    def _counted_as(self, phase: str, tokens: str) -> Iterator[None]:
        """Scoring passes inside belong to this phase, and their tokens to this kind."""
        before, self._scoring = self._scoring, (phase, tokens)
        try:
            yield
        finally:
            self._scoring = before

    def _backbone(self) -> nn.Module:
        """The module whose output is what lm_head reads."""
        model = self.accelerator.unwrap_model(self.model)
        return (model.get_base_model() if is_peft_model(model) else model).base_model

    # -----------------------------------------------------------------------------------------------------------------
    # The loss
    # -----------------------------------------------------------------------------------------------------------------

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._has_causal_kl = self._has_clipped = False
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        ignores_clip = self.args.kl_clip is not None and "ref_per_token_logps" in inputs and not self._has_clipped
        if ignores_clip and not self._warned_of_clip:
            self._warned_of_clip = True
            warnings.warn(
                f"{type(self).__name__}._compute_loss leaves out `kl_clip` of the reference KL. Take "
                "`self.clipped_reference(inputs, per_token_logps)` for the reference's log-probabilities.",
                stacklevel=2,
            )
        if "context_logps" in inputs and not self._has_causal_kl and not self._warned_of_causal_kl:
            self._warned_of_causal_kl = True
            warnings.warn(
                f"{type(self).__name__}._compute_loss leaves out the second KL term, although the step drew colliders "
                "and scored contexts for it. Add `self.causal_kl_loss(model, inputs, per_token_logps)` to the loss it "
                "returns, or set `kappa=0`.",
                stacklevel=2,
            )
        return loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        # A copy: `_keep_for_loss` replaces an entry between TRL's forward and its loss.
        self._loss_inputs = inputs = dict(inputs)
        try:
            loss = super()._compute_loss(model, inputs)
            if "context_logps" not in inputs:
                return loss
            assert self._policy_logps is not None
            return loss + self.causal_kl_loss(model, inputs, self._policy_logps)
        finally:
            self._loss_inputs = self._policy_logps = None

    def clipped_reference(self, inputs: dict[str, Any], per_token_logps: torch.Tensor) -> torch.Tensor:
        """
        The reference's log-probabilities (B, T), held within `kl_clip` of the policy's. Where they are further away the
        difference of the two is a constant, so that the gradient of a KL term between them is 0.

        `_compute_loss` takes them. A subclass with a reference KL of its own takes them too, with `causal_kl_loss`.

        Args:
            inputs: what `_compute_loss` gets, with `ref_per_token_logps`.
            per_token_logps: (B, T) log-probabilities of the completions under q, with their gradient.
        """
        self._has_clipped = True
        clip, reference = self.args.kl_clip, inputs["ref_per_token_logps"]
        if clip is None:
            return reference
        difference = reference - per_token_logps
        if self.model.training:
            mask = self._loss_mask(inputs) != 0
            clipped = ((difference.detach().abs() > clip) & mask).sum()
            sums = torch.stack([clipped, mask.sum()]).float()
            self._metrics["train"]["reference_sums"].append(self.accelerator.reduce(sums, reduction="sum").tolist())
        return per_token_logps + difference.clamp(-clip, clip)

    def _loss_mask(self, inputs: dict[str, Any]) -> torch.Tensor:
        """(B, T): the tokens that count, as TRL has them."""
        mask = inputs["completion_mask"]
        return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask

    def causal_kl_loss(self, model: nn.Module, inputs: dict[str, Any], per_token_logps: torch.Tensor) -> torch.Tensor:
        """
        The second KL term of a micro-batch (eq. 12): kappa * k3 towards the causal reference, reduced and scaled for
        gradient accumulation as TRL's own loss is, to be added to it.

        `_compute_loss` adds it. A subclass whose `_compute_loss` does not call ours adds it itself, where
        `"context_logps" in inputs`: evaluation has no such term, nor has a run with `kappa=0`.

        Args:
            model: the model being trained, as `_compute_loss` gets it.
            inputs: what `_compute_loss` gets.
            per_token_logps: (B, T) log-probabilities of the completions under q, with their gradient.

        Returns:
            A scalar with gradient.
        """
        self._has_causal_kl = True
        logp = per_token_logps
        causal_logp = None
        if "context_ids" in inputs:  # the paper's form: pi_theta under x_i too, in a forward with its own gradient
            completion = inputs["completion_ids"], inputs["completion_mask"]
            causal_logp, _, _ = self._get_per_token_logps_and_entropies(
                model,
                torch.cat([inputs["context_ids"], completion[0]], dim=1),
                torch.cat([inputs["context_mask"], completion[1]], dim=1),
                completion[0].size(1),
            )
        mask = self._loss_mask(inputs)
        reduction = _REDUCTION[self.loss_type]
        accumulation = self.current_gradient_accumulation_steps
        scale: float = 1.0 / accumulation
        items = mask.sum()
        if reduction == "dapo":
            # The count spans the generation batch: bring it to one accumulation window of one process.
            items = inputs["num_items_in_batch"] / self.accelerator.num_processes
            items = items * accumulation / self.args.steps_per_generation
            scale = 1.0
        elif reduction == "bnpo":
            reduction = "dapo"  # over all unmasked tokens, those without a collider included
        counted = mask * inputs["has_collider"].unsqueeze(1)
        loss, metrics = gcpo_loss(
            logp,
            torch.zeros_like(logp[:, 0]),
            counted,
            old_logp=logp.detach(),
            causal_logp=causal_logp,
            query_logp=inputs.get("query_logps"),
            context_logp=inputs["context_logps"],
            context_weights=inputs["context_weights"],
            kappa=self.args.kappa,
            proj_floor=self.args.proj_floor,
            kl_clip=self.args.kl_clip,
            loss_type="dr_grpo" if reduction == "luspo" else reduction,
            max_completion_length=1 if reduction == "luspo" else self.max_completion_length,
            num_items_in_batch=items,
        )
        # Sums over the tokens of all processes, for `log` to divide: a micro-batch may hold no row that was scored.
        count = counted.sum().float()
        means = [metrics["kl_causal"], metrics["proj_clamped"]]
        means.append(metrics["kl_causal_clipped"] if self.args.kl_clip is not None else torch.zeros_like(count))
        sums = torch.stack([*(mean * count for mean in means), count])
        self._metrics["train"]["causal_sums"].append(self.accelerator.reduce(sums, reduction="sum").tolist())
        return loss * scale * inputs["causal_scale"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            kl_causal, proj_clamped, causal_clipped = self._means_of_sums("causal_sums", 3)
            (clipped,) = self._means_of_sums("reference_sums", 1)
            self._log("kl_causal", kl_causal)
            self._log("proj_clamped", proj_clamped)
            if self.args.kl_clip is not None:
                self._log("kl_causal_clipped", causal_clipped)
                self._log("kl_clipped", clipped)
        super().log(logs, start_time)

    def _means_of_sums(self, name: str, width: int) -> list[float]:
        """Means over all tokens since the last log, from sums whose last column counts tokens; NaN without any."""
        rows = torch.tensor(self._metrics["train"].pop(name, []), dtype=torch.float64).view(-1, width + 1)
        *sums, count = rows[~rows.isnan().any(dim=1)].sum(dim=0).tolist()
        return [value / count if count else math.nan for value in sums]

    def _log(self, name: str, value: torch.Tensor | float, mode: str = "train") -> None:
        """Log a metric of GCPO's own. NaN is the mean of no values: such a metric is left out."""
        value = float(value)
        if self.keeps_account and not math.isnan(value):
            self._metrics[mode].setdefault(f"gcpo/{name}", []).append(value)


def _checked_datasets(arguments: dict[str, Any]) -> dict[str, Any]:
    """The datasets among the trainer's arguments, with every prompt looked at, or to be when its row comes up."""
    train, held_out = arguments.get("train_dataset"), arguments.get("eval_dataset")
    checked = {"train_dataset": check_prompts(train, "`train_dataset`")}
    if isinstance(held_out, dict):
        named = {name: check_prompts(part, f"`eval_dataset[{name!r}]`") for name, part in held_out.items()}
        return checked | {"eval_dataset": named}
    return checked | {"eval_dataset": check_prompts(held_out, "`eval_dataset`")}


def _refuse_unsupported(arguments: dict[str, Any]) -> None:
    for name in ("tools", "environment_factory"):
        if arguments.get(name):
            raise ValueError(
                f"`{name}` must be None: GCPO shows candidates to the policy as plain text, which a conversation with "
                "tool calls is not. Use GRPOTrainer, or `kappa=0` with `estimator='none'`."
            )
    if isinstance(arguments.get("processing_class"), ProcessorMixin):
        raise ValueError("`processing_class` must be a tokenizer: GCPO shows candidates as text, without images.")
