"""The policy's own forward, with gradient, in which a prompt that several rows of a batch have is read once."""

from typing import Any, NamedTuple

import torch
from transformers import DynamicCache


class SharedForward(NamedTuple):
    logps: torch.Tensor  # (B, T)
    entropies: torch.Tensor | None  # (B, T)
    tokens: torch.Tensor  # how many passed through the model


def repeats_prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor, width: int) -> bool:
    """Whether two rows begin with the same `width` columns, of more than one token."""
    prompts = torch.cat([input_ids[:, :width], attention_mask[:, :width]], dim=1)
    return width > 1 and len(torch.unique(prompts, dim=0)) < len(prompts)


def logps_sharing_prompts(
    model: Any,
    config: Any,  # the model's own: what wraps it may have another
    input_ids: torch.Tensor,  # (B, P + T): prompts padded on the left, completions on the right
    attention_mask: torch.Tensor,  # (B, P + T)
    logits_to_keep: int,  # T
    compute_entropy: bool,
) -> SharedForward:
    """
    Log-probabilities of completions with gradient. Prompts go through the model once each, less their last token; every
    row then goes on from their keys and values, through which the gradients of all of them come back.
    """
    width = input_ids.shape[1] - logits_to_keep
    prompts = torch.cat([input_ids[:, :width], attention_mask[:, :width]], dim=1)
    distinct, place = torch.unique(prompts, dim=0, return_inverse=True)
    stems, stem_mask = distinct[:, : width - 1], distinct[:, width : 2 * width - 1]
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = DynamicCache(config=config)
    model(
        input_ids=stems,
        attention_mask=stem_mask,
        position_ids=(stem_mask.cumsum(dim=1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_select_indices(place)
    labels = torch.full_like(input_ids[:, width - 1 :], -100)
    labels[:, :-1] = input_ids[:, width:].masked_fill(attention_mask[:, width:] == 0, -100)
    output = model(
        input_ids=input_ids[:, width - 1 :],
        attention_mask=attention_mask,
        position_ids=positions[:, width - 1 :],
        past_key_values=cache,
        shift_labels=labels,
        fused_lm_head=True,
    )
    entropies = output.entropy[:, :-1] if compute_entropy else None
    return SharedForward(output.log_probs[:, :-1], entropies, stem_mask.sum() + attention_mask[:, width - 1 :].sum())
