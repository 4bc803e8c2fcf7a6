"""The causal step without a model: colliders, scores and states are given, what it makes of them is computed here."""

from dataclasses import replace

import pytest
import torch
from scripted_policy import END, ListBuilder, ScriptedPolicy, World, scores_of

from gcpo.causal import CausalOptions, CausalStep, Rollout
from gcpo.causal.loss import causal_kl_loss
from gcpo_kernels import reference

# Scripted policies that cannot read after keys and values are what many of these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:`share_prefix` needs")

PROMPTS = [[1, 2], [3]]
CANDIDATES = [[10, 11, END], [12, END], [13, 14, 15], [16, END], [20, END], [21, 22, END], [23, END], [24, 25, 26]]
COLLIDERS = [[30, END], [31, 32, END], [33], [40, END], [END], [42, 43, END]]  # three for each prompt, one is empty
LENGTH = 3
ALL = {"num_colliders": 3, "context_attention": "full", "num_kl_contexts": None, "kl_fraction": 1.0}


def rollout_of(start=0, stop=8):
    rows = range(start, stop)
    prompts = [PROMPTS[k // 4] for k in rows]
    return Rollout(prompts, prompts, [CANDIDATES[k] for k in rows], inputs=[{"prompt": x} for x in prompts])


def step_of(world=None, rank=0, policy=None, **options):
    options = CausalOptions(**{**ALL, **options})
    scripted = ScriptedPolicy(options, 4, COLLIDERS, world=world, rank=rank, **(policy or {}))
    return scripted, CausalStep(scripted, options, ListBuilder())


def colliders_of(p):
    """Those that say something first."""
    return [[30, END], [31, 32, END], [33]] if p == 0 else [[40, END], [42, 43, END], [END]]


def context_of(p, i, l):
    others = [CANDIDATES[4 * p + k] for k in range(4) if k != i]
    return ListBuilder().context(PROMPTS[p], others, colliders_of(p)[l])


def test_colliders_are_asked_for_and_sorted():
    scripted, step = step_of(kappa=0.0, log_collider_reward=True)
    terms = step.terms(rollout_of(), LENGTH)
    assert scripted.asked == [
        ListBuilder().fusion(PROMPTS[p], CANDIDATES[4 * p : 4 * p + 4]) for p in (0, 0, 0, 1, 1, 1)
    ]
    assert [group.colliders for group in terms.groups] == [colliders_of(0), colliders_of(1)]
    assert [group.has_content for group in terms.groups] == [[True] * 3, [True, True, False]]
    assert scripted.logged["colliders/masked"] == pytest.approx(1 / 6) and terms.kl is None
    assert scripted.logged["colliders/ended"] == pytest.approx(5 / 6)
    assert scripted.logged["colliders/reward"] == pytest.approx(sum(map(len, COLLIDERS)) / 6)
    assert scripted.tokens["generated_colliders"] == sum(map(len, COLLIDERS))
    _, masking = step_of(kappa=0.0, mask_truncated_colliders=True)
    assert masking.terms(rollout_of(), LENGTH).groups[0].has_content == [True, True, False]


@pytest.mark.parametrize("estimator", ["loo", "scored", "sampled"])
def test_weights_from_given_states(estimator):
    scripted, step = step_of(estimator=estimator, baseline="mean", num_estimator_samples=2, alpha=1.5)
    terms = step.terms(rollout_of(), LENGTH)
    z = torch.stack([scores_of(PROMPTS[k // 4], y)[1] for k, y in enumerate(CANDIDATES)]).view(2, 4, -1)
    mask = torch.tensor([[True] * 3, [True, True, False]])[:, None, :, None]
    if estimator == "loo":
        states = torch.stack(
            [torch.stack([scores_of(PROMPTS[p], ids)[1] for ids in colliders_of(p)]) for p in range(2)]
        )
        context_z = (states / 4)[:, None, :, None].expand(2, 4, 3, 1, -1)
    else:
        output = {"scored": lambda row: CANDIDATES[row], "sampled": lambda row: [7, END]}[estimator]
        m = 1 if estimator == "scored" else 2
        context_z = torch.stack(
            [
                scores_of(context_of(*divmod(k, 4), l), output(k))[1]
                for k in range(8)
                for l in range(3)
                for _ in range(m)
            ]
        ).view(2, 4, 3, m, -1)
    expected = reference.causal_weights(
        z.double(), context_z.double(), alpha=1.5, context_mask=mask.expand(context_z.shape[:4])
    )
    torch.testing.assert_close(terms.upsilon, expected.flatten().float(), atol=1e-5, rtol=1e-5)
    advantages = torch.arange(8.0)
    torch.testing.assert_close(terms.weigh(advantages), advantages * terms.upsilon)
    torch.testing.assert_close(terms.weigh(advantages[:, None].expand(8, 2))[:, 1], advantages * terms.upsilon)
    assert scripted.logged["upsilon/mean"] == pytest.approx(float(terms.upsilon.mean()))


def test_scores_of_full_contexts_and_what_a_draw_leaves_out():
    _, step = step_of()
    terms = step.terms(rollout_of(), LENGTH).kl
    for k, y in enumerate(CANDIDATES):
        p, i = divmod(k, 4)
        for l in range(3 if p == 0 else 2):
            expected = scores_of(context_of(p, i, l), y)[0]
            assert torch.equal(terms.context_logp[k, : len(y), l], expected)
            assert not terms.context_logp[k, len(y) :, l].any()
    torch.testing.assert_close(terms.context_weights[0], torch.full((3,), 1 / 3))
    torch.testing.assert_close(terms.context_weights[4], torch.tensor([0.5, 0.5, 0.0]))
    assert terms.counted.all() and terms.scale == 1.0
    _, some = step_of(kl_fraction=0.5, num_kl_contexts=1)
    drawn = some.terms(rollout_of(), LENGTH).kl
    assert int(drawn.counted.sum()) == 4 and drawn.scale == 2.0
    left = ~drawn.counted
    assert not drawn.context_logp[left].any() and not drawn.context_weights[left].any()
    first = next(k for k in range(8) if drawn.counted[k] and k < 4)
    # x_{i,0} always, and one of the other two, which stands for both.
    assert torch.equal(drawn.context_logp[first, :, 0], terms.context_logp[first, :, 0])
    torch.testing.assert_close(drawn.context_weights[first], torch.tensor([1 / 3, 2 / 3]))
    assert any(torch.equal(drawn.context_logp[first, :, 1], terms.context_logp[first, :, l]) for l in (1, 2))


def test_weights_do_not_depend_on_what_is_drawn_for_the_kl():
    whole, drawn = (step_of(**saving)[1].terms(rollout_of(), LENGTH) for saving in ({}, {"kl_fraction": 0.25}))
    assert drawn.kl.counted.sum() == 2 and torch.equal(whole.upsilon, drawn.upsilon)


def test_truncated_candidates_are_not_drawn_where_they_are_masked():
    ended = torch.tensor([ids[-1] == END for ids in CANDIDATES])
    _, step = step_of(policy={"masks_truncated": True})
    assert torch.equal(step.terms(rollout_of(), LENGTH).kl.counted, ended)
    _, some = step_of(policy={"masks_truncated": True}, kl_fraction=0.5)
    drawn = some.terms(rollout_of(), LENGTH).kl
    assert drawn.counted.sum() == 3 and not drawn.counted[~ended].any() and drawn.scale == 2.0
    _, scored = step_of(policy={"masks_truncated": True}, estimator="scored", kl_fraction=0.5)
    assert scored.terms(rollout_of(), LENGTH).kl.counted.all()  # it needs all of them


def test_parallel_contexts_see_what_they_should():
    _, step = step_of(context_attention="parallel", candidate_context_tokens=1, policy={"can_continue": True})
    terms = step.terms(rollout_of(), LENGTH).kl
    for k, y in enumerate(CANDIDATES):
        p, i = divmod(k, 4)
        shown = [CANDIDATES[4 * p + j][-1:] for j in range(4) if j != i]
        seen = [*PROMPTS[p][:-1], *(token for ids in shown for token in ids), *colliders_of(p)[0], PROMPTS[p][-1]]
        assert torch.equal(terms.context_logp[k, : len(y), 0], scores_of(seen, y)[0])


def test_what_is_given_is_not_made_again():
    scripted, step = step_of(kl_fraction=0.5)
    whole = step.terms(rollout_of(), LENGTH, seed=3)
    asked = len(scripted.asked)
    again = step.terms(rollout_of(), LENGTH, groups=whole.groups, seed=3)
    assert len(scripted.asked) == asked
    assert torch.equal(again.upsilon, whole.upsilon) and torch.equal(again.kl.context_logp, whole.kl.context_logp)
    draws = [step.terms(rollout_of(), LENGTH, groups=whole.groups, seed=seed).kl.counted for seed in range(9)]
    assert len({tuple(draw.tolist()) for draw in draws}) > 1
    given = torch.randn(8, scripted.hidden_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(step.terms(rollout_of(), LENGTH, None, given).weight_inputs.z.view(8, -1), given)


def test_the_papers_form_names_the_first_contexts():
    _, step = step_of(causal_policy_context="context", kl_fraction=0.5)
    terms = step.terms(rollout_of(), LENGTH)
    for k, ids in enumerate(terms.first_contexts):
        assert ids == (context_of(*divmod(k, 4), 0) if terms.kl.counted[k] else PROMPTS[k // 4])


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"estimator": "scored"},
        {"kl_fraction": 0.5, "num_kl_contexts": 1, "log_collider_reward": True},
        {"context_attention": "parallel", "kl_fraction": 0.25, "policy": {"can_continue": True}},
        {"estimator": "none", "policy": {"can_continue": True}},
        {"kl_target": "context", "kl_fraction": 0.5},
        {"kl_target": "ensemble", "num_kl_contexts": 1, "weight_scale": "unit", "similarity": "gaussian"},
    ],
    ids=str,
)
def test_several_processes_give_what_one_gives(size, changed):
    """Also where a group is spread over them, and where colliders do not divide."""
    one, step = step_of(**changed)
    whole = step.terms(rollout_of(), LENGTH)
    world, each = World(size), 8 // size

    def task(rank):
        scripted, own = step_of(world, rank, **changed)
        return scripted, own.terms(rollout_of(rank * each, (rank + 1) * each), LENGTH)

    found = world.run(task)
    for rank, (scripted, terms) in enumerate(found):
        rows = slice(rank * each, (rank + 1) * each)
        assert terms.rows == rows and terms.groups == whole.groups
        if whole.upsilon is not None:
            torch.testing.assert_close(terms.upsilon, whole.upsilon)
            torch.testing.assert_close(terms.weigh(torch.ones(each)), whole.upsilon[rows])
        width = terms.kl.context_weights.shape[1]
        assert torch.equal(terms.kl.context_weights, whole.kl.context_weights[rows, :width])
        assert torch.equal(terms.kl.context_logp, whole.kl.context_logp[rows, :, :width])
        assert torch.equal(terms.kl.counted, whole.kl.counted[rows]) and terms.kl.scale == whole.kl.scale
        assert scripted.logged == pytest.approx(one.logged)
    totals = [scripted.tokens.get("generated_colliders", 0) for scripted, _ in found]
    assert sum(totals) == one.tokens["generated_colliders"]


def test_with_all_parts_off_nothing_is_drawn():
    scripted, step = step_of(kappa=0.0, estimator="none")
    terms = step.terms(rollout_of(), LENGTH)
    assert not scripted.asked and not scripted.tokens and not scripted.logged
    assert (terms.groups, terms.upsilon, terms.kl, terms.rows) == ([], None, None, slice(0, 8))
    assert terms.weigh(torch.ones(8)).tolist() == [1.0] * 8


def test_the_papers_form_needs_the_policy_under_the_context():
    _, step = step_of(causal_policy_context="context")
    terms, logp = step.terms(rollout_of(), LENGTH), torch.full((8, LENGTH), -1.0)
    mask = torch.tensor([[float(t < len(y)) for t in range(LENGTH)] for y in CANDIDATES])
    with pytest.raises(ValueError, match=r"`causal_logp`.*first_contexts"):
        causal_kl_loss(terms.kl, step.options, logp, mask)
    under = [causal_kl_loss(terms.kl, step.options, logp, mask, causal_logp=logp + d)[0] for d in (0.0, -1.0)]
    assert under[0] != under[1]


def test_advantages_are_those_of_this_process():
    _, step = step_of(kappa=0.0)
    with pytest.raises(ValueError, match="`advantages` must be those of this process's 8 rows, got 16"):
        step.terms(rollout_of(), LENGTH).weigh(torch.ones(16))


def test_the_baseline_follows_the_estimator_it_is_used_with():
    assert CausalOptions().group_baseline == "loo"
    assert replace(CausalOptions(), estimator="scored").group_baseline == "mean"
    assert replace(CausalOptions(baseline="loo"), estimator="scored").group_baseline == "loo"


def nan_in(tensor):
    return tensor.index_fill(0, torch.tensor([1]), torch.nan)


def each(**changes):
    """Every reading, with these functions of it in place of its parts."""
    return lambda readings: [replace(one, **{name: f(one) for name, f in changes.items()}) for one in readings]


SAMPLED, READS = {"estimator": "sampled"}, {"policy": {"can_continue": True}, "context_attention": "parallel"}
# method, what becomes of its answer, options under which it is asked, what the error says
WRONG = {
    "fewer outputs": ("generate", lambda a: a[1:], {}, "must return 6 completions, one for each prompt, got 5"),
    "no outputs": ("generate", lambda a: None, {}, "must return 6 completions, one for each prompt, got NoneType"),
    "scores alone": ("score", lambda a: a[0], {}, "must return a tuple of two, got Tensor"),
    "short rows": ("score", lambda a: (a[0][:, 1:], a[1]), {}, r"of shape \(8, 3\), got \(8, 2\)"),
    "fewer rows": ("score", lambda a: (a[0][1:], a[1]), {}, r"log-probabilities of shape \(8, 3\), got \(7, 3\)"),
    "small z": ("score", lambda a: (a[0], a[1][:, 1:]), {}, r"representations of shape \(8, 6\), got \(8, 5\)"),
    "a list": ("score", lambda a: (a[0].tolist(), a[1]), {}, "must return log-probabilities as a tensor, got list"),
    "NaN": ("score", lambda a: (nan_in(a[0]), a[1]), {}, "log-probabilities that are numbers, got NaN"),
    "NaN in z": ("score", lambda a: (a[0], nan_in(a[1])), {}, "representations that are numbers, got NaN"),
    "fewer samples": ("sample_states", lambda a: (a[0][1:], a[1]), SAMPLED, "must return 24 completions, .* got 23"),
    "z by row": ("sample_states", lambda a: (a[0], a[1][:, None]), SAMPLED, r"shape \(24, 6\), got \(24, 1, 6\)"),
    "no states": ("sample_states", lambda a: a[0], SAMPLED, "must return a tuple of two, got list"),
    "NaN sampled": ("sample_states", lambda a: (a[0], nan_in(a[1])), SAMPLED, "representations .* got NaN"),
    "fewer readings": ("read", lambda a: a[1:], READS, "must return 1 readings, one for each row, got 0"),
    "no readings": ("read", lambda a: None, READS, "must return 1 readings, one for each row, got NoneType"),
    "no keys": ("read", each(own=lambda one: []), READS, "keys and values of 1 tokens with `keep=True`, got 0"),
    "other keys": ("read", each(own=lambda one: [(torch.zeros(1, 4),) * 2]), READS, "of 1 tokens .* got 4"),
    "short reading": ("read", each(logp=lambda one: one.logp[1:]), READS, r"of shape \(3,\), got \(2,\)"),
    "NaN read": ("read", each(z=lambda one: one.z * torch.nan), READS, "representations that are numbers, got NaN"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_policy_that_answers_wrongly(name):
    """One error, which names the method and what it returned."""
    method, broken, changed, message = WRONG[name]
    scripted, step = step_of(**changed)
    step.terms(rollout_of(), LENGTH)
    answer = getattr(scripted, method)
    setattr(scripted, method, lambda *args, **kwargs: broken(answer(*args, **kwargs)))
    with pytest.raises((ValueError, TypeError), match=f"`policy.{method}` .*{message}"):
        step.terms(rollout_of(), LENGTH)


def test_nan_is_let_through_where_a_guard_deals_with_it():
    scripted, step = step_of(policy={"allows_nan": True})
    score = scripted.score
    scripted.score = lambda *args: tuple(map(nan_in, score(*args)))
    assert step.terms(rollout_of(), LENGTH).kl.context_logp.isnan().any()


@pytest.mark.parametrize("items", [None, 20])
def test_the_second_term_is_reduced_as_the_loss_it_is_added_to(items):
    """Of rows that are left out the tokens count all the same, so that a draw's scale makes up for them."""
    _, step = step_of(kappa=0.5)
    terms = step.terms(rollout_of(), LENGTH).kl
    mask = torch.tensor([[k < len(ids) for k in range(LENGTH)] for ids in CANDIDATES])
    logp = -torch.rand(8, LENGTH, generator=torch.Generator().manual_seed(0))

    def loss(counted):
        own = replace(terms, counted=counted)
        return causal_kl_loss(own, step.options, logp, mask, loss_type="dapo", num_items_in_batch=items)[0]

    alone = [loss(torch.arange(8) == k) for k in range(8)]
    assert min(alone) > 1e-4
    torch.testing.assert_close(sum(alone), loss(torch.ones(8, dtype=torch.bool)))
