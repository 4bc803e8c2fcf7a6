"""
Parallel contexts (`context_attention="parallel"`): candidates and colliders are read once, each seeing the query and
itself, and a copy of candidate i sees the query, the other candidates, one collider and itself. No text stands between
them. What a candidate was generated with is what it is read with here, so its keys and values can be the rollout's.

Parallel colliders (`collider_attention="parallel"`): an integrated answer is decoded after the query, all candidates
side by side, and the turn that asks for it, which alone passes through the model.
"""

from dataclasses import dataclass, field

import torch

from gcpo.causal.answers import checked_readings
from gcpo.causal.contexts import PromptBuilder
from gcpo.causal.port import Continuation, Group, Ids, Piece, Policy, Reading, Rollout, head, tail


@dataclass
class GroupReading:
    """What is known of one group's query, candidates and colliders."""

    query: Piece = field(default_factory=list)  # of the query less its last token
    candidates: dict[int, Reading] = field(default_factory=dict)
    colliders: dict[int, Reading] = field(default_factory=dict)


def known_readings(policy: Policy, rollout: Rollout) -> dict[int, GroupReading]:
    """What generation has left of this process's candidates, by group; nothing where it kept no keys and values."""
    states, known = rollout.states, dict[int, GroupReading]()
    if states is None or not states.queries:
        return known
    nothing, first = torch.zeros(0, device=policy.device), policy.rank * len(rollout.prompts)
    for k in range(len(rollout.prompts)):
        p, i = divmod(first + k, policy.num_generations)
        group = known.setdefault(p, GroupReading(query=states.queries[k]))
        group.candidates[i] = Reading(nothing, states.z[k], states.completions[k])
    return known


def read_groups(
    policy: Policy,
    groups: dict[int, Group],
    known: dict[int, GroupReading],
    candidates: list[tuple[int, int]],  # (group, k)
    colliders: list[tuple[int, int]],  # (group, l)
) -> dict[int, GroupReading]:
    """
    Read these candidates and colliders under their queries, those apart that are `known`. Each is read from the query's
    last token on, which predicts its first.
    """
    found = {p: known.get(p) or GroupReading() for p in groups}
    wanted = [
        *((p, "candidates", k) for p, k in candidates if k not in found[p].candidates),
        *((p, "colliders", l) for p, l in colliders if l not in found[p].colliders),
    ]
    missing = sorted({p for p, _, _ in wanted if not found[p].query and len(groups[p].prompt_ids) > 1})
    stems = [Continuation([], groups[p].prompt_ids[:-1], 0, "scored_query", scores=False) for p in missing]
    for p, reading in zip(missing, checked_readings(policy, stems, keep=True), strict=True):
        found[p].query = reading.own
    rows = []
    for p, kind, k in wanted:
        query = groups[p].prompt_ids
        own = (groups[p].candidates if kind == "candidates" else groups[p].colliders)[k]
        tokens = "scored_query" if kind == "candidates" else "scored_colliders"
        rows.append(Continuation([found[p].query], query[-1:] + own, len(query) - 1, tokens))
    for (p, kind, k), reading in zip(wanted, checked_readings(policy, rows, keep=True), strict=True):
        reading.own = tail(reading.own, len(reading.logp))  # without the query's last token
        (found[p].candidates if kind == "candidates" else found[p].colliders)[k] = reading
    return found


def copy_start(group: Group, i: int, l: int) -> int:
    """
    The position of the first token of y_i under its parallel context with collider l: behind the longest of what the
    copy sees, as if that were what it followed. What is not part of x_{i,l} (the other colliders, y_i itself) has no
    say in it, so that it cannot change a score.
    """
    seen = [ids for k, ids in enumerate(group.candidates) if k != i]
    return len(group.prompt_ids) + max(map(len, [*seen, group.colliders[l]]))


def score_copies(
    policy: Policy,
    groups: dict[int, Group],
    found: dict[int, GroupReading],
    wanted: list[tuple[int, int, int]],  # (group, i, l)
    shown: int | None,
) -> list[Reading]:
    """
    Score candidate i under its parallel context with collider l.

    A copy begins at the position `copy_start` gives, and sees the last `shown` tokens of every other candidate (None:
    all), at the positions that they were read at.
    """
    rows = []
    for p, i, l in wanted:
        group, reading = groups[p], found[p]
        others = [tail(reading.candidates[k].own, shown) for k in range(len(group.candidates)) if k != i]
        after = copy_start(group, i, l)
        ids = group.prompt_ids[-1:] + group.candidates[i]
        rows.append(Continuation([reading.query, *others, reading.colliders[l].own], ids, after - 1))
    return checked_readings(policy, rows)


def collider_rows(
    builder: PromptBuilder,
    groups: dict[int, Group],
    found: dict[int, GroupReading],
    wanted: list[int],
    shown: int | None,
) -> list[Continuation]:
    """
    What colliders are decoded after, for `policy.decode`: the query, the last `shown` tokens of every candidate (None:
    all), each at the positions it was read at, and `builder.fusion_turn` behind the longest candidate, as if that were
    the one it followed. Candidates end where their content does: special tokens behind it, such as the end token, are
    not shown, and the turn begins with an end of its own.

    A row's ids begin with the query's last token, which is in no piece, read at the position before the turn's.

    Args:
        groups: by number; colliders may be missing.
        found: what is known of these groups: the queries, and all candidates.
        wanted: the group of each collider. Those of one group share their pieces, so that a turn is read once.
        shown: `candidate_context_tokens`.
    """
    rows = {}
    for p in dict.fromkeys(wanted):
        group, reading = groups[p], found[p]
        parts = [
            tail(head(reading.candidates[k].own, _content_length(builder, ids)), shown)
            for k, ids in enumerate(group.candidates)
        ]
        start = len(group.prompt_ids) + max(map(len, group.candidates))
        ids = group.prompt_ids[-1:] + builder.fusion_turn(group.prompt)
        rows[p] = Continuation([reading.query, *parts], ids, start - 1, "generated_colliders", scores=False)
    return [rows[p] for p in wanted]


def _content_length(builder: PromptBuilder, ids: Ids) -> int:
    """Tokens of a completion up to its last that is not special."""
    return next((stop for stop in range(len(ids), 0, -1) if builder.content(ids[stop - 1 : stop])), 0)
