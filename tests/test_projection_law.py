"""
What the projection says on average, by enumerating which collider is c_0: with exchangeable colliders E[p'] = pi(y | q)
and E[Zbar - Zprime] = 0, up to the clamp; with a c_0 that is chosen, what the choice makes likelier.
"""

from collections.abc import Callable, Iterator
from itertools import product
from math import prod

import pytest
import torch
from torch import Tensor

from gcpo_kernels import causal_weights, gcpo_loss, maths, reference
from gcpo_kernels.group import context_difference

FLOOR = 1e-6
BOTH = pytest.mark.parametrize("project", [maths.project, reference.projection], ids=["torch", "oracle"])
Project = Callable[[Tensor, Tensor, None, float], tuple[Tensor, Tensor]]


def choices(x: Tensor, dim: int) -> list[Tensor]:
    """Every choice of the entry along `dim` that comes first."""
    size = x.shape[dim]
    orders = [[first, *(k for k in range(size) if k != first)] for first in range(size)]
    return [x.index_select(dim, torch.tensor(order)) for order in orders]


def scores(contexts: int) -> tuple[Tensor, Tensor]:
    """Probabilities of 200 tokens under the query, (200,), and under the contexts, (200, L), far from the clamp."""
    generator = torch.Generator().manual_seed(contexts)
    query = 0.2 + 0.5 * torch.rand(200, generator=generator, dtype=torch.float64)
    return query, 0.15 * torch.rand(200, contexts, generator=generator, dtype=torch.float64)


@BOTH
@pytest.mark.parametrize("contexts", [2, 3, 4, 8])
def test_the_mean_of_the_projection_is_the_query(contexts: int, project: Project) -> None:
    query, given = scores(contexts)
    found = [project(query.log(), x.log(), None, FLOOR) for x in choices(given, 1)]
    assert not torch.stack([clamped for _, clamped in found]).any()
    relative = torch.stack([log_proj.exp() for log_proj, _ in found]) / query - 1.0
    assert relative.mean(dim=0).abs().max() < 1e-12
    assert relative.abs().mean() > 0.02  # what a single draw says


@pytest.mark.parametrize("contexts", [2, 4])
def test_on_policy_the_second_kl_pulls_nowhere(contexts: int) -> None:
    """The mean over choices of the gradient is 0 where the policy is the one that generated; each alone is not."""
    query, given = scores(contexts)
    gradients = []
    for x in choices(given, 1):
        logp = query.log()[None].requires_grad_()
        loss, metrics = gcpo_loss(
            logp,
            torch.zeros(1, dtype=torch.float64),
            torch.ones(1, 200),
            context_logp=x.log()[None],
            kappa=1.0,
            loss_type="luspo",
        )
        gradients += torch.autograd.grad(loss, logp)
        assert metrics["proj_clamped"] == 0
    each = torch.cat(gradients)
    assert each.mean(dim=0).abs().max() < 1e-12
    assert each.abs().mean() > 0.02


