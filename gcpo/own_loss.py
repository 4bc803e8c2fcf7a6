"""
The loss phase of the trainer, as `fused_loss` and `padding_free` have it: the policy's loss from hidden states
(`gcpo_kernels.linear_gcpo_loss`), from rows without padding that read a prompt once. With both off it is TRL's.
"""

from contextlib import nullcontext
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn

from gcpo._trl import maybe_gather_lm_head_ctx
from gcpo.config import GCPOConfig
from gcpo.forward.microbatches import regrouped
from gcpo.forward.output_layer import add_reader, logit_options
from gcpo.forward.own_forward import OwnForward, Rows, against_unpadded
from gcpo.kl_terms import KLTermsTrainer
from gcpo_kernels.options import LossOptions

logger = get_logger(__name__)


class OwnLossTrainer(KLTermsTrainer):
    """
    Attributes:
        fuses_loss: whether the loss is made from hidden states, instead of by TRL's `_compute_loss`.
        leaves_padding_out: whether the policy's rows, and those that TRL scores, are packed.
        own_forward: makes the forwards of both; None where neither holds.
    """

    fuses_loss = False
    leaves_padding_out = False
    _policy: Any  # a TrlPolicy
    own_forward: OwnForward | None = None
    # What forwards of a loss gave that TRL's `_compute_loss` is to take, in the order in which it asks.
    _given_scores: list[tuple] | None = None

    def _decide_on_own_loss(self) -> None:
        """Find out which of the two options hold, and prepare the models for them."""
        against_fused = against_fused_loss(self) or self._against_its_objective()
        found = {"fused_loss": against_fused, "padding_free": against_padding_free(self)}
        self.fuses_loss, self.leaves_padding_out = (self._holds(name, reason) for name, reason in found.items())
        if not (self.fuses_loss or self.leaves_padding_out):
            return
        in_float32 = self.args.cast_lm_head_to_fp32
        for model in (self.model, self.ref_model):
            if model is not None:
                add_reader(causal_lm(self, model), in_float32, maybe_gather_lm_head_ctx)
        model = causal_lm(self, self.model)
        head = {"temperature": self.temperature, **logit_options(model.config.get_text_config())}
        self.own_forward = OwnForward(
            model, head, self._tokenizer.pad_token_id, self.accelerator.autocast, lambda called: causal_lm(self, called)
        )

    def _against_its_objective(self) -> str | None:
        """What of this class or of its options our loss does not have, in words; None: nothing."""
        for name in _PARTS_OF_THE_LOSS:
            if getattr(type(self), name) is not getattr(OwnLossTrainer, name):
                return f"`{type(self).__name__}.{name}` changes a part of the loss that would not be called"
        try:
            LossOptions(**self._objective)
        except (TypeError, ValueError) as error:  # values that TRL does not look at
            return str(error).removesuffix(".")
        return None

    def _holds(self, name: str, reason: str | None) -> bool:
        if getattr(self.args, name) is None and self.args.is_causal and reason is not None:
            logger.warning(f"`{name}` is off: {reason}.", main_process_only=True)
        return holds(self.args, name, reason)

    # -----------------------------------------------------------------------------------------------------------------
    # Micro-batches
    # -----------------------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        buffered = self._buffered_inputs
        if (
            not (self.leaves_padding_out and self.model.training)
            or buffered is before
            or loss_is_of_its_rows(self.args)
        ):
            return inputs
        self._buffered_inputs = regrouped(buffered, self.args.gradient_accumulation_steps)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    # -----------------------------------------------------------------------------------------------------------------
    # Forwards
    # -----------------------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple:
        if self._given_scores:
            return self._keep_for_loss(self._given_scores.pop(0))
        if not self.leaves_padding_out:
            call = super()._get_per_token_logps_and_entropies
            with self._policy.watched(model, logits_to_keep):
                result = call(model, input_ids, attention_mask, logits_to_keep, batch_size, *args, **kwargs)
            return self._keep_for_loss(result)
        # TRL's own scoring passes have a phase; a forward with gradient is part of the loss.
        with nullcontext() if torch.is_grad_enabled() else self._account.phase("scoring"):
            return self._keep_for_loss(self._scores(model, input_ids, attention_mask, logits_to_keep, batch_size))

    def _scores(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        width: int,
        batch_size: int | None,
    ) -> tuple:
        """What TRL's method returns, from packed rows: `batch_size` completions in each forward."""
        assert self.own_forward is not None
        recorder, size, parts = self._policy.recorder_of(model), batch_size or len(input_ids), []
        for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            rows = self.own_forward.rows(ids, mask, width, without_padding=True)
            kind = None if recorder is None else self.args.representation
            scores, z = self.own_forward.score(model, rows, ids[:, -width:], mask[:, -width:], kind)
            self._count_read(rows)
            if recorder is not None:
                recorder.rows.append(z)
            parts.append(scores)
        logp, entropy = (torch.cat(each) for each in zip(*parts, strict=True))
        return logp, entropy, None

    def _count_read(self, rows: Rows) -> None:
        if not torch.is_grad_enabled():
            self._account.add_tokens("scored_query", rows.tokens)
            return
        self._account.add_tokens("trained", rows.tokens)
        self._account.add_tokens("trained_padding", rows.padding)

    # -----------------------------------------------------------------------------------------------------------------
    # The loss
    # -----------------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        if not self.fuses_loss:
            return super()._compute_loss(model, inputs)
        assert self.own_forward is not None
        completion_ids, completion_mask = inputs["completion_ids"], inputs["completion_mask"]
        width = completion_ids.size(1)
        under_contexts = self._logps_under_contexts(model, inputs)
        rows = self.own_forward.rows(
            torch.cat([inputs["prompt_ids"], completion_ids], dim=1),
            torch.cat([inputs["prompt_mask"], completion_mask], dim=1),
            width,
            self.leaves_padding_out,
        )
        items, scale = self._reduction(inputs)
        loss, scores = self.own_forward.loss(
            model,
            rows,
            completion_ids,
            inputs["advantages"],
            self._loss_mask(inputs),
            num_items_in_batch=items,
            causal_logp=under_contexts,
            **self._loss_options(inputs),
        )
        self._count_read(rows)
        # TRL's own loss and that of the second KL, of the same log-probabilities: for their metrics.
        self._given_scores = [(scores.logp, scores.entropy, None)]
        if under_contexts is not None:
            self._given_scores.append((under_contexts.detach(), None, None))
        try:
            with torch.no_grad():
                super()._compute_loss(model, inputs)
        finally:
            self._given_scores = None
        return loss * scale

    @property
    def _objective(self) -> dict[str, Any]:
        """The options of `LossOptions` that are the same for every micro-batch."""
        args = self.args
        return {
            "beta": self.beta,
            "kappa": args.kappa,
            "bias_correction_kl": args.use_bias_correction_kl,
            "kl_clip": args.kl_clip,
            "proj_floor": args.proj_floor,
            "epsilon_low": self.epsilon_low,
            "epsilon_high": self.epsilon_high,
            "delta": args.delta,
            "importance_sampling_level": self.importance_sampling_level,
            "loss_type": self.loss_type,
            "max_completion_length": self.max_completion_length,
            **{name: getattr(args, name) for name in _GATES},
        }

    def _loss_options(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Options of `linear_gcpo_loss`, from TRL's and ours and what a micro-batch holds."""
        # Estimates of the log-probabilities, for speed alone, the nearest first.
        names = ["sampling_per_token_logps", "old_per_token_logps"]
        if self.args.kl_target == "projection":  # of another target they are not the policy's, nor those of all rows
            names.append("query_logps")
        estimates = map(inputs.get, names)
        options: dict[str, Any] = {
            **self._objective,
            "old_logp": inputs.get("old_per_token_logps"),
            "importance_sampling_ratio": inputs.get("importance_sampling_ratio"),
            "ref_logp": inputs.get("ref_per_token_logps") if self.beta != 0.0 else None,
            "offset_logp": next((x for x in estimates if x is not None), None),
        }
        if "context_logps" not in inputs:
            return options | {"kappa": 0.0}
        return options | {
            "context_logp": inputs["context_logps"],
            "context_weights": inputs["context_weights"],
            "query_logp": inputs.get("query_logps"),
            "kappa_weights": inputs["has_collider"] * inputs["causal_scale"],
        }


# Options of TRL's that single loss types have, by the names that `gcpo_loss` has for them too.
_GATES = "sapo_temperature_pos sapo_temperature_neg vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg".split()


# What a subclass may change of the loss without writing one of its own.
_PARTS_OF_THE_LOSS = "_get_per_token_logps_and_entropies causal_kl_loss clipped_reference get_gamma_weights".split()


def loss_is_of_its_rows(args: GCPOConfig) -> bool:
    """
    Whether a micro-batch's loss depends on which rows share it: one that is divided by its own tokens, an entropy
    bonus, which is the mean over them, and a quantile of theirs.
    """
    bonus = args.use_adaptive_entropy or args.entropy_coef != 0.0
    return args.loss_type == "bnpo" or bonus or args.top_entropy_quantile < 1.0


def holds(args: GCPOConfig, name: str, reason: str | None) -> bool:
    """
    Whether a run has `fused_loss` or `padding_free`.

    Args:
        args: of the run.
        name: of the option.
        reason: what stands against it, in words; None: nothing does.

    Raises:
        ValueError: the option is True, and something stands against it.
    """
    wanted = getattr(args, name)
    if wanted and reason is not None:
        raise ValueError(f"`{name}` must be False or None: {reason}.")
    return reason is None and (args.is_causal if wanted is None else wanted)


def causal_lm(trainer: Any, model: Any) -> Any:
    """The causal language model of transformers inside what wraps it."""
    model = trainer.accelerator.unwrap_model(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def against_fused_loss(trainer: Any) -> str | None:
    """What keeps the loss from being made from hidden states, in words; None: nothing does."""
    args = trainer.args
    for name, off in (("entropy_coef", 0.0), ("use_adaptive_entropy", False), ("top_entropy_quantile", 1.0)):
        if getattr(args, name) != off:
            return f"`{name}={getattr(args, name)}` needs the gradient of the entropy, or a look at all of it first"
    if args.off_policy_mask_threshold is not None:
        return "`off_policy_mask_threshold` needs every log-probability of a completion before its loss"
    return _against_both(trainer)


def against_padding_free(trainer: Any) -> str | None:
    """What keeps the policy's rows from being packed, in words; None: nothing does."""
    models = (trainer.model, trainer.ref_model)  # a reference may have an attention implementation of its own
    reasons = (against_unpadded(causal_lm(trainer, model)) for model in models if model is not None)
    return _against_both(trainer) or next((reason for reason in reasons if reason), None)


def _against_both(trainer: Any) -> str | None:
    model = causal_lm(trainer, trainer.model)
    adapter = getattr(trainer.accelerator.unwrap_model(trainer.model), "active_peft_config", None)
    head = model.get_output_embeddings()
    if trainer.args.torch_compile:
        return "`torch_compile` would compile anew for every batch"
    if trainer._is_vlm:
        return "images and other inputs beside tokens are for TRL's forward"
    if trainer.aux_loss_enabled:
        return "`router_aux_loss_coef` adds a loss of the router's, which counts padding and prompts as TRL reads them"
    if adapter is not None and adapter.is_prompt_learning:
        return f"the adapter ({adapter.peft_type.value}) puts tokens of its own before every row"
    if not getattr(head, "weight", torch.empty(0, dtype=torch.long)).is_floating_point():
        return f"the output layer ({type(head).__name__}) has no weight of a floating type"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "the model is spread over devices (`device_map`)"
    return None
