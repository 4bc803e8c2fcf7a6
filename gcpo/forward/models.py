"""Forwards of a transformers model that score and represent completions, and what a model can and cannot do."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gcpo.causal.account import StepAccount
from gcpo.causal.port import Continuation, Ids, Piece, Reading, RolloutStates
from gcpo.causal.sampling import own_random_stream
from gcpo.forward.key_values import cut, join, keeps_every_token
from gcpo.forward.packing import PackedRow
from gcpo.forward.representations import BranchRecorder, HiddenRecorder
from gcpo.forward.scheduling import ScheduledPolicy, Scored, distinct_rows


class ModelForwards(ScheduledPolicy):
    """
    The forwards of `ScheduledPolicy`, computed. A subclass says which model, and how it gives log-probabilities.

    Attributes:
        model: the module to call; it may be wrapped.
        account: counts time and tokens.
        accelerator: `accelerate.Accelerator` of several processes. None: there is one.
        pad_token_id, pad_to_multiple_of: of batches.
    """

    model: Any
    account: StepAccount
    accelerator: Any = None
    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def look_at(self, model: Any) -> None:
        """Find out what can be shared with this model."""
        # Prompt and prefix tuning put tokens of their own before every forward, a continuation's included.
        adapter = getattr(model, "active_peft_config", None)
        virtual_tokens = adapter is not None and adapter.is_prompt_learning
        self.can_continue = keeps_every_token(model) and not virtual_tokens
        self.can_pack = takes_tree_mask(model) and not virtual_tokens

    @property
    def name(self) -> str:
        return self.unwrapped.config.model_type

    @property
    def hidden_size(self) -> int:
        return self.unwrapped.config.get_text_config().hidden_size

    @property
    def max_positions(self) -> int | None:
        return getattr(self.unwrapped.config.get_text_config(), "max_position_embeddings", None)

    @property
    def backbone(self) -> nn.Module:
        """The module whose output is what the output layer reads."""
        model = self.unwrapped
        return (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model

    @property
    def unwrapped(self) -> Any:
        return self.model

    # What several processes need, and what is measured.

    @property
    def rank(self) -> int:  # type: ignore[override]
        return 0 if self.accelerator is None else self.accelerator.process_index

    @property
    def size(self) -> int:  # type: ignore[override]
        return 1 if self.accelerator is None else self.accelerator.num_processes

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.accelerator is None else self.accelerator.gather(tensor)

    def gather_lists(self, items: list[Any]) -> list[Any]:
        if self.accelerator is None:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.accelerator is None else self.accelerator.reduce(tensor, reduction="sum")

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.accelerator is None else self.accelerator.autocast()

    def phase(self, name: str) -> AbstractContextManager[Any]:
        return self.account.phase(name)

    def count(self, kind: str, tokens: Any) -> None:
        self.account.add_tokens(kind, tokens)

    # -----------------------------------------------------------------------------------------------------------------

    def _sample_outputs(self, prompts: list[Ids]) -> tuple[list[Ids], RolloutStates | None]:
        """Outputs sampled as candidates are, and what generating them computed anyway."""
        raise NotImplementedError

    def sample_states(self, prompts: list[Ids], seed: int, rows: int) -> tuple[list[Ids], torch.Tensor]:
        outputs: list[Ids] = []
        z: list[torch.Tensor] = []
        with self.phase("contexts"), own_random_stream(seed):
            for start in range(0, len(prompts), rows):
                sampled, states = self._sample_outputs(prompts[start : start + rows])
                outputs += sampled
                z += [] if states is None else [states.z]
        if sum(map(len, z)) == len(prompts):
            return outputs, torch.cat(z)
        scored = self._score_rows(prompts, [ids or self.eos_token_ids[:1] for ids in outputs], "scored_contexts")
        return outputs, torch.stack([item.z for item in sorted(scored, key=lambda item: item.key)])

    @property
    def can_decode(self) -> bool:
        """Whether completions can be decoded after keys and values, as this policy generates them."""
        raise NotImplementedError

    @torch.no_grad()
    def decode(
        self,
        rows: list[Continuation],
        seed: int,
        *,
        limit: int,
        temperature: float | None,
        greedy: Sequence[bool] | None = None,
    ) -> list[Ids]:
        """
        One completion of at most `limit` tokens for each row, sampled after its past and its ids as `generate` samples.

        All ids but the last are read first, for rows that are the same once. So a generation begins with one token of
        each row, and rows whose ids differ in length need no padding among them.
        """
        if not self.can_decode:
            raise ValueError(f"{self.name} cannot decode after keys and values, as it is or as it is set to generate.")
        firsts, place = distinct_rows(rows)
        beginnings = [replace(rows[k], ids=rows[k].ids[:-1], scores=False) for k in firsts]
        longer = [k for k, row in enumerate(beginnings) if row.ids]
        read = self._read([beginnings[k] for k in longer], keep=True, counted=False)
        own = dict(zip(longer, (reading.own for reading in read), strict=True))
        past = [[*filter(None, [*row.past, own.get(k)])] for row, k in zip(rows, place, strict=True)]
        positions = [row.first_position + len(row.ids) - 1 for row in rows]
        with own_random_stream(seed):
            return self._decode_after(past, [row.ids[-1:] for row in rows], positions, limit, temperature, greedy)

    def _decode_after(
        self,
        past: list[list[Piece]],
        ids: list[Ids],
        positions: list[int],
        limit: int,
        temperature: float | None,
        greedy: Sequence[bool] | None,
    ) -> list[Ids]:
        """Completions of rows that each begin with one token, at its position, after its past."""
        raise NotImplementedError

    def _log_probs(self, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """(rows, S): log-probability of `labels` (rows, S), each the token after its place; -100: none is asked for."""
        raise NotImplementedError

    @contextmanager
    def _forward_of(self, tokens: str, count: int, counts: bool) -> Iterator[None]:
        if counts:
            self.count(tokens, count)
        phase = {"scored_contexts": "contexts", "generated_colliders": "colliders"}.get(tokens, "scoring")
        with self.phase(phase), without_dropout(self.model):
            yield

    # -----------------------------------------------------------------------------------------------------------------

    def _forward_rows(self, prompts: list[Ids], completions: list[Ids], tokens: str, counts: bool) -> list[Scored]:
        x, x_mask = self.pad(prompts, "left")
        y, y_mask = self.pad(completions, "right")
        recorder = HiddenRecorder(self.options.representation)
        ids, mask = torch.cat([x, y], dim=1), torch.cat([x_mask, y_mask], dim=1)
        with self._forward_of(tokens, sum(map(len, prompts)) + sum(map(len, completions)), counts):
            logp = self._score_padded(ids, mask, y.shape[1], recorder)
        z = recorder.result()
        return [Scored(k, logp[k, : len(y)].float(), z[k]) for k, y in enumerate(completions)]

    def _score_padded(
        self, ids: torch.Tensor, mask: torch.Tensor, completion_length: int, recorder: HiddenRecorder
    ) -> torch.Tensor:
        """(rows, completion_length): log-probabilities of the last columns of padded rows, seen by `recorder`."""
        labels = torch.full_like(ids, -100)
        scored = ids[:, -completion_length:].masked_fill(mask[:, -completion_length:] == 0, -100)
        labels[:, -completion_length - 1 : -1] = scored
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        with recorder.attached(self.backbone, completion_length):
            logp = self._log_probs(labels, input_ids=ids, attention_mask=mask, position_ids=positions)
        return logp[:, -completion_length - 1 : -1]

    def _forward_continuations(self, rows: list[Continuation], keep: bool, counts: bool) -> list[Reading]:
        past = [[piece for piece in row.past if piece] for row in rows]
        cache, past_mask = join(past, self.unwrapped.config, self.device)
        ids, mask = self.pad([row.ids for row in rows], "right")
        first = torch.tensor([row.first_position for row in rows], device=self.device)
        positions = first[:, None] + torch.arange(ids.shape[1], device=self.device)
        labels = torch.full_like(ids, -100)
        scored = mask[:, 1:] * torch.tensor([row.scores for row in rows], device=self.device)[:, None]
        labels[:, :-1] = ids[:, 1:].masked_fill(scored == 0, -100)
        # What follows a row's first token is its completion.
        recorder = HiddenRecorder(self.options.representation, mask=torch.cat([mask[:, :1] * 0, mask[:, 1:]], dim=1))
        if counts:
            for row in rows:  # those of one forward may be of several kinds
                self.count(row.tokens, len(row.ids))
        with self._forward_of(rows[0].tokens, 0, False), recorder.attached(self.backbone, ids.shape[1]):
            logp = self._log_probs(
                labels,
                input_ids=ids,
                attention_mask=torch.cat([past_mask, mask], dim=1),
                position_ids=positions,
                past_key_values=cache,
            )
        z, start = recorder.result(), past_mask.shape[1]
        return [
            Reading(
                logp[k, : len(row.ids) - 1].float(), z[k], cut(cache, k, start, start + len(row.ids)) if keep else []
            )
            for k, row in enumerate(rows)
        ]

    def _forward_packed(self, row: PackedRow, counts: bool) -> list[Scored]:
        places = [branch.completion.to(self.device) for branch in row.branches]
        recorder = BranchRecorder(self.options.representation, places)
        with self._forward_of("scored_contexts", len(row.ids), counts), recorder.attached(self.backbone):
            logp = self._log_probs(
                row.labels()[None].to(self.device),
                input_ids=torch.tensor(row.ids)[None].to(self.device),
                attention_mask=self._tree_mask(row),
                position_ids=torch.tensor(row.positions)[None].to(self.device),
            )[0]
        scores = [logp[branch.predictors.to(self.device)] for branch in row.branches]
        return [Scored(b.key, s, z) for b, s, z in zip(row.branches, scores, recorder.result(), strict=True)]

    def _tree_mask(self, row: PackedRow) -> Any:
        """The row's attention mask as the model's attention takes it: blocks, bool or additive, the last two 4-D."""
        kind = self.unwrapped.config.get_text_config()._attn_implementation
        if kind == "flex_attention":
            return row.block_mask(self.device)
        allowed = row.allowed().to(self.device)[None, None]
        if kind == "sdpa":
            return allowed  # of no type that autocast could make differ from the queries'
        dtype = self.unwrapped.dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=self.device).masked_fill(~allowed, torch.finfo(dtype).min)

    def pad(self, ids: list[Ids], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Padded ids and mask of one batch, (rows, columns) int64."""
        longest = padded_width(ids, self.pad_to_multiple_of)
        padded = torch.full((len(ids), longest), self.pad_token_id)
        mask = torch.zeros(len(ids), longest, dtype=torch.long)
        for k, row in enumerate(ids):
            place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
            padded[k, place], mask[k, place] = torch.tensor(row, dtype=torch.long), 1
        return padded.to(self.device), mask.to(self.device)


def padded_width(rows: list[Ids], multiple: int | None) -> int:
    """Columns of a batch of these rows, padded to a multiple."""
    longest = max(map(len, rows))
    return longest if not multiple else -(-longest // multiple) * multiple


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
    itself keeps its mode, by which TRL tells training from evaluation.
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
