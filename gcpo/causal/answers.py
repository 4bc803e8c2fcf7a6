"""What a policy answered, checked before it is used: one error that names the method and what it returned."""

from typing import Any

import torch

from gcpo.causal.port import Continuation, Ids, Policy, Reading, length_of


def checked_outputs(method: str, outputs: Any, count: int) -> list[Ids]:
    """`count` sequences of token ids."""
    if not hasattr(outputs, "__len__") or len(outputs) != count:
        got = len(outputs) if hasattr(outputs, "__len__") else type(outputs).__name__
        raise ValueError(f"`policy.{method}` must return {count} completions, one for each prompt, got {got}.")
    return outputs


def checked_pair(method: str, answer: Any) -> tuple[Any, Any]:
    """Two things."""
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise TypeError(f"`policy.{method}` must return a tuple of two, got {type(answer).__name__}.")
    return answer


def checked_scores(
    policy: Policy, method: str, logp: Any, z: Any, shape: tuple[int, ...] | None, lengths: list[int]
) -> None:
    """
    Log-probabilities of `shape` (None: not asked for) and representations (rows, H) of completions of `lengths` tokens,
    without NaN wherever there is a token, unless the policy allows it.
    """
    wanted: dict[str, tuple[Any, tuple[int, ...]]] = {"representations": (z, (len(lengths), policy.hidden_size))}
    if shape is not None:
        wanted["log-probabilities"] = (logp, shape)
    for name, (tensor, size) in wanted.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"`policy.{method}` must return {name} as a tensor, got {type(tensor).__name__}.")
        if tuple(tensor.shape) != size:
            raise ValueError(f"`policy.{method}` must return {name} of shape {size}, got {tuple(tensor.shape)}.")
    if policy.allows_nan:
        return
    if shape is not None and bool(logp.isnan().any()):
        raise ValueError(f"`policy.{method}` must return log-probabilities that are numbers, got NaN.")
    some = torch.tensor([length > 0 for length in lengths], device=z.device)
    if bool(z[some].isnan().any()):
        raise ValueError(f"`policy.{method}` must return representations that are numbers, got NaN.")


def checked_readings(policy: Policy, rows: list[Continuation], keep: bool = False) -> list[Reading]:
    """What `policy.read` says of these rows."""
    readings = policy.read(rows, keep)
    if not isinstance(readings, list) or len(readings) != len(rows):
        got = len(readings) if isinstance(readings, list) else type(readings).__name__
        raise ValueError(f"`policy.read` must return {len(rows)} readings, one for each row, got {got}.")
    for row, reading in zip(rows, readings, strict=True):
        z = reading.z[None] if isinstance(reading.z, torch.Tensor) else reading.z
        checked_scores(policy, "read", reading.logp, z, (len(row.ids) - 1,), [len(row.ids) - 1])
        kept = length_of(reading.own) if reading.own else 0
        if keep and kept != len(row.ids):
            raise ValueError(
                f"`policy.read` must return keys and values of {len(row.ids)} tokens with `keep=True`, got {kept}."
            )
    return readings
