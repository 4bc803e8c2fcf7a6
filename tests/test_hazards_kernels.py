"""Bug classes of docs/hazards.md that other tests of the kernels do not try: heads of real models, sizes, caches."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import grid
import pytest
import torch

import gcpo_kernels
from gcpo_kernels import reference
from gcpo_kernels.testing import (
    assert_close_to_truth,
    assert_gradient,
    in_float64,
    make_linear_inputs,
    make_representations,
    make_token_inputs,
    with_gradients,
)

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {path: path.read_text() for path in (ROOT / "gcpo_kernels").rglob("*.py")}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.hazard(1)
def test_unknown_and_contradicting_options_raise() -> None:
    """Nothing that a caller asks for is dropped in silence (trl#6808: one loss_type ran another's loss)."""
    inputs = make_token_inputs()
    for loss_type in ("gspo", "gmpo", "CISPO", "vespo "):
        with pytest.raises(ValueError, match="`loss_type` must be one of"):
            gcpo_kernels.gcpo_loss(**inputs, loss_type=loss_type)
    with pytest.raises(TypeError, match="unexpected keyword"):
        gcpo_kernels.gcpo_loss(**inputs, epsilon=0.2)
    without = inputs | {"ref_logp": None, "context_logp": None, "context_weights": None}
    for option in ("beta", "kappa"):
        with pytest.raises(ValueError, match=f"`{option}` = 0.1 needs"):
            gcpo_kernels.gcpo_loss(**without, **{option: 0.1})


@pytest.mark.hazard(2)
def test_gradients_need_no_functional_transform() -> None:
    """`torch.func` inside DDP cannot reach parameters (trl#7247): gradients come from registered operators alone."""
    wrong = [str(path) for path, text in SOURCES.items() if re.search(r"torch\.func\b|functorch|torch\.vmap", text)]
    assert not wrong


@pytest.mark.hazard(5)
@pytest.mark.parametrize("function", ["linear_gcpo_loss", "linear_logprob"])
def test_tied_embeddings_get_both_halves(function: str) -> None:
    """One weight as embedding and output layer: its gradient is the sum of both uses (verl#7834)."""
    inputs = make_linear_inputs(dtype=torch.float64, masked="none") | {"bias": None}
    ids = inputs["token_ids"]

    def total(call: Any, embedding: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        given = inputs | {"hidden": torch.tanh(embedding[ids.roll(1, dims=1)]), "weight": head}
        if function == "linear_logprob":
            return call(given["hidden"], given["weight"], ids).square().mean()
        return call(**given, beta=0.04)[0]

    def gradient(call: Any, tied: bool) -> torch.Tensor:
        embedding, head = (inputs["weight"].clone().requires_grad_() for _ in range(2))
        if tied:
            return torch.autograd.grad(total(call, embedding, embedding), embedding)[0]
        halves = torch.autograd.grad(total(call, embedding, head), (embedding, head))
        assert all(half.abs().max() > 1e-6 for half in halves)
        return halves[0] + halves[1]

    ours = gradient(getattr(gcpo_kernels, function), tied=True)
    assert_gradient(ours, gradient(getattr(reference, function), tied=True), roundings=2**10)
    assert_gradient(ours, gradient(getattr(reference, function), tied=False), roundings=2**10)


# Models whose logits are not hidden @ weight.T: what their configs are called, and what that is here.
HEADS = {
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 1.5}, {"logit_softcap": 1.5}),
    "gemma3": ("Gemma3TextConfig", {"final_logit_softcapping": 1.5}, {"logit_softcap": 1.5}),
    "cohere multiplies": ("CohereConfig", {"logit_scale": 0.25}, {"logit_scale": 0.25}),
    "granite divides": ("GraniteConfig", {"logits_scaling": 4.0}, {"logit_scale": 0.25}),
    "hyperclovax multiplies": ("HyperCLOVAXConfig", {"logits_scaling": 0.25}, {"logit_scale": 0.25}),
}


