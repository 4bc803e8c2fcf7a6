"""Every public function with backend="triton" against the float64 reference, within the error budget."""

from typing import Any

import budget
import grid
import pytest
import torch

import gcpo_kernels
from gcpo_kernels.testing import make_linear_inputs, make_representations, make_token_inputs
from gcpo_kernels.triton_backend import tiling

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
# One type for each case, by the parity of its number's bits: any two options meet in both types.
_TYPES = (torch.float32, torch.float16)
_PAIRS = [(case, _TYPES[number.bit_count() % 2]) for number, case in enumerate(grid.cases())]
CASES = pytest.mark.parametrize(
    ("case", "dtype"), [pytest.param(case, dtype, id=f"{grid.name(case)}-{dtype}") for case, dtype in _PAIRS]
)


@pytest.mark.hazard(1)
@CASES
def test_loss(case: Any, dtype: torch.dtype) -> None:
    """Seen in Liger#1082."""
    inputs, options = grid.token_call(case, 4, 6, dtype=dtype)
    budget.compare("gcpo_loss", inputs, **options)


@pytest.mark.hazard(1)
@CASES
def test_linear_loss(case: Any, dtype: torch.dtype, small_tiles: None) -> None:
    """Tiles of three tokens: shorter than the sequences, and not a divisor of anything (Liger#1082)."""
    inputs, options = grid.linear_call(case, 4, 5, 2, dtype=dtype)
    budget.compare("linear_gcpo_loss", inputs, **options)


@pytest.mark.parametrize("rows", [1, 5, 6, 11, 100])
@pytest.mark.parametrize("masked", ["ragged", "none"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_any_tile_size(level: str, masked: str, rows: int, small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles below, at and above the length of a sequence; several sequences in one; one tile for all."""
    monkeypatch.setattr(tiling, "_STEP", rows)
    inputs = make_linear_inputs(4, 5, 2, seed=rows, masked=masked) | {"context_weights": None}
    budget.compare("linear_gcpo_loss", inputs, importance_sampling_level=level, beta=0.04, kappa=0.06)


@pytest.mark.parametrize("name", ["gcpo_loss", "linear_gcpo_loss"])
@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 512, 513])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_lengths_around_blocks(level: str, tokens: int, name: str) -> None:
    options = {"importance_sampling_level": level, "beta": 0.04, "kappa": 0.06, "loss_type": "grpo"}
    if name == "gcpo_loss":
        inputs = make_token_inputs(3, tokens, 2, seed=tokens)
    else:  # all but a few tokens masked: each costs a launch of its own
        inputs = make_linear_inputs(2, tokens, 2, masked="none", seed=tokens) | {"context_weights": None}
        inputs["mask"][:, 3:-2] = False
    budget.compare(name, inputs, **options)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 8 * 512 + 3), (1, 16 * 512 + 1)])
def test_long_sequences(batch: int, tokens: int, level: str) -> None:
    """Several programs to a sequence, more than one block to a program, and 64 programs."""
    options = {"importance_sampling_level": level, "beta": 0.04, "kappa": 0.06, "kl_clip": 0.3}
    budget.compare("gcpo_loss", make_token_inputs(batch, tokens, 2, masked="none"), **options)


@DTYPES
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("head", grid.HEADS, ids=str)
def test_linear_logprob(head: dict[str, Any], entropy: bool, dtype: torch.dtype, small_tiles: None) -> None:
    inputs = make_linear_inputs(2, 5, dtype=dtype)
    call = {key: inputs[key] for key in ("hidden", "weight", "bias", "token_ids")}
    call["bias"] = None if "bias" in head else call["bias"]
    options = {key: value for key, value in head.items() if key != "bias"}
    budget.compare("linear_logprob", call, **options, return_entropy=entropy)


@pytest.mark.hazard(8)
@pytest.mark.parametrize(("vocab", "hidden"), [(1, 5), (7, 1), (1000, 33), (4096, 3), (4097, 7), (8200, 3)])
def test_vocabularies_of_the_head(vocab: int, hidden: int) -> None:
    """In one block, in several, and in several slices where no gradient is asked for (verl#2656)."""
    inputs = make_linear_inputs(2, 3, 2, hidden, vocab, masked="none", seed=1) | {"context_weights": None}
    options = {"beta": 0.04, "kappa": 0.06}
    if vocab > 1:  # one token: every gradient of the head is 0
        budget.compare("linear_gcpo_loss", inputs, **options)
    with torch.no_grad():
        loss, metrics = gcpo_kernels.linear_gcpo_loss(**inputs, **options, backend="triton")
        whole, whole_metrics = gcpo_kernels.linear_gcpo_loss(**inputs, **options, backend="torch")
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics, whole_metrics, rtol=1e-5, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    "shape", [(5, 7), (2, 3, 37), (3, 129), (3, 1000), (2, 4096), (2, 4097), (1, 2, 9000)], ids=str
)
def test_selective_logprob(shape: tuple[int, ...], temperature: float, entropy: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    ids = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    call = {"logits": logits, "token_ids": ids}
    budget.compare("selective_logprob", call, temperature=temperature, return_entropy=entropy)


def test_one_word() -> None:
    """A vocabulary of one: log-probability and entropy are 0, and so is the gradient."""
    logits = torch.randn(4, 1, requires_grad=True)
    logp, entropy = gcpo_kernels.selective_logprob(logits, torch.zeros(4, dtype=torch.int64), return_entropy=True)
    (logp.sum() + entropy.sum()).backward()
    assert not torch.stack([logp, entropy, logits.grad[:, 0]]).any()


@DTYPES
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "euclidean", "gaussian"])
@pytest.mark.parametrize("baseline", ["mean", "loo"])
def test_causal_weights(baseline: str, similarity: str, masked: bool, dtype: torch.dtype) -> None:
    inputs: dict[str, Any] = make_representations(2, 4, 3, 2, 9, dtype=dtype)
    inputs["context_mask"] = inputs["context_mask"] if masked else None
    budget.compare("causal_weights", inputs, baseline=baseline, similarity=similarity, alpha=1.7)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("sizes", "baseline"),
    [
        ((1, 1, 2, 1, 5), "mean"),
        ((3, 2, 1, 1, 5), "mean"),
        ((2, 2, 1, 3, 5), "loo"),
        ((2, 3, 4, 1, 1), "mean"),
        ((1, 3, 2, 2, 511), "loo"),
        ((1, 2, 2, 1, 512), "mean"),
        ((1, 2, 2, 1, 513), "loo"),
        ((1, 2, 1, 2, 1030), "mean"),
    ],
    ids=str,
)
def test_sizes_of_representations(sizes: tuple[int, ...], baseline: str, masked: bool) -> None:
    inputs: dict[str, Any] = make_representations(*sizes)
    inputs["context_mask"] = inputs["context_mask"] if masked else None
    if sizes[2] == 1 or masked or sizes[-1] == 1:  # gradients in context_z, or in z, are 0: values alone
        ours, want = (gcpo_kernels.causal_weights(**inputs, baseline=baseline, backend=b) for b in ("triton", "torch"))
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6)
    else:
        budget.compare("causal_weights", inputs, baseline=baseline)


