"""GCPOTrainer: TRL's GRPOTrainer with causal weights on the advantages and a second KL term."""

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from trl import GRPOTrainer

from gcpo._trl import (
    check_version,
    disable_gradient_checkpointing,
    get_config_model_id,
    refuse_wrapped_head,
)
from gcpo.causal.contexts import PromptBuilder
from gcpo.causal.port import CausalTerms, Prompt, Rollout
from gcpo.causal.step import CausalStep
from gcpo.config import GCPOConfig
from gcpo.forward.trl_policy import TrlPolicy
from gcpo.own_loss import OwnLossTrainer
from gcpo.run.admission import check_datasets, check_model, refuse_unsupported
from gcpo.run.guard import SkipNonFiniteSteps
from gcpo.run.lengths import check_prompt_lengths
from gcpo.run.overlap import against_overlap, beside
from gcpo.run.processes import check_processes_agree, explained_loss_of_process, explained_server

_OWN_ARGUMENTS = ("self", "model", "reward_funcs", "args")
# Columns of TRL's completions table, whose `advantage` is B = A * Upsilon.
WEIGHT_COLUMNS = ("plain_advantage", "upsilon")


class GCPOTrainer(OwnLossTrainer):
    """
    Trainer for Group Causal Policy Optimization (GCPO, https://huggingface.co/papers/2508.05428).

    Takes exactly [`~trl.GRPOTrainer`]'s arguments, with `args` a [`GCPOConfig`]. Every training step adds to GRPO's:

    1. integrated answers (colliders), which the policy writes after seeing all candidates of a prompt;
    2. representations of candidates and colliders, from forwards that also score them;
    3. advantages multiplied by the causal weight Upsilon (eq. 11), a constant;
    4. scores of the candidates under the contexts x_{i,l}, from which `gcpo_kernels.gcpo_loss` forms the causal
       reference and a second KL term, kappa * k3 (eqs. 10, 12, 13), added to TRL's own loss.

    With `kappa=0` and `estimator="none"` it is GRPOTrainer, and logs and writes what that does (checkpoints hold one
    file more, for exact resuming), unless `keeps_account` is set to True. Evaluation reports GRPO's metrics; the causal
    parts run in training only.
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
    _rollout: Rollout | None = None  # the one that is going on, in training with the causal parts on
    _causal: CausalStep | None = None  # with the causal parts on
    _collider_ids: list[list[list[int]]] | None = None  # of the last rollout's prompts

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
            refuse_unsupported(kwargs)
            kwargs |= check_datasets(kwargs)
        size = len(kwargs["train_dataset"]) if hasattr(kwargs.get("train_dataset"), "__len__") else None
        check_processes_agree(args, train_dataset_size=size)
        with explained_server(args, model):
            super().__init__(model, reward_funcs, args=args, **kwargs)
        refuse_wrapped_head(self.model)
        self.add_callback(SkipNonFiniteSteps(self._log))
        self.max_positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._policy = TrlPolicy(self)
        check_model(self, self._policy)
        if args.overlap_rewards and (reason := against_overlap(args, self._policy.gathers_weights)):
            raise ValueError(f"`overlap_rewards` must be False: {reason}.")
        self._decide_on_own_loss()
        if args.is_causal:  # without, it builds no prompts, and asks no more of the tokenizer than GRPOTrainer
            builder = PromptBuilder(self._tokenizer, args, self.chat_template, self.chat_template_kwargs)
            self._causal = CausalStep(self._policy, args, builder)
            check_prompt_lengths(self, builder, self._causal.parallel)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with explained_loss_of_process(self.args.ddp_timeout):
            return super().train(*args, **kwargs)

    @property
    def generation_limit(self) -> int | None:
        """Most tokens of a candidate: `max_completion_length`, unless `generation_kwargs` says otherwise."""
        return self._policy.max_completion_length

    # -----------------------------------------------------------------------------------------------------------------
    # A rollout
    # -----------------------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not (self.args.is_causal and self.model.training):
            if self.args.uses_weights:  # rows of the completions table whose columns only training fills
                for column in WEIGHT_COLUMNS:
                    self._log_completion_extra(column, [None] * len(inputs))
            return super()._generate_and_score_completions(inputs)
        with self._policy.watching_scores() as recorder:
            output = super()._generate_and_score_completions(inputs)
        rollout, self._rollout = self._rollout, None
        assert rollout is not None
        rollout.inputs = inputs
        z = None
        # Where TRL scores the rollout under the policy itself, its pass gives the representations too; a PEFT reference
        # pass over the same model comes after. It hides truncated completions when they are masked: then it is no use.
        scored = recorder.rows and "old_per_token_logps" in output and not self.mask_truncated_completions
        if rollout.states is None and scored:
            z = recorder.result()[: len(rollout.prompts)]
        with torch.no_grad(), self._scoring():
            terms = self.causal_terms(rollout, output["completion_ids"].size(1), output.get("old_per_token_logps"), z)
        self._collider_ids = [group.colliders for group in terms.groups]
        self._take(terms, output)
        return output

    def causal_terms(
        self, rollout: Rollout, length: int, query_logp: torch.Tensor | None, z: torch.Tensor | None
    ) -> CausalTerms:
        """The causal step of a rollout; arguments as for [`~gcpo.CausalStep.terms`]. Override it to look at them."""
        assert self._causal is not None
        return self._causal.terms(rollout, length, query_logp, z)

    def _take(self, terms: CausalTerms, output: dict[str, Any]) -> None:
        """Put the causal terms among what TRL shuffles and splits, and into its completions table."""
        advantages = output["advantages"]
        if terms.upsilon is not None:
            output["advantages"] = terms.weigh(advantages)
            # TRL has logged A already; the completions table shows B = A * Upsilon, and Upsilon in its own column.
            upsilon, logged = terms.upsilon.tolist(), self._logs["advantages"]
            plain = [logged.pop() for _ in range(min(len(upsilon), len(logged)))][::-1]
            logged.extend(a * u for a, u in zip(plain, upsilon[-len(plain) :], strict=True))
            for column, values in zip(WEIGHT_COLUMNS, (plain, upsilon), strict=True):
                self._logs["extra"][column].extend(values)
        if terms.kl is not None:
            output["context_logps"], output["context_weights"] = terms.kl.context_logp, terms.kl.context_weights
            output["has_collider"], output["plain_advantages"] = terms.kl.counted, advantages
            output["causal_scale"] = torch.tensor(terms.kl.scale, device=self.accelerator.device)
            if terms.kl.query_logp is not None:
                output["query_logps"] = terms.kl.query_logp
        if terms.first_contexts is not None:
            output["context_ids"], output["context_mask"] = self._policy.pad(terms.first_contexts, "left")

    def _generate(self, prompts: list[Prompt]) -> tuple:
        if self._causal is None or not self.model.training:
            return super()._generate(prompts)
        with self._policy.staying_awake():
            with self._policy.watching_generation() as states:
                result = super()._generate(prompts)
            rollout = Rollout(prompts, result[0], result[1], states.pop() if states else None)
            with torch.no_grad(), self._scoring():
                rollout.drawing = self._causal.draw_colliders(rollout)
                if not self.args.overlap_rewards:
                    with self._policy.phase("colliders"):
                        rollout.drawing.decode()
        self._rollout = rollout
        return result

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple:
        call = super()._generate_single_turn
        if not self.args.is_causal:
            return call(prompt_ids, *args, **kwargs)
        return self._policy.generate_watched(call, prompt_ids, *args, **kwargs)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        call = super()._calculate_rewards
        with self._decoding_colliders():
            rewards = call(inputs, prompts, completions, completion_ids_list)
        if not self.args.is_causal:
            return rewards
        # An infinite reward would make its group's mean, and then its advantages, infinite: no reward, as NaN is.
        rewards = torch.where(torch.isfinite(rewards), rewards, torch.nan)
        mode = "train" if self.model.training else "eval"
        n = self.num_generations if mode == "train" else self.num_generations_eval
        lost = rewards.isnan().all(dim=1).view(-1, n).all(dim=1)
        self._log("groups_without_reward", lost.float().mean(), mode)
        return rewards

    @contextmanager
    def _decoding_colliders(self) -> Iterator[None]:
        """With `overlap_rewards`: colliders are decoded inside, in a thread of their own."""
        if not (self.args.overlap_rewards and self.model.training and self._rollout is not None):
            yield
            return
        self._policy.alone = True
        try:
            # What the rewards take is theirs: the phase is what is waited for colliders beyond it.
            with (
                self._scoring(),
                self._policy.phase("colliders"),
                beside(self._rollout.drawing.decode, self.accelerator.device),
            ):
                yield
        finally:
            self._policy.alone = False

    def _scoring(self) -> AbstractContextManager[Any]:
        """For forwards that keep keys and values."""
        return disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)

    def _collider_texts(self) -> list[list[str]] | None:
        if self._collider_ids is None:
            return super()._collider_texts()
        return [self._tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in self._collider_ids]
