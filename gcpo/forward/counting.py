"""A policy without a model: the real causal step runs on it, and it counts what would pass through one."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, total_ordering
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from gcpo.causal.options import CausalOptions
from gcpo.causal.port import Continuation, Ids, Piece, Prompt, Reading, length_of
from gcpo.forward.packing import PackedRow
from gcpo.forward.scheduling import ScheduledPolicy, Scored, distinct_rows, hashable
from gcpo.forward.unpadded import LayerCost

_EMPTY: Piece = []
_Z = torch.zeros(1)
_PRODUCTS = LayerCost(per_token=1.0, per_pair=0.0)  # of a layer of which nothing is known


@total_ordering
class Span:
    """
    Token ids in few words: runs (what, start, stop) of tokens that stand together, each token known by (what, place).
    It does what the causal step does with a list of ids, whatever its length.
    """

    def __init__(self, runs: tuple[tuple[Hashable, int, int], ...]):
        self.runs = runs

    @classmethod
    def of(cls, what: Hashable, count: int) -> "Span":
        return cls(((what, 0, count),) if count else ())

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(stop - start for _, start, stop in self.runs))

    def __len__(self) -> int:
        return self._ends[-1] if self.runs else 0

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            first, last, _ = at.indices(len(self))
            return Span(tuple(self._between(first, last))) if first < last else Span(())
        at = at + len(self) if at < 0 else at
        number = bisect_right(self._ends, at)
        what, _, stop = self.runs[number]
        return what, stop - (self._ends[number] - at)

    def _between(self, first: int, last: int) -> Iterator[tuple[Hashable, int, int]]:
        for (what, start, stop), end in zip(self.runs, self._ends, strict=True):
            begin = end - (stop - start)
            if end > first and begin < last:
                yield what, start + max(first - begin, 0), stop - max(end - last, 0)

    def __add__(self, other: "Span") -> "Span":
        if self.runs and other.runs:
            (what, start, stop), (next_what, next_start, next_stop) = self.runs[-1], other.runs[0]
            if what == next_what and stop == next_start:  # one run: the same tokens are always written down alike
                return Span((*self.runs[:-1], (what, start, next_stop), *other.runs[1:]))
        return Span(self.runs + other.runs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Span) and self.runs == other.runs

    def __lt__(self, other: "Span") -> bool:
        return self.runs < other.runs

    def __hash__(self) -> int:
        return hash(self.runs)

    def common_prefix(self, other: "Span", start: int = 0) -> int:
        """How many tokens both begin with; they agree on the first `start`."""
        mine, others = bisect_right(self._ends, start), bisect_right(other._ends, start)
        if mine != others:  # one goes on with another run there, or ends
            return start
        for number in range(mine, min(len(self.runs), len(other.runs))):
            left, right = self.runs[number], other.runs[number]
            if left != right:
                before = self._ends[number] - (left[2] - left[1])
                same = left[:2] == right[:2]
                return before + (min(left[2], right[2]) - left[1] if same else 0)
        return min(len(self), len(other))


class Pass(NamedTuple):
    """A row that passes through the model."""

    phase: str  # as in `gcpo/seconds/PHASE`
    what: str
    mode: str  # "prefill", "decode" (one token at a time), "score" (no gradient) or "train" (forward and backward)
    new: int  # tokens of the row that pass through the model
    predicted: int = 0  # of those, at how many the output layer is applied
    before: int = 0  # tokens that they attend to as keys and values
    dense: bool = False  # attention is computed over the whole square, not its lower half
    keeps: bool = False  # keys and values stay until all contexts are scored
    padding: int = 0  # positions that are computed beside `new`
    head: str = "trl"  # the output layer: TRL's, "compact" (predicted tokens only) or "fused" (and one product less)


@dataclass(frozen=True)
class Decoding:
    """Of calls of generation: how often all weights are read, and how many tokens' keys and values."""

    steps: int = 0  # of a call as many as its longest output has tokens
    keys: float = 0.0  # summed over rows and steps

    def __add__(self, other: "Decoding") -> "Decoding":
        return Decoding(self.steps + other.steps, self.keys + other.keys)


