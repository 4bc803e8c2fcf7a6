"""
The token loss: one pass over every input, which writes each token's derivative and per-block partial sums; a second,
one-program launch that turns the partial sums into the loss and the metrics; and one launch backward.

The reduction's weight is constant along a sequence (`reference.token_weights`), so derivatives are stored without it
and scaled in the backward, when all counts are known. Sums run in a fixed order: results repeat bit for bit.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gcpo_kernels.options import LossOptions
from gcpo_kernels.reference import TokenInputs
from gcpo_kernels.triton_backend.common import token_objective

# Partial sums of a block of tokens, then what the finishing kernel writes.
N_SUMS = tl.constexpr(7)  # count, loss, kl, kl_causal, proj_clamped, clip_low, clip_high
METRICS = ("kl", "kl_causal", "proj_clamped", "clip_low", "clip_high")
N_OUT = 7  # loss, the five metrics, 1 / denominator of the loss types that have one for all sequences

GRPO, PER_TOKEN, GIVEN = 0, 1, 2  # what the loss is divided by: each sequence's count, all tokens, a given number


@triton.jit
def _log_proj(
    first_ptr,  # of the block's tokens, context 0
    inside,  # [BLOCK_T]
    query,  # [BLOCK_T]
    stride_ctx_l,
    weights_ptr,  # of the row
    stride_w_l,
    L,
    log_floor,
    HAS_WEIGHTS: tl.constexpr,
):
    """log p' of a block of tokens and whether it was clamped: `reference.project`, with a running maximum over l."""
    a = tl.load(first_ptr, mask=inside, other=0.0).to(tl.float32)
    # Finite, so that tokens whose every probability is 0 do not become NaN.
    top = tl.maximum(tl.maximum(a, query), -1.0e30)
    mean = tl.zeros_like(query)
    for l in range(0, L):
        b = tl.load(first_ptr + l * stride_ctx_l, mask=inside, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + l * stride_w_l).to(tl.float32)
            b = tl.where(weight != 0.0, b, -1.0e30)  # its scores do not matter, NaN included
        else:
            weight = 1.0 / L.to(tl.float32)
        new_top = tl.where(b > top, b, top)
        mean = mean * tl.exp(top - new_top) + weight * tl.exp(b - new_top)
        top = new_top
    total = tl.exp(a - top) - mean + tl.exp(query - top)
    raw = tl.where(total <= 0.0, -float("inf"), top + tl.log(total))
    clamped = (raw < log_floor) | (raw > 0.0)
    return tl.where(raw < log_floor, log_floor, tl.where(raw > 0.0, 0.0, raw)), clamped