def model_with_head(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    config_class, head, _ = HEADS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.4,
        pad_token_id=0,
        **head,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.hazard(7)
@pytest.mark.parametrize("name", HEADS)
def test_softcaps_and_scales_are_those_of_the_models(name: str) -> None:
    """log-probabilities are those of `model(...).logits`, at a temperature too (unsloth#11277, vllm#52158)."""
    model = model_with_head(name)
    ids = torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        logits = model(input_ids=ids).logits[:, :-1]
    targets = ids[:, 1:]
    for temperature in (1.0, 0.6):
        want = (logits / temperature).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        head = HEADS[name][2] | {"temperature": temperature}
        ours = gcpo_kernels.linear_logprob(hidden, model.lm_head.weight, targets, **head)
        torch.testing.assert_close(ours, want, atol=2e-5, rtol=1e-5)
        # The test would see it missing.
        bare = gcpo_kernels.linear_logprob(hidden, model.lm_head.weight, targets, temperature=temperature)
        assert (bare - want).abs().max() > 1e-2


@pytest.mark.hazard(8)
@pytest.mark.parametrize("vocab", [1000, 32_000, 65_537, 151_665])
def test_no_vocabulary_makes_a_log_probability_positive(vocab: int) -> None:
    """All logits far below 0, sizes that no block divides: a padding column would raise logp above 0 (verl#2656)."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(vocab, generator=generator) - 100.0
    ids = torch.tensor([0, vocab // 2, vocab - 1])
    want = row.double().log_softmax(-1)[ids]
    ours = gcpo_kernels.selective_logprob(row.expand(3, -1), ids)
    hidden, weight = torch.ones(3, 1), (row[:, None] / 2).contiguous()
    through = gcpo_kernels.linear_logprob(hidden, weight, ids, bias=row / 2)
    for got in (ours, through):
        assert (got <= 0).all()
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


@pytest.mark.hazard(10)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    ("advantage", "delta", "correction"),
    [(1.0, None, 1.0), (0.0, None, 1.0), (1.0, 1.5, 1.0), (-1.0, 1.5, 1.0), (0.0, 1.5, 1.0), (-9.0, None, 0.0)],
)
@pytest.mark.parametrize("function", ["gcpo_loss", "linear_gcpo_loss"])
def test_an_overflowing_ratio_that_is_clipped_has_gradient_zero(
    function: str, advantage: float, delta: float | None, correction: float, level: str
) -> None:
    """
    log R = 100 is inf in float32. Where the clip, `delta`, an advantage or a sampler's correction of 0 takes over, the
    loss is finite and its gradient 0; multiplying the clipped side's 0 with R's inf gives NaN (NeMo-RL#4154).
    """
    inputs = make_linear_inputs(3, 4, masked="none")
    inputs["advantages"] = torch.tensor([1.0, advantage, -1.0])
    if function == "gcpo_loss":
        inputs["logp"] = reference.linear_logprob(*(inputs.pop(key) for key in ("hidden", "weight", "token_ids")))
        del inputs["bias"]
        inputs["old_logp"] = inputs["logp"] + 0.1
    inputs["old_logp"][1] -= 100.0
    inputs["importance_sampling_ratio"][1] = correction
    options = {"delta": delta, "importance_sampling_level": level}
    loss, metrics, grads = grid.run(function, inputs, options)
    truth, true_metrics, true_grads = grid.run(function, in_float64(inputs), options, backend=None)
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    assert metrics["clip_high"].item() == pytest.approx(true_metrics["clip_high"].item())
    row = grads["logp" if function == "gcpo_loss" else "hidden"][1]
    assert not row.any()
    assert torch.isfinite(row).all()
    for key, want in true_grads.items():
        if want is not None and want.any():
            assert_gradient(grads[key], want, what=key, roundings=2**10)


@pytest.mark.hazard(10)
def test_an_infinite_loss_is_not_hidden() -> None:
    """Where the loss does grow with an overflowing ratio it is inf, not a large number that looks like one: the
    guard against NaN (NeMo-RL#4154) covers nothing up."""
    logp = torch.full((1, 2), -1.0, requires_grad=True)
    loss, _ = gcpo_kernels.gcpo_loss(logp, -torch.ones(1), torch.ones(1, 2), old_logp=torch.full((1, 2), -101.0))
    loss.backward()
    assert loss == torch.inf
    assert (logp.grad == torch.inf).all()


@pytest.mark.hazard(15)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gap", [6.0, 12.0, 20.0])
def test_confident_tokens_through_the_head(gap: float, dtype: torch.dtype, small_tiles: None) -> None:
    """1 - p of a token that is nearly certain keeps its digits into every gradient, in any number of tiles
    (Liger#1419: p - 1 cancels as p goes to 1)."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("bfloat16, which the interpreter computes wrongly")
    inputs = make_linear_inputs(4, 12, 1, 16, 40, dtype=dtype, masked="none") | {"causal_logp": None}
    bias = torch.zeros(40, dtype=dtype)
    bias[0] = gap
    inputs |= {"bias": bias, "token_ids": torch.zeros_like(inputs["token_ids"]), "hidden": inputs["hidden"] * 0.1}
    options = {"loss_type": "bnpo"}
    inputs["old_logp"] = None
    ours, truth, plain = (
        grid.run("linear_gcpo_loss", x, options, backend=backend)[2]
        for x, backend in ((inputs, "default"), (in_float64(inputs), None), (inputs, None))
    )
    for key in ("hidden", "weight", "bias"):
        assert_gradient(ours[key], truth[key], plain[key], what=key, roundings=2**8)


@pytest.mark.hazard(17)
@pytest.mark.hazard(18)
def test_kernels_round_nothing_to_tf32_and_tune_nothing() -> None:
    """A float32 `tl.dot` rounds to TF32 unless it is told not to (triton#5895), and autotuning re-runs what it times
    (triton#6547)."""
    kernels = {path: text for path, text in SOURCES.items() if "triton_backend" in path.parts}
    assert len(kernels) > 4
    for path, text in kernels.items():
        products = re.findall(r"tl\.dot\w*\(.*\)", text)
        assert len(products) == text.count("tl.dot"), path
        assert all('input_precision="ieee"' in call for call in products), path
        assert not re.search(r"autotune|heuristics", text), path


@pytest.mark.hazard(17)
def test_the_projects_never_touch_the_tf32_switch() -> None:
    """Whether products may be TF32 (triton#5895) is the user's choice, and float32 by torch's default."""
    everything = SOURCES | {path: path.read_text() for path in (ROOT / "gcpo").rglob("*.py")}
    wrong = [
        path for path, text in everything.items() if re.search(r"allow_tf32|matmul_precision|fp32_precision", text)
    ]
    assert not wrong


@pytest.mark.hazard(18)
@pytest.mark.parametrize("name", ["gcpo_loss", "linear_gcpo_loss"])
def test_the_first_call_is_like_the_second(name: str) -> None:
    """Nothing is accumulated across calls (triton#7181): bit for bit the same, gradients too."""
    inputs = make_token_inputs() if name == "gcpo_loss" else make_linear_inputs()
    first, second = (grid.run(name, inputs, {"beta": 0.04, "kappa": 0.06}) for _ in range(2))
    assert torch.equal(first[0], second[0])
    for key, x in first[2].items():
        assert torch.equal(x, second[2][key]), key


def specialisations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(kernel, what Triton would compile it for) of every launch from now on; nothing runs, and no GPU is needed."""
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from gcpo_kernels import backends, targets

    backend = make_backend(targets.TARGETS["sm_90"])
    binders: dict[str, Any] = {}
    seen: list[tuple[str, str]] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        name = self.fn.__name__
        if name not in binders:
            binders[name] = create_function_from_signature(self.signature, self.params, backend)
        _, specialisation, options = binders[name](*args, debug=False, instrumentation_mode="", **kwargs)
        seen.append((name, f"{specialisation} {options}"))

    monkeypatch.setattr(JITFunction, "run", record)
    monkeypatch.setattr(backends, "available_backends", lambda device="cpu": ("triton", "torch"))
    return seen


@pytest.mark.hazard(19)
@pytest.mark.skipif(INTERPRETED, reason="what is compiled, not what is interpreted")
@pytest.mark.parametrize("name", ["gcpo_loss", "linear_gcpo_loss", "causal_weights"])
def test_twenty_lengths_compile_a_handful_of_variants(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Keys of Triton's compiler cache over twenty lengths (flash-attention#911): only strides that are 1 or divide by 16
    make a difference, and the number of programs per sequence.
    """
    pytest.importorskip("triton")
    seen = specialisations(monkeypatch)
    for tokens in range(130, 510, 19):
        if name == "causal_weights":
            inputs = make_representations(2, tokens % 7 + 2, tokens % 5 + 1, tokens % 3 + 1, 24)
        else:
            inputs = (
                make_token_inputs(3, tokens, 3) if name == "gcpo_loss" else make_linear_inputs(3, tokens, 3, 24, 97)
            )
        leaves = with_gradients(inputs, "logp", "hidden", "weight", "causal_logp", "z", "context_z")
        out = getattr(gcpo_kernels, name)(**leaves, **({} if name == "causal_weights" else {"kappa": 0.06}))
        (out[0] if isinstance(out, tuple) else out).sum().backward()
    kernels = {kernel for kernel, _ in seen}
    assert len(kernels) >= 2
    for kernel in kernels:
        variants = {key for name, key in seen if name == kernel}
        assert len(variants) <= 6, f"{kernel}: {len(variants)} variants"


@pytest.mark.hazard(19)
@pytest.mark.skipif(INTERPRETED, reason="what is compiled, not what is interpreted")
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_few_variants_of_the_token_loss_for_any_length(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Above one block of tokens, all that makes a difference is whether 16 divides a row, and a row of contexts
    (flash-attention#911).
    """
    pytest.importorskip("triton")
    seen = specialisations(monkeypatch)
    for tokens in (*range(1050, 40_000, 3001), *range(1056, 40_000, 4096)):
        leaves = with_gradients(make_token_inputs(2, tokens, 4), "logp", "causal_logp")
        loss, _ = gcpo_kernels.gcpo_loss(**leaves, kappa=0.06, importance_sampling_level=level)
        loss.backward()
    variants = {name: {key for kernel, key in seen if kernel == name} for name, _ in seen}
    assert len(variants["token_loss_kernel"]) == 3
    assert len(variants["token_loss_backward_kernel"]) == 2
    # Its block spans the programs of a sequence, as a power of two.
    assert len(variants["token_loss_finish_kernel"]) == (1 if level == "sequence" else 5)


COMPILE = """
import sys
from gcpo_kernels import targets
specimen = next(x for x in targets.specimens() if x.kernel.__name__ == "leave_one_out_kernel")
print(targets.compile_for(specimen, targets.TARGETS["sm_90"]).registers)
"""


@pytest.mark.hazard(20)
@pytest.mark.skipif(INTERPRETED, reason="kernels cannot be compiled under TRITON_INTERPRET=1")
def test_two_processes_fill_one_compiler_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started together on an empty cache (triton#2688), both compile, and a third process finds what they left."""
    triton = pytest.importorskip("triton")
    from gcpo_kernels import targets

    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMPILE]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, env=environment, cwd=ROOT, **pipes) for _ in range(2)]
    outs = [process.communicate(timeout=120) for process in both]
    assert all(process.returncode == 0 for process in both), outs
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert any(name.endswith(".cubin") for name in files)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    specimen = next(x for x in targets.specimens() if x.kernel.__name__ == "leave_one_out_kernel")
    registers = targets.compile_for(specimen, targets.TARGETS["sm_90"]).registers
    assert outs[0][0] == outs[1][0] == f"{registers}\n"
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == files


@pytest.mark.hazard(23)
def test_temperature_reaches_policy_and_old_policy_once(small_tiles: None) -> None:
    """At T = 0.6, scoring and training on the same weights give a ratio of 1 (trl#4159: it was pinned at its cap), and
    log-probabilities are those of logits divided by T once."""
    inputs = make_linear_inputs(masked="none", dtype=torch.float32)
    head = {key: inputs[key] for key in ("hidden", "weight", "token_ids", "bias")}
    with torch.no_grad():
        old = gcpo_kernels.linear_logprob(**head, temperature=0.6)
    logits = torch.nn.functional.linear(*(inputs[key].double() for key in ("hidden", "weight", "bias")))
    want = (logits / 0.6).log_softmax(-1).gather(-1, inputs["token_ids"][..., None])[..., 0]
    assert_close_to_truth(old, want)
    loss, metrics = gcpo_kernels.linear_gcpo_loss(
        **head, advantages=torch.ones(5), mask=inputs["mask"], old_logp=old, ref_logp=old, beta=1.0, temperature=0.6
    )
    assert loss.item() == pytest.approx(-1.0, abs=1e-6)
    assert metrics["kl"].item() == pytest.approx(0.0, abs=1e-9)
    assert metrics["clip_low"] == metrics["clip_high"] == 0


@pytest.mark.hazard(24)
def test_sampler_ratios_at_masked_tokens_do_not_matter() -> None:
    """NaN log-probabilities of the sampler at tokens that are left out (trl#6266) reach nothing."""
    inputs = make_token_inputs()
    clean = grid.run("gcpo_loss", inputs, {})
    broken = inputs["importance_sampling_ratio"].masked_fill(~inputs["mask"], torch.nan)
    dirty = grid.run("gcpo_loss", inputs | {"importance_sampling_ratio": broken}, {})
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[2]["logp"], dirty[2]["logp"])


@pytest.mark.hazard(27)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_almost_equal_rewards_stay_small(scale: str) -> None:
    """Rewards 1e-7 apart are finite and below 2e-3 in float32 (NeMo-RL#4158: noise in the std blew them up)."""
    rewards = torch.tensor([0.5, 0.5 + 1e-7, 0.5, 0.5 - 1e-7, 0.5, 0.5, 0.5, 0.5])
    assert rewards.unique().numel() > 1
    advantages = gcpo_kernels.group_advantages(rewards, 4, scale=scale)
    assert torch.isfinite(advantages).all()
    assert advantages.abs().max() < 2e-3
    assert not advantages[4:].abs().max() > 1e-3
