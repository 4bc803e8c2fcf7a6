"""
The forwards of a trainer's own rows, with gradient or without: without padding where the model allows it, and with the
output layer applied to completions only.
"""

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from gcpo.forward.models import learns_positions
from gcpo.forward.representations import represent
from gcpo.forward.unpadded import LayerCost, Unpadded, unpad
from gcpo_kernels import linear_gcpo_loss, linear_logprob

MASKED_ATTENTION = ("sdpa", "eager", "flex_attention")  # those that take a mask of our making


class Rows(Protocol):
    """A batch of completions as a forward reads it."""

    @property
    def tokens(self) -> Any:
        """How many are read, padding left out."""

    @property
    def padding(self) -> Any:
        """How many positions are read beside."""

    def select(self, hidden: torch.Tensor, own: bool = False) -> torch.Tensor:
        """(B, T, H): the hidden states that predict the completions' tokens, or the tokens' `own`."""


@dataclass
class Padded:
    """TRL's batch: prompts padded on the left, completions on the right."""

    input_ids: torch.Tensor  # (B, P + T)
    attention_mask: torch.Tensor  # (B, P + T)
    width: int  # T

    @property
    def tokens(self) -> torch.Tensor:
        return self.attention_mask.sum()

    @property
    def padding(self) -> torch.Tensor:
        return self.attention_mask.numel() - self.attention_mask.sum()

    def select(self, hidden: torch.Tensor, own: bool = False) -> torch.Tensor:
        return hidden[:, -self.width :] if own else hidden[:, -self.width - 1 : -1]


class TokenScores(NamedTuple):
    """Of a batch's completions, 0 where there is no token."""

    logp: torch.Tensor  # (B, T)
    entropy: torch.Tensor  # (B, T)


class LossResult(NamedTuple):
    loss: torch.Tensor  # scalar with gradient
    scores: TokenScores  # detached


