"""What a model's config says of its cost: weights, floating-point operations per token, bytes of keys and values."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Configs that can be asked for by size, without a download: Qwen2.5's and SmolLM2-135M's published shapes.
_QWEN = {"model_type": "qwen2", "vocab_size": 151_936, "max_position_embeddings": 32_768, "tie_word_embeddings": True}
_LARGE_QWEN = {**_QWEN, "vocab_size": 152_064, "tie_word_embeddings": False}
_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES: dict[str, dict[str, Any]] = {
    "0.5b": _QWEN | dict(zip(_SHAPE, (896, 4864, 24, 14, 2), strict=True)),
    "1.5b": _QWEN | dict(zip(_SHAPE, (1536, 8960, 28, 12, 2), strict=True)),
    "3b": _QWEN | dict(zip(_SHAPE, (2048, 11_008, 36, 16, 2), strict=True)),
    "7b": _LARGE_QWEN | dict(zip(_SHAPE, (3584, 18_944, 28, 28, 4), strict=True)),
    "14b": _LARGE_QWEN | dict(zip(_SHAPE, (5120, 13_824, 48, 40, 8), strict=True)),
    "32b": _LARGE_QWEN | dict(zip(_SHAPE, (5120, 27_648, 64, 40, 8), strict=True)),
    "smollm2-135m": {
        **dict(zip(_SHAPE, (576, 1536, 30, 9, 3), strict=True)),
        "model_type": "llama",
        "vocab_size": 49_152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}


def load_config(name: str, **options: Any) -> Any:
    """The config of one of `SIZES`, of a folder, of a config.json, or of a model on the hub; never its weights."""
    from transformers import AutoConfig

    if name.lower() in SIZES:
        return AutoConfig.for_model(**SIZES[name.lower()])
    path = Path(name)
    if path.suffix == ".json" and not path.is_file():
        raise FileNotFoundError(f"`--model_name_or_path` must be a config.json that exists, got {name!r}.")
    return AutoConfig.from_pretrained(name, **options)


@dataclass(frozen=True)
class Architecture:
    """
    A decoder-only transformer, in numbers.

    Args:
        parameters: all weights.
        layer_weights: weights of matrix products outside the output layer.
        active_weights: those that one token passes through: fewer with experts.
        hidden, vocab: sizes of the output layer.
        heads, kv_heads, head_dim: of attention.
        intermediate: width of a feed-forward layer, of all experts that a token is sent to.
        windows: per layer, how many tokens attention looks back. None: all; 0: it is no attention layer.
        max_positions: the longest sequence. None: unknown.
        model: it, without memory for its weights, for what a trainer asks of a model. None: nothing is known.
    """

    parameters: int
    layer_weights: int
    active_weights: float
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    windows: tuple[int | None, ...]
    max_positions: int | None = None
    model: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def from_config(cls, config: Any) -> "Architecture":
        """Counts the weights of a model that is built without memory for them."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        text = config.get_text_config()
        outside = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
        matrices = [(n, p) for n, p in model.named_parameters() if p.dim() >= 2 and id(p) not in outside]
        per_token = getattr(text, "num_experts_per_tok", None) or 1
        experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or per_token
        active = sum(p.numel() * (per_token / experts if ".experts." in n else 1.0) for n, p in matrices)
        width = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", 4 * text.hidden_size)
        heads = text.num_attention_heads
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            layer_weights=sum(p.numel() for _, p in matrices),
            active_weights=active,
            hidden=text.hidden_size,
            vocab=text.vocab_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            intermediate=width * per_token,
            windows=_windows(text),
            max_positions=getattr(text, "max_position_embeddings", None),
            model=model,
        )

    def key_value_bytes(self, size: int) -> float:
        """Of one token, in all layers that keep every token, for numbers of `size` bytes."""
        return 2.0 * size * self.kv_heads * self.head_dim * sum(window != 0 for window in self.windows)

    def matrix_flops(self) -> float:
        """Of one token's forward outside attention and the output layer: two per weight."""
        return 2.0 * self.active_weights

    def head_flops(self) -> float:
        """Of the output layer at one token."""
        return 2.0 * self.hidden * self.vocab

    def attention_flops(self, new: float, before: float, dense: bool) -> float:
        """
        Of one row's scores and weighted sums, all layers.

        Args:
            new: tokens that attend.
            before: tokens ahead of them that they attend to.
            dense: whether every new token is multiplied with every other, masked or not.
        """
        keys = sum(_attended(new, before, window, dense) for window in self.windows)
        return 4.0 * self.heads * self.head_dim * keys

    def activation_bytes(self, size: int, checkpointing: bool) -> float:
        """
        Roughly what a forward keeps for the backward, per token, for activations of `size` bytes: inputs of the matrix
        products, queries, keys and values, three of the feed-forward layer, and the norms' inputs in float32.
        """
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = size * (4 * self.hidden + 2 * queries + 2 * keys + 4 * self.intermediate) + 8.0 * self.hidden
        layers = len(self.windows)
        return layers * size * self.hidden + layer if checkpointing else layers * layer


def _windows(text: Any) -> tuple[int | None, ...]:
    sliding = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = getattr(text, "layer_types", None) or ["sliding_attention" if sliding else "full_attention"] * (
        text.num_hidden_layers
    )
    window = {"full_attention": None, "sliding_attention": sliding, "chunked_attention": sliding}
    return tuple(window.get(kind, 0) for kind in kinds)


def _attended(new: float, before: float, window: int | None, dense: bool) -> float:
    """Pairs of a new token and one it is multiplied with."""
    if window == 0:
        return 0.0
    if dense:
        return new * (before + new)
    whole = new if window is None else min(max(window - before, 0.0), new)  # tokens that see all there is
    limited = 0.0 if window is None else (new - whole) * window
    return whole * before + whole * (whole + 1) / 2 + limited