@triton.jit(do_not_specialize=["T", "B", "L"])
def token_loss_kernel(
    logp_ptr,  # (B, T)
    mask_ptr,  # (B, T)
    adv_ptr,  # (B, T), or (B,) with stride_adv_t = 0
    old_ptr,  # (B, T)
    ref_ptr,  # (B, T)
    query_ptr,  # (B, T)
    causal_ptr,  # (B, T)
    is_ptr,  # (B, T), or per sequence with stride_is_t = 0
    ctx_ptr,  # (B, T, L)
    weights_ptr,  # (B, L), or (L,) with stride_w_b = 0
    d_logp_ptr,  # (B, T) float32, contiguous
    d_causal_ptr,  # (B, T) float32, contiguous
    sequence_ptr,  # (B,) float32: with a ratio per sequence, what each of its tokens adds to d_logp
    sums_ptr,  # (N_SUMS, B, BLOCKS) float32
    stride_logp_b,
    stride_logp_t,
    stride_mask_b,
    stride_mask_t,
    stride_adv_b,
    stride_adv_t,
    stride_old_b,
    stride_old_t,
    stride_ref_b,
    stride_ref_t,
    stride_query_b,
    stride_query_t,
    stride_causal_b,
    stride_causal_t,
    stride_is_b,
    stride_is_t,
    stride_ctx_b,
    stride_ctx_t,
    stride_ctx_l,
    stride_w_b,
    stride_w_l,
    B,
    T,
    L,
    beta,
    kappa,
    epsilon_low,
    epsilon_high,
    delta,
    log_floor,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_QUERY: tl.constexpr,
    HAS_CAUSAL: tl.constexpr,
    HAS_IS: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    BY_SEQUENCE: tl.constexpr,
    BLOCKS: tl.constexpr,  # programs per sequence
    BLOCK_T: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row = pid // BLOCKS
    part = pid % BLOCKS
    share = tl.cdiv(tl.cdiv(T, BLOCKS), BLOCK_T) * BLOCK_T
    start = part * share
    end = tl.minimum(start + share, T)
    logp_ptr += row * stride_logp_b
    mask_ptr += row * stride_mask_b
    old_ptr += row * stride_old_b
    block = tl.arange(0, BLOCK_T)
    contexts = L.to(tl.int64)

    sequence_log_ratio = 0.0
    if BY_SEQUENCE and HAS_OLD:
        ratio_sum = tl.zeros([BLOCK_T], tl.float32)
        ratio_count = tl.zeros([BLOCK_T], tl.float32)
        for t0 in range(start, end, BLOCK_T):
            t = t0 + block  # [BLOCK_T]
            keep = tl.load(mask_ptr + t * stride_mask_t, mask=t < end, other=0) != 0
            logp = tl.load(logp_ptr + t * stride_logp_t, mask=keep, other=0.0).to(tl.float32)
            old = tl.load(old_ptr + t * stride_old_t, mask=keep, other=0.0).to(tl.float32)
            ratio_sum += logp - old
            ratio_count += keep.to(tl.float32)
        sequence_log_ratio = tl.sum(ratio_sum) / tl.maximum(tl.sum(ratio_count), 1.0)

    n = tl.zeros([BLOCK_T], tl.float32)
    sum_loss = tl.zeros([BLOCK_T], tl.float32)
    sum_kl = tl.zeros([BLOCK_T], tl.float32)
    sum_causal = tl.zeros([BLOCK_T], tl.float32)
    sum_clamped = tl.zeros([BLOCK_T], tl.float32)
    sum_low = tl.zeros([BLOCK_T], tl.float32)
    sum_high = tl.zeros([BLOCK_T], tl.float32)
    sum_ratio = tl.zeros([BLOCK_T], tl.float32)
    for t0 in range(start, end, BLOCK_T):
        t = t0 + block  # [BLOCK_T]
        inside = t < end
        keep = tl.load(mask_ptr + t * stride_mask_t, mask=inside, other=0) != 0
        # Nothing is loaded where the mask is 0: whatever stands there, NaN included, takes no part.
        logp = tl.load(logp_ptr + t * stride_logp_t, mask=keep, other=0.0).to(tl.float32)
        adv = tl.load(adv_ptr + row * stride_adv_b + t * stride_adv_t, mask=keep, other=0.0).to(tl.float32)
        old = logp
        if HAS_OLD:
            old = tl.load(old_ptr + t * stride_old_t, mask=keep, other=0.0).to(tl.float32)
        if BY_SEQUENCE:
            log_ratio = tl.zeros([BLOCK_T], tl.float32) + sequence_log_ratio
        else:
            log_ratio = logp - old
        ref = logp
        if HAS_REF:
            ref = tl.load(ref_ptr + row * stride_ref_b + t * stride_ref_t, mask=keep, other=0.0).to(tl.float32)
        causal = logp
        if HAS_CAUSAL:
            causal_at = causal_ptr + row * stride_causal_b + t * stride_causal_t
            causal = tl.load(causal_at, mask=keep, other=0.0).to(tl.float32)
        is_ratio = tl.full([BLOCK_T], 1.0, tl.float32)
        if HAS_IS:
            is_ratio = tl.load(is_ptr + row * stride_is_b + t * stride_is_t, mask=keep, other=0.0).to(tl.float32)
        log_proj = logp
        clamped = keep
        if HAS_CONTEXT:
            query = old
            if HAS_QUERY:
                query_at = query_ptr + row * stride_query_b + t * stride_query_t
                query = tl.load(query_at, mask=keep, other=0.0).to(tl.float32)
            log_proj, clamped = _log_proj(
                ctx_ptr + row * stride_ctx_b + t * stride_ctx_t,
                keep,
                query,
                stride_ctx_l,
                weights_ptr + row * stride_w_b,
                stride_w_l,
                contexts,
                log_floor,
                HAS_WEIGHTS,
            )
        loss, d_ratio, d_logp, d_causal, kl, kl_causal, ratio = token_objective(
            logp,
            log_ratio,
            adv,
            is_ratio,
            ref,
            log_proj,
            causal,
            beta,
            kappa,
            epsilon_low,
            epsilon_high,
            delta,
            HAS_DELTA,
            HAS_REF,
            HAS_CONTEXT,
        )
        if not HAS_CAUSAL:
            d_logp += d_causal
        if not BY_SEQUENCE:
            d_logp += d_ratio
        out = row * T + t
        tl.store(d_logp_ptr + out, tl.where(keep, d_logp, 0.0), mask=inside)
        if HAS_CAUSAL:
            tl.store(d_causal_ptr + out, tl.where(keep, d_causal, 0.0), mask=inside)
        n += keep.to(tl.float32)
        sum_loss += tl.where(keep, loss, 0.0)
        sum_kl += tl.where(keep, kl, 0.0)
        sum_ratio += tl.where(keep, d_ratio, 0.0)
        if HAS_CONTEXT:
            sum_causal += tl.where(keep, kl_causal, 0.0)
            sum_clamped += (keep & clamped).to(tl.float32)
        sum_low += (keep & (ratio < 1.0 - epsilon_low) & (adv < 0)).to(tl.float32)
        sum_high += (keep & (ratio > 1.0 + epsilon_high) & (adv > 0)).to(tl.float32)

    step = B.to(tl.int64) * BLOCKS
    tl.store(sums_ptr + pid, tl.sum(n))
    tl.store(sums_ptr + step + pid, tl.sum(sum_loss))
    tl.store(sums_ptr + 2 * step + pid, tl.sum(sum_kl))
    tl.store(sums_ptr + 3 * step + pid, tl.sum(sum_causal))
    tl.store(sums_ptr + 4 * step + pid, tl.sum(sum_clamped))
    tl.store(sums_ptr + 5 * step + pid, tl.sum(sum_low))
    tl.store(sums_ptr + 6 * step + pid, tl.sum(sum_high))
    if BY_SEQUENCE:
        tl.store(sequence_ptr + row, tl.sum(sum_ratio) / tl.maximum(tl.sum(n), 1.0))


@triton.jit(do_not_specialize=["B"])
def token_loss_finish_kernel(
    sums_ptr,  # (N_SUMS, B, BLOCKS)
    items_ptr,  # (1,): num_items_in_batch, where it is a tensor
    out_ptr,  # (N_OUT,)
    B,
    divisor,
    DIVIDE_BY: tl.constexpr,
    ITEMS_ON_DEVICE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    step = B.to(tl.int64) * BLOCKS
    rows = tl.arange(0, BLOCK_B)
    parts = tl.arange(0, BLOCKS).to(tl.int64)
    loss = tl.zeros([BLOCK_B], tl.float32)
    total = tl.zeros([BLOCK_B], tl.float32)
    kl = tl.zeros([BLOCK_B], tl.float32)
    kl_causal = tl.zeros([BLOCK_B], tl.float32)
    clamped = tl.zeros([BLOCK_B], tl.float32)
    low = tl.zeros([BLOCK_B], tl.float32)
    high = tl.zeros([BLOCK_B], tl.float32)
    for b0 in range(0, B, BLOCK_B):
        b = (b0 + rows).to(tl.int64)
        inside = (b < B)[:, None] & (parts[None, :] < BLOCKS)
        at = sums_ptr + b[:, None] * BLOCKS + parts[None, :]  # [BLOCK_B, BLOCKS]
        n = tl.sum(tl.load(at, mask=inside, other=0.0), axis=1)
        row_loss = tl.sum(tl.load(at + step, mask=inside, other=0.0), axis=1)
        if DIVIDE_BY == 0:
            row_loss = row_loss / tl.maximum(n, 1.0)
        loss += row_loss
        total += n
        kl += tl.sum(tl.load(at + 2 * step, mask=inside, other=0.0), axis=1)
        kl_causal += tl.sum(tl.load(at + 3 * step, mask=inside, other=0.0), axis=1)
        clamped += tl.sum(tl.load(at + 4 * step, mask=inside, other=0.0), axis=1)
        low += tl.sum(tl.load(at + 5 * step, mask=inside, other=0.0), axis=1)
        high += tl.sum(tl.load(at + 6 * step, mask=inside, other=0.0), axis=1)
    count = tl.maximum(tl.sum(total), 1.0)
    denominator = count
    if DIVIDE_BY == 0:
        denominator = tl.maximum(B * 1.0, 1.0)
    elif DIVIDE_BY == 2:
        denominator = divisor
        if ITEMS_ON_DEVICE:
            denominator = tl.load(items_ptr).to(tl.float32)
        denominator = tl.maximum(denominator, 1.0)
    tl.store(out_ptr, tl.sum(loss) / denominator)
    tl.store(out_ptr + 1, tl.sum(kl) / count)
    tl.store(out_ptr + 2, tl.sum(kl_causal) / count)
    tl.store(out_ptr + 3, tl.sum(clamped) / count)
    tl.store(out_ptr + 4, tl.sum(low) / count)
    tl.store(out_ptr + 5, tl.sum(high) / count)
    tl.store(out_ptr + 6, 1.0 / denominator)


@triton.jit(do_not_specialize=["T"])
def token_loss_backward_kernel(
    grad_ptr,  # (): upstream gradient
    d_logp_ptr,  # (B, T) float32
    d_causal_ptr,  # (B, T) float32
    sequence_ptr,  # (B,) float32
    sums_ptr,  # (N_SUMS, B, BLOCKS): the counts come first
    out_ptr,  # (N_OUT,)
    mask_ptr,  # (B, T)
    stride_mask_b,
    stride_mask_t,
    grad_logp_ptr,  # (B, T), contiguous
    grad_causal_ptr,  # (B, T), contiguous
    T,
    BY_COUNT: tl.constexpr,  # divide by each sequence's own count too
    BY_SEQUENCE: tl.constexpr,
    HAS_CAUSAL: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row = pid // BLOCKS
    share = tl.cdiv(tl.cdiv(T, BLOCKS), BLOCK_T) * BLOCK_T
    start = (pid % BLOCKS) * share
    end = tl.minimum(start + share, T)
    scale = tl.load(grad_ptr).to(tl.float32) * tl.load(out_ptr + 6)
    if BY_COUNT:
        n = tl.sum(tl.load(sums_ptr + row * BLOCKS + tl.arange(0, BLOCKS)))
        scale = scale / tl.maximum(n, 1.0)
    for t0 in range(start, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        inside = t < end
        at = row * T + t
        d = tl.load(d_logp_ptr + at, mask=inside, other=0.0)
        if BY_SEQUENCE:
            keep = tl.load(mask_ptr + row * stride_mask_b + t * stride_mask_t, mask=inside, other=0) != 0
            d += tl.where(keep, tl.load(sequence_ptr + row), 0.0)
        # 0 at masked tokens whatever the scale is, as autograd's `where` has it.
        grad = tl.where(d == 0.0, 0.0, d * scale)
        tl.store(grad_logp_ptr + at, grad.to(grad_logp_ptr.dtype.element_ty), mask=inside)
        if HAS_CAUSAL:
            d = tl.load(d_causal_ptr + at, mask=inside, other=0.0)
            grad = tl.where(d == 0.0, 0.0, d * scale)
            tl.store(grad_causal_ptr + at, grad.to(grad_causal_ptr.dtype.element_ty), mask=inside)


class TokenTensors(NamedTuple):
    """Tensor arguments of the token loss, unchanged: any strides, any floating type, garbage where masked."""

    logp: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, T)
    advantages: torch.Tensor  # (B,) or (B, T)
    old_logp: torch.Tensor | None
    ref_logp: torch.Tensor | None
    query_logp: torch.Tensor | None
    causal_logp: torch.Tensor | None
    importance_sampling_ratio: torch.Tensor | None  # (B,), (B, 1) or (B, T)
    context_logp: torch.Tensor | None  # (B, T, L)
    context_weights: torch.Tensor | None  # (L,) or (B, L)


class TokenResult(NamedTuple):
    out: torch.Tensor  # (N_OUT,): loss, metrics, 1 / denominator
    d_logp: torch.Tensor  # (B, T) float32, before the reduction's weights
    d_causal: torch.Tensor  # (B, T) float32, or empty
    sequence: torch.Tensor  # (B,) float32, or empty
    sums: torch.Tensor  # (N_SUMS, B, BLOCKS) float32


def blocking(b: int, t: int, by_sequence: bool) -> tuple[int, int]:
    """(BLOCKS, BLOCK_T): programs per sequence and tokens at a time. Few values, so that few kernels are compiled."""
    if t <= 128:
        return 1, 128
    if by_sequence:
        return 1, 256  # with 512, sm_100 spills
    # With 1,024 tokens at a time the forward needs 217 registers a thread on sm_90, and half the warps fit.
    if t <= 512:
        return 1, 512
    return (8 if t <= 16 * 512 or b >= 512 else 64), 512


def _rows_strides(x: torch.Tensor | None, shape: tuple[int, int]) -> tuple[int, int]:
    if x is None:
        return 0, 0
    x = x[:, None] if x.dim() == 1 else x
    return x.expand(shape).stride()  # type: ignore[return-value]


def _divide_by(options: LossOptions, b: int) -> tuple[int, float, torch.Tensor | None]:
    """How the finishing kernel reduces: (DIVIDE_BY, divisor, tensor that holds it)."""
    if options.loss_type == "grpo":
        return GRPO, 0.0, None
    if options.loss_type == "dr_grpo":
        return GIVEN, float(b) * (options.max_completion_length or 1), None
    items = options.num_items_in_batch
    if options.loss_type == "bnpo" or items is None:
        return PER_TOKEN, 0.0, None
    return (GIVEN, 0.0, items) if isinstance(items, torch.Tensor) else (GIVEN, float(items), None)


def _launch(x: TokenTensors, options: LossOptions) -> TokenResult:
    """The pass over the tokens; `out` is left unwritten."""
    b, t = x.logp.shape
    device = x.logp.device
    by_sequence = options.importance_sampling_level == "sequence"
    blocks, block_t = blocking(b, t, by_sequence)
    has_causal = x.causal_logp is not None

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    result = TokenResult(
        out=empty(N_OUT),
        d_logp=empty(b, t),
        d_causal=empty(b, t) if has_causal else empty(0),
        sequence=empty(b) if by_sequence else empty(0),
        sums=empty(N_SUMS.value, b, blocks),
    )
    if b * t == 0:
        result.sums.zero_()
        return result
    mask = x.mask.view(torch.uint8) if x.mask.dtype == torch.bool else x.mask
    contexts = x.context_logp
    weights_strides = (0, 0)
    if x.context_weights is not None:
        given = x.context_weights.stride()
        weights_strides = (0, given[0]) if x.context_weights.dim() == 1 else (given[0], given[1])
    rows = (x.old_logp, x.ref_logp, x.query_logp, x.causal_logp, x.importance_sampling_ratio)
    strides = [s for y in (x.logp, mask, x.advantages, *rows) for s in _rows_strides(y, (b, t))]
    anything = x.logp  # stands in for pointers that a flag keeps from being read
    token_loss_kernel[(b * blocks,)](
        x.logp,
        mask,
        x.advantages,
        *(anything if y is None else y for y in rows),
        anything if contexts is None else contexts,
        anything if x.context_weights is None else x.context_weights,
        result.d_logp,
        result.d_causal if has_causal else result.d_logp,
        result.sequence if by_sequence else result.d_logp,
        result.sums,
        *strides,
        *((0, 0, 0) if contexts is None else contexts.stride()),
        *weights_strides,
        b,
        t,
        1 if contexts is None else contexts.shape[2],
        options.beta,
        options.kappa,
        options.epsilon_low,
        options.epsilon_high,
        options.delta or 0.0,
        math.log(options.proj_floor),
        HAS_OLD=x.old_logp is not None,
        HAS_REF=x.ref_logp is not None,
        HAS_QUERY=x.query_logp is not None,
        HAS_CAUSAL=has_causal,
        HAS_IS=x.importance_sampling_ratio is not None,
        HAS_CONTEXT=contexts is not None,
        HAS_WEIGHTS=x.context_weights is not None,
        HAS_DELTA=options.delta is not None,
        BY_SEQUENCE=by_sequence,
        BLOCKS=blocks,
        BLOCK_T=block_t,
        num_warps=4,
    )
    return result


def token_loss_forward(x: TokenTensors, options: LossOptions) -> TokenResult:
    """Loss, metrics and unreduced derivatives: two launches, no sync."""
    result = _launch(x, options)
    divide_by, divisor, items = _divide_by(options, x.logp.shape[0])
    blocks = result.sums.shape[2]
    token_loss_finish_kernel[(1,)](
        result.sums,
        result.sums if items is None else items,
        result.out,
        result.sums.shape[1],
        divisor,
        DIVIDE_BY=divide_by,
        ITEMS_ON_DEVICE=items is not None,
        BLOCKS=blocks,
        BLOCK_B=max(16, 1024 // blocks),
        num_warps=4,
    )
    return result


def token_derivatives(logp: torch.Tensor, inputs: TokenInputs, options: LossOptions) -> torch.Tensor:
    """
    d per-token loss / d logp before the reduction's weights, of tokens (N,) or whole sequences (B, T): one launch.

    With a ratio per sequence, what every token adds to its sequence's ratio is in it.
    """
    if logp.dim() == 1:
        # Tokens of any sequences. Weights of contexts are per row of the kernel: then every token is a row.
        shape = (1, -1) if inputs.context_weights is None else (-1, 1)
    else:
        shape = (logp.shape[0], logp.shape[1])

    def rows(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.reshape(*shape, *x.shape[logp.dim() :])

    weights = inputs.context_weights
    if weights is not None and logp.dim() == 2:
        weights = weights.amax(dim=1)  # constant along a sequence, but 0 where masked
    result = _launch(
        TokenTensors(
            logp=logp.reshape(shape),
            mask=inputs.mask.reshape(shape),
            advantages=inputs.advantages.reshape(shape),
            old_logp=rows(inputs.old_logp),
            ref_logp=rows(inputs.ref_logp),
            query_logp=rows(inputs.query_logp),
            causal_logp=rows(inputs.causal_logp),
            importance_sampling_ratio=rows(inputs.importance_sampling_ratio),
            context_logp=rows(inputs.context_logp),
            context_weights=weights,
        ),
        options,
    )
    d = result.d_logp
    if options.importance_sampling_level == "sequence":
        d = torch.where(inputs.mask, d + result.sequence.unsqueeze(1), 0.0)
    return d.reshape(logp.shape)


def token_loss_backward(
    grad: torch.Tensor,  # ()
    result: TokenResult,
    mask: torch.Tensor,
    options: LossOptions,
    dtypes: tuple[torch.dtype, torch.dtype | None],  # of logp, and of causal_logp if it is there
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients in logp and causal_logp (empty where there is none): one launch."""
    b, t = result.d_logp.shape
    grad_logp = torch.empty_like(result.d_logp, dtype=dtypes[0])
    has_causal = dtypes[1] is not None
    grad_causal = torch.empty_like(result.d_causal, dtype=dtypes[1])
    if b * t == 0:
        return grad_logp, grad_causal
    by_sequence = options.importance_sampling_level == "sequence"
    blocks, block_t = blocking(b, t, by_sequence)
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    token_loss_backward_kernel[(b * blocks,)](
        grad,
        result.d_logp,
        result.d_causal if has_causal else result.d_logp,
        result.sequence if by_sequence else result.d_logp,
        result.sums,
        result.out,
        mask,
        *mask.stride(),
        grad_logp,
        grad_causal if has_causal else grad_logp,
        t,
        BY_COUNT=options.loss_type == "grpo",
        BY_SEQUENCE=by_sequence,
        HAS_CAUSAL=has_causal,
        BLOCKS=blocks,
        BLOCK_T=block_t,
        num_warps=4,
    )
    return grad_logp, grad_causal
