"""Drawing contexts and sequences: what is not drawn is not scored, and the expected gradient is the full one."""

from itertools import combinations

import pytest
import torch
from test_trainer_causal import first_batch, make_trainer, plain_scores
from tiny_policy import save_policy

from gcpo.causal.sampling import draw_contexts
from gcpo_kernels import gcpo_loss


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_everything_is_drawn_by_default():
    draw = draw_contexts([3, 2, 0], None, 1.0, generator())
    assert draw.contexts == [[0, 1, 2], [0, 1], []]
    torch.testing.assert_close(draw.weights, torch.tensor([[1 / 3] * 3, [0.5, 0.5, 0], [0, 0, 0]]))
    assert draw.counted.tolist() == [True, True, False] and draw.scale == 1.0


@pytest.mark.parametrize("num_contexts", [1, 2, 3, 4, 9])
def test_the_first_context_is_always_drawn_and_weights_are_a_mean(num_contexts):
    for seed in range(20):
        draw = draw_contexts([5, 1, 4], num_contexts, 1.0, generator(seed))
        for drawn, weights, total in zip(draw.contexts, draw.weights, (5, 1, 4), strict=True):
            assert drawn[0] == 0 and drawn == sorted(set(drawn)) and max(drawn) < total
            assert len(drawn) == min(total, num_contexts + 1)
            assert weights.sum() == pytest.approx(1.0) and weights[0] == pytest.approx(1 / total)


@pytest.mark.parametrize(("count", "fraction", "drawn"), [(8, 0.5, 4), (8, 0.3, 2), (3, 0.01, 1), (5, 1.0, 5)])
def test_share_of_sequences(count, fraction, drawn):
    draw = draw_contexts([2] * count, None, fraction, generator())
    assert draw.counted.sum() == drawn and draw.scale == pytest.approx(count / drawn)
    assert [bool(contexts) for contexts in draw.contexts] == draw.counted.tolist()


def test_only_sequences_with_a_collider_are_drawn():
    """The rest add nothing to the term: drawing them would only scale up the others, at random."""
    for seed in range(20):
        draw = draw_contexts([0, 2, 0, 2, 2, 2, 0], None, 0.5, generator(seed))
        assert draw.counted.sum() == 2 and not draw.counted[[0, 2, 6]].any() and draw.scale == 2.0
    draw = draw_contexts([0, 0], None, 0.5, generator())
    assert draw.contexts == [[], []] and not draw.counted.any()


@pytest.mark.parametrize("estimator", ["loo", "scored"])
def test_masked_candidates_are_not_drawn(estimator, policy, tmp_path):
    """Their tokens count for nothing in the loss. `scored` needs their representations under every context."""
    settings = {"mask_truncated_completions": True, "kl_fraction": 0.5}
    likely_end = {"sequence_bias": [[[1], 1.5]]}
    trainer = make_trainer(policy, tmp_path, estimator=estimator, generation_kwargs=likely_end, **settings)
    output, captured = first_batch(trainer)
    ended = torch.tensor([y[-1] in trainer.eos_token_ids for group in captured["groups"] for y in group.candidates])
    assert 1 < ended.sum() < 8
    if estimator == "scored":
        assert output["has_collider"].all()
    else:
        drawn = max(1, round(0.5 * int(ended.sum())))
        assert output["has_collider"].sum() == drawn and not output["has_collider"][~ended].any()
        assert output["causal_scale"] == pytest.approx(int(ended.sum()) / drawn)


def test_the_first_context_alone():
    """Of the same sequences that a draw with others has."""
    for seed in range(5):
        draw = draw_contexts([5, 0, 1, 4], 0, 0.7, generator(seed))
        others = draw_contexts([5, 0, 1, 4], 2, 0.7, generator(seed))
        assert draw.contexts == [[0] if some else [] for some in others.contexts] and sum(map(len, draw.contexts)) == 2
        assert draw.weights.tolist() == [[float(bool(some))] for some in others.contexts]
        assert torch.equal(draw.counted, others.counted) and draw.scale == others.scale == 1.5


