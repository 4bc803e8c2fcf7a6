"""
The ways from hidden states to log-probabilities and gradients: two reads of the logits, one read, none (a product with
the exponentials in its epilogue, by pointers and by descriptors), and scoring by a product and by slices. All give the
numbers of the float64 reference, whatever the estimate is that the fast ones start from.
"""

import json
import warnings
from functools import partial
from typing import Any

import budget
import grid
import pytest
import test_layout
import torch
import triton
import triton.language as tl

import gcpo_kernels
from gcpo_kernels import reference
from gcpo_kernels.options import HeadOptions
from gcpo_kernels.testing import assert_gradient, make_linear_inputs, with_gradients
from gcpo_kernels.triton_backend import gate, product
from gcpo_kernels.triton_backend.linear import TritonTiles
from gcpo_kernels.triton_backend.logprob import softmax_once
from gcpo_kernels.triton_backend.product import Blocks, Product
from gcpo_kernels.triton_backend.product_kernels import _place_of
from gcpo_kernels.triton_backend.scale import scale_

HEADS = (*grid.HEADS, {"temperature": 0.8, "logit_scale": -0.7})
LOSSES = ("two_reads", "one_read", "epilogue", "epilogue by descriptors")
SCORINGS = ("product", "product by descriptors", "slices")
OFFSETS = (0.0, 20.0, -20.0, 200.0, -200.0, "nan", "inf", "-inf", "mixed")


@pytest.fixture(autouse=True)
def _small(small_tiles: None) -> None:
    """Several tiles, blocks and parts of everything."""


