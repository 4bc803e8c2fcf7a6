"""Representations z of completions, and the causal weights Upsilon made of them (eq. 11)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gcpo.config import GCPOConfig
from gcpo_kernels import causal_weights
from gcpo_kernels.reference import context_difference


class HiddenRecorder:
    """
    Reduces the last layer's hidden states (after the final norm: what the output layer reads) to one vector per
    completion, inside the forward that computes them, so that no (rows, length, H) tensor outlives it.

    Args:
        representation: "last", the state of the completion's last token, or "mean", the mean over its tokens.
        mask: (rows, length), which tokens are the completion's. None: what the model's attention mask says.
    """

    def __init__(self, representation: str, mask: torch.Tensor | None = None):
        self.representation = representation
        self.mask = mask
        self.rows: list[torch.Tensor] = []

    @contextmanager
    def attached(self, backbone: nn.Module, completion_length: int) -> Iterator[None]:
        """While active, every forward of `backbone` adds its rows; the last `completion_length` columns count."""

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            mask = kwargs["attention_mask"] if self.mask is None else self.mask
            mask = mask[:, -completion_length:]
            hidden = output.last_hidden_state[:, -completion_length:]
            self.rows.append(represent(hidden, mask, self.representation))

        handle = backbone.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def result(self) -> torch.Tensor:
        """(rows, H) float32, in the order of the forwards."""
        return torch.cat(self.rows)


class BranchRecorder:
    """`HiddenRecorder` for a packed row: one vector per branch, from the places of its completion's tokens."""

    def __init__(self, representation: str, completions: list[torch.Tensor]):
        self.representation = representation
        self.completions = completions
        self.rows: list[torch.Tensor] = []

    @contextmanager
    def attached(self, backbone: nn.Module) -> Iterator[None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output.last_hidden_state[0]
            for places in self.completions:
                every = torch.ones(1, len(places), dtype=torch.long, device=hidden.device)
                self.rows.append(represent(hidden[places][None], every, self.representation)[0])

        handle = backbone.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def result(self) -> torch.Tensor:
        """(branches, H) float32."""
        return torch.stack(self.rows)


def represent(hidden: torch.Tensor, mask: torch.Tensor, representation: str) -> torch.Tensor:
    """
    z of each row, (rows, H) float32, from hidden (rows, T, H) and mask (rows, T).

    NaN for a row without tokens: it has no representation, and the weights that would depend on it fall back.
    """
    count = mask.sum(dim=1)
    if representation == "last":
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask != 0, positions, -1).amax(dim=1).clamp(min=0)
        z = hidden[torch.arange(len(hidden), device=hidden.device), last].float()
    else:
        z = torch.where((mask != 0).unsqueeze(-1), hidden, 0.0).sum(dim=1, dtype=torch.float32)
        z = z / count.clamp(min=1).unsqueeze(1)
    return torch.where((count > 0).unsqueeze(1), z, torch.nan)


def estimate_weights(
    config: GCPOConfig,
    z: torch.Tensor,  # (P, n, H)
    collider_z: torch.Tensor | None,  # (P, L, H), for "loo"
    context_z: torch.Tensor | None,  # (P, n, L, m, H), for "scored" (m = 1) and "sampled"
    collider_mask: torch.Tensor,  # (P, L) bool, colliders that say anything; those come first
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    Upsilon (P, n), with 1 where it is undefined, and metrics about it.

    "loo" reads Zbar_i as the mean of what context x_{i,0} shows, the other candidates and c_0, and Zprime_i as the
    same with the collider averaged out: their difference is (z_{c_0} - mean_l z_{c_l}) / n. "scored" takes y_i's own
    representation under each context, "sampled" those of fresh outputs.
    """
    p, n, hidden = z.shape
    if config.estimator == "loo":
        assert collider_z is not None
        samples = (collider_z / n)[:, None, :, None, :].expand(p, n, -1, 1, hidden)
    else:
        assert context_z is not None
        samples = context_z
    mask = collider_mask[:, None, :, None].expand(samples.shape[:4])
    baseline = config.baseline or "mean"
    upsilon = causal_weights(
        z, samples, alpha=config.alpha, baseline=baseline, similarity=config.similarity, context_mask=mask
    )
    defined = torch.isfinite(upsilon)
    zbar = z.mean(dim=1, keepdim=True)
    difference = context_difference(samples, mask)
    cosine = torch.cosine_similarity(difference, zbar.expand_as(difference), dim=-1)
    ratio = difference.norm(dim=-1) / zbar.norm(dim=-1).clamp(min=1e-12)
    metrics = {
        "upsilon/fallback": (~defined).float().mean(),
        "upsilon/near_zero": (upsilon[defined].abs() < 0.1).float().mean(),
        "upsilon/mean": upsilon[defined].mean(),
        "upsilon/std": upsilon[defined].std(unbiased=False),
        "upsilon/min": upsilon[defined].min() if defined.any() else upsilon.new_tensor(torch.nan),
        "upsilon/max": upsilon[defined].max() if defined.any() else upsilon.new_tensor(torch.nan),
        "projection/cosine": cosine.nanmean(),
        "projection/norm_ratio": ratio.nanmean(),
    }
    return torch.where(defined, upsilon, 1.0), metrics
