"""
Shared prefixes: many (context, completion) sequences packed into one row, in which a run of tokens that several of them
begin with stands once. Pure functions on token ids.

The row is a tree written out depth first. A token attends to the tokens on its path from the root and to no other, at
the positions it would have in a sequence of its own: the forward of the row computes what forwards of the sequences
would. The last token of a context predicts its completion's first token, so it is never shared.
"""

from collections.abc import Hashable
from dataclasses import dataclass

import torch

Ids = list[int]


@dataclass
class Branch:
    """One sequence of a packed row, as indices into the row."""

    key: Hashable  # which sequence this is, of those that were packed
    path: torch.Tensor  # (length,) int64: the places of everything its last token sees, itself last
    new_from: int  # where in the path the tokens begin that no branch before has
    context_length: int  # where in the path the completion begins

    @property
    def completion(self) -> torch.Tensor:
        """Places of the completion's tokens."""
        return self.path[self.context_length :]

    @property
    def predictors(self) -> torch.Tensor:
        """Places of the tokens that predict them."""
        return self.path[self.context_length - 1 : -1]


@dataclass
class PackedRow:
    ids: torch.Tensor  # (S,) int64
    positions: torch.Tensor  # (S,) int64: position ids
    branches: list[Branch]
    base: int = 0  # tokens at its beginning that score completions under the query alone

    def allowed(self) -> torch.Tensor:
        """(S, S) bool: may the token of this row attend to that of this column?"""
        size = len(self.ids)
        mask = torch.zeros(size, size, dtype=torch.bool)
        for branch in self.branches:
            path, start = branch.path, branch.new_from
            depth = torch.arange(len(path))
            mask[path[start:, None], path[None, :]] = depth[None, :] <= depth[start:, None]
        return mask

    def labels(self) -> torch.Tensor:
        """(S,) int64: the token that each place must predict, -100 where none is scored."""
        labels = torch.full((len(self.ids),), -100, dtype=torch.long)
        for branch in self.branches:
            if branch.context_length < len(branch.path):
                labels[branch.predictors] = self.ids[branch.completion]
        return labels


def pack(contexts: list[Ids], completions: list[Ids], max_tokens: int) -> list[PackedRow]:
    """
    Pack sequences so that common beginnings are shared.

    Args:
        contexts: what each completion comes after; at least one token each.
        completions: the tokens to score.
        max_tokens: a row is closed before it would hold more, or more than twice its longest sequence, if that is more.

    Returns:
        Rows; every sequence is in exactly one. A branch's key is its sequence's number.
    """
    order = sorted(range(len(contexts)), key=lambda k: contexts[k] + completions[k])
    rows: list[PackedRow] = []
    ids: Ids = []
    positions: list[int] = []
    branches: list[Branch] = []
    path: list[int] = []  # of the sequence before
    before: int | None = None
    longest = 0

    def close() -> None:
        rows.append(PackedRow(torch.tensor(ids), torch.tensor(positions), list(branches)))

    for k in order:
        sequence = contexts[k] + completions[k]
        shared = 0
        if before is not None:
            shared = _common(contexts[before], contexts[k])
            longest = max(longest, len(sequence))
            if len(ids) + len(sequence) - shared > max(max_tokens, 2 * longest):
                close()
                ids, positions, branches, before = [], [], [], None
        if before is None:
            shared, path, longest = 0, [], len(sequence)
        path = path[:shared] + list(range(len(ids), len(ids) + len(sequence) - shared))
        ids = ids + sequence[shared:]
        positions = positions + list(range(shared, len(sequence)))
        branches.append(Branch(k, torch.tensor(path), shared, len(contexts[k])))
        before = k
    if branches:
        close()
    return rows


def _common(left: Ids, right: Ids) -> int:
    """How many tokens two contexts may share: those they begin with, but for the last of either."""
    limit = min(len(left), len(right)) - 1
    for k in range(limit):
        if left[k] != right[k]:
            return k
    return max(limit, 0)


def pack_parallel(
    query: Ids,
    candidates: list[Ids],  # n
    colliders: list[Ids],  # L
    wanted: list[tuple[int, int]],  # (i, l)
    shown: int | None,
    max_tokens: int,
) -> list[PackedRow]:
    """
    Parallel contexts of one prompt: candidates and colliders are encoded once, each seeing the query and itself, and a
    copy of candidate i sees the query, the other candidates, collider l and itself. No text stands between them.

    Args:
        query: at least one token. Its last token stands again before each candidate and each copy: there it predicts
            their first token, which for a copy depends on what the copy sees.
        wanted: which copies are made.
        shown: how many tokens of another candidate a copy sees, counted from its end. None: all.
        max_tokens: a row is closed before it would hold more, or more than twice what all rows begin with, if that is
            more: the query, the candidates and the colliders.

    Returns:
        At least one row. Branches with key ("query", k) score candidate k under the query (in the first row), those
        with key (i, l) score candidate i under its parallel context. Blocks begin at the position after the query,
        copies at the one after the longest block, as if it were what they followed.
    """
    ids, positions = list(query), list(range(len(query)))
    stem = list(range(len(query) - 1))
    base: list[Branch] = []

    def block(key: Hashable, before: list[int], own: Ids, first_position: int, scored: bool) -> Branch:
        """Append a copy of the query's last token and `own`, which see `before` and themselves."""
        places = list(range(len(ids), len(ids) + 1 + len(own)))
        ids.extend([query[-1], *own])
        positions.extend(range(first_position - 1, first_position + len(own)))
        path = torch.tensor(before + places)
        return Branch(key, path, len(before), len(before) + 1 if scored else len(path))

    base.append(Branch("stem", torch.arange(len(query)), 0, len(query)))
    blocks = [block(("query", k), stem, own, len(query), True) for k, own in enumerate(candidates)]
    ends = [block(("collider", l), stem, own, len(query), False) for l, own in enumerate(colliders)]
    base += [*blocks, *ends]
    base_length = len(ids)
    after = len(query) + max(map(len, [*candidates, *colliders]))
    visible = [b.completion.tolist()[-shown:] if shown else b.completion.tolist() for b in blocks]
    said = [b.path[len(stem) + 1 :].tolist() for b in ends]
    rows: list[PackedRow] = []
    copies: list[Branch] = []

    def close() -> None:
        # Scores under the query are the same in every row: the first one's count.
        scoring = base if not rows else [Branch(b.key, b.path, b.new_from, len(b.path)) for b in base]
        rows.append(PackedRow(torch.tensor(ids), torch.tensor(positions), scoring + copies, 0 if rows else base_length))

    for i, l in wanted:
        if copies and len(ids) + 1 + len(candidates[i]) > max(max_tokens, 2 * base_length):
            close()
            copies = []
            del ids[base_length:], positions[base_length:]
        seen = [place for k, places in enumerate(visible) if k != i for place in places]
        copies.append(block((i, l), [*stem, *seen, *said[l]], candidates[i], after, True))
    close()
    return rows