def test_draws_are_uniform():
    """1,200 draws of 2 among 4: each of the 6 pairs 200 times, within five standard deviations."""
    seen = {}
    source = generator()
    for _ in range(1200):
        pair = tuple(draw_contexts([5], 2, 1.0, source).contexts[0][1:])
        seen[pair] = seen.get(pair, 0) + 1
    assert seen.keys() == set(combinations(range(1, 5), 2))
    assert all(abs(times - 200) < 5 * (1200 * (1 / 6) * (5 / 6)) ** 0.5 for times in seen.values())


def test_expected_gradient_over_all_draws_is_the_full_one():
    """Every choice of 2 contexts among 3 for each of 2 sequences, and every choice of sequences, exhaustively."""
    torch.manual_seed(0)
    b, t, contexts = 2, 3, 4
    logp = (-torch.rand(b, t, dtype=torch.float64) - 0.5).requires_grad_()
    context_logp = -torch.rand(b, t, contexts, dtype=torch.float64) * 0.2 - 1.5  # p' stays inside its clamp
    query_logp = torch.full((b, t), -0.7, dtype=torch.float64)
    advantages, mask = torch.zeros(b, dtype=torch.float64), torch.tensor([[1, 1, 1], [1, 1, 0]])

    def gradient(scores, weights, counted, scale):
        loss, metrics = gcpo_loss(
            logp,
            advantages,
            mask * counted[:, None],
            query_logp=query_logp,
            context_logp=scores,
            context_weights=weights,
            kappa=0.5,
        )
        assert metrics["proj_clamped"] == 0
        return torch.autograd.grad(loss * scale, logp)[0]

    full = gradient(context_logp, None, torch.ones(b), 1.0)
    total, draws = torch.zeros_like(full), 0
    for row in range(b):
        counted = torch.nn.functional.one_hot(torch.tensor(row), b)
        for first in combinations(range(1, contexts), 2):
            for second in combinations(range(1, contexts), 2):
                scores = torch.stack([context_logp[k][:, [0, *some]] for k, some in enumerate((first, second))])
                # As draw_contexts weighs 2 drawn among 3.
                weights = torch.tensor([[1 / 4, 3 / 8, 3 / 8]] * b, dtype=torch.float64)
                total += gradient(scores, weights, counted, 2.0)
                draws += 1
    assert draws == 2 * 9 and full.abs().max() > 1e-3
    torch.testing.assert_close(total / draws, full, atol=1e-12, rtol=1e-10)
    drawn = draw_contexts([4, 4], 2, 0.5, generator())
    assert drawn.scale == 2.0
    row = drawn.weights[drawn.counted][0]
    torch.testing.assert_close(row, torch.tensor([1 / 4, 3 / 8, 3 / 8]))


def test_only_what_is_drawn_is_scored(policy, tmp_path):
    full = make_trainer(policy, tmp_path, num_colliders=4, share_prefix=False)
    first_batch(full)
    some = make_trainer(policy, tmp_path, num_colliders=4, num_kl_contexts=1, kl_fraction=0.5, share_prefix=False)
    output, captured = first_batch(some)
    assert output["context_logps"].shape[2] == 2
    assert output["has_collider"].sum() == 4 and output["causal_scale"] == 2.0
    tokens = [float(trainer._account.tokens["scored_contexts"]) for trainer in (full, some)]
    assert tokens[1] < 0.3 * tokens[0]  # 8 x 4 scored, against 4 x 2
    row = int(output["has_collider"].nonzero()[0])
    group, i = captured["groups"][row // 4], row % 4
    others = group.candidates[:i] + group.candidates[i + 1 :]
    context = some._causal.builder.context(group.prompt, others, group.colliders[0])
    expected, _ = plain_scores(some, context, group.candidates[i])
    got = output["context_logps"][row, : len(expected), 0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
