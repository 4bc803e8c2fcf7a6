"""Device functions that the kernels share. The per-token objective is here, and nowhere else in Triton."""

import triton
import triton.language as tl

LARGEST_LOG = tl.constexpr(88.72283)  # exp of what lies above overflows
LARGEST = tl.constexpr(3.4028234e38)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# What the policy term of a token is: places in `options.KINDS`.
CLIPPED = tl.constexpr(0)
CISPO = tl.constexpr(1)
SAPO = tl.constexpr(2)


@triton.jit
def power_of_two(y):
    """
    2**y, and y bounded from below: where y is -inf, 2**y y must be 0, not NaN. -200 is far below float32's range, so
    that 2**-200 is 0. NaN stays NaN.
    """
    y = tl.maximum(y, -200.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(y), y


@triton.jit
def _tanh(x):
    """tanh and its slope."""
    # exp of a negative argument only: no overflow at either end.
    e = tl.exp(-2.0 * tl.abs(x))
    r = 1.0 / (1.0 + e)
    y = (1.0 - e) * r
    y = tl.where(x < 0, -y, tl.where(x >= 0, y, x))
    # 1 - e loses its digits as x goes to 0: its series, to 1e-8 of it. 1 - y * y would as y goes to 1.
    x2 = x * x
    y = tl.where(x2 < 0.0225, x - x * x2 * (1.0 / 3 - x2 * (2.0 / 15 - x2 * (17.0 / 315))), y)
    return y, 4.0 * e * r * r


@triton.jit
def head_logit(u, scale, softcap, HAS_SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr):
    """
    z of raw logits u, and the softcap's slope: a logit is chain * z with a chain of at least 0, the same for all.
    Kernels subtract one z from another before they multiply by the chain, because that difference is exact between
    large neighbours.

    Without a softcap z is u, or -u where scale / temperature is negative, and chain its absolute value; with one z is
    softcap(scale * u), and chain 1 / temperature.
    """
    slope = 1.0
    z = u
    if HAS_SOFTCAP:
        y, slope = _tanh(u * scale / softcap)
        z = softcap * y
    elif NEGATIVE:
        z = -u
    return z, slope


@triton.jit
def _beyond_linear(x):
    """exp(x) - x - 1 for |x| <= 0.5: a Taylor polynomial, an instruction a term (remainder below 4e-8 of the value)."""
    series = 1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040 + x * (1.0 / 40320)))
    return x * x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * series)))


@triton.jit
def expm1(x):
    """exp(x) - 1 without cancellation."""
    return tl.where(tl.abs(x) <= 0.5, x + _beyond_linear(x), tl.exp(x) - 1.0)


@triton.jit
def k3(d):
    """exp(d) - d - 1, from its own series where it is small: the difference would lose every digit."""
    return tl.where(tl.abs(d) <= 0.5, _beyond_linear(d), tl.exp(d) - d - 1.0)


@triton.jit
def at_least(x, low):
    """max(x, low) that keeps NaN."""
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_most(x, high):
    """min(x, high) that keeps NaN."""
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


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
    kl_clip,
    tau_pos,
    tau_neg,
    KIND: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
    HAS_KL_CLIP: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
):
    """
    Eq. 10 for one block of tokens: the loss, its derivatives in log R, in logp and in causal_logp, both KL terms, the
    ratio as metrics count it, and where the log-ratio of either k3 leaves [-kl_clip, kl_clip].
    `maths.token_objective` and `token_objective_gradient`, in one pass. KIND is the policy term, `kappa` one number or
    one a token.
    """
    # As `maths.bounded_log_ratio`: R may overflow only where the loss grows with it.
    bounded = at_most(log_ratio, LARGEST_LOG)
    if not HAS_DELTA and KIND == CLIPPED:
        bounded = tl.where(advantage < 0.0, log_ratio, bounded)
    # Times 0 in the loss, where R * A must be finite for that, but large enough for the metrics to count it as clipped.
    bounded = tl.where(is_ratio == 0.0, at_most(log_ratio, 40.0), bounded)
    ratio = tl.exp(bounded)
    capped = ratio
    if KIND == CLIPPED:
        low = 1.0 - epsilon_low
        high = 1.0 + epsilon_high
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
    elif KIND == SAPO:
        tau = tl.where(advantage > 0.0, tau_pos, tau_neg)
        u = tau * (ratio - 1.0)
        # sigmoid(u) and its slope from exp of a negative argument only.
        e = tl.exp(-tl.abs(u))
        r = 1.0 / (1.0 + e)
        loss = -4.0 / tau * tl.where(u < 0.0, e * r, r) * advantage * is_ratio
        d_ratio = -4.0 * e * r * r * ratio * advantage * is_ratio
        d_logp = tl.zeros_like(loss)
    else:
        factor = advantage * is_ratio  # in vespo it is the advantage that is times phi
        if KIND == CISPO:
            factor = at_most(ratio, epsilon_high) * advantage * is_ratio
        loss = -factor * logp
        d_ratio = tl.zeros_like(loss)
        d_logp = -factor
    d_causal = tl.zeros_like(loss)
    kl = tl.zeros_like(loss)
    kl_causal = tl.zeros_like(loss)
    kl_beyond = loss != loss  # only read where they are set below
    causal_beyond = kl_beyond
    if HAS_REF:
        d = ref_logp - logp
        if HAS_KL_CLIP:
            kl_beyond = tl.abs(d) > kl_clip
            d = at_most(at_least(d, -kl_clip), kl_clip)
        kl = k3(d)
        if BIAS_CORRECTION:
            # As `maths.reference_kl`: in the exponent where d is large, and no 0 meets an infinity.
            full = tl.exp(log_ratio)
            largest = at_most(full, LARGEST)
            whole = tl.exp(d + log_ratio)
            kl = tl.where(d > 2.0, whole * (1.0 - (d + 1.0) * tl.exp(-d)), kl * tl.where(kl == 0.0, largest, full))
            d_ratio += tl.where(beta != 0.0, beta * kl, 0.0)
        # A switched-off term must not turn an infinite k3 into NaN.
        loss += tl.where(beta != 0.0, beta * kl, 0.0)
        slope = expm1(d)
        if BIAS_CORRECTION:
            slope = tl.where(d > 2.0, whole * (1.0 - tl.exp(-d)), slope * tl.where(slope == 0.0, largest, full))
        if HAS_KL_CLIP:
            slope = tl.where(kl_beyond, 0.0, slope)
        d_logp -= tl.where(beta != 0.0, beta * slope, 0.0)
    if HAS_CONTEXT:
        d = log_proj - causal_logp
        if HAS_KL_CLIP:
            causal_beyond = tl.abs(d) > kl_clip
            d = at_most(at_least(d, -kl_clip), kl_clip)
        kl_causal = k3(d)
        loss += tl.where(kappa != 0.0, kappa * kl_causal, 0.0)
        slope = expm1(d)
        if HAS_KL_CLIP:
            slope = tl.where(causal_beyond, 0.0, slope)
        d_causal = -tl.where(kappa != 0.0, kappa * slope, 0.0)
    return loss, d_ratio, d_logp, d_causal, kl, kl_causal, capped, kl_beyond, causal_beyond
