"""
Forwards without gradient that score completions and represent them: row by row, continued from keys and values that
rows share, or packed into trees.

Everything here is collective: a process with less to do repeats its last forward, as ZeRO-3 and FSDP need.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from torch import nn

from gcpo._trl import pad
from gcpo.forward.key_values import Piece, cut, join, keeps_every_token, length_of
from gcpo.forward.packing import PackedRow, pack
from gcpo.forward.prefix_tree import grow
from gcpo.forward.representations import BranchRecorder, HiddenRecorder

if TYPE_CHECKING:
    from gcpo.trainer import GCPOTrainer

Ids = list[int]


@dataclass
class Continuation:
    """A row that is read after keys and values which others may share."""

    past: list[Piece]  # what it sees, in order
    ids: Ids  # its own tokens; each predicts the next
    first_position: int  # position id of the first
    tokens: str = "scored_contexts"  # what its tokens are counted as


@dataclass
class Reading:
    """What a forward says of one continuation of S tokens."""

    logp: torch.Tensor  # (S - 1,): log-probability of each token but the first
    z: torch.Tensor  # (H,) float32: representation of the tokens but the first; NaN where there is but one
    own: Piece = field(default_factory=list)  # keys and values of its S tokens, where asked for


class Scorer:
    """
    Args:
        trainer: whose model scores and whose counters are added to.
    """

    def __init__(self, trainer: "GCPOTrainer"):
        self.trainer = trainer
        self.config = trainer.args
        self.accelerator = trainer.accelerator
        # Prompt and prefix tuning put tokens of their own before every forward, a continuation's included.
        virtual_tokens = is_peft_model(trainer.model) and trainer.model.active_peft_config.is_prompt_learning
        self.can_continue = keeps_every_token(trainer.model) and not virtual_tokens
        self.can_pack = takes_tree_mask(trainer.model) and not virtual_tokens
        self.shares = trainer.args.share_prefix and self.can_continue

    @property
    def rows_per_forward(self) -> int:
        return self.config.context_batch_size or self.config.per_device_train_batch_size

    def score(self, prompts: list[Ids], completions: list[Ids], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Score each completion after its prompt: log-probabilities (rows, length), 0 behind a completion's end, and
        representations (rows, H) float32. Rows of similar length share a forward.
        """
        device, rows = self.accelerator.device, len(prompts)
        logp = torch.zeros(rows, length, device=device)
        z: torch.Tensor | None = None
        for part, counts in self._parts([len(x) + len(y) for x, y in zip(prompts, completions, strict=True)]):
            x, x_mask = self._pad([prompts[k] for k in part], "left")
            y, y_mask = self._pad([completions[k] for k in part], "right")
            recorder = HiddenRecorder(self.config.representation)
            with self.trainer._recording(recorder), without_dropout(self.trainer.model):
                scores, _, _ = self.trainer._get_per_token_logps_and_entropies(
                    self.trainer.model, torch.cat([x, y], dim=1), torch.cat([x_mask, y_mask], dim=1), y.size(1)
                )
            reduced = recorder.result()
            z = reduced.new_zeros(rows, reduced.shape[1]) if z is None else z
            if counts:
                z[part] = reduced
                width = min(y.size(1), length)
                logp[part, :width] = torch.where(y_mask != 0, scores, 0.0)[:, :width].to(logp.dtype)
        assert z is not None
        return logp, z

    # -----------------------------------------------------------------------------------------------------------------
    # Rows that look back at keys and values
    # -----------------------------------------------------------------------------------------------------------------

    def score_by_level(
        self, contexts: list[Ids], completions: list[Ids], length: int, tokens: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `score`, with what contexts begin with passed through the model once, level by level of their tree: the same
        values from fewer tokens, which are counted as `tokens`. Holds the keys and values of the whole tree.
        """
        # The last token of a context predicts its completion's first, and is read with it.
        nodes, spelled = grow([context[:-1] for context in contexts])
        pieces: dict[int, Piece] = {}
        for level in range(self.most(max((len(node.path) for node in nodes), default=-1) + 1)):
            numbers = [k for k, node in enumerate(nodes) if len(node.path) == level]
            rows = [Continuation([pieces[n] for n in nodes[k].path], nodes[k].ids, nodes[k].start) for k in numbers]
            for row in rows:
                row.tokens = tokens
            pieces.update((k, reading.own) for k, reading in zip(numbers, self.read(rows, keep=True), strict=True))
        rows = [
            Continuation([pieces[n] for n in path], [x[-1], *y], len(x) - 1, tokens)
            for x, y, path in zip(contexts, completions, spelled, strict=True)
        ]
        logp = torch.zeros(len(rows), length, device=self.accelerator.device)
        readings = self.read(rows)
        for k, reading in enumerate(readings):
            width = min(len(reading.logp), length)
            logp[k, :width] = reading.logp[:width]
        return logp, torch.stack([reading.z for reading in readings])

    def read(self, rows: list[Continuation], keep: bool = False) -> list[Reading]:
        """Log-probabilities and representations of continuations; with `keep`, their own keys and values too."""
        if not self.most(len(rows)):
            return []
        readings: list[Any] = [None] * len(rows)
        # A process without rows of its own takes part with one token that is thrown away.
        offered = rows or [Continuation([], [self.trainer._tokenizer.eos_token_id], 0)]
        past = [sum(map(length_of, filter(None, row.past))) for row in offered]
        for part, counts in self._parts([len(row.ids) for row in offered], past):
            read = self._forward([offered[k] for k in part], keep, counts and bool(rows))
            if counts and rows:
                for k, reading in zip(part, read, strict=True):
                    readings[k] = reading
        return readings

    def _forward(self, rows: list[Continuation], keep: bool, counts: bool) -> list[Reading]:
        trainer, device = self.trainer, self.accelerator.device
        past = [[piece for piece in row.past if piece] for row in rows]
        cache, past_mask = join(past, trainer.model.config, device)
        ids, mask = self._pad([row.ids for row in rows], "right")
        first = torch.tensor([row.first_position for row in rows], device=device)
        positions = first[:, None] + torch.arange(ids.shape[1], device=device)
        labels = torch.full_like(ids, -100)
        labels[:, :-1] = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        if counts:
            for row in rows:
                trainer._account.add_tokens(row.tokens, len(row.ids))
        # What follows a row's first token is its completion.
        recorder = HiddenRecorder(self.config.representation, mask=torch.cat([mask[:, :1] * 0, mask[:, 1:]], dim=1))
        with (
            trainer._account.phase("contexts" if rows[0].tokens == "scored_contexts" else "scoring"),
            recorder.attached(trainer._backbone(), ids.shape[1]),
            without_dropout(trainer.model),
            self.accelerator.autocast(),
        ):
            logp = trainer.model(
                input_ids=ids,
                attention_mask=torch.cat([past_mask, mask], dim=1),
                position_ids=positions,
                past_key_values=cache,
                shift_labels=labels,
                fused_lm_head=True,
                **no_auxiliary_loss(trainer.model),
            ).log_probs
        z, start = recorder.result(), past_mask.shape[1]
        return [
            Reading(
                logp[k, : len(row.ids) - 1].float(),
                z[k],
                cut(cache, k, start, start + len(row.ids)) if keep else [],
            )
            for k, row in enumerate(rows)
        ]

    # -----------------------------------------------------------------------------------------------------------------
    # Rows packed into trees
    # -----------------------------------------------------------------------------------------------------------------

    def score_packed(
        self, contexts: list[Ids], completions: list[Ids], length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`score`, with tokens that contexts share passed through the model once: the same values, fewer tokens."""
        logp = torch.zeros(len(contexts), length, device=self.accelerator.device)
        states: list[Any] = [None] * len(contexts)
        for key, scores, z in self._forward_packed(pack(contexts, completions, self.config.pack_tokens)):
            width = min(len(scores), length)
            logp[key, :width], states[key] = scores[:width].to(logp.dtype), z
        return logp, torch.stack(states)

    def _forward_packed(self, packed: list[PackedRow]) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor]]:
        """Key, log-probabilities (T,) and representation (H,) of every branch of packed rows, a forward each."""
        trainer, device = self.trainer, self.accelerator.device
        for number in range(self.most(len(packed))):
            row = packed[min(number, len(packed) - 1)]
            counts = number < len(packed)
            if counts:
                trainer._account.add_tokens("scored_contexts", len(row.ids))
            recorder = BranchRecorder(
                self.config.representation, [branch.completion.to(device) for branch in row.branches]
            )
            with (
                trainer._account.phase("contexts"),
                recorder.attached(trainer._backbone()),
                without_dropout(trainer.model),
                self.accelerator.autocast(),
            ):
                logp = trainer.model(
                    input_ids=row.ids[None].to(device),
                    attention_mask=self._tree_mask(row),
                    position_ids=row.positions[None].to(device),
                    shift_labels=row.labels()[None].to(device),
                    fused_lm_head=True,
                    **no_auxiliary_loss(trainer.model),
                ).log_probs[0]
            if counts:
                for branch, z in zip(row.branches, recorder.result(), strict=True):
                    yield branch.key, logp[branch.predictors.to(device)], z

    def _tree_mask(self, row: PackedRow) -> Any:
        """The row's attention mask as the model's attention takes it: blocks, bool or additive, the last two 4-D."""
        config = self.trainer.model.config.get_text_config()
        device = self.accelerator.device
        if config._attn_implementation == "flex_attention":
            return row.block_mask(device)
        allowed = row.allowed().to(device)[None, None]
        if config._attn_implementation == "sdpa":
            return allowed  # of no type that autocast could make differ from the queries'
        dtype = self.trainer.model.dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, torch.finfo(dtype).min)

    # -----------------------------------------------------------------------------------------------------------------

    def _parts(self, lengths: list[int], past: list[int] | None = None) -> Iterator[tuple[list[int], bool]]:
        """
        Rows for a forward each, of similar length, so that little is padded; False with those that are repeated for
        other processes' sake.
        """
        before = past or [0] * len(lengths)
        parts: list[list[int]] = []
        for k in sorted(range(len(lengths)), key=lambda k: (lengths[k], before[k])):
            fits = parts and len(parts[-1]) < self.rows_per_forward
            if fits and lengths[k] <= 1.25 * lengths[parts[-1][0]] + 16:
                parts[-1].append(k)
            else:
                parts.append([k])
        for number in range(self.most(len(parts))):
            counts = number < len(parts)
            yield (parts[number] if counts else parts[0][:1]), counts

    def most(self, count: int) -> int:
        """The largest `count` of any process."""
        if self.accelerator.num_processes == 1:
            return count
        return int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())

    def _pad(self, ids: list[Ids], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        return pad_ids(self.trainer, ids, side)


def pad_ids(trainer: "GCPOTrainer", ids: list[Ids], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ids and mask of one batch, on this process's device."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in ids]
    multiple = trainer.pad_to_multiple_of
    padded = pad(tensors, trainer._tokenizer.pad_token_id, side, multiple)
    mask = pad([torch.ones_like(row) for row in tensors], 0, side, multiple)
    return padded.to(trainer.accelerator.device), mask.to(trainer.accelerator.device)


def learns_positions(model: Any) -> bool:
    """Whether positions are looked up in an embedding, as GPT-2's are."""
    count, tokens = (
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        model.get_input_embeddings(),
    )
    found = (part for part in model.modules() if isinstance(part, nn.Embedding) and part is not tokens)
    return any(part.num_embeddings == count for part in found)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """
    Every part of `model` in evaluation mode: what is compared or subtracted later must not differ by noise. The model
    itself stays in training mode, which is how TRL tells training from evaluation.
    """
    parts = [part for part in model.modules() if part is not model and part.training]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part in parts:
            part.training = True


def no_auxiliary_loss(model: Any) -> dict[str, bool]:
    """Keyword of a forward that leaves out a mixture of experts' load-balancing loss, which knows plain masks only."""
    return {"output_router_logits": False} if hasattr(model.config.get_text_config(), "output_router_logits") else {}


def takes_tree_mask(model: Any) -> bool:
    """
    Whether a model computes packed rows exactly: its attention must take a mask of our making, and every layer must
    look back without a window, which a row's order would distort.
    """
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager", "flex_attention"):
        return False
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return kinds == {"full_attention"} and not (windowed and not getattr(config, "layer_types", None))
