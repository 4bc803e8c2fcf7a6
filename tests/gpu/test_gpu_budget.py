"""The Triton backend on a GPU against the float64 reference, in every type; compiled variants, syncs, repeatability."""

import shutil
import subprocess
import sys
from typing import Any

import budget
import grid
import pytest
import test_layout
import torch

import gcpo_kernels
from gcpo_kernels.testing import make_linear_inputs, make_representations, make_token_inputs, with_gradients

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
CASES = pytest.mark.parametrize("case", grid.cases(), ids=grid.name)
CUDA = "cuda"


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: x.to(CUDA) if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}


@DTYPES
@CASES
def test_loss(case: Any, dtype: torch.dtype) -> None:
    inputs, options = grid.token_call(case, 5, 300, dtype=dtype)
    budget.compare("gcpo_loss", on_gpu(inputs), **options)


@pytest.mark.hazard(1, 17)
@DTYPES
@CASES
def test_linear_loss(case: Any, dtype: torch.dtype) -> None:
    """Seen in Liger#1082, triton#5895."""
    inputs, options = grid.linear_call(case, 5, 40, 3, 72, 1003, dtype=dtype)
    budget.compare("linear_gcpo_loss", on_gpu(inputs), **options)


@pytest.mark.parametrize("factor", [2.0**-3, 1.7])
def test_rounded_once_more(factor: float) -> None:
    """As in tests/test_linear_gradients.py, by the kernel that multiplies in place."""
    inputs = on_gpu(make_linear_inputs(5, 40, 3, 72, 1003, dtype=torch.bfloat16))
    found = []
    for by in (1.0, factor):
        leaves = with_gradients(inputs, "hidden", "weight", "bias")
        (gcpo_kernels.linear_gcpo_loss(**leaves, kappa=0.06)[0] * by).backward()
        found.append([leaves[key].grad.float() for key in ("hidden", "weight", "bias")])
    for made, multiplied in zip(*found, strict=True):
        assert made.any()
        assert torch.equal(multiplied, (made * factor).bfloat16().float())


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 512, 513, 8192, 8193])
def test_lengths(tokens: int, level: str) -> None:
    options = {"importance_sampling_level": level, "beta": 0.04, "kappa": 0.06}
    budget.compare("gcpo_loss", on_gpu(make_token_inputs(3, tokens, 2, seed=tokens)), **options)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_several_tiles(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles shorter than a sequence, in bfloat16."""
    from gcpo_kernels.triton_backend import tiling

    monkeypatch.setattr(tiling, "TILE_BYTES", -(2**60))
    monkeypatch.setattr(tiling, "_STEP", 100)
    inputs = on_gpu(make_linear_inputs(4, 257, 2, 64, 4099, dtype=torch.bfloat16))
    budget.compare("linear_gcpo_loss", inputs, importance_sampling_level=level, beta=0.04, kappa=0.06)


@DTYPES
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("head", grid.HEADS, ids=str)
def test_linear_logprob(head: dict[str, Any], entropy: bool, dtype: torch.dtype) -> None:
    inputs = on_gpu(make_linear_inputs(3, 41, 1, 72, 5003, dtype=dtype))
    call = {key: inputs[key] for key in ("hidden", "weight", "bias", "token_ids")}
    call["bias"] = None if "bias" in head else call["bias"]
    options = {key: value for key, value in head.items() if key != "bias"}
    budget.compare("linear_logprob", call, **options, return_entropy=entropy)


@DTYPES
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("shape", [(5, 1), (5, 7), (3, 11, 1000), (9, 4096), (9, 4097), (2, 3, 151_936)], ids=str)
def test_selective_logprob(shape: tuple[int, ...], entropy: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    call = on_gpu({"logits": logits, "token_ids": torch.randint(0, shape[-1], shape[:-1], generator=generator)})
    if shape[-1] == 1:  # every gradient is 0
        assert not gcpo_kernels.selective_logprob(**call).any()
        return
    budget.compare("selective_logprob", call, temperature=0.7, return_entropy=entropy)


@DTYPES
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "euclidean", "gaussian"])
@pytest.mark.parametrize("baseline", ["mean", "loo"])
def test_causal_weights(baseline: str, similarity: str, masked: bool, dtype: torch.dtype) -> None:
    inputs: dict[str, Any] = on_gpu(make_representations(4, 8, 4, 2, 1025, dtype=dtype))
    inputs["context_mask"] = inputs["context_mask"] if masked else None
    budget.compare("causal_weights", inputs, baseline=baseline, similarity=similarity)
    budget.compare("leave_one_out_mean", {"z": inputs["z"]})


@pytest.mark.hazard(18)
@pytest.mark.parametrize("name", test_layout.CALLS)
def test_runs_repeat_bit_for_bit(name: str) -> None:
    """The first call, which compiles, and two more (triton#6547)."""
    function, make, options = test_layout.CALLS[name]
    inputs = on_gpu(make())
    runs = [test_layout.values_and_gradients(function, inputs, options) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(run, runs[0], strict=True))


@pytest.mark.hazard(13)
@pytest.mark.parametrize("layout", [test_layout.transposed, test_layout.sliced, test_layout.expanded])
@pytest.mark.parametrize("name", test_layout.CALLS)
def test_strides(name: str, layout: Any) -> None:
    """Seen in TE#2734."""
    function, make, options = test_layout.CALLS[name]
    odd = {key: layout(x) if key != "token_ids" else x for key, x in on_gpu(make()).items()}
    plain = {key: x.contiguous() for key, x in odd.items()}
    for ours, want in zip(*(test_layout.values_and_gradients(function, x, options) for x in (odd, plain)), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_no_sync(level: str) -> None:
    """After the first call, which compiles, the host never waits for the device."""
    tokens = with_gradients(on_gpu(make_token_inputs(5, 600)), "logp", "causal_logp")
    items = torch.tensor(100.0, device=CUDA)
    groups = with_gradients(on_gpu(make_representations()), "z", "context_z")

    def step() -> None:
        options = {"loss_type": "dapo", "num_items_in_batch": items, "importance_sampling_level": level}
        gcpo_kernels.gcpo_loss(**tokens, **options, beta=0.04, kappa=0.06)[0].backward()
        gcpo_kernels.causal_weights(**groups).sum().backward()
        gcpo_kernels.leave_one_out_mean(groups["z"]).sum().backward()

    step()
    step()  # gradients accumulate from here on
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.hazard(19)
@pytest.mark.parametrize("name", ["gcpo_loss", "linear_gcpo_loss"])
def test_few_compiled_variants(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty lengths compile a handful of variants of each kernel, not twenty (fla#1207)."""
    import triton

    compiled: list[str] = []
    hook = lambda **k: compiled.append(k["fn"].name)  # noqa: E731
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", hook)
    for tokens in range(130, 510, 19):
        if name == "gcpo_loss":
            inputs = make_token_inputs(3, tokens, 3)
        else:
            inputs = make_linear_inputs(3, tokens, 3, 24, 97)
        grid.run(name, on_gpu(inputs), {"kappa": 0.06}, "triton")
    for kernel in set(compiled):
        assert compiled.count(kernel) <= 6, f"{kernel}: {compiled.count(kernel)}"


@pytest.mark.parametrize("token", [-1, 37, 2**40, -(2**63)])
def test_ids_outside_the_vocabulary_score_nan(token: int) -> None:
    """Where the mask counts them, and nowhere else; nothing outside the tensor is read."""
    inputs = on_gpu(make_linear_inputs())
    call = {key: inputs[key] for key in ("hidden", "weight", "bias", "token_ids")}
    call["token_ids"] = call["token_ids"].clone()
    call["token_ids"][0, 3] = token
    logits = call["hidden"] @ call["weight"].T
    for out in (
        gcpo_kernels.linear_logprob(**call),
        gcpo_kernels.selective_logprob(logits, call["token_ids"]),
    ):
        wrong = out.isnan()
        assert wrong[0, 3]
        assert wrong.sum() == 1
    with torch.no_grad():
        assert gcpo_kernels.linear_gcpo_loss(**(inputs | {"token_ids": call["token_ids"]}))[0].isnan()


def test_rows_outside_the_hidden_states_give_nan() -> None:
    """For their group alone; nothing outside the tensor is read."""
    hidden, context_z = torch.randn(4, 3, 5, device=CUDA), torch.randn(2, 2, 1, 1, 5, device=CUDA)
    index = torch.tensor([0, 2, 1, 2**40], device=CUDA)
    out = gcpo_kernels.causal_weights_from_hidden(hidden, index, context_z)
    assert torch.isfinite(out[0]).all()
    assert out[1].isnan().all()


@pytest.mark.hazard(22)
@pytest.mark.parametrize("name", ["gcpo_loss", "linear_gcpo_loss"])
def test_compiled(name: str, fresh_compiler: None) -> None:
    """torch.compile with its default backend gives the same gradients (fla#52)."""
    function, make, options = test_layout.CALLS[name]
    inputs = on_gpu(make())
    compiled = torch.compile(lambda **k: function(**k, **options), fullgraph=True)
    want = test_layout.values_and_gradients(function, inputs, options)
    got = test_layout.values_and_gradients(lambda **k: compiled(**k), inputs, {})
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", test_layout.CALLS)
def test_on_another_device_than_the_current_one(name: str) -> None:
    function, make, options = test_layout.CALLS[name]
    inputs = make()
    first, second = (
        test_layout.values_and_gradients(function, {key: x.to(device) for key, x in inputs.items()}, options)
        for device in ("cuda:0", "cuda:1")
    )
    assert torch.cuda.current_device() == 0
    for x, y in zip(first, second, strict=True):
        assert y.device == torch.device("cuda:1")
        torch.testing.assert_close(x, y.to(x.device), rtol=1e-5, atol=1e-6)


SANITIZED = """
import torch, gcpo_kernels
from gcpo_kernels.testing import make_linear_inputs, make_representations, with_gradients
inputs = with_gradients(make_linear_inputs(3, 131, 2, 24, 131, device="cuda", dtype=torch.bfloat16), "hidden", "weight")
for level in ("token", "sequence"):
    options = {"beta": 0.1, "kappa": 0.1, "importance_sampling_level": level}
    gcpo_kernels.linear_gcpo_loss(**inputs, **options)[0].backward()
logits = torch.randn(5, 4099, device="cuda", requires_grad=True)
gcpo_kernels.selective_logprob(logits, torch.arange(5, device="cuda")).sum().backward()
groups = with_gradients(make_representations(2, 3, 2, 2, 517, device="cuda"), "z", "context_z")
gcpo_kernels.causal_weights(**groups).sum().backward()
gcpo_kernels.leave_one_out_mean(groups["z"]).sum().backward()
torch.cuda.synchronize()
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # every tensor an allocation of its own
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
