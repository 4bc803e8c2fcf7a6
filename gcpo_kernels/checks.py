"""Checks of tensor arguments: every message names the argument, what it got and what it wants."""

from typing import Any

import torch


def check_tensor(
    name: str,
    x: Any,
    *,
    shapes: tuple[tuple[int, ...], ...] = (),
    wanted: str = "",
    floating: bool = True,
    like: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    `x`, once it is known to be a tensor of one of `shapes` (described by `wanted`), floating or not as asked, on the
    device of `like`.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(x).__name__}.")
    if floating and x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"`{name}` must be float32, bfloat16, float16 or float64, got {x.dtype}.")
    if shapes and tuple(x.shape) not in shapes:
        raise ValueError(f"`{name}` must have shape {wanted}, got {tuple(x.shape)}.")
    if like is not None and x.device != like.device:
        raise ValueError(f"`{name}` must be on {like.device}, got {x.device}.")
    return x


def check_rank(name: str, x: Any, ranks: tuple[int, ...], wanted: str) -> torch.Tensor:
    check_tensor(name, x)
    if x.dim() not in ranks:
        raise ValueError(f"`{name}` must have shape {wanted}, got {tuple(x.shape)}.")
    return x


def check_ids(name: str, x: Any, shape: tuple[int, ...], wanted: str, like: torch.Tensor) -> torch.Tensor:
    check_tensor(name, x, floating=False, like=like)
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"`{name}` must be int64, got {x.dtype}.")
    if tuple(x.shape) != shape:
        raise ValueError(f"`{name}` must have shape {wanted} = {shape}, got {tuple(x.shape)}.")
    return x.long()


def check_mask(name: str, x: Any, shape: tuple[int, ...], wanted: str, like: torch.Tensor) -> torch.Tensor:
    check_tensor(name, x, floating=False, like=like)
    if x.is_complex():
        raise TypeError(f"`{name}` must be bool, integer or float, got {x.dtype}.")
    if tuple(x.shape) != shape:
        raise ValueError(f"`{name}` must have shape {wanted} = {shape}, got {tuple(x.shape)}.")
    return x
