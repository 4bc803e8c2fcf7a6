"""The tree of what sequences begin with: it spells each of them, and holds nothing twice."""

import random

import pytest

from gcpo.forward.prefix_tree import grow


def check(sequences):
    nodes, spelled = grow(sequences)
    for sequence, path in zip(sequences, spelled, strict=True):
        assert [token for number in path for token in nodes[number].ids] == sequence
        for depth, number in enumerate(path):
            node = nodes[number]
            assert node.path == path[:depth] and node.ids
            assert node.start == sum(len(nodes[k].ids) for k in node.path)
    distinct = {tuple(sequence[: k + 1]) for sequence in sequences for k in range(len(sequence))}
    assert sum(len(node.ids) for node in nodes) == len(distinct)
    for number, node in enumerate(nodes):  # a run is only cut where sequences part or one ends
        children = [other for other in nodes if other.path == [*node.path, number]]
        ends = any(path == [*node.path, number] for path in spelled)
        assert len({child.ids[0] for child in children}) == len(children) != 1 or ends
    return nodes


@pytest.mark.parametrize(
    "sequences",
    [[[1, 2, 3]], [[1, 2], [1, 2]], [[1, 2], [1, 2, 3]], [[1], [2]], [[], [1]], [[]], []],
    ids=str,
)
def test_small(sequences):
    check(sequences)


@pytest.mark.parametrize("seed", range(20))
def test_random(seed):
    draw = random.Random(seed)
    check([[draw.randrange(2) for _ in range(draw.randrange(7))] for _ in range(draw.randrange(1, 12))])


def test_contexts_of_a_group_share_their_runs():
    """Contexts without y_i, for every i and two colliders: what is held grows like n, not like n squared times L."""
    n, long = 6, 50
    candidates = [[100 + k] * long for k in range(n)]
    contexts = [
        [1, *[t for k, y in enumerate(candidates) if k != i for t in y], collider]
        for i in range(n)
        for collider in (2, 3)
    ]
    held = sum(len(node.ids) for node in check(contexts))
    assert held < sum(map(len, contexts)) / 2
