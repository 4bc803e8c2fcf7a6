"""An output layer that is spread over processes: what becomes of it before a kernel sees it."""

from typing import Any

import torch
import torch.distributed as dist


def group_name(process_group: Any) -> str:
    """The name by which operators find a process group; "" for none, or for one process."""
    if process_group is None:
        return ""
    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(
            f"`process_group` must be a torch.distributed.ProcessGroup, got {type(process_group).__name__}."
        )
    return process_group.group_name if process_group.size() > 1 else ""


def gather_head(weight: Any, bias: Any, group: str) -> tuple[Any, Any]:
    """
    The output layer's weight and bias as plain tensors.

    A DTensor is gathered, with one collective, and its gradient is scattered back: the mean over processes, which are
    taken to hold different tokens, as FSDP takes them.

    Raises:
        ValueError: a DTensor together with a process group, or a parameter that DeepSpeed ZeRO-3 has put away.
    """
    for name, x in (("weight", weight), ("bias", bias)):
        if hasattr(x, "ds_status") and x.numel() == 0:
            raise ValueError(
                f"`{name}` is a parameter that DeepSpeed ZeRO-3 has put away, got shape {tuple(x.shape)}: read it, and "
                "call this function, in the forward of the module that was wrapped, where DeepSpeed gathers what is "
                "read."
            )
    if not (_is_dtensor(weight) or _is_dtensor(bias)):
        return weight, bias
    if group:
        raise ValueError(
            "`process_group` takes `weight` and `bias` as plain tensors of this process's rows, got a DTensor: pass "
            "`weight.to_local()`, or no process group to have it gathered."
        )
    return _gathered(weight), _gathered(bias)


def _is_dtensor(x: Any) -> bool:
    if type(x) in (torch.Tensor, torch.nn.Parameter) or not dist.is_available():
        return False  # without importing what DTensor needs
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def _gathered(x: Any) -> Any:
    if not _is_dtensor(x):
        return x
    from torch.distributed.tensor import Partial

    mesh = x.device_mesh
    whole = x.full_tensor(grad_placements=[Partial()] * mesh.ndim)  # gradients are summed on the way back
    return _ScaleGradient.apply(whole, 1.0 / mesh.size())


class _ScaleGradient(torch.autograd.Function):
    """The identity, with its gradient multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.scale, None
