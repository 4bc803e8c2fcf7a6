"""Drawing colliders, with a policy whose answers are given: which is c_0, what fits, and how the work is shared."""

from collections import Counter

import pytest
import torch
from scripted_policy import END, ListBuilder, ScriptedPolicy, World

from gcpo.causal import CausalOptions, CausalStep, Rollout

pytestmark = pytest.mark.filterwarnings("ignore:`share_prefix` needs")

N, L = 4, 3
CANDIDATES = [[10, 11, END], [12, END], [13, 14, 15], [16, END]]
# The scripted reward of a collider is its length.
COLLIDERS = [[30, END], [31, 32, END], [33, END], [END], [41, END], [42, 43, 44, END]]


def rollout_of(prompts, rank=0, size=1):
    each = len(prompts) * N // size
    rows = range(rank * each, (rank + 1) * each)
    own = [prompts[k // N] for k in rows]
    return Rollout(own, own, [CANDIDATES[k % 4] for k in rows], inputs=[{"prompt": x} for x in own])


def step_of(colliders=COLLIDERS, world=None, rank=0, policy=None, **options):
    settings = {"num_colliders": L, "num_kl_contexts": None, "kl_fraction": 1.0, "context_attention": "full"}
    made = CausalOptions(**{**settings, **options})
    scripted = ScriptedPolicy(made, N, colliders, world=world, rank=rank, **(policy or {}))
    return scripted, CausalStep(scripted, made, ListBuilder())


def test_c_0_is_the_collider_of_highest_reward():
    scripted, step = step_of(collider_choice="reward")
    first, second = step.terms(rollout_of([[1], [2]]), 3).groups
    assert first.colliders == [[31, 32, END], [30, END], [33, END]] and first.has_content == [True] * 3
    assert second.colliders == [[42, 43, 44, END], [41, END], [END]] and second.has_content == [True, True, False]
    assert scripted.logged["colliders/reward"] == pytest.approx(sum(map(len, COLLIDERS)) / 6)
    assert scripted.logged["colliders/first_above"] == 1.0
    # As they are drawn: 2 is not above the mean of 3 and 2, nor is 2 above 4, the only other that says something.
    scripted, step = step_of(log_collider_reward=True)
    assert [group.colliders[0] for group in step.terms(rollout_of([[1], [2]]), 3).groups] == [[30, END], [41, END]]
    assert scripted.logged["colliders/first_above"] == 0.0


def test_equal_rewards_are_drawn_from_evenly():
    equal = [[30, END], [31, END], [32]]  # rewards 2, 2, 1
    found = Counter()
    for seed in range(200):
        _, step = step_of(equal, collider_choice="reward", policy={"step_seed": seed})
        (group,) = step.terms(rollout_of([[1]]), 3).groups
        found[group.colliders[0][0]] += 1
    assert found.keys() == {30, 31} and 70 <= found[30] <= 130  # 4 standard deviations of 200 fair draws


@pytest.mark.parametrize(
    ("rewards", "first"),
    [([torch.nan, 1.0, 0.5], 31), ([torch.nan] * 3, 30), ([-torch.inf, -2.0, -3.0], 31), ([0.0, 0.0, 5.0], 30)],
)
def test_colliders_without_reward_or_content_are_not_chosen(rewards, first):
    colliders = [[30, END], [31, END], [END]]
    scripted, step = step_of(colliders, collider_choice="reward", policy={"step_seed": 1})
    scripted.reward = lambda inputs, prompts, ids: torch.tensor(rewards)
    (group,) = step.terms(rollout_of([[1]]), 3).groups
    if rewards == [0.0, 0.0, 5.0]:  # the best says nothing: one of the other two
        assert group.colliders[0][0] in (30, 31)
    else:
        assert group.colliders[0][0] == first
    assert group.has_content == [True, True, False]


@pytest.mark.parametrize("choice", ["reward", "greedy"])
def test_two_processes_choose_alike(choice):
    def terms(world, rank):
        size = world.size
        scripted, step = step_of(world=world, rank=rank, collider_choice=choice)
        found = step.terms(rollout_of([[1], [2]], rank, size), 3)
        return scripted, found

    alone = terms(World(1), 0)
    world = World(2)
    both = world.run(lambda rank: terms(world, rank))
    for scripted, found in both:
        assert found.groups == alone[1].groups
        torch.testing.assert_close(found.upsilon, alone[1].upsilon)
        if choice == "reward":
            assert scripted.logged["colliders/first_above"] == alone[0].logged["colliders/first_above"]
    asked = alone[0].asked_greedily
    assert asked == ([True, False, False] * 2 if choice == "greedy" else [])
    assert asked == [flag for scripted, _ in both for flag in scripted.asked_greedily]


@pytest.mark.parametrize(
    ("choice", "off"), [("reward", "collider_choice='sample'"), ("sample", "log_collider_reward=F")]
)
def test_a_reward_that_cannot_score_colliders_is_named(choice, off):
    scripted, step = step_of(collider_choice=choice, log_collider_reward=True)

    def fails(inputs, prompts, ids):
        raise RuntimeError("Reward function 'strict' raised KeyError: 'answer'.")

    scripted.reward = fails
    with pytest.raises(RuntimeError, match=f"'strict' raised KeyError: 'answer'.*colliders.*switch .* off .*{off}"):
        step.terms(rollout_of([[1]]), 3)


def test_no_more_colliders_at_once_than_the_rollout_had_rows():
    """Twelve colliders of a rollout of four rows: three calls of four, with a seed each."""
    colliders = [[30 + k, END] for k in range(12)]
    scripted, step = step_of(colliders, num_colliders=12)
    calls = []

    def generate(prompts, seed, **settings):
        calls.append((len(prompts), seed))
        start = 4 * (len(calls) - 1)
        return colliders[start : start + len(prompts)]

    scripted.generate = generate
    (group,) = step.terms(rollout_of([[1]]), 3).groups
    assert group.colliders == colliders
    assert [count for count, _ in calls] == [4] * 3 and len({seed for _, seed in calls}) == 3


# -----------------------------------------------------------------------------------------------------------------
# Groups whose prompts do not fit
# -----------------------------------------------------------------------------------------------------------------

LONG = list(range(50, 70))
OPTIONS = {
    "loo": {},
    "scored": {"estimator": "scored"},
    "sampled": {"estimator": "sampled"},
    "policy under contexts": {"causal_policy_context": "context"},
    "no second KL": {"kappa": 0.0},
    "by reward": {"collider_choice": "reward"},
    "parallel": {"context_attention": "parallel", "collider_attention": "full"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", [1, 2])
def test_a_group_whose_fusion_prompt_does_not_fit_goes_on_without_colliders(name, size):
    """The others are what they are without it, and it has the weights of the group's mean alone, and no second KL."""
    options = {"collider_max_completion_length": 4, **OPTIONS[name]}
    policy = {"can_continue": name == "parallel"}

    def terms(prompts, colliders, positions, world, rank):
        scripted, step = step_of(colliders, world, rank, policy={**policy, "max_positions": positions}, **options)
        return scripted, step.terms(rollout_of(prompts, rank, world.size), 3)

    first = COLLIDERS[:3]
    alone = terms([[1], [1]], first * 2, None, World(1), 0)[1]
    world = World(size)
    with pytest.warns(UserWarning, match=r"A fusion prompt .* more than the model's 27 positions.*without colliders"):
        found = world.run(lambda rank: terms([[1], LONG], first, 27, world, rank))
    for scripted, mine in found:
        assert [any(group.has_content) for group in mine.groups] == [True, False]
        assert scripted.logged["groups_without_colliders"] == 0.5
        assert mine.groups[0].colliders == alone.groups[0].colliders
        if alone.upsilon is not None:
            torch.testing.assert_close(mine.upsilon[:4], alone.upsilon[:4])
            assert mine.upsilon.isfinite().all() and scripted.logged["upsilon/fallback"] == 0.0
        if alone.kl is not None:
            rows = range(mine.rows.start, mine.rows.stop)
            for k, row in enumerate(rows):
                assert bool(mine.kl.counted[k]) == (row < 4)
                if row < 4:
                    torch.testing.assert_close(mine.kl.context_logp[k], alone.kl.context_logp[row])
                else:
                    assert not mine.kl.context_logp[k].any()


@pytest.mark.parametrize("name", ["loo", "scored", "sampled", "policy under contexts", "parallel"])
def test_a_group_whose_contexts_do_not_fit_goes_on_without_colliders(name):
    """The fusion prompt with a collider within its limit fits, a context with what comes after it does not."""
    what = "A parallel context" if name == "parallel" else "A context"
    prompt = LONG[:20] if name != "parallel" else LONG + LONG[:8]
    positions = len(prompt) + 10
    policy = {"max_positions": positions, "can_continue": name == "parallel", "max_completion_length": 6}
    colliders = [[*range(30, 39), END]] * 6  # longer than their limit, so that only contexts are too long
    scripted, step = step_of(colliders, policy=policy, collider_max_completion_length=2, **OPTIONS[name])
    with pytest.warns(UserWarning, match=rf"{what}.* candidate needs \d+ tokens, more than the model's {positions} "):
        terms = step.terms(rollout_of([[1], prompt]), 3)
    assert [any(group.has_content) for group in terms.groups] == [True, False]
    assert scripted.logged["groups_without_colliders"] == 0.5
    assert terms.kl.counted.tolist() == [True] * 4 + [False] * 4
    assert terms.upsilon.isfinite().all()


def test_no_group_fits():
    scripted, step = step_of(policy={"max_positions": 3})
    with pytest.warns(UserWarning, match="without colliders"):
        terms = step.terms(rollout_of([[1], [2]]), 3)
    assert scripted.asked == [] and scripted.logged["groups_without_colliders"] == 1.0
    assert not terms.kl.counted.any() and terms.upsilon.isfinite().all()