def take(path: str, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `gate.choose` take a path for an operation; "by descriptors" as on a device that has them."""
    kernel, _, how = path.partition(" by ")
    monkeypatch.setattr(gate, "choose", lambda op, *rest: kernel if op == operation else gate.KERNELS[op][0])
    if how:
        monkeypatch.setattr(product, "choose_blocks", lambda *matrices: (Blocks(16, 32, 16, 4, 2, 4), True))


def aligned(by_descriptors: bool, **sizes: Any) -> dict[str, Any]:
    """Inputs; for descriptors with rows a multiple of 16 bytes apart."""
    hidden, vocab = (16, 40) if by_descriptors else (13, 37)
    return make_linear_inputs(4, 5, 2, hidden, vocab, **sizes)


def offset_of(inputs: dict[str, Any], head: dict[str, Any], by: float | str) -> torch.Tensor:
    """Log-probabilities of the tokens, off by so many nats."""
    keys = ("hidden", "weight", "bias", "token_ids")
    logp = reference.linear_logprob(**{k: inputs[k] for k in keys if inputs[k] is not None}, **head)
    assert isinstance(logp, torch.Tensor)
    noise = 0.1 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(3))
    if by == "mixed":
        some = torch.tensor([0.0, 20.0, float("nan"), -200.0, 200.0])
        return logp.float() + noise + some[torch.arange(logp.numel()) % 5].view(logp.shape)
    return logp.float() + noise + float(by)


def with_head(inputs: dict[str, Any], head: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    without_bias = {"bias": None} if "bias" in head else {}
    return inputs | without_bias, {k: v for k, v in head.items() if k != "bias"}


@pytest.mark.hazard(7, 8, 9)
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("path", LOSSES)
def test_loss(path: str, head: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, per token and per sequence, with `old_logp` as the estimate.
    Seen in unsloth#11277, verl#5349, flash-attention#1930."""
    take(path, "loss", monkeypatch)
    inputs, head = with_head(aligned("descriptors" in path), head)
    for level in ("token", "sequence"):
        options = {"importance_sampling_level": level, "beta": 0.04, "kappa": 0.06}
        budget.compare("linear_gcpo_loss", inputs, **options, **head)


@pytest.mark.parametrize("by", OFFSETS)
@pytest.mark.parametrize("path", LOSSES)
def test_no_offset_matters(path: str, by: float | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates off by 20 nats cost no accuracy; those off by 200, and NaN, are done again."""
    take(path, "loss", monkeypatch)
    head: dict[str, Any] = {"temperature": 0.7, "logit_softcap": 4.0} if by == "mixed" else {"temperature": 0.7}
    inputs = aligned("descriptors" in path)
    offset = offset_of(inputs, head, by)
    ours = partial(gcpo_kernels.linear_gcpo_loss, offset_logp=offset)
    monkeypatch.setattr(gcpo_kernels, "linear_gcpo_loss", ours)
    budget.compare("linear_gcpo_loss", inputs, beta=0.04, kappa=0.06, **head)


@pytest.mark.parametrize("wrong", [[], [1, 7, 19]], ids=str)
@pytest.mark.parametrize("path", LOSSES[1:])
def test_rows_are_done_again_only_where_they_must(path: str, wrong: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The list that is made on the device: which rows an estimate was too far off for."""
    take(path, "loss", monkeypatch)
    inputs = aligned("descriptors" in path, masked="none")
    head = HeadOptions(0.7)
    offset = offset_of(inputs, {"temperature": 0.7}, 0.0).flatten()
    offset[wrong] += torch.tensor([40.0, -40.0, float("nan")])[: len(wrong)]
    x, weight, bias = inputs["hidden"].flatten(0, 1), inputs["weight"], inputs["bias"]
    made = Product(x, weight, bias, inputs["token_ids"].flatten(), head)
    if path == "one_read":
        tile = x @ weight.T + bias
        out = softmax_once(tile, made.token_ids, head, offset, torch.float32)
    else:
        out = made.exponentials(offset)
    assert out.total.isnan().nonzero().flatten().tolist() == wrong
    right = [row for row in range(len(x)) if row not in wrong]
    before = [kept[right].clone() for kept in out]
    made.redo(out)
    assert all(torch.equal(kept[right], was) for kept, was in zip(out, before, strict=True))
    assert not out.total.isnan().any()
    truth = reference.linear_logprob(x.double(), weight.double(), made.token_ids, bias=bias.double(), temperature=0.7)
    assert isinstance(truth, torch.Tensor)
    torch.testing.assert_close(out.logp.double(), truth, rtol=2e-6, atol=2e-6)


def exact_head(path: str, shift: float) -> dict[str, torch.Tensor]:
    """
    Logits that float32 holds exactly, however they are added up: what is lost, the kernel lost. Multiples of 1/64 below
    2**4, all `shift` larger, by a column of the hidden states that is the same for all of the vocabulary.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-4, 5, (6, 16), generator=generator) / 8.0
    weight = torch.randint(-4, 5, (40, 16), generator=generator) / 8.0
    hidden[:, -1], weight[:, -1] = shift / 100, 100.0
    return {"hidden": hidden, "weight": weight, "token_ids": torch.randint(0, 40, (6,), generator=generator)}


@pytest.mark.hazard(8, 9)
@pytest.mark.parametrize("path", LOSSES)
def test_large_logits_lose_no_digits(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows at 12,800 have the log-probabilities and gradients of the same rows at 0.
    Seen in pytorch#195829, ml-cross-entropy#59."""
    take(path, "loss", monkeypatch)
    results = []
    for shift in (0.0, 12_800.0):
        head = exact_head(path, shift)
        scores = tiles_of(head).score(head["hidden"], head["token_ids"], offset_of(head | {"bias": None}, {}, 0.1))
        gradient = tiles_of(head).gradient(scores, head["token_ids"], torch.linspace(-1, 1, 6))
        scale = 1.0 if gradient.row_scale is None else gradient.row_scale[:, None]
        results.append((scores.logp, scores.entropy, gradient.tile * scale))
    for small, large in zip(*results, strict=True):
        torch.testing.assert_close(large, small, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("path", SCORINGS)
def test_large_logits_are_scored_without_loss(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(path, "scoring", monkeypatch)
    small, large = (
        gcpo_kernels.linear_logprob(**exact_head(path, shift), return_entropy=True) for shift in (0.0, 12_800.0)
    )
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-6, atol=2e-7)


@triton.jit
def places_kernel(out_ptr, down, columns, GROUP: tl.constexpr):
    for tile in range(0, down * columns):
        row, column = _place_of(tile, down, columns, GROUP)
        tl.store(out_ptr + 2 * tile, row)
        tl.store(out_ptr + 2 * tile + 1, column)


@pytest.mark.parametrize("group", [0, 1, 3, 5, 8])
def test_places_of_tiles(group: int) -> None:
    """Groups of blocks of rows one after the other, the last one lower; in a group rows run fastest."""
    down, columns = 5, 3
    out = torch.zeros(down * columns, 2, dtype=torch.int64)
    places_kernel[(1,)](out, down, columns, GROUP=group)
    step = group or down
    rows = [range(first, min(first + step, down)) for first in range(0, down, step)]
    assert out.tolist() == [[row, column] for some in rows for column in range(columns) for row in some]


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("by_descriptors", [False, True])
def test_order_of_tiles(by_descriptors: bool, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many blocks of rows belong together, of five here, every tile is made, and no bit depends on when."""
    x = make_linear_inputs(14, 5, 2, 8, 40, masked="none")
    x = {"hidden": x["hidden"].flatten(0, 1), "token_ids": x["token_ids"].flatten(), "weight": x["weight"]}
    results = []
    for grouped in (0, group):
        blocks = Blocks(16, 32, 8, 4, 2, 2, grouped)
        monkeypatch.setattr(product, "choose_blocks", lambda *_, b=blocks: (b, by_descriptors))
        monkeypatch.setattr(product, "POINTER_BLOCKS", blocks._replace(subtiles=1))  # of rows that are done again
        made = Product(x["hidden"], x["weight"], None, x["token_ids"], HeadOptions())
        out = made.exponentials(torch.full((70,), -200.0))
        assert out.total.isnan().all()
        made.redo(out)
        results.append((*made.scores(), out.logp, out.entropy, out.total, out.e))
    for ours, want in zip(*results, strict=True):
        assert torch.isfinite(want).all()
        assert torch.equal(ours, want)


def tiles_of(inputs: dict[str, Any], **head: Any) -> TritonTiles:
    return TritonTiles(inputs["weight"], inputs.get("bias"), HeadOptions(**head), torch.float32, torch.float32)


@pytest.mark.hazard(9)
@pytest.mark.parametrize("path", LOSSES)
def test_tokens_of_probability_zero(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of -inf, of whole blocks of the vocabulary too: nothing of it is NaN (flash-attention#1930)."""
    take(path, "loss", monkeypatch)
    inputs = aligned("descriptors" in path, masked="none")
    inputs["bias"][8:34] = -float("inf")
    inputs["token_ids"] = inputs["token_ids"] % 8
    budget.compare("linear_gcpo_loss", inputs | {"bias": None}, beta=0.04, kappa=0.06)
    leaves = with_gradients(inputs, "hidden", "weight")
    truth = with_gradients(
        {k: v.double() if k in ("hidden", "weight", "bias") else v for k, v in inputs.items()}, "hidden", "weight"
    )
    gcpo_kernels.linear_gcpo_loss(**leaves, beta=0.04)[0].backward()
    reference.linear_gcpo_loss(**truth, beta=0.04)[0].backward()
    for key in ("hidden", "weight"):
        assert_gradient(leaves[key].grad, truth[key].grad, truth[key].grad.float(), what=key, roundings=64)


@pytest.mark.hazard(8)
@pytest.mark.parametrize("path", LOSSES)
def test_ids_outside_the_vocabulary(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where ids are not checked: NaN in that row, the other rows and every entropy right (verl#2656)."""
    take(path, "loss", monkeypatch)
    inputs = aligned("descriptors" in path, masked="none")
    x, ids = inputs["hidden"].flatten(0, 1), inputs["token_ids"].flatten().clone()
    ids[2], ids[5], ids[9] = -1, len(inputs["weight"]), 2**40
    wrong = torch.tensor([2, 5, 9])
    right = torch.ones(len(ids), dtype=torch.bool)
    right[wrong] = False
    scores = tiles_of(inputs).score(x, ids, torch.full((len(ids),), -3.0))
    _, entropy = reference.linear_logprob(
        x, inputs["weight"], ids.clamp(0, 5), bias=inputs["bias"], return_entropy=True
    )
    truth = reference.linear_logprob(x, inputs["weight"], torch.where(right, ids, 0), bias=inputs["bias"])
    assert scores.logp[wrong].isnan().all()
    torch.testing.assert_close(scores.logp[right], truth[right], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores.entropy, entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("path", SCORINGS)
def test_scoring(path: str, head: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way and every head meets both types."""
    dtype = (torch.float32, torch.float16)[(SCORINGS.index(path) + HEADS.index(head)) % 2]
    take(path, "scoring", monkeypatch)
    inputs, head = with_head(aligned("descriptors" in path, dtype=dtype), head)
    keys = ("hidden", "weight", "bias", "token_ids")
    call = {key: inputs[key] for key in keys}
    budget.compare("linear_logprob", call, **head, return_entropy=True)


@pytest.mark.hazard(13)
@pytest.mark.parametrize("layout", [test_layout.transposed, test_layout.sliced, test_layout.expanded])
@pytest.mark.parametrize("by", [0.0, 200.0])
@pytest.mark.parametrize("path", LOSSES[:3])
def test_strides(path: str, by: float, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states, weight, bias, ids and estimates in an odd layout, done at once and again (TE#2734)."""
    take(path, "loss", monkeypatch)
    inputs = make_linear_inputs(4, 5, 2)
    inputs |= {key: layout(inputs[key]) for key in ("hidden", "bias", "token_ids")}
    # One row for all would leave the hidden states without a gradient: it is one column instead.
    weight = inputs["weight"]
    inputs["weight"] = weight[:, :1].expand(weight.shape) if layout is test_layout.expanded else layout(weight)
    offset = layout(offset_of(inputs, {}, by))
    monkeypatch.setattr(gcpo_kernels, "linear_gcpo_loss", partial(gcpo_kernels.linear_gcpo_loss, offset_logp=offset))
    budget.compare("linear_gcpo_loss", inputs, beta=0.04, kappa=0.06)


@pytest.mark.hazard(13)
@pytest.mark.parametrize("layout", [test_layout.transposed, test_layout.sliced, test_layout.expanded])
@pytest.mark.parametrize("path", ["product", "slices"])
def test_strides_of_scoring(path: str, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen in TE#2734."""
    take(path, "scoring", monkeypatch)
    inputs = make_linear_inputs(4, 5, 2)
    odd = {key: layout(inputs[key]) for key in ("hidden", "weight", "bias", "token_ids")}
    ours = gcpo_kernels.linear_logprob(**odd, return_entropy=True)
    want = reference.linear_logprob(**odd, return_entropy=True)
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab", [40, 64])
@pytest.mark.parametrize("path", SCORINGS)
def test_logits_that_overflow(path: str, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To -inf, without a bias: a token of probability 0, whose entropy is not NaN, whatever the vocabulary's size."""
    take(path, "scoring", monkeypatch)
    inputs = make_linear_inputs(4, 5, 2, 16, vocab)
    hidden, weight = inputs["hidden"].abs() + 1.0, inputs["weight"].clone()
    weight[3] = -3e38
    ids = torch.where(inputs["token_ids"] == 3, 4, inputs["token_ids"])
    ours = gcpo_kernels.linear_logprob(hidden, weight, ids, return_entropy=True)
    want = reference.linear_logprob(hidden, weight, ids, return_entropy=True)
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", LOSSES)
def test_results_repeat(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(path, "loss", monkeypatch)
    results = []
    for _ in range(2):
        inputs = with_gradients(aligned("descriptors" in path), "hidden", "weight", "bias")
        loss, _ = gcpo_kernels.linear_gcpo_loss(**inputs, beta=0.04, kappa=0.06)
        loss.backward()
        results.append([loss.detach(), *(inputs[key].grad for key in ("hidden", "weight", "bias"))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("entropy", [False, True])
def test_gradient_of_logprob(entropy: bool) -> None:
    """Without a gradient in the entropies, the forward's own log-probabilities are the estimate."""
    inputs = make_linear_inputs(2, 5, 1, 13, 37)
    call = {key: inputs[key] for key in ("hidden", "weight", "bias", "token_ids")}
    budget.compare("linear_logprob", call, temperature=0.6, return_entropy=entropy)


def test_gradient_in_entropies_alone() -> None:
    inputs = make_linear_inputs(2, 5, 1, 13, 37)
    call = {key: inputs[key] for key in ("hidden", "weight", "bias", "token_ids")}
    grads = []
    for function, kind in ((gcpo_kernels.linear_logprob, torch.float32), (reference.linear_logprob, torch.float64)):
        leaves = with_gradients({k: v.to(kind) if v.is_floating_point() else v for k, v in call.items()}, "hidden")
        function(**leaves, return_entropy=True)[1].sum().backward()
        grads.append(leaves["hidden"].grad)
    assert_gradient(grads[0], grads[1], grads[1].float(), what="hidden", roundings=64)


@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0, float("nan")])
@pytest.mark.parametrize("size", [0, 1, 4095, 4097])
def test_scaling_in_place(size: int, factor: float) -> None:
    """Times a number on the device; the same bits where it is 1."""
    x = torch.linspace(-3, 3, size)
    want = x * factor
    assert scale_(x, torch.tensor(factor)) is x
    torch.testing.assert_close(x, want, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------------
# The gate
# ---------------------------------------------------------------------------------------------------------------------


def table(tmp_path: Any, *entries: dict[str, Any]) -> str:
    path = tmp_path / "gate.json"
    path.write_text(json.dumps({"entries": list(entries)}))
    return str(path)


def entry(**changes: Any) -> dict[str, Any]:
    usual = {"device": "NVIDIA H200", "operation": "loss", "hidden": 64, "vocab": 1000, "kernel": "epilogue"}
    return usual | changes


def test_gate(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry holds for its device, in all variants, and its size; everything else takes the default."""
    monkeypatch.setenv(gate.VARIABLE, table(tmp_path, entry(), entry(operation="scoring", kernel="slices")))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 NVL")
    cuda = torch.device("cuda:0")
    assert gate.choose("loss", cuda, 64, 1000) == "epilogue"
    assert gate.choose("scoring", cuda, 64, 1000) == "slices"
    assert gate.choose("loss", cuda, 64, 1001) == "one_read"
    assert gate.choose("loss", torch.device("cpu"), 64, 1000) == "one_read"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert gate.choose("loss", cuda, 64, 1000) == "one_read"
    assert gate.choose("scoring", cuda, 64, 1000) == "product"


@pytest.mark.parametrize(
    "wrong",
    [entry(kernel="fastest"), entry(device="NVIDIA A100"), entry(operation="everything"), entry(kernel="slices")],
    ids=str,
)
def test_gate_entries_that_mean_nothing(wrong: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignored with one warning; the others hold."""
    monkeypatch.setenv(gate.VARIABLE, table(tmp_path, wrong, entry()))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    with pytest.warns(UserWarning, match="1 entries that are ignored") as caught:
        assert gate.choose("loss", torch.device("cuda"), 64, 1000) == "epilogue"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gate.choose("loss", torch.device("cuda"), 64, 1000) == "epilogue"


@pytest.mark.parametrize("text", ["", "[]", '{"entries": [{"device": "NVIDIA H200"}]}', '{"entries": [3]}'])
def test_gate_files_that_are_no_table(text: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gate.json"
    path.write_text(text)
    monkeypatch.setenv(gate.VARIABLE, str(path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    with pytest.warns(UserWarning, match="not a table"):
        assert gate.choose("loss", torch.device("cuda"), 64, 1000) == "one_read"


def test_gate_file_that_is_not_there(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gate.VARIABLE, str(tmp_path / "missing.json"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    with pytest.warns(UserWarning, match="names no file"):
        assert gate.choose("loss", torch.device("cuda"), 64, 1000) == "one_read"
