"""Extremes that are the kernels' own: blocks of impossible tokens, p' and ratios at their ends."""

from math import inf, log, nan
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import gcpo_kernels
from gcpo_kernels import reference
from gcpo_kernels.testing import assert_close_to_truth, assert_gradient, make_linear_inputs, with_gradients
from gcpo_kernels.triton_backend import ops as triton_ops
from gcpo_kernels.triton_backend import tiling
from gcpo_kernels.triton_backend.common import expm1, k3
from gcpo_kernels.triton_backend.token_kernels import _log_proj


@triton.jit
def log_proj_kernel(
    ctx_ptr,
    query_ptr,
    weights_ptr,
    out_ptr,
    clamped_ptr,
    N,
    L,
    log_floor,
    HAS_WEIGHTS: tl.constexpr,
    FLOOR_AT_QUERY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """`_log_proj` of N tokens that share the weights of their contexts."""
    t = tl.arange(0, BLOCK)
    inside = t < N
    query = tl.load(query_ptr + t, mask=inside, other=0.0)
    contexts = L.to(tl.int64)
    value, clamped = _log_proj(
        ctx_ptr,
        t,
        inside,
        query,
        contexts,
        1,
        weights_ptr,
        1,
        contexts,
        log_floor,
        HAS_WEIGHTS,
        FLOOR_AT_QUERY,
        BLOCK_L,
    )
    tl.store(out_ptr + t, value, mask=inside)
    tl.store(clamped_ptr + t, clamped.to(tl.float32), mask=inside)


def project(
    query: torch.Tensor,
    contexts: torch.Tensor,
    weights: torch.Tensor | None = None,
    floor: float = 1e-6,
    at_a_time: int = 1,
    at_query: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p' of (N,) tokens and whether it was clamped, by the kernels' device function."""
    n, l = contexts.shape
    out, clamped = torch.empty(n), torch.empty(n)
    given = query if weights is None else weights
    log_proj_kernel[(1,)](
        contexts.contiguous(),
        query,
        given,
        out,
        clamped,
        n,
        l,
        log(floor),
        weights is not None,
        at_query,
        triton.next_power_of_2(n),
        at_a_time,
    )
    return out, clamped.bool()


@triton.jit
def functions_kernel(d_ptr, k3_ptr, expm1_ptr, BLOCK: tl.constexpr):
    d = tl.load(d_ptr + tl.arange(0, BLOCK))
    tl.store(k3_ptr + tl.arange(0, BLOCK), k3(d))
    tl.store(expm1_ptr + tl.arange(0, BLOCK), expm1(d))


def test_k3_and_expm1() -> None:
    """Relative precision everywhere, and a k3 that is never negative, from 1e-20 to where exp overflows."""
    d = torch.cat([s * torch.logspace(-20, 1.94, 16384) for s in (-1, 1)])
    ours, ours_expm1 = torch.empty_like(d), torch.empty_like(d)
    functions_kernel[(1,)](d, ours, ours_expm1, d.numel())
    assert (ours >= 0).all()
    torch.testing.assert_close(ours_expm1.double(), torch.expm1(d.double()), rtol=1e-6, atol=0)
    # expm1(d) - d loses digits where d is small, even in float64: there the series' first terms are exact.
    x = d.double()
    truth = torch.where(x.abs() < 1e-3, x * x / 2 * (1 + x / 3 * (1 + x / 4)), torch.expm1(x) - x)
    torch.testing.assert_close(ours.double(), truth, rtol=3e-6, atol=1e-38)
    edges = torch.tensor([0.0, -0.0, -inf, nan])
    functions_kernel[(1,)](edges, ours, ours_expm1, 4)
    assert ours[0] == ours[1] == ours_expm1[0] == 0
    assert ours[2] == inf
    assert ours_expm1[2] == -1
    assert ours[3].isnan()
    assert ours_expm1[3].isnan()


@pytest.mark.parametrize("at_query", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("floor", [1e-6, 1e-30, 0.5])
@pytest.mark.parametrize(("count", "at_a_time"), [(3, 1), (4, 2), (4, 4), (8, 4)])
def test_projection(count: int, at_a_time: int, floor: float, weighted: bool, at_query: bool) -> None:
    """All combinations of extreme scores: the reference in float64, and NaN where a score that counts is NaN."""
    scores = torch.tensor([0.0, -1e-3, -1.0, -20.0, -60.0, -1e4, -inf, nan])
    query, first, second = (x.flatten() for x in torch.meshgrid(scores, scores, scores, indexing="ij"))
    columns = [first, second, first.flip(0), second.flip(0)]
    contexts = torch.stack([columns[l % 4].roll(l // 4) for l in range(count)], dim=1)
    weights = torch.tensor([0.3, 0.9, 0.0, 0.1])[torch.arange(count) % 4] if weighted else None
    ours, clamped = project(query, contexts, weights, floor, at_a_time, at_query)
    wide = None if weights is None else weights.double()
    oracle = reference.projection_floored_at_query if at_query else reference.projection
    truth, truly = oracle(query.double(), contexts.double(), wide, floor)
    single, _ = oracle(query, contexts, weights, floor)
    assert torch.equal(ours.isnan(), truth.isnan())
    seen = ~truth.isnan()
    low = query.clamp(min=-1e30, max=log(floor)) if at_query else torch.full_like(query, log(floor))
    assert (ours >= low - 1e-5)[seen].all()
    assert (ours[seen] <= 0).all()
    # Where terms cancel p' is only as good as its terms: there the float32 reference is the yardstick.
    error = (ours.double() - truth)[seen].abs()
    allowed = 2 * (single.double() - truth)[seen].abs() + 1e-6 * truth[seen].abs().clamp(min=1)
    assert (error <= allowed).all()
    # A p' that is a bound of its own up to a rounding of its terms is on either side of it.
    terms = torch.cat([query[:, None], contexts], dim=1).double().exp()
    shares = torch.full((count,), 1.0 / count).double() if wide is None else wide
    mean = torch.where(shares != 0, shares * terms[:, 1:], 0.0).sum(dim=1)
    bounds = torch.stack([low.double().exp(), torch.ones(len(low), dtype=torch.float64)])
    rounding = 8 * torch.finfo(torch.float32).eps * (terms[:, 1] + mean + terms[:, 0])
    apart = ((terms[:, 1] - mean + terms[:, 0] - bounds).abs() > rounding).all(dim=0)
    assert torch.equal(clamped[seen & apart], truly[seen & apart])
    assert (seen & apart).sum() > 200
    if not at_query:
        assert (clamped == truly)[seen].float().mean() > 0.98
    assert clamped[seen & apart].any()
    assert not clamped[seen & apart].all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("count", "at_a_time"), [(1, 1), (3, 1), (5, 1), (6, 2), (7, 1), (12, 4)])
def test_contexts_that_agree_leave_the_query(count: int, at_a_time: int, weighted: bool) -> None:
    """With the floor at the query, exactly where no context is likelier; never clamped, unlike at proj_floor."""
    query = torch.linspace(-60.0, -14.0, 64)  # below log 1e-6
    weights = torch.full((count,), 1.0 / count) if weighted else None
    for shift in (0.0, -3.0, -200.0, 13.0):
        contexts = (query + shift)[:, None].expand(-1, count)
        ours, clamped = project(query, contexts, weights, at_a_time=at_a_time, at_query=True)
        assert not clamped.any()
        torch.testing.assert_close(ours, query, rtol=0.0 if shift <= 0 else 1e-6, atol=0.0)
        ours, clamped = project(query, contexts, weights, at_a_time=at_a_time)
        assert clamped.all()
    far, clamped = project(query, torch.zeros(64, count), weights, at_a_time=at_a_time, at_query=True)
    assert not clamped.any()
    torch.testing.assert_close(far, query, rtol=1e-6, atol=0.0)
    impossible, clamped = project(torch.full((2,), -inf), torch.full((2, count), -inf), weights, at_query=True)
    assert not clamped.any()
    assert torch.isfinite(impossible).all()


def test_context_of_weight_zero_serves_as_a() -> None:
    contexts = torch.tensor([[-1.0, -2.0, nan], [nan, -2.0, -1.0]])
    ours, _ = project(torch.full((2,), -3.0), contexts, torch.tensor([0.0, 1.0, 0.0]))
    want = torch.tensor([-1.0, -2.0, -3.0]).exp()
    assert ours[0].item() == pytest.approx((want[0] - want[1] + want[2]).log().item(), rel=1e-6)
    assert ours[1].isnan()


HOLES = {
    "first block": slice(0, 16),
    "first two": slice(0, 32),
    "middle": slice(16, 48),
    "last": slice(48, 61),
    "all but one": slice(1, 61),
}


@pytest.mark.hazard(8, 9)
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("hole", HOLES.values(), ids=HOLES)
@pytest.mark.parametrize("through_head", [False, True])
def test_impossible_blocks(through_head: bool, hole: slice, offset: float, small_tiles: None) -> None:
    """Whole blocks of -inf, and huge offsets: no NaN, and the truth to rounding, in blocks of sixteen columns.
    Seen in verl#2656, flash-attention#1930."""
    logits = torch.randn(3, 61, generator=torch.Generator().manual_seed(0)) + offset
    logits[:, hole] = -inf
    ids = torch.isfinite(logits[0]).nonzero().flatten()[[-1, 0, -1]]
    results = []
    for f, dtype in ((gcpo_kernels, torch.float32), (reference, torch.float64), (reference, torch.float32)):
        x = logits.to(dtype, copy=True).requires_grad_()
        if through_head:  # every column from the bias, which is the same for all rows
            x = logits[:1].to(dtype, copy=True).requires_grad_()
            out = f.linear_logprob(x.new_zeros(3, 2), x.new_zeros(61, 2), ids, bias=x[0], return_entropy=True)
        else:
            out = f.selective_logprob(x, ids, return_entropy=True)
        (out[0] * torch.linspace(0.5, 2, 3) - 0.3 * out[1]).sum().backward()
        results.append([out[0].detach(), out[1].detach(), x.grad])
    for ours, truth, plain in zip(*results, strict=True):
        assert torch.isfinite(ours).all()
        assert_close_to_truth(ours, truth, plain)
    assert (results[0][0] <= 0).all()
    assert not results[0][2][:, hole].any()
    if through_head:  # slices of eight columns, whole ones of -inf among them
        with torch.no_grad():
            row = logits[0]
            scored = gcpo_kernels.linear_logprob(row.new_zeros(3, 2), row.new_zeros(61, 2), ids, bias=row)
        torch.testing.assert_close(scored, results[0][0], rtol=1e-6, atol=1e-6)


@pytest.mark.hazard(10)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("delta", [None, 1.5])
def test_ratios_at_their_ends(delta: float | None, level: str) -> None:
    """From 0 to inf, and exactly at the clip's bounds, where the derivative is split: what torch gives.
    Seen in NeMo-RL#4154."""
    ratios = [-400.0, -100.0, -20.0, log(0.8), -1e-6, 0.0, 1e-6, log(1.2), 20.0, 80.0, 100.0]
    old = torch.full((3 * len(ratios), 1), -1.0)
    logp = old + torch.tensor(ratios * 3).unsqueeze(1)
    advantages = torch.tensor([1.0] * len(ratios) + [-1.0] * len(ratios) + [0.0] * len(ratios))
    results = []
    for backend in ("triton", "torch"):
        x = logp.clone().requires_grad_()
        options: dict[str, Any] = {"old_logp": old, "delta": delta, "importance_sampling_level": level}
        losses = [
            gcpo_kernels.gcpo_loss(
                x[k : k + 1],
                advantages[k : k + 1],
                torch.ones(1, 1),
                **(options | {"old_logp": old[k : k + 1]}),
                backend=backend,
            )[0]
            for k in range(len(x))
        ]
        torch.stack(losses).sum().backward()
        results.append((torch.stack(losses).detach(), x.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("largest", [1e-4, 12.0])
def test_a_softcap_keeps_its_digits(largest: float) -> None:
    """
    Small logits are divided by a small temperature; where tanh is almost 1 its slope is small, but what it is
    multiplied by may be large: 1 - exp(-2x) has no digits left at one end, 1 - tanh(x)^2 at the other.
    """
    logits = torch.linspace(0.0, largest, 8)
    options: dict[str, Any] = {"logit_softcap": 1.0, "temperature": min(largest, 1.0)}
    leaves = [x.requires_grad_() for x in (logits.clone(), logits.double())]
    logps = []
    for module, bias in zip((gcpo_kernels, reference), leaves, strict=True):
        zero = torch.zeros(1, 1, dtype=bias.dtype)
        out = module.linear_logprob(zero, zero.expand(8, 1), torch.tensor([7]), bias=bias, **options)
        out.sum().backward()
        logps.append(out.detach())
    torch.testing.assert_close(logps[0].double(), logps[1], rtol=1e-6, atol=0.0)
    ours, truth = (x.grad for x in leaves)
    assert ours is not None and truth is not None
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("step", [1e-2, 1e-3, 1e-4])
def test_kl_of_almost_equal_policies(step: float) -> None:
    """k3 of a small difference keeps its digits on the way into the metrics: exp(d) - d - 1 would lose them."""
    logp = -torch.linspace(0.1, 0.9, 20).view(2, 10)
    other = logp + step * torch.linspace(-1, 1, 20).view(2, 10)
    _, metrics = gcpo_kernels.gcpo_loss(
        logp, torch.ones(2), torch.ones(2, 10), ref_logp=other, query_logp=other, context_logp=other[..., None]
    )
    d = other.double() - logp.double()
    truth = (d * d / 2 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5)))).mean().item()
    assert metrics["kl"].item() == pytest.approx(truth, rel=1e-5)
    assert metrics["kl_causal"].item() == pytest.approx(truth, rel=2e-7 / step + 1e-5)  # log p' is rounded


@pytest.mark.hazard(15)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_error_does_not_grow_with_tiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight gradients accumulate in float32: tiles of one row end as exact as one tile (Liger#830)."""
    inputs = make_linear_inputs(8, 10, 1, 8, 50, dtype=dtype, masked="none") | {"context_weights": None}
    keys = ("hidden", "weight", "bias")
    truth = with_gradients({k: x.double() if k in keys else x for k, x in inputs.items()}, *keys)
    reference.linear_gcpo_loss(**truth)[0].backward()
    for rows in (80, 1):
        monkeypatch.setattr(tiling, "TILE_BYTES", -(2**60))
        monkeypatch.setattr(tiling, "_STEP", rows)
        ours = with_gradients(inputs, *keys)
        gcpo_kernels.linear_gcpo_loss(**ours)[0].backward()
        for key in keys:
            plain = truth[key].grad.to(dtype)  # one rounding
            assert_gradient(ours[key].grad, truth[key].grad, plain, what=f"{key}, tiles of {rows}", roundings=64)


def test_rows_outside_the_hidden_states() -> None:
    """A row that is not there is never read: an error, and from the operator, which a GPU runs unchecked, NaN."""
    hidden, context_z = torch.randn(4, 3, 5), torch.randn(2, 2, 1, 1, 5)
    for wrong in (-1, 3, 2**40):
        index = torch.tensor([0, 2, 1, wrong])
        for backend in ("triton", "torch"):
            with pytest.raises(ValueError, match="`last_index`"):
                gcpo_kernels.causal_weights_from_hidden(hidden, index, context_z, backend=backend)
        leaf = hidden.clone().requires_grad_()
        upsilon, _ = triton_ops.triton_causal_weights(leaf, index, context_z, None, 2.0, "mean", "cosine")
        assert torch.isfinite(upsilon[0]).all()
        assert upsilon[1].isnan().all()
        upsilon[0].sum().backward()
        assert torch.isfinite(leaf.grad).all()
