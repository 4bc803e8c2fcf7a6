"""How the kernels of the causal weights cut their inputs: groups above a tile, layouts, samples that are not there."""

from typing import Any

import budget
import pytest
import small_tiles
import torch

import gcpo_kernels
from gcpo_kernels import reference
from gcpo_kernels.testing import make_hidden_representations, make_representations, with_gradients
from gcpo_kernels.triton_backend import causal


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of two candidates, blocks of four columns."""
    small_tiles.apply(monkeypatch, small_tiles.BLOCKS["triton"])


def gradients(inputs: dict[str, Any], backend: str = "triton", **options: Any) -> list[torch.Tensor]:
    """Upsilon and the gradients of both inputs."""
    leaves = with_gradients(inputs, "z", "context_z")
    out = gcpo_kernels.causal_weights(**leaves, **options, backend=backend)
    (out * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), leaves["z"].grad, leaves["context_z"].grad]


@pytest.mark.parametrize("baseline", ["mean", "loo"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 3, 5, 1, 37),  # candidates fill no tile, samples are odd
        (1, 8, 2, 3, 64),
        (2, 9, 3, 1, 33),  # one more than the smaller tile holds
        (1, 16, 2, 1, 300),  # several blocks of H, the last one with a tail
        (1, 17, 3, 3, 130),  # one more than the larger tile holds
        (1, 37, 2, 1, 66),
    ],
    ids=str,
)
def test_groups_and_tiles(sizes: tuple[int, ...], masked: bool, baseline: str) -> None:
    dtype = torch.float16 if masked else torch.float32  # of half the bytes: the forward's tile is twice as wide
    inputs: dict[str, Any] = make_representations(*sizes, dtype=dtype)
    inputs["context_mask"] = inputs["context_mask"] if masked else None
    budget.compare("causal_weights", inputs, baseline=baseline, similarity="gaussian")
    budget.compare("leave_one_out_mean", {"z": inputs["z"]})


@pytest.mark.parametrize("baseline", ["mean", "loo"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [(2, 2, 3, 1, 4), (2, 3, 2, 3, 5), (1, 5, 3, 3, 11)], ids=str)
def test_slices_and_blocks(sizes: tuple[int, ...], masked: bool, baseline: str, small_blocks: None) -> None:
    """The same in slices and blocks of the smallest size, with z from rows of hidden states too."""
    inputs: dict[str, Any] = make_representations(*sizes)
    if sizes[1] == 2:  # or no sample would count
        inputs["context_mask"][:, 0] = True
    inputs["context_mask"] = inputs["context_mask"] if masked else None
    budget.compare("causal_weights", inputs, baseline=baseline)
    budget.compare("leave_one_out_mean", {"z": inputs["z"]})
    keys = ("prompts", "group", "contexts", "samples", "hidden")
    hidden: dict[str, Any] = make_hidden_representations(**dict(zip(keys, sizes, strict=True)))
    hidden["context_mask"] = inputs["context_mask"]
    hidden["last_index"] = torch.arange(len(hidden["last_index"])) % 3
    budget.compare("causal_weights_from_hidden", hidden, baseline=baseline)


def reversed_strides(x: torch.Tensor) -> torch.Tensor:
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("group", [3, 17])
def test_layouts_change_no_bit(group: int, masked: bool) -> None:
    """Transposed inputs, and contexts that all candidates, all contexts or all samples share without a copy."""
    inputs: dict[str, Any] = make_representations(2, group, 2, 3, 21)
    inputs["context_mask"] = inputs["context_mask"] if masked else None
    context_z = inputs["context_z"]
    views = [reversed_strides(context_z), *(context_z.narrow(dim, 0, 1).expand_as(context_z) for dim in (0, 1, 2, 3))]
    for view in views:
        whole = gradients(inputs | {"context_z": view.contiguous()})
        leaves = inputs | {"z": reversed_strides(inputs["z"]).requires_grad_(), "context_z": view.requires_grad_()}
        out = gcpo_kernels.causal_weights(**leaves, backend="triton")
        grads = torch.autograd.grad(
            (out * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).sum(), [leaves["z"], leaves["context_z"]]
        )
        for got, want in zip([out, *grads], whole, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("group", [2, 5])
def test_samples_that_are_not_there(group: int, small_blocks: None) -> None:
    """NaN at masked samples reaches neither the weights nor a gradient; at one that counts with 0 it shows."""
    inputs = make_representations(2, group, 3, 2, 6)
    mask = inputs["context_mask"]
    clean = gradients(inputs)
    spoilt = inputs["context_z"].masked_fill(~mask[..., None], torch.nan)
    for got, want in zip(gradients(inputs | {"context_z": spoilt}), clean, strict=True):
        assert torch.equal(got, want)
    assert not clean[2][~mask].any()
    # With one context Zbar and Zprime cancel: all coefficients are 0, and what is there is read all the same.
    one = {"z": inputs["z"], "context_z": inputs["context_z"][:, :, :1].clone(), "context_mask": mask[:, :, :1] | True}
    one["context_z"][1, group - 1, 0, 1, 5] = torch.nan
    for given in (one, one | {"context_mask": None}):
        out = gcpo_kernels.causal_weights(**given)
        assert out.isnan().nonzero().tolist() == [[1, group - 1]]


@pytest.mark.parametrize(("contexts", "samples"), [(1, 1), (16, 8), (17, 3), (2, 9), (40, 20)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_coefficients(dtype: torch.dtype, contexts: int, samples: int) -> None:
    """Fewer contexts and samples than the kernel looks at together, as many and more; masks in any layout."""
    mask = torch.rand(2, 3, contexts, samples, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0, 0], mask[0, 1, 0], mask[1, 2] = False, False, True
    found = causal.coefficients(reversed_strides(mask.to(dtype))).view(mask.shape)
    count = mask.sum(dim=3, keepdim=True).double()
    first = (torch.arange(contexts) == 0).view(1, 1, -1, 1).double()
    want = (first - 1 / (count > 0).sum(dim=2, keepdim=True)) / count
    want = torch.where(mask & (count[:, :, :1] > 0), want, torch.nan)
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("group", [1, 17])
def test_one_column(group: int) -> None:
    """H = 1: every stride may be 1, and the weights are alpha or -alpha."""
    inputs: dict[str, Any] = make_representations(2, group, 2, 2, 1) | {"context_mask": None}
    ours, want = (gcpo_kernels.causal_weights(**inputs, backend=backend) for backend in ("triton", "torch"))
    torch.testing.assert_close(ours, want)
    ours, want = (gcpo_kernels.leave_one_out_mean(inputs["z"], backend=backend) for backend in ("triton", "torch"))
    torch.testing.assert_close(ours, want, equal_nan=True)


@pytest.mark.parametrize("sizes", [(0, 3, 2, 1, 5), (2, 0, 2, 1, 5), (2, 3, 2, 1, 0)], ids=str)
@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_nothing(sizes: tuple[int, ...], similarity: str) -> None:
    """No prompts, no candidates, no hidden dimension: what the reference gives."""
    p, n, l, m, hidden = sizes
    inputs = {"z": torch.zeros(p, n, hidden), "context_z": torch.zeros(p, n, l, m, hidden)}
    results = [gradients(inputs, backend, similarity=similarity) for backend in ("triton", "torch")]
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    assert gcpo_kernels.leave_one_out_mean(inputs["z"]).shape == inputs["z"].shape


def test_results_repeat(small_blocks: None) -> None:
    """Bit for bit, and whatever other prompts are in the batch."""
    inputs: dict[str, Any] = make_representations(3, 3, 3, 1, 10)
    first = gradients(inputs)
    for got, want in zip(gradients(inputs), first, strict=True):
        assert torch.equal(got, want)
    alone = gcpo_kernels.causal_weights(**{key: x[2:3] for key, x in inputs.items()})
    assert torch.equal(alone, first[0][2:3])


def test_parts_add_up(small_blocks: None) -> None:
    """What the forward leaves for the backward: z.t, |z|^2 and |t|^2, over more blocks than are added at once."""
    z, context_z = torch.randn(2, 3, 21), torch.zeros(2, 3, 1, 1, 21)
    arguments = causal.CausalArguments(z, None, context_z, None, 1.0, "loo", "cosine")
    upsilon, saved = causal.causal_weights_forward(arguments)
    t = reference.leave_one_out_mean(z.double())
    want = [(z.double() * t).sum(-1), z.double().square().sum(-1), t.square().sum(-1)]
    torch.testing.assert_close(saved.double(), torch.stack(want).flatten(1), rtol=1e-5, atol=1e-5)
    cosine = want[0] / (want[1] * want[2]).sqrt()
    torch.testing.assert_close(upsilon.double(), cosine, rtol=1e-5, atol=1e-5)