class OwnForward:
    """
    Args:
        model: the causal language model, unwrapped, to which `gcpo.forward.output_layer.add_reader` was applied.
        head: options of `linear_logprob` for its output layer, temperature included.
        pad_token_id: of packed rows.
        autocast: what forwards run in.
        unwrap: gives the causal language model inside a module that is called.
    """

    def __init__(self, model: Any, head: dict[str, Any], pad_token_id: int, autocast: Any, unwrap: Any):
        self.config, self.head, self.pad_token_id = model.config, head, pad_token_id
        self.autocast, self.unwrap = autocast, unwrap

    def rows(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, width: int, without_padding: bool) -> Rows:
        """
        Args:
            input_ids, attention_mask: (B, P + T), TRL's batch.
            width: T.
            without_padding: whether rows are packed.
        """
        if not without_padding:
            return Padded(input_ids, attention_mask, width)
        ids, kept = input_ids.cpu(), attention_mask.cpu() != 0
        if not _is_contiguous(kept, width):
            return Padded(input_ids, attention_mask, width)
        prompts, completions = (
            [row[mask].tolist() for row, mask in zip(ids[:, part], kept[:, part], strict=True)]
            for part in (slice(None, -width), slice(-width, None))
        )
        text = self.config.get_text_config()
        cost = LayerCost.of(text, text._attn_implementation)
        return unpad(prompts, completions, width, self.pad_token_id, cost).to(input_ids.device)

    def _inputs(self, model: Any, rows: Rows) -> dict[str, Any]:
        if isinstance(rows, Padded):
            return {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
        assert isinstance(rows, Unpadded)
        return {"input_ids": rows.ids, "position_ids": rows.positions, "attention_mask": self._mask(model, rows)}

    def _mask(self, model: Any, rows: Unpadded) -> Any:
        """As the model takes it: one mask, or one for each kind of layer."""
        if rows.ends is None:
            return None
        inner = self.unwrap(model)  # a reference may have another attention implementation than the policy
        text, dtype = inner.config.get_text_config(), inner.dtype
        masks = {
            kind: rows.attention_mask(text._attn_implementation, window, dtype)
            for kind, window in _windows(text).items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def score(
        self, model: Any, rows: Rows, token_ids: torch.Tensor, mask: torch.Tensor, representation: str | None = None
    ) -> tuple[TokenScores, torch.Tensor | None]:
        """
        Log-probabilities and entropies of completions, with gradient where that is enabled, and their representations
        (B, H) float32 of this kind, if any.

        Args:
            model: the module to call; it may be wrapped.
            rows: of these completions.
            token_ids, mask: (B, T); where the mask is 0 nothing is scored.
        """
        asked = mask != 0

        def read(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
            states = rows.select(hidden)
            scores: Any = linear_logprob(
                states[asked], weight, token_ids[asked], bias=bias, return_entropy=True, **self.head
            )
            # Connected to the model even where no token is asked for: every process then has a backward to run.
            logp, entropy = (x.new_zeros(mask.shape).masked_scatter(asked, x) for x in scores)
            found = {"logp": logp, "entropy": entropy}
            if representation is not None:
                found["z"] = represent(rows.select(hidden, own=True), mask, representation)
            return found

        found = self._call(model, rows, read)
        return TokenScores(found["logp"], found["entropy"]), found.get("z")

    def loss(
        self,
        model: Any,
        rows: Rows,
        token_ids: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        **options: Any,
    ) -> LossResult:
        """
        `linear_gcpo_loss` of the policy's hidden states.

        Args:
            model: the module to call; it may be wrapped.
            rows: of the completions.
            token_ids, advantages, mask, options: as for `linear_gcpo_loss`, but for the output layer's.
        """

        def read(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
            hidden = rows.select(hidden)
            given = {"bias": bias, "return_scores": True, **self.head, **options}
            loss, _, (logp, entropy) = linear_gcpo_loss(hidden, weight, token_ids, advantages, mask, **given)
            return {"loss": loss, "logp": logp, "entropy": entropy}

        found = self._call(model, rows, read)
        return LossResult(found["loss"], TokenScores(found["logp"], found["entropy"]))

    def log_probs(self, model: Any, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """(rows, S): log-probability of `labels` (rows, S), each the token after its place; -100: none is asked for."""
        asked = labels != -100

        def read(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
            scores: Any = linear_logprob(hidden[asked], weight, labels[asked], bias=bias, **self.head)
            return {"logp": scores.new_zeros(labels.shape).masked_scatter(asked, scores)}

        with self.autocast():
            return model(reader=read, **inputs)["logp"]

    def _call(self, model: Any, rows: Rows, reader: Any) -> dict[str, torch.Tensor]:
        with self.autocast():
            return model(**self._inputs(model, rows), reader=reader)


def _is_contiguous(kept: torch.Tensor, width: int) -> bool:
    """Whether prompts end, and completions begin, in the middle, without holes: then positions are places."""
    prompts, completions = kept[:, :-width], kept[:, -width:]
    if not prompts.shape[1] or not prompts[:, -1].all():
        return False
    return not (prompts[:, :-1] & ~prompts[:, 1:]).any() and not (~completions[:, :-1] & completions[:, 1:]).any()


def _windows(text: Any) -> dict[str, int | None]:
    """How far back each kind of layer looks; None: to the beginning."""
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = getattr(text, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def against_unpadded(model: Any) -> str | None:
    """What of a model's own keeps its rows from being packed, in words; None: nothing does."""
    text = model.config.get_text_config()
    attention = text._attn_implementation
    if attention not in MASKED_ATTENTION:
        return f"`attn_implementation={attention!r}` takes no mask over packed rows (sdpa and flex_attention do)"
    kinds = getattr(text, "layer_types", None) or []
    layers = DynamicCache(config=model.config).layers
    other = not set(kinds) <= {"full_attention", "sliding_attention"}
    if other or not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return f"{text.model_type} has layers that read a row from left to right (convolutions, recurrence, chunks)"
    if len(set(kinds)) > 1 and "attention_mask, dict)" not in inspect.getsource(type(model.base_model).forward):
        return f"{text.model_type} does not take a mask for each kind of its layers"
    places = inspect.signature(type(model.base_model).forward).parameters
    if learns_positions(model) or "position_ids" not in places or getattr(text, "alibi", False):
        return f"{text.model_type} does not take positions from its caller as rotary models do"
    return None
