"""Which backend runs a call, and in which type its matrix products are done."""

import torch

from gcpo_kernels.options import check_choice

try:
    import triton

    from gcpo_kernels.triton_backend import ops as triton_ops

    _INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:  # no Triton on this platform: the torch backend does everything
    triton_ops = None  # type: ignore[assignment]
    _INTERPRETED = False


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """
    Backends that run on tensors of `device`, the one that `backend=None` chooses first.

    "triton" runs on CUDA, ROCm and XPU tensors, and on CPU tensors where `TRITON_INTERPRET=1` was set before the
    import (for tests: it is slow, and never chosen by itself).
    """
    kind = torch.device(device).type
    if triton_ops is not None and kind in ("cuda", "xpu"):
        return ("triton", "torch")
    if triton_ops is not None and kind == "cpu" and _INTERPRETED:
        return ("torch", "triton")
    return ("torch",)


def use_triton(backend: str | None, *tensors: torch.Tensor | None, storage: torch.dtype | None = None) -> bool:
    """
    Whether the Triton backend runs this call, whose products round operands to `storage`. One that was asked for by
    name runs it or raises.
    """
    given = [x for x in tensors if x is not None]
    if backend is None:
        return available_backends(given[0].device)[0] == "triton" and all(x.dtype != torch.float64 for x in given)
    check_choice("backend", backend, ("triton", "torch"))
    available = available_backends(given[0].device)
    if backend not in available:
        raise ValueError(
            f"`backend` {backend!r} does not run on {given[0].device} tensors here; available: {available}."
        )
    if backend == "triton" and any(x.dtype == torch.float64 for x in given):
        raise TypeError("`backend` 'triton' takes float32, bfloat16 and float16, got float64: use 'torch'.")
    types = [storage, *(x.dtype for x in given)]
    if backend == "triton" and given[0].device.type == "cpu" and torch.bfloat16 in types:
        raise TypeError("`backend` 'triton' takes no bfloat16 on a CPU: Triton's interpreter computes it wrongly.")
    return backend == "triton"


def storage_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The type that the operands of the matrix products are rounded to: autocast's where it is on, else promotion's."""
    promoted = torch.promote_types(hidden.dtype, weight.dtype)
    kind = hidden.device.type
    if promoted != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return promoted
