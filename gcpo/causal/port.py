"""
What the causal step asks of whoever holds a model (`Policy`), and the plain data that passes between the two.

Letters: P prompts of all processes, n candidates of each, B rows of this process, T tokens, L colliders, H hidden size.
Token ids are lists of ints. The step itself only takes their lengths, slices and sums, so that a policy that counts may
answer with sequences which are shorter to write down.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch

Ids = list[int]
Prompt = str | list[dict[str, Any]]  # plain text, or the messages of a conversation
Piece = list[tuple[torch.Tensor, torch.Tensor]]  # per layer: keys and values (heads, tokens, head_dim)
Task = TypeVar("Task")


def length_of(piece: Piece) -> int:
    """How many tokens a piece holds."""
    return piece[0][0].shape[1]


def tail(piece: Piece, count: int | None) -> Piece:
    """The last `count` tokens of a piece. None: all."""
    if count is None or not piece:
        return piece
    start = max(0, length_of(piece) - count)
    return [(keys[:, start:], values[:, start:]) for keys, values in piece]


def head(piece: Piece, count: int) -> Piece:
    """The first `count` tokens of a piece."""
    return [(keys[:, :count], values[:, :count]) for keys, values in piece]


def common_prefix(left: Sequence[int], right: Sequence[int], start: int = 0) -> int:
    """How many ids two sequences begin with alike, which agree on the first `start`."""
    if hasattr(left, "common_prefix"):
        return left.common_prefix(right, start)
    pairs = zip(islice(left, start, None), islice(right, start, None), strict=False)
    return next((k for k, (a, b) in enumerate(pairs, start) if a != b), min(len(left), len(right)))


@dataclass
class Group:
    """One prompt with everything sampled for it. Every process holds all groups."""

    prompt: Prompt
    prompt_ids: Ids
    candidates: list[Ids]  # n
    colliders: list[Ids]  # L, those that count first
    has_content: list[bool]  # L: whether it counts


@dataclass
class RolloutStates:
    """What a generation computed anyway, for each of its B rows."""

    z: torch.Tensor  # (B, H) float32
    queries: list[Piece] = field(default_factory=list)  # of each prompt less its last token; none where not kept
    completions: list[Piece] = field(default_factory=list)


@dataclass
class Rollout:
    """What one generation produced on this process: B rows, those of a group next to each other."""

    prompts: list[Prompt]
    prompt_ids: list[Ids]
    completion_ids: list[Ids]  # with their end token, unless they were cut off
    states: RolloutStates | None = None
    inputs: list[dict[str, Any]] = field(default_factory=list)  # the dataset's rows, for `Policy.reward`
    drawing: Any = None  # a `gcpo.causal.colliders.Drawing`: its colliders, where they are drawn already


@dataclass
class Continuation:
    """A row that is read after keys and values which other rows may share."""

    past: list[Piece]  # what it sees, in order
    ids: Ids  # its own tokens; each predicts the next
    first_position: int  # position id of the first
    tokens: str = "scored_contexts"  # what its tokens are counted as
    scores: bool = True  # whether anyone asks for log-probabilities, rather than for keys and values alone


@dataclass
class Reading:
    """What a forward says of one continuation of S tokens."""

    logp: torch.Tensor  # (S - 1,): log-probability of each token but the first; 0 where the row is not scored
    z: torch.Tensor  # (H,) float32: representation of the tokens but the first; NaN where there is but one
    own: Piece = field(default_factory=list)  # keys and values of its S tokens, where asked for


@dataclass
class WeightInputs:
    """What Upsilon is estimated from, gathered from all processes."""

    z: torch.Tensor  # (P, n, H)
    collider_z: torch.Tensor | None  # (P, L, H), for "loo"
    context_z: torch.Tensor | None  # (P, n, L, m, H), for "scored" (m = 1) and "sampled"
    collider_mask: torch.Tensor  # (P, L) bool: colliders that say anything; those come first


@dataclass
class KLTerms:
    """
    What the second KL term needs, of some rows: what p' of eq. 13 is made of. Where `kl_target` is not p', all are made
    such that eq. 13 gives the target instead.
    """

    context_logp: torch.Tensor  # (B, T, width) log pi_old(y_i | x_{i,l}), x_{i,0} first
    context_weights: torch.Tensor  # (B, width): of the mean over l
    counted: torch.Tensor  # (B,) bool: rows in the term
    scale: float | torch.Tensor  # what the term is multiplied by, for the rows that are not in it
    # (B, T): log pi_old(y | q), None: the policy's own at the first update; of another target, that one's logarithm.
    query_logp: torch.Tensor | None = None


@dataclass
class CausalTerms:
    """What the causal step makes of a rollout."""

    groups: list[Group]  # none with kappa=0 and estimator="none"
    rows: slice  # this process's, of the P * n of all
    upsilon: torch.Tensor | None = None  # (P * n,) of all processes; None with estimator="none"
    weight_inputs: WeightInputs | None = None
    kl: KLTerms | None = None  # of this process's rows; None with kappa=0
    first_contexts: list[Ids] | None = None  # x_{i,0} of each row, for causal_policy_context="context"

    def weigh(self, advantages: torch.Tensor) -> torch.Tensor:
        """B_i = A_i * Upsilon_i for this process's advantages, (B,) or (B, T)."""
        if self.upsilon is None:
            return advantages
        upsilon = self.upsilon[self.rows].to(advantages.dtype)
        if len(advantages) != len(upsilon):
            raise ValueError(
                f"`advantages` must be those of this process's {len(upsilon)} rows, got {len(advantages)}: of what is "
                "gathered from all processes, take `[terms.rows]`."
            )
        return advantages * upsilon.view(-1, *[1] * (advantages.dim() - 1))


