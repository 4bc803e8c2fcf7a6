"""
The token loss: one pass over every input, which writes each token's derivative and per-block partial sums; a second,
one-program launch that turns the partial sums into the loss and the metrics; and one launch backward.

The reduction's weight is constant along a sequence (`maths.token_weights`), so derivatives are stored without it
and scaled in the backward, when all counts are known. Sums run in a fixed order: results repeat bit for bit.
"""

import math
from typing import NamedTuple

import torch
import triton

from gcpo_kernels.options import KINDS, LossOptions
from gcpo_kernels.tokens import TokenInputs
from gcpo_kernels.triton_backend.token_kernels import (
    MOST_BLOCKS,
    N_SUMS,
    token_loss_backward_kernel,
    token_loss_finish_kernel,
    token_loss_kernel,
)

# What the finishing kernel writes beside the loss: 1 / denominator of the loss types that have one for all sequences,
# these,
METRICS = ("kl", "kl_causal", "proj_clamped", "clip_low", "clip_high")
N_OUT = 6
# and with a kl_clip these, which the pass over the tokens then sums too.
KL_CLIP_METRICS = ("kl_clipped", "kl_causal_clipped")

GRPO, PER_TOKEN, GIVEN = 0, 1, 2  # what the loss is divided by: each sequence's count, all tokens, a given number


class TokenResult(NamedTuple):
    """What the backward goes on from."""

    out: torch.Tensor  # (N_OUT,) or two more: 1 / denominator, METRICS, KL_CLIP_METRICS
    d_logp: torch.Tensor  # (B, T) float32, before the reduction's weights
    d_causal: torch.Tensor  # (B, T) float32, or empty
    sequence: torch.Tensor  # (B,) float32, or empty
    sums: torch.Tensor  # (N_SUMS and more, B, BLOCKS) float32: see there


def named_metrics(out: torch.Tensor, kl_clip: bool) -> dict[str, torch.Tensor]:
    """Of `TokenResult.out`, views of it, one by one: those of one `unbind` may not be written to."""
    names = (*METRICS, *KL_CLIP_METRICS) if kl_clip else METRICS
    return {name: out[1 + k] for k, name in enumerate(names)}


def result_sizes(kl_clip: bool, kappa_weights: bool) -> tuple[int, int]:
    """Entries of `TokenResult.out`, and sums of `TokenResult.sums`."""
    more = len(KL_CLIP_METRICS) if kl_clip else 0
    return N_OUT + more, N_SUMS.value + more + kappa_weights


def blocking(b: int, t: int, by_sequence: bool) -> tuple[int, int]:
    """
    (BLOCKS, BLOCK_T): programs per sequence, none without tokens, and tokens at a time. Few BLOCK_T, so that few
    kernels are compiled.
    """
    if by_sequence:
        return 1, 128 if t <= 128 else 1024  # with 512, sm_80 and sm_90 spill
    if t <= 128:
        return 1, 128
    parts = (t + 511) // 512
    most = 8 if b >= 512 else MOST_BLOCKS.value
    each = (parts + most - 1) // most
    return (parts + each - 1) // each, 512


