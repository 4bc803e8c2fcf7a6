"""
The output layer, read by its weight inside the model's own forward, so that what wraps the model (DDP, FSDP, DeepSpeed)
has its say, and logits are made nowhere.
"""

import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

# What is done with hidden states (rows, S, H), the layer's weight (V, H) and its bias (V,) or None.
Reader = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Any]


def _whole(*parameters: Any) -> AbstractContextManager[Any]:
    return nullcontext()


def logit_options(config: Any) -> dict[str, Any]:
    """What a model of this text config does between hidden @ weight.T and a logit, by the names that configs have."""
    scale = next(
        (
            value
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (value := getattr(config, name, None)) is not None
        ),
        None,
    )
    scaling = getattr(config, "logits_scaling", None)
    if scale is None and scaling is not None:
        scale = scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    return {
        "logit_scale": 1.0 if scale is None else float(scale),
        "logit_softcap": getattr(config, "final_logit_softcapping", None),
    }


def add_reader(
    model: Any, in_float32: bool = False, gathered: Callable[..., AbstractContextManager[Any]] = _whole
) -> None:
    """
    Let a causal language model be called with `reader=`, a `Reader`: its backbone runs on the other arguments, and the
    forward returns what the reader makes of hidden states and output layer. Without one the forward is what it was.

    Args:
        model: of transformers; not what wraps it.
        in_float32: whether the reader gets hidden states in float32, with autocast off.
        gathered: called with the output layer's weight and bias, a context in which they are whole. FSDP and DDP need
            none.
    """
    before = model.forward

    @functools.wraps(type(model).forward)  # `generate` looks at the signature
    def forward(self: Any, *args: Any, reader: Reader | None = None, **kwargs: Any) -> Any:
        if reader is None:
            return before(*args, **kwargs)
        # Both are looked up here, for FSDP and PEFT replace them.
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        layer = self.get_output_embeddings()
        context: Any = nullcontext()
        if in_float32:
            hidden, context = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
        with context, gathered(layer.weight, layer.bias):
            return reader(hidden, layer.weight, layer.bias)

    model.forward = types.MethodType(forward, model)