class Policy(Protocol):
    """
    A model, as the causal step sees it. `gcpo.ModelPolicy` answers for a transformers model; trainers have their own.

    All methods are collective: where several processes take part, each calls them in the same order, also with
    nothing of its own to ask.
    """

    num_generations: int  # n
    eos_token_ids: list[int]  # what ends a completion

    @property
    def device(self) -> torch.device: ...

    @property
    def rank(self) -> int:
        """Of this process."""

    @property
    def size(self) -> int:
        """How many processes there are."""

    @property
    def max_completion_length(self) -> int | None:
        """Most tokens of a sampled output, None without a limit."""

    @property
    def max_positions(self) -> int | None:
        """Most tokens of a sequence, None where that is unknown."""

    @property
    def hidden_size(self) -> int:
        """H."""

    @property
    def name(self) -> str:
        """The type of the model, as messages call it."""

    @property
    def can_continue(self) -> bool:
        """Whether the model can read rows after keys and values that others share (`read`)."""

    @property
    def shares(self) -> bool:
        """Whether it does so for what completions begin with, too (`share_prefix`)."""

    @property
    def masks_truncated(self) -> bool:
        """Whether completions that end in none of `ending_ids`, which were cut off, are left out of the loss."""

    @property
    def ending_ids(self) -> list[int]:
        """`eos_token_ids`, and the padding token where that counts as an end."""

    @property
    def allows_nan(self) -> bool:
        """Whether a NaN among scores is dealt with later, as by a guard over gradients. Otherwise it is an error."""

    @property
    def step_seed(self) -> int:
        """What all draws of this step are seeded with; from its number, so that a resumed run draws the same."""

    @property
    def can_decode(self) -> bool:
        """Whether completions can be decoded after keys and values (`decode`): transformers generates in-house."""

    def generate(
        self,
        prompts: list[Ids],
        seed: int,
        *,
        limit: int,
        temperature: float | None,
        greedy: Sequence[bool] | None = None,
    ) -> list[Ids]:
        """
        Sample one completion of at most `limit` tokens for each prompt, without touching the random stream that
        candidates are drawn from.

        Args:
            temperature: None: that of the candidates.
            greedy: for each prompt, whether its completion is decoded at temperature 0, token by likeliest token,
                instead. None: none is; as all arguments but the prompts, None on every process or on none.
        """

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
        `generate`, after keys and values: one completion for each row, which follows the pieces of its `past`, in
        order, and its tokens `ids`, at positions from `first_position` on. What rows have in common (the same pieces,
        not equal ones, and equal ids) is read once. The pieces stay as they are.

        Whatever looks back at the tokens of a prompt, such as a repetition penalty, sees the last of `ids` alone.

        Raises:
            ValueError: the policy cannot (`can_decode`).
        """

    def sample_states(self, prompts: list[Ids], seed: int, rows: int) -> tuple[list[Ids], torch.Tensor]:
        """
        Sample an output for each prompt as candidates are sampled, at most `rows` of them at once, and represent them:
        completions and z (len(prompts), H) float32.
        """

    def score(
        self, prompts: list[Ids], completions: list[Ids], length: int, tokens: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Score each completion after its prompt, without gradient: log-probabilities (rows, length), 0 behind a
        completion's end, and representations (rows, H) float32. What is read is counted as `tokens`.
        """

    def read(self, rows: list[Continuation], keep: bool = False) -> list[Reading]:
        """Score and represent continuations, without gradient; with `keep`, return their keys and values too."""

    def reward(self, inputs: list[dict[str, Any]], prompts: list[Prompt], ids: list[Ids]) -> torch.Tensor:
        """Rewards (rows of all processes,) of completions of `prompts`, rows of the dataset; NaN: no reward."""

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, concatenated along the first dimension."""

    def gather_lists(self, items: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other."""

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' tensors."""

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Time inside is spent on this part of the step."""

    def count(self, kind: str, tokens: int) -> None:
        """So many tokens were generated or read for this purpose, on this process."""

    def log(self, name: str, value: torch.Tensor | float) -> None:
        """A metric of the step, the same on every process. NaN: there is none."""


def share(tasks: Sequence[Task], policy: Policy) -> list[Task]:
    """
    This process's part of what processes do together; gathered from all, the first `len(tasks)` results are those of
    the tasks. Each takes as many, the last task again where they do not divide, because what is done is collective.
    """
    each = -(-len(tasks) // policy.size)
    padded = [*tasks, *[tasks[-1]] * (each * policy.size - len(tasks))]
    return padded[policy.rank * each :][:each]
