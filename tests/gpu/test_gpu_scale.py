"""More than 2**31 elements and more than 65,535 rows: the last rows are as right as the first."""

import pytest
import torch

import gcpo_kernels
from gcpo_kernels import reference
from gcpo_kernels.testing import assert_close_to_truth, assert_gradient

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
CUDA = "cuda"
ROWS = 70_000  # more than the y and z axes of a grid hold


def needs(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of device memory, {free:.0f} are free")


def ends(count: int) -> torch.Tensor:
    """A few rows at both ends, and those around 2**31 elements."""
    return torch.tensor([0, 1, 2, count // 2, count - 3, count - 2, count - 1], device=CUDA)


@pytest.mark.hazard(11)
@pytest.mark.parametrize("padded", [0, 3])
def test_logits_beyond_32_bits(padded: int) -> None:
    """Contiguous, and as a slice whose rows lie `padded` elements further apart (fla#1080)."""
    needs(24)
    vocab, rows = 131_072, 16_500
    whole = torch.empty(rows, vocab + padded, dtype=torch.bfloat16, device=CUDA).normal_(std=3.0)
    logits = whole[:, :vocab].detach().requires_grad_()
    assert logits.numel() > 2**31
    ids = torch.randint(0, vocab, (rows,), device=CUDA)
    logp, entropy = gcpo_kernels.selective_logprob(logits, ids, return_entropy=True, backend="triton")
    upstream = torch.linspace(0.5, 2.0, rows, device=CUDA)
    (logp * upstream - 0.3 * entropy).sum().backward()
    some = ends(rows)
    truth, plain = logits.detach()[some].double().requires_grad_(), logits.detach()[some].requires_grad_()
    outs = [reference.selective_logprob(x, ids[some], return_entropy=True) for x in (truth, plain)]
    for out in outs:
        (out[0] * upstream[some] - 0.3 * out[1]).sum().backward()
    assert_close_to_truth(logp[some], outs[0][0], outs[1][0])
    assert_close_to_truth(entropy[some], outs[0][1], outs[1][1])
    assert logits.grad is not None
    assert truth.grad is not None
    assert_gradient(logits.grad[some], truth.grad, plain.grad)


@pytest.mark.hazard(11, 12)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_contexts_beyond_32_bits(level: str) -> None:
    """(B, T, L) context scores of more than 2**31 elements, and more sequences than another axis holds.
    Seen in fla#1080, Liger#1294."""
    needs(16)
    tokens, contexts = 1000, 32
    logp = -torch.rand(ROWS, tokens, device=CUDA)
    old = logp + 0.1 * torch.randn(ROWS, tokens, device=CUDA)
    context_logp = torch.empty(ROWS, tokens, contexts, dtype=torch.float16, device=CUDA).normal_(-1.0, 0.2)
    assert context_logp.numel() > 2**31
    advantages = torch.randn(ROWS, device=CUDA)
    mask = torch.rand(ROWS, tokens, device=CUDA) < 0.9
    # Divided by 1: every sequence's gradient is its own.
    options = {"loss_type": "dapo", "num_items_in_batch": 1, "kappa": 0.06, "importance_sampling_level": level}
    leaf = logp.clone().requires_grad_()
    loss, metrics = gcpo_kernels.gcpo_loss(
        leaf, advantages, mask, old_logp=old, context_logp=context_logp, **options, backend="triton"
    )
    loss.backward()
    assert torch.isfinite(torch.stack([loss.detach(), *metrics.values()])).all()
    some = ends(ROWS)
    results = []
    for dtype in (torch.float64, torch.float32):
        x = logp[some].to(dtype).requires_grad_()
        value, _ = reference.gcpo_loss(
            x,
            advantages[some].to(dtype),
            mask[some],
            old_logp=old[some].to(dtype),
            context_logp=context_logp[some].to(dtype),
            **options,
        )
        value.backward()
        results.append(x.grad)
    assert leaf.grad is not None
    assert_gradient(leaf.grad[some], results[0], results[1])
    assert not leaf.grad[~mask].any()


@pytest.mark.hazard(12)
def test_many_short_sequences() -> None:
    """Loss and metrics, summed by one program over all sequences, against the torch backend (Liger#1294)."""
    logp = -torch.rand(3 * ROWS, 3, device=CUDA)
    old = logp + 0.2 * torch.randn_like(logp)
    advantages = torch.randn(3 * ROWS, device=CUDA)
    results = []
    for backend in ("triton", "torch"):
        x = logp.clone().requires_grad_()
        loss, metrics = gcpo_kernels.gcpo_loss(
            x, advantages, torch.ones_like(logp), old_logp=old, ref_logp=old, beta=0.1, backend=backend
        )
        loss.backward()
        results.append([loss.detach(), *metrics.values(), x.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.hazard(12)
@pytest.mark.parametrize("baseline", ["mean", "loo"])
def test_many_groups(baseline: str) -> None:
    """Seen in fla#1077."""
    z = torch.randn(ROWS, 2, 24, device=CUDA)
    context_z = z[:, :, None, None] + 0.5 * torch.randn(ROWS, 2, 2, 1, 24, device=CUDA)
    results = []
    for backend in ("triton", "torch"):
        leaves = [z.clone().requires_grad_(), context_z.clone().requires_grad_()]
        out = gcpo_kernels.causal_weights(*leaves, baseline=baseline, backend=backend)
        mean = gcpo_kernels.leave_one_out_mean(leaves[0], backend=backend)
        (out * torch.linspace(0.5, 1.5, ROWS, device=CUDA)[:, None]).sum().backward()
        results.append([out.detach(), mean.detach(), *(x.grad for x in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.hazard(11)
def test_representations_beyond_32_bits() -> None:
    """context_z of more than 2**31 elements, in bfloat16 (megablocks#186)."""
    needs(16)
    groups, hidden = 150, 4096
    context_z = torch.empty(groups, 8, 8, 64, hidden, dtype=torch.bfloat16, device=CUDA).normal_()
    assert context_z.numel() > 2**31
    z = torch.randn(groups, 8, hidden, device=CUDA, dtype=torch.bfloat16)
    ours = gcpo_kernels.causal_weights(z, context_z, backend="triton")
    some = torch.tensor([0, groups // 2, groups - 1], device=CUDA)
    truth = reference.causal_weights(z[some].double(), context_z[some].double())
    plain = reference.causal_weights(z[some], context_z[some])
    assert_close_to_truth(ours[some], truth, plain)