def warps(block_t: int, crowded: bool = False) -> int:
    """
    Four tokens a thread: 128 bits of float32 at a time. Two of long rows where `crowded`: with weights of the causal
    term, a corrected KL or, in rows that are read in whole words, a kl_clip, a thread has not enough registers for four
    beside a ratio per sequence.
    """
    return 16 if crowded and block_t == 1024 else min(max(block_t // 128, 1), 8)


def _aligned(t: int) -> bool:
    """Whether a length may be compiled in as a multiple of 16: then contiguous rows are read in words of 128 bits."""
    return t % 16 == 0


def contexts_at_a_time(contexts: torch.Tensor | None) -> tuple[int, bool]:
    """
    (BLOCK_L, L_INNERMOST): how many contexts of a token are read together, and whether they lie side by side, at
    addresses that divide by as many. Any other layout is read context by context.
    """
    if contexts is None:
        return 1, False
    size = next(x for x in (4, 2, 1) if contexts.shape[2] % x == 0)
    stride_b, stride_t, stride_l = contexts.stride()
    if stride_t == 1:
        return size, False
    aligned = stride_b % size == 0 and stride_t % size == 0 and contexts.data_ptr() % 16 == 0
    return (size, True) if size > 1 and stride_l == 1 and aligned else (1, False)


def _rows_strides(x: torch.Tensor | None, shape: tuple[int, int]) -> tuple[int, int]:
    if x is None:
        return 0, 0
    x = x[:, None] if x.dim() == 1 else x
    return x.expand(shape).stride()  # type: ignore[return-value]


def _divide_by(options: LossOptions, b: int) -> tuple[int, float, torch.Tensor | None]:
    """How the finishing kernel reduces: (DIVIDE_BY, divisor, tensor that holds it)."""
    if options.reduction == "grpo":
        return GRPO, 0.0, None
    if options.reduction in ("dr_grpo", "luspo"):
        length = options.max_completion_length if options.reduction == "dr_grpo" else None
        return GIVEN, float(b) * (length or 1), None
    items = options.num_items_in_batch
    if options.reduction == "bnpo" or items is None:
        return PER_TOKEN, 0.0, None
    return (GIVEN, 0.0, items) if isinstance(items, torch.Tensor) else (GIVEN, float(items), None)


def _launch(logp: torch.Tensor, x: TokenInputs, options: LossOptions) -> TokenResult:
    """The pass over the tokens (B, T), their tensors as given; `out` is left unwritten."""
    b, t = logp.shape
    device = logp.device
    by_sequence = options.importance_sampling_level == "sequence"
    blocks, block_t = blocking(b, t, by_sequence)
    has_causal = x.causal_logp is not None
    n_out, n_sums = result_sizes(options.kl_clip is not None, x.kappa_weights is not None)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    result = TokenResult(
        out=empty(n_out),
        d_logp=empty(b, t),
        d_causal=empty(b, t) if has_causal else empty(0),
        sequence=empty(b) if by_sequence else empty(0),
        sums=empty(n_sums, b, blocks),
    )
    if b * t == 0:
        result.sums.zero_()
        return result
    mask = x.mask.view(torch.uint8) if x.mask.dtype == torch.bool else x.mask
    contexts = x.context_logp
    block_l, l_innermost = contexts_at_a_time(contexts)
    weights_strides = (0, 0)
    if x.context_weights is not None:
        given = x.context_weights.stride()
        weights_strides = (0, given[0]) if x.context_weights.dim() == 1 else (given[0], given[1])
    rows = (x.old_logp, x.ref_logp, x.query_logp, x.causal_logp, x.importance_sampling_ratio)
    strides = [_rows_strides(y, (b, t)) for y in (logp, mask, x.advantages, *rows)]
    corrected = options.bias_correction_kl and x.ref_logp is not None
    clipped = options.kl_clip is not None and contexts is not None and _aligned(t)
    anything = logp  # stands in for pointers that a flag keeps from being read
    token_loss_kernel[(b * blocks,)](
        logp,
        mask,
        x.advantages,
        *(anything if y is None else y for y in rows),
        anything if contexts is None else contexts,
        anything if x.context_weights is None else x.context_weights,
        result.d_logp,
        result.d_causal if has_causal else result.d_logp,
        result.sequence if by_sequence else result.d_logp,
        result.sums,
        *(stride for pair in strides for stride in pair),
        *((0, 0, 0) if contexts is None else contexts.stride()),
        *weights_strides,
        b,
        t,
        1 if contexts is None else contexts.shape[2],
        blocks,
        options.beta,
        options.kappa,
        options.epsilon_low,
        options.epsilon_high,
        options.delta or 0.0,
        math.log(options.proj_floor),
        options.kl_clip or 0.0,
        anything if x.kappa_weights is None else x.kappa_weights,
        *_rows_strides(x.kappa_weights, (b, t)),
        options.sapo_temperature_pos,
        options.sapo_temperature_neg,
        HAS_OLD=x.old_logp is not None,
        HAS_REF=x.ref_logp is not None,
        HAS_QUERY=x.query_logp is not None,
        HAS_CAUSAL=has_causal,
        HAS_IS=x.importance_sampling_ratio is not None,
        HAS_CONTEXT=contexts is not None,
        HAS_WEIGHTS=x.context_weights is not None,
        HAS_KAPPA_WEIGHTS=x.kappa_weights is not None,
        HAS_DELTA=options.delta is not None and options.kind == "clipped",
        HAS_KL_CLIP=options.kl_clip is not None,
        BIAS_CORRECTION=corrected,
        KIND=KINDS.index(options.kind),
        ADV_BY_TOKEN=strides[2][1] != 0,
        BY_SEQUENCE=by_sequence,
        ALIGNED_T=_aligned(t),
        L_INNERMOST=l_innermost,
        BLOCK_T=block_t,
        BLOCK_L=block_l,
        num_warps=warps(block_t, corrected or clipped or x.kappa_weights is not None),
    )
    return result


def token_loss_forward(logp: torch.Tensor, x: TokenInputs, options: LossOptions) -> tuple[torch.Tensor, TokenResult]:
    """
    The loss, () float32, metrics and unreduced derivatives of tokens (B, T), their tensors as given: two launches, no
    sync. The loss is a tensor of its own: the gradient of a vector's entry would be a vector of zeros and a copy.
    """
    result = _launch(logp, x, options)
    loss = torch.empty((), dtype=torch.float32, device=logp.device)
    divide_by, divisor, items = _divide_by(options, logp.shape[0])
    blocks = result.sums.shape[2]
    block_p = triton.next_power_of_2(blocks)
    token_loss_finish_kernel[(1,)](
        result.sums,
        result.sums if items is None else items,
        loss,
        result.out,
        result.sums.shape[1],
        blocks,
        divisor,
        DIVIDE_BY=divide_by,
        ITEMS_ON_DEVICE=items is not None,
        HAS_KL_CLIP=options.kl_clip is not None,
        HAS_KAPPA_WEIGHTS=x.kappa_weights is not None,
        BLOCK_P=block_p,
        BLOCK_B=max(16, 1024 // block_p),
        num_warps=4,
    )
    return loss, result


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

    weights = inputs.context_weights
    if weights is not None and logp.dim() == 2:
        weights = weights.amax(dim=1)  # constant along a sequence, but 0 where masked
    rows = inputs._replace(context_weights=None).map(lambda x: x.reshape(*shape, *x.shape[logp.dim() :]))
    result = _launch(logp.reshape(shape), rows._replace(context_weights=weights), options)
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
        blocks,
        BY_COUNT=options.reduction == "grpo",
        BY_SEQUENCE=by_sequence,
        HAS_CAUSAL=has_causal,
        ALIGNED_T=_aligned(t),
        BLOCK_T=block_t,
        num_warps=warps(block_t),
    )
    return grad_logp, grad_causal