@pytest.mark.parametrize("estimator", ["scored", "loo"])
def test_the_mean_of_the_difference_is_zero(estimator: str) -> None:
    """Zbar - Zprime, from samples under contexts, and as "loo" has it, from the colliders; so the mean of t is zbar."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    if estimator == "scored":
        samples = torch.randn(3, 5, 4, 2, 7, generator=generator, dtype=torch.float64)
    else:
        colliders = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64)
        samples = (colliders / 5)[:, None, :, None, :].expand(3, 5, 4, 1, 7)
    differences = torch.stack([context_difference(x, None) for x in choices(samples, 2)])
    assert differences.mean(dim=0).abs().max() < 1e-14
    assert differences.abs().mean() > 0.05
    weights = torch.stack([causal_weights(z, x) for x in choices(samples, 2)])
    no_projection = causal_weights(z, torch.zeros_like(samples))
    assert (weights - no_projection).abs().mean() > 1e-3
    along = (z * (differences + z.mean(dim=1, keepdim=True))).sum(dim=-1).mean(dim=0)
    torch.testing.assert_close(along, (z * z.mean(dim=1, keepdim=True)).sum(dim=-1), rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The clamp
# ---------------------------------------------------------------------------------------------------------------------

# Under four contexts a token is so many times as likely as under the query. Their mean is 1.5: the four choices of c_0
# give p' / pi = 1 + ratio - 1.5.
RATIOS = (0.1, 0.2, 0.3, 5.4)
RARE = (1e-2, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-10)


def lift(at_query: bool, oracle: bool) -> Tensor:
    """E[p'] / pi - 1 of tokens of probability RARE, over the choices of c_0."""
    query = torch.tensor(RARE, dtype=torch.float64)
    given = query[:, None] * torch.tensor(RATIOS, dtype=torch.float64)
    if oracle:
        function = reference.projection_floored_at_query if at_query else reference.projection
        means = [function(query.log(), x.log(), None, FLOOR)[0].exp() for x in choices(given, 1)]
    else:
        means = [maths.project(query.log(), x.log(), None, FLOOR, at_query)[0].exp() for x in choices(given, 1)]
    return torch.stack(means).mean(dim=0) / query - 1.0


@pytest.mark.parametrize("at_query", [False, True])
@pytest.mark.parametrize("oracle", [False, True])
def test_the_clamp_lifts_rare_tokens(at_query: bool, oracle: bool) -> None:
    """
    p' / pi is -0.4, -0.3, -0.2 and 4.9, of mean 1, and clamped to at least f = floor / pi: the mean rises by
    (0.9 + 3 f) / 4 while f is below 4.9, and by f - 1 beyond. With the floor at the query f is at most 1.
    """
    ours = lift(at_query, oracle)
    f = [min(FLOOR / p, 1.0) if at_query else FLOOR / p for p in RARE]
    want = torch.tensor([(0.9 + 3 * x) / 4 if x < 4.9 else x - 1.0 for x in f], dtype=torch.float64)
    torch.testing.assert_close(ours, want, rtol=1e-9, atol=0.0)
    assert (ours > 0).all()


def test_how_much_the_clamp_lifts() -> None:
    """By 0.23 of a probability of 1e-2 and 9,999 times one of 1e-10; with the floor at the query by 0.975 at most."""
    paper, at_query = lift(False, False), lift(True, False)
    assert (paper.diff() > 0).all()  # more, the rarer the token is
    assert paper[0].item() == pytest.approx(0.225075, rel=1e-6)
    assert paper[-1].item() == pytest.approx(9999.0, rel=1e-6)
    assert (at_query <= paper).all()
    assert at_query.max().item() == pytest.approx(0.975, rel=1e-6)
    assert torch.equal(at_query[:4], paper[:4])  # at 1e-6 and above nothing changes


@pytest.mark.parametrize("contexts", [2, 4, 8])
def test_the_clamps_bias_on_random_scores(contexts: int) -> None:
    """Exactly what the clamp adds, and never below pi at the low end; with the floor at the query never more."""
    generator = torch.Generator().manual_seed(contexts)
    log_query = -18.0 * torch.rand(500, generator=generator, dtype=torch.float64) - 2.5
    noise = torch.randn(500, contexts, generator=generator, dtype=torch.float64)
    given = (log_query[:, None] + 1.5 * noise).clamp(max=-3.0).exp()
    query = log_query.exp()
    biases = []
    for at_query in (False, True):
        low = query.clamp(max=FLOOR) if at_query else torch.full_like(query, FLOOR)
        raw = torch.stack([x[:, 0] - x.mean(dim=1) + query for x in choices(given, 1)])
        assert (raw < 1.0).all()
        added = (low - raw).clamp(min=0.0).mean(dim=0)
        found = [maths.project(log_query, x.log(), None, FLOOR, at_query) for x in choices(given, 1)]
        bias = torch.stack([log_proj.exp() for log_proj, _ in found]).mean(dim=0) - query
        torch.testing.assert_close(bias, added, rtol=1e-9, atol=1e-15)
        assert 0.05 < torch.stack([clamped for _, clamped in found]).double().mean() < 0.95
        biases.append(bias)
    paper, smaller = biases
    assert (paper > -1e-15).all()
    assert (smaller <= paper + 1e-15).all()
    rare = query < FLOOR
    assert torch.equal(smaller[~rare], paper[~rare])
    assert (smaller / query)[rare].mean() < 0.5 * (paper / query)[rare].mean()


# ---------------------------------------------------------------------------------------------------------------------
# A c_0 that is chosen
# ---------------------------------------------------------------------------------------------------------------------

DRAWN = 3  # colliders, L
PROBABILITIES = (0.5, 0.3, 0.2)  # of three colliders, of which the first is the mode
REWARDS = (0.0, 0.0, 1.0)  # and the last the right one
QUERY = torch.tensor([0.40, 0.30, 0.20, 0.10], dtype=torch.float64)  # of four tokens
UNDER = torch.tensor(  # and under contexts that end in each collider
    [[0.45, 0.25, 0.20, 0.10], [0.35, 0.35, 0.22, 0.08], [0.30, 0.28, 0.24, 0.18]], dtype=torch.float64
)
AVERAGE = torch.tensor(PROBABILITIES, dtype=torch.float64) @ UNDER


def draws(choice: str) -> Iterator[tuple[float, list[int]]]:
    """Every tuple of colliders, c_0 first, and its probability."""
    if choice == "greedy":
        for others in product(range(3), repeat=DRAWN - 1):
            yield prod(PROBABILITIES[c] for c in others), [0, *others]
        return
    for drawn in product(range(3), repeat=DRAWN):
        probability = prod(PROBABILITIES[c] for c in drawn)
        best = max(REWARDS[c] for c in drawn)
        first = [k for k, c in enumerate(drawn) if REWARDS[c] == best] if choice == "reward" else [0]
        for k in first:  # among equals, each as often
            yield probability / len(first), [drawn[k], *drawn[:k], *drawn[k + 1 :]]


# E[p'] - pi. Greedy: c_0 is the mode and one of L in the mean. Reward: the right collider is among three draws with
# probability 1 - 0.8^3 = 0.488; else c_0 is one of the others, as often as it is drawn.
EXPECTED = {
    "sample": torch.zeros(4, dtype=torch.float64),
    "greedy": (DRAWN - 1) / DRAWN * (UNDER[0] - AVERAGE),
    "reward": 0.488 * UNDER[2] + 0.512 * (0.625 * UNDER[0] + 0.375 * UNDER[1]) - AVERAGE,
}
# The same in numbers, by which tokens are raised and lowered.
NUMBERS = {
    "greedy": (0.04, -0.024, -0.00933333, -0.00666667),
    "reward": (-0.0324, -0.00216, 0.00936, 0.0252),
}


@BOTH
@pytest.mark.parametrize("choice", EXPECTED)
def test_what_the_choice_of_c_0_adds(choice: str, project: Project) -> None:
    """Nothing to one that is drawn like the others; to a chosen one what it finds likelier than the average does."""
    assert sum(probability for probability, _ in draws(choice)) == pytest.approx(1.0, abs=1e-15)
    mean, raised = torch.zeros(4, dtype=torch.float64), 0.0
    for probability, drawn in draws(choice):
        log_proj, clamped = project(QUERY.log(), UNDER[drawn].T.log(), None, FLOOR)
        assert not clamped.any()
        mean += probability * log_proj.exp()
        raised += probability * REWARDS[drawn[0]]
    torch.testing.assert_close(mean - QUERY, EXPECTED[choice], rtol=0.0, atol=1e-12)
    assert mean.sum().item() == pytest.approx(1.0, abs=1e-12)  # what it adds to some it takes from others
    assert raised == pytest.approx({"sample": 0.2, "greedy": 0.0, "reward": 0.488}[choice], abs=1e-15)


@pytest.mark.parametrize("choice", EXPECTED)
def test_which_way_a_chosen_c_0_pulls(choice: str) -> None:
    """The expected gradient of the second KL on-policy is 1 - E[p'] / pi: below 0 raises a token."""
    total = torch.zeros(4, dtype=torch.float64)
    for probability, drawn in draws(choice):
        logp = QUERY.log()[None].requires_grad_()
        loss, _ = gcpo_loss(
            logp,
            torch.zeros(1, dtype=torch.float64),
            torch.ones(1, 4),
            context_logp=UNDER[drawn].T.log()[None],
            kappa=1.0,
            loss_type="luspo",
        )
        total += probability * torch.autograd.grad(loss, logp)[0][0]
    torch.testing.assert_close(total, -EXPECTED[choice] / QUERY, rtol=0.0, atol=1e-12)
    if choice == "sample":
        return
    assert EXPECTED[choice].tolist() == pytest.approx(NUMBERS[choice], abs=1e-7)
    likelier = UNDER[0] > AVERAGE if choice == "greedy" else UNDER[2] > AVERAGE
    assert torch.equal(total < 0, likelier)


@pytest.mark.parametrize("choice", EXPECTED)
def test_the_difference_of_representations_has_the_same_law(choice: str) -> None:
    """Zbar - Zprime of the "loo" estimate: (z_{c_0} - mean_l z_{c_l}) / n, with n = 4 candidates."""
    mean = torch.zeros(4, dtype=torch.float64)
    for probability, drawn in draws(choice):
        samples = (UNDER[drawn] / 4)[None, None, :, None, :]
        mean += probability * context_difference(samples, None)[0, 0]
    torch.testing.assert_close(mean, EXPECTED[choice] / 4, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("choice", ["sample", "greedy"])
def test_the_variance(choice: str) -> None:
    """
    With s the variance of a context's score over colliders: s (1 - 1 / L) where c_0 is drawn like the others, which
    more colliders do not make small; s (L - 1) / L^2 where it is the same every time.
    """
    spread = torch.tensor(PROBABILITIES, dtype=torch.float64) @ (UNDER - AVERAGE).square()
    variance = torch.zeros(4, dtype=torch.float64)
    for probability, drawn in draws(choice):
        proj = maths.project(QUERY.log(), UNDER[drawn].T.log(), None, FLOOR)[0].exp()
        variance += probability * (proj - QUERY - EXPECTED[choice]).square()
    want = spread * (2 / 3 if choice == "sample" else 2 / 9)
    torch.testing.assert_close(variance, want, rtol=1e-10, atol=0.0)
