"""Representations z of completions, taken from hidden states inside the forward that computes them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


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