@dataclass(frozen=True)
class Abilities:
    """What a model and its engine can do, of what decides which forwards are made."""

    can_continue: bool = True  # every layer keeps the keys and values of all tokens
    can_pack: bool = True  # attention takes a mask over packed rows
    in_house: bool = True  # transformers generates in the training process
    name: str = "a planned model"  # its type
    caches_prefixes: bool = False  # the engine reads prompts that repeat once of its own accord
    against_fused_loss: str | None = None  # what keeps the loss from being made from hidden states, in words
    against_padding_free: str | None = None  # what keeps the policy's rows from being packed
    layer_cost: LayerCost = _PRODUCTS  # by which packed rows are laid out
    masks_squares: bool = True  # attention that takes a mask, of padding too, computes whole squares


class CountingPolicy(ScheduledPolicy):
    """
    Args:
        options: of the method.
        num_generations: n.
        outputs: the completion of a prompt, given the phase it is generated in and how many came before in it.
        ending_ids: what completions end in, the end token first.
        step_seed: of the draws, as a run has it.
        masks_truncated: whether completions that end in none of `ending_ids` are left out of the loss.
        abilities: what is assumed of model and engine.
        head: as `Pass.head`, of the forwards that score.

    Attributes:
        passes: how many rows of each kind pass through the model.
        tokens: by kind, as a run logs them.
        rewarded: colliders that the reward functions run on.
        decoding: by phase and kind of pass, what decoding waits for.
    """

    allows_nan = True
    max_positions = None
    max_completion_length = None
    hidden_size = 1
    rows_per_forward = 2**62
    device = torch.device("cpu")

    def __init__(
        self,
        options: CausalOptions,
        num_generations: int,
        outputs: Callable[[str, int], Ids],
        ending_ids: list[Any],
        *,
        step_seed: int = 0,
        masks_truncated: bool = False,
        abilities: Abilities | None = None,
        head: str = "trl",
    ):
        self.options, self.num_generations, self.outputs = options, num_generations, outputs
        self.eos_token_ids, self.ending_ids = ending_ids[:1], ending_ids
        self.step_seed, self.masks_truncated = step_seed, masks_truncated
        self.abilities = abilities or Abilities()
        self.name, self.head = self.abilities.name, head
        self.can_continue, self.can_pack = self.abilities.can_continue, self.abilities.can_pack
        self.can_decode = self.abilities.in_house and self.abilities.can_continue
        self.passes: Counter[Pass] = Counter()
        self.tokens: Counter[str] = Counter()
        self.rewarded = 0
        self.decoding: dict[tuple[str, str], Decoding] = {}

    @property
    def keeps_states(self) -> bool:
        """Whether generation leaves representations, keys and values."""
        return self.abilities.in_house and self.options.reuse_rollout and self.options.uses_rollout_states

    def phase(self, name: str) -> AbstractContextManager[Any]:
        return nullcontext()

    def log(self, name: str, value: Any) -> None:
        pass

    def count(self, kind: str, tokens: int) -> None:
        self.tokens[kind] += tokens

    def reward(self, inputs: list[dict[str, Any]], prompts: list[Prompt], ids: list[Ids]) -> torch.Tensor:
        self.rewarded += len(ids)
        return torch.zeros(len(ids))

    def generate(
        self,
        prompts: list[Ids],
        seed: int,
        *,
        limit: int,
        temperature: float | None,
        greedy: Sequence[bool] | None = None,
    ) -> list[Ids]:
        # An engine takes one temperature for a call.
        calls = None if greedy is None or self.abilities.in_house else list(greedy)
        return self.count_generation("colliders", "", prompts, calls=calls)

    def decode(
        self,
        rows: list[Continuation],
        seed: int,
        *,
        limit: int,
        temperature: float | None,
        greedy: Sequence[bool] | None = None,
    ) -> list[Ids]:
        before = [sum(map(length_of, filter(None, row.past))) for row in rows]
        for k in distinct_rows(rows)[0]:
            self.passes[Pass("colliders", "prefill", "prefill", len(rows[k].ids), 1, before[k])] += 1
        return self._count_decoding("colliders", "", [b + len(row.ids) for b, row in zip(before, rows, strict=True)])

    def sample_states(self, prompts: list[Ids], seed: int, rows: int) -> tuple[list[Ids], torch.Tensor]:
        outputs = self.count_generation("contexts", "samples, ", prompts)
        if not self.keeps_states:
            for _ in self._score_rows(prompts, outputs, "scored_contexts"):
                pass
        return outputs, torch.zeros(len(prompts), 1)

    @property
    def reads_once(self) -> bool:
        """Whether generation reads prompts that repeat once."""
        return self.abilities.caches_prefixes or (self.abilities.in_house and self.shares)

    def count_generation(
        self,
        phase: str,
        what: str,
        prompts: list[Ids],
        once: bool | None = None,
        keeps: bool = False,
        calls: list[bool] | None = None,
    ) -> list[Ids]:
        """
        The completions of these prompts, of which those that repeat are read `once`. None: as the causal step's.

        Args:
            calls: which of two calls each is generated in. None: there is one.
        """
        once = self.reads_once if once is None else once
        for prompt in {hashable(ids): ids for ids in prompts}.values() if once else prompts:
            self.passes[Pass(phase, f"{what}prefill", "prefill", len(prompt), 1)] += 1
        return self._count_decoding(phase, what, list(map(len, prompts)), keeps, calls)

    def _count_decoding(
        self, phase: str, what: str, before: list[int], keeps: bool = False, calls: list[bool] | None = None
    ) -> list[Ids]:
        """Completions of rows that are decoded after so many tokens."""
        outputs = [self.outputs(phase, number) for number in range(len(before))]
        calls = [False] * len(before) if calls is None else calls
        for call in sorted(set(calls)):
            rows = [(x, y) for x, y, its in zip(before, outputs, calls, strict=True) if its == call]
            longest, keys = max(len(y) for _, y in rows), 0.0
            for x, y in rows:
                # In the training process, rows that have ended are computed until the last one ends.
                steps = longest if self.abilities.in_house else len(y)
                keys += steps * (x + steps / 2)
                item = Pass(phase, f"{what}decode", "decode", len(y), steps, x, keeps=keeps, padding=steps - len(y))
                self.passes[item] += 1
            key = (phase, f"{what}decode")
            self.decoding[key] = self.decoding.get(key, Decoding()) + Decoding(longest, keys)
        return outputs

    # -----------------------------------------------------------------------------------------------------------------

    def _forward_rows(self, prompts: list[Ids], completions: list[Ids], tokens: str, counts: bool) -> list[Scored]:
        phase = "contexts" if tokens == "scored_contexts" else "scoring"
        what = {"scored_query": "candidates", "scored_colliders": "colliders"}.get(tokens, "one by one")
        for x, y in zip(prompts, completions, strict=True):
            self.count(tokens, len(x) + len(y))
            self.passes[Pass(phase, what, "score", len(x) + len(y), len(y), head=self.head)] += 1
        return [Scored(k, _zeros(len(y)), _Z) for k, y in enumerate(completions)]

    def _forward_continuations(self, rows: list[Continuation], keep: bool, counts: bool) -> list[Reading]:
        for row in rows:
            phase = "contexts" if row.tokens == "scored_contexts" else "scoring"
            what = "colliders" if row.tokens == "scored_colliders" else "candidates"
            if not row.scores:
                what = "beginnings" if phase == "contexts" else "queries"
            before, size = sum(map(length_of, filter(None, row.past))), len(row.ids)
            self.count(row.tokens, size)
            predicted = (size - 1) * row.scores
            self.passes[Pass(phase, what, "score", size, predicted, before, keeps=keep, head=self.head)] += 1
        return [Reading(_zeros(len(row.ids) - 1), _Z, piece_of(len(row.ids)) if keep else _EMPTY) for row in rows]

    def _forward_packed(self, row: PackedRow, counts: bool) -> list[Scored]:
        self.count("scored_contexts", len(row.ids))
        predicted = len({place for branch in row.branches for place in branch.predictors.tolist()})
        self.passes[Pass("contexts", "packed", "score", len(row.ids), predicted, dense=True, head=self.head)] += 1
        return [Scored(branch.key, _zeros(len(branch.completion)), _Z) for branch in row.branches]


def _zeros(count: int) -> torch.Tensor:
    return _Z.expand(count)


def piece_of(tokens: int) -> Piece:
    """Keys and values of so many tokens, without any numbers."""
    empty = torch.empty(0, tokens)
    return [(empty, empty)]
