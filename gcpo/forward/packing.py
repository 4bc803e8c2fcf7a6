"""
Shared prefixes: many (context, completion) sequences packed into one row, in which a run of tokens that several of them
begin with stands once. Pure functions on token ids.

The row is a tree written out depth first. A token attends to the tokens on its path from the root and to no other, at
the positions it would have in a sequence of its own: the forward of the row computes what forwards of the sequences
would. The last token of a context predicts its completion's first token, so it is never shared.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from gcpo.causal.port import Ids, common_prefix


@dataclass
class Branch:
    """One sequence of a packed row, as indices into the row."""

    key: int  # which sequence this is, of those that were packed
    path: torch.Tensor  # (length,) int64: the places of everything its last token sees, itself last
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
    ids: Ids  # S
    positions: list[int]  # S position ids
    branches: list[Branch]

    def ends(self) -> torch.Tensor:
        """
        (S,) int64: the place after the last token that sees this one. Depth first, those that see a token stand in one
        run from it on: a token of place q sees one of place k exactly if k <= q < ends[k].
        """
        ends = torch.zeros(len(self.ids), dtype=torch.long)
        for branch in self.branches:
            ends[branch.path] = branch.path[-1] + 1  # branches come in the order of their ends
        return ends

    def allowed(self) -> torch.Tensor:
        """(S, S) bool: may the token of this row attend to that of this column?"""
        place = torch.arange(len(self.ids))
        return (place[None, :] <= place[:, None]) & (place[:, None] < self.ends()[None, :])

    def block_mask(self, device: torch.device) -> BlockMask:
        """`allowed` as FlexAttention takes it: blocks that no token may attend to are never computed."""
        ends, size = self.ends().to(device), len(self.ids)

        def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return (key <= query) & (query < ends[key])

        return create_block_mask(sees, 1, 1, size, size, device=str(device))

    def labels(self) -> torch.Tensor:
        """(S,) int64: the token that each place must predict, -100 where none is scored."""
        ids = torch.tensor(self.ids)
        labels = torch.full_like(ids, -100)
        for branch in self.branches:
            labels[branch.predictors] = ids[branch.completion]
        return labels


def pack(contexts: list[Ids], completions: list[Ids], max_tokens: int | None) -> list[PackedRow]:
    """
    Pack sequences so that common beginnings are shared.

    Args:
        contexts: what each completion comes after; at least one token each.
        completions: the tokens to score.
        max_tokens: a row is closed before it would hold more, or more than twice its longest sequence, if that is more.
            None: there is one row.

    Returns:
        Rows; every sequence is in exactly one. A branch's key is its sequence's number.
    """
    sequences = [context + completion for context, completion in zip(contexts, completions, strict=True)]
    order = sorted(range(len(contexts)), key=sequences.__getitem__)
    rows: list[PackedRow] = []
    ids: Ids = []
    positions: list[int] = []
    branches: list[Branch] = []
    path: list[int] = []  # of the sequence before
    before: int | None = None
    longest = 0

    def close() -> None:
        rows.append(PackedRow(ids, positions, branches))

    for k in order:
        sequence = sequences[k]
        shared = 0
        if before is not None:
            # Not the last token of either, which predicts its completion's first.
            shared = common_prefix(contexts[before][:-1], contexts[k][:-1])
            longest = max(longest, len(sequence))
            if max_tokens is not None and len(ids) + len(sequence) - shared > max(max_tokens, 2 * longest):
                close()
                ids, positions, branches, before = [], [], [], None
        if before is None:
            shared, path, longest = 0, [], len(sequence)
        path = path[:shared] + list(range(len(ids), len(ids) + len(sequence) - shared))
        ids = sequence if before is None else ids + sequence[shared:]
        positions = positions + list(range(shared, len(sequence)))
        branches.append(Branch(k, torch.tensor(path), len(contexts[k])))
        before = k
    if branches:
        close()
    return rows
