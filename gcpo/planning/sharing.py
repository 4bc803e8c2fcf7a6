"""
How many tokens contexts have in common, from what stands in them and not from ids: the counts of
`gcpo.forward.packing` before there is anything to pack.
"""

from itertools import takewhile
from typing import Any

Run = tuple[tuple[Any, ...], float]  # tokens that stand together: what they are, and how many


def packed_rows(contexts: list[list[Run]], completion: float, max_tokens: int) -> list[float]:
    """Tokens of each packed row, closed as `gcpo.forward.packing.pack` closes them."""
    rows: list[float] = []
    size, longest = 0.0, 0.0
    before: list[Run] | None = None
    for context in sorted(contexts, key=lambda runs: [name for name, _ in runs]):
        length = sum(tokens for _, tokens in context)
        own = length + completion
        if before is not None:
            # The last token of a context is never shared: it predicts its completion's first.
            shared = min(_shared(before, context), length - 1)
            longest = max(longest, own)
            if size + own - shared > max(max_tokens, 2 * longest):
                rows.append(size)
                before = None
            else:
                size += own - shared
        if before is None:
            size, longest = own, own
        before = context
    return [*rows, size] if contexts else rows


def tree_nodes(contexts: list[list[Run]]) -> list[tuple[float, float]]:
    """Where each run of a tree of contexts starts, and its tokens, the last of every context left out."""
    nodes: dict[tuple[Any, ...], tuple[float, float]] = {}
    for context in contexts:
        path: tuple[Any, ...] = ()
        start, last = 0.0, max((k for k, (_, tokens) in enumerate(context) if tokens), default=0)
        for k, (name, tokens) in enumerate(context):
            path = (*path, name)
            nodes[path] = start, tokens - (k == last)
            start += tokens
    return [(start, tokens) for start, tokens in nodes.values() if tokens > 0]


def _shared(left: list[Run], right: list[Run]) -> float:
    """Tokens of the runs that two contexts begin with."""
    return sum(a[1] for a, _ in takewhile(lambda pair: pair[0][0] == pair[1][0], zip(left, right, strict=True)))
