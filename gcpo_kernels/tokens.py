"""The tensors of a loss call, named in one place: the public functions collect them, operators hand them on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class TokenInputs(NamedTuple):
    """
    What the objective needs of each token beside the policy's log-probability.

    As the public functions collect them, tensors have any strides, any floating type and garbage where the mask is 0.
    `clean` makes them alike: of one leading shape, (B, T) or (N,), and one type, with 0 at masked positions.
    """

    mask: torch.Tensor  # (B, T) bool, int or float
    advantages: torch.Tensor  # (B,) or (B, T)
    old_logp: torch.Tensor | None = None  # (B, T); None: the policy itself, detached
    ref_logp: torch.Tensor | None = None  # (B, T)
    query_logp: torch.Tensor | None = None  # (B, T); None: old_logp
    causal_logp: torch.Tensor | None = None  # (B, T), the only one that carries gradient; None: the policy itself
    importance_sampling_ratio: torch.Tensor | None = None  # (B,), (B, 1) or (B, T)
    context_logp: torch.Tensor | None = None  # (B, T, L)
    context_weights: torch.Tensor | None = None  # (L,) or (B, L); clean, (B, T, L)
    policy_weights: torch.Tensor | None = None  # (B,), (B, 1) or (B, T); `maths.fold_weights` folds them in
    kappa_weights: torch.Tensor | None = None  # (B,) or (B, T)
    sampler_log: torch.Tensor | None = None  # (B, T), of `maths.fold_weights`: logs that vespo sums

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "TokenInputs":
        """The same with `function` applied to every tensor that is there."""
        return TokenInputs(*(None if x is None else function(x) for x in self))  # type: ignore[arg-type]

    def take(self, index: Any) -> "TokenInputs":
        """The same at `index` of the leading dimension."""
        return self.map(lambda x: x[index])

    def flatten(self) -> "TokenInputs":
        """(B, T, ...) -> (B * T, ...)."""
        return self.map(lambda x: x.flatten(0, 1))

    def constants(self) -> "TokenInputs":
        """The same without gradients, but for `causal_logp`."""
        return self.map(torch.Tensor.detach)._replace(causal_logp=self.causal_logp)

    def clean(self, dtype: torch.dtype) -> "TokenInputs":
        """Broadcast to (B, T), of type `dtype`, and 0 where the mask is 0: garbage there reaches no arithmetic."""
        keep = self.mask != 0

        def filled(name: str, x: torch.Tensor | None) -> torch.Tensor | None:
            if x is None:
                return None
            if name == "context_weights":
                x = x.unsqueeze(-2)
            elif x.dim() == 1:
                x = x.unsqueeze(1)
            return torch.where(keep.unsqueeze(-1) if name.startswith("context") else keep, x.to(dtype), 0.0)

        named = zip(self._fields[1:], self.constants()[1:], strict=True)
        return TokenInputs(keep, *(filled(name, x) for name, x in named))  # type: ignore[arg-type]
