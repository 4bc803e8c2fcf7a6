"""Sequences as a tree of what they begin with: every run of tokens that some of them share is one node."""

from collections.abc import Hashable
from dataclasses import dataclass

from gcpo.causal.port import Ids, common_prefix


@dataclass
class Node:
    ids: Ids  # at least one token
    start: int  # how many tokens come before
    path: list[int]  # the nodes before, root first, by number


def grow(sequences: list[Ids]) -> tuple[list[Node], list[list[int]]]:
    """
    Returns:
        The nodes, each after those of its path, and for every sequence the numbers of the nodes that spell it.
    """
    nodes: list[Node] = []
    spelled: list[list[int]] = [[] for _ in sequences]

    def split(members: list[int], depth: int, path: list[int]) -> None:
        """`members` agree on their first `depth` tokens, which `path` spells."""
        by_token: dict[Hashable, list[int]] = {}
        for k in members:
            spelled[k] = path
            if len(sequences[k]) > depth:
                by_token.setdefault(sequences[k][depth], []).append(k)
        for those in by_token.values():
            first = sequences[those[0]]
            end = min(common_prefix(first, sequences[k], depth) for k in those)
            nodes.append(Node(first[depth:end], depth, path))
            split(those, end, [*path, len(nodes) - 1])

    split(list(range(len(sequences))), 0, [])
    return nodes, spelled