@DTYPES
@pytest.mark.parametrize("sizes", [(3, 2, 1, 1, 7), (2, 5, 1, 1, 16), (1, 3, 1, 1, 513)], ids=str)
def test_leave_one_out_mean(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    budget.compare("leave_one_out_mean", {"z": make_representations(*sizes, dtype=dtype)["z"]})


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gcpo_loss": (lambda: make_token_inputs(4, 5, 2), {"kappa": 0.06}),
    "linear_gcpo_loss": (lambda: make_linear_inputs(4, 5, 2) | {"context_weights": None}, {"kappa": 0.06}),
    "linear_logprob": (
        lambda: {key: make_linear_inputs(2, 5)[key] for key in ("hidden", "weight", "bias", "token_ids")},
        {"return_entropy": True},
    ),
    "selective_logprob": (
        lambda: {"logits": make_linear_inputs(2, 5)["hidden"], "token_ids": make_linear_inputs(2, 5)["token_ids"] % 13},
        {},
    ),
    "causal_weights": (lambda: make_representations(2, 3), {}),
    "leave_one_out_mean": (lambda: {"z": make_representations(2, 3)["z"]}, {}),
}


@pytest.mark.parametrize("factor", [0.0, 1.01, 0.99, -1.0])
@pytest.mark.parametrize("function", CALLS)
def test_the_comparison_rejects_wrong_gradients(function: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero, 1% off or negated, one gradient at a time; the untouched call passes."""
    make, options = CALLS[function]
    inputs = make()
    if factor == 0.0:
        budget.compare(function, inputs, **options)
    true_function = getattr(gcpo_kernels, function)
    for spoiled in [key for key in inputs if key in budget.LEAVES]:

        def wrong(spoiled: str = spoiled, **arguments: Any) -> Any:
            arguments[spoiled].register_hook(lambda g: g * factor)
            return true_function(**arguments)

        monkeypatch.setattr(gcpo_kernels, function, wrong)
        with pytest.raises(AssertionError, match=spoiled):
            budget.compare(function, inputs, **options)
