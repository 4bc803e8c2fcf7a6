"""Device functions that the kernels share. The per-token objective is here, and nowhere else in Triton."""

import triton
import triton.language as tl

LARGEST_LOG = tl.constexpr(88.72283)  # exp of what lies above overflows


@triton.jit
def expm1(x):
    """exp(x) - 1 without cancellation: a Taylor polynomial where |x| <= 0.5 (remainder below 1e-7 of the value)."""
    series = x * (1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7))))))
    return tl.where(tl.abs(x) <= 0.5, series, tl.exp(x) - 1.0)


@triton.jit
def k3(d):
    """exp(d) - d - 1, from its own series where it is small: the difference would lose every digit."""
    series = d * d / 2 * (1.0 + d / 3 * (1.0 + d / 4 * (1.0 + d / 5 * (1.0 + d / 6 * (1.0 + d / 7)))))
    return tl.where(tl.abs(d) <= 0.5, series, tl.exp(d) - d - 1.0)


@triton.jit
def at_least(x, low):
    """max(x, low) that keeps NaN."""
    return tl.where(x < low, low, x)


@triton.jit
def at_most(x, high):
    """min(x, high) that keeps NaN."""
    return tl.where(x > high, high, x)


@triton.jit
def token_objective(
    logp,
    log_ratio,
    advantage,
    is_ratio,
    ref_logp,
    log_proj,
    causal_logp,
    beta,
    kappa,
    epsilon_low,
    epsilon_high,
    delta,
    HAS_DELTA: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
):
    """
    Eq. 10 for one block of tokens: the loss, its derivatives in log R, in logp and in causal_logp, both k3 terms, and
    the ratio as metrics count it. `reference.token_objective` and `token_objective_gradient`, in one pass.
    """
    # As `reference.bounded_log_ratio`: R may overflow only where the loss grows with it.
    bounded = at_most(log_ratio, LARGEST_LOG)
    if not HAS_DELTA:
        bounded = tl.where(advantage < 0.0, log_ratio, bounded)
    # Times 0 in the loss, where R * A must be finite for that, but large enough for the metrics to count it as clipped.
    bounded = tl.where(is_ratio == 0.0, at_most(log_ratio, 40.0), bounded)
    ratio = tl.exp(bounded)
    low = 1.0 - epsilon_low
    high = 1.0 + epsilon_high
    capped = ratio
    uncapped = ratio == ratio  # true, but for NaN, which the ratio below carries on anyway
    if HAS_DELTA:
        capped = at_most(ratio, delta)
        uncapped = ratio <= delta
    left = capped * advantage
    right = at_most(at_least(ratio, low), high) * advantage
    unclipped = (ratio >= low) & (ratio <= high)
    # `left` where it is NaN: the minimum hides nothing.
    loss = -tl.where((left < right) | (left != left), left, right) * is_ratio
    # Where the minimum is a tie, each side has half of the derivative, as in torch.
    tie = 0.5 * (uncapped.to(tl.float32) + unclipped.to(tl.float32))
    passes = tl.where(left < right, uncapped.to(tl.float32), unclipped.to(tl.float32))
    passes = tl.where(left == right, tie, passes)
    d_ratio = -passes * ratio * advantage * is_ratio
    d_logp = tl.zeros_like(loss)
    d_causal = tl.zeros_like(loss)
    kl = tl.zeros_like(loss)
    kl_causal = tl.zeros_like(loss)
    if HAS_REF:
        kl = k3(ref_logp - logp)
        # A switched-off term must not turn an infinite k3 into NaN.
        loss += tl.where(beta != 0.0, beta * kl, 0.0)
        d_logp -= tl.where(beta != 0.0, beta * expm1(ref_logp - logp), 0.0)
    if HAS_CONTEXT:
        kl_causal = k3(log_proj - causal_logp)
        loss += tl.where(kappa != 0.0, kappa * kl_causal, 0.0)
        d_causal = -tl.where(kappa != 0.0, kappa * expm1(log_proj - causal_logp), 0.0)
    return loss, d_ratio, d_logp, d_causal, kl, kl_causal, capped
