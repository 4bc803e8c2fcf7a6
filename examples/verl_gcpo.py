"""
GCPO's loss for verl 0.9, in its registry of policy losses:

    PYTHONPATH=examples VERL_USE_EXTERNAL_MODULES=verl_gcpo GCPO_KAPPA=0.06 python -m verl.trainer.main_ppo \\
        actor_rollout_ref.actor.policy_loss.loss_mode=gcpo algorithm.adv_estimator=grpo ...

Alone, with advantages multiplied by `gcpo_kernels.causal_weights`, this is GCPO without its second KL term. The
registry hands a loss no more than log-probabilities, advantages and a mask. For the second KL, put the scores of each
response under its contexts into the batch, and let the actor use this module's `ppo_loss` in place of verl's:

    context_log_probs  (B, T, L) float, 0 behind a response's end; index 0 is the context x_i
    context_weights    (B, L) float, optional: weights of the mean over L
"""

import os
from contextvars import ContextVar
from typing import Any

import torch
from verl.trainer.ppo.core_algos import register_policy_loss

from gcpo_kernels import gcpo_loss

_SCORES: ContextVar[tuple[torch.Tensor, torch.Tensor | None] | None] = ContextVar("context scores", default=None)


@register_policy_loss("gcpo")
def gcpo_policy_loss(
    old_log_prob: torch.Tensor,  # (B, T)
    log_prob: torch.Tensor,  # (B, T)
    advantages: torch.Tensor,  # (B, T)
    response_mask: torch.Tensor,  # (B, T)
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,  # (B, T)
) -> tuple[torch.Tensor, dict[str, Any]]:
    """
    verl's "vanilla" loss, clipping and reductions included, plus kappa times the second KL where there are scores.

    Raises:
        ValueError: an unknown `loss_agg_mode`.
    """
    scores = _SCORES.get()
    reduction, scale = _reduction(loss_agg_mode, response_mask, config.global_batch_info)
    loss, metrics = gcpo_loss(
        log_prob,
        advantages,
        response_mask,
        old_logp=old_log_prob,
        context_logp=None if scores is None else scores[0],
        context_weights=None if scores is None else scores[1],
        kappa=0.0 if scores is None else float(os.environ.get("GCPO_KAPPA", "0.06")),
        epsilon_low=config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low,
        epsilon_high=config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high,
        delta=config.get("clip_ratio_c", 3.0),
        importance_sampling_ratio=rollout_is_weights,
        **reduction,
    )
    names = {"clip_low": "pg_clipfrac_low", "clip_high": "pg_clipfrac_high", "kl_causal": "kl_causal"}
    return loss * scale, {f"actor/{name}": metrics[key].item() for key, name in names.items()}


def _reduction(mode: str, mask: torch.Tensor, info: dict[str, Any]) -> tuple[dict[str, Any], float | torch.Tensor]:
    """verl's reduction as options of `gcpo_loss`, and a factor for what those divide by otherwise."""
    devices, rows = info.get("dp_size") or 1, len(mask)
    if mode == "token-sum":
        return {"loss_type": "dapo", "num_items_in_batch": 1}, devices
    if mode == "token-mean":
        return {"loss_type": "dapo", "num_items_in_batch": info.get("batch_num_tokens") or mask.sum()}, devices
    filled = info.get("global_batch_size") or (mask.sum(1) > 0).sum().clamp(min=1)
    if mode == "seq-mean-token-mean":
        return {"loss_type": "grpo"}, devices * rows / filled
    if mode == "seq-mean-token-sum":
        return {"loss_type": "dr_grpo", "max_completion_length": 1}, devices * rows / filled
    if mode == "seq-mean-token-sum-norm":
        length = info.get("loss_scale_factor") or mask.shape[1]
        return {"loss_type": "dr_grpo", "max_completion_length": length}, devices * rows / filled
    raise ValueError(f"`loss_agg_mode` must be one of verl's token-* and seq-mean-* modes, got {mode!r}.")


def ppo_loss(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> tuple[torch.Tensor, dict[str, Any]]:
    """verl's actor loss, with `context_log_probs` of the batch, where it has them, handed on to the loss above."""
    from verl.workers.utils.losses import ppo_loss as verl_ppo_loss

    if "context_log_probs" not in data:
        return verl_ppo_loss(config, model_output, data, dp_group)
    names = [name for name in ("context_log_probs", "context_weights") if name in data]
    found = data.select(*names).to_padded_tensor()
    token = _SCORES.set((found["context_log_probs"], found.get("context_weights", None)))
    try:
        return verl_ppo_loss(config, model_output, data, dp_group)
    finally:
        _SCORES.reset(token)
