"""The step-overhead benchmark runs, compares like with like, and writes what it prints."""

import json

import pytest
import torch

from bench import step_overhead
from bench.overhead_runs import MemoryAccount, resident

MIB = 1 << 20


@pytest.mark.slow
def test_step_overhead(tmp_path, capsys):
    out = tmp_path / "results" / "overhead.json"
    flags = "--model tiny --steps 2 --prompts 2 --num_generations 4 --batch_size 4 --completion_tokens 6".split()
    step_overhead.main([*flags, "--collider_tokens", "4", "--only", "GCPO, defaults", "--out", str(out)])
    content = json.loads(out.read_text())
    results = content["results"]
    assert list(results) == ["GRPO", "GCPO, defaults"]
    for result in results.values():  # the learning rate is 0: every run rolls out the same tokens
        assert result["tokens"]["generated"] == 2 * 4 * 6
        assert result["tokens"]["trained"] == results["GRPO"]["tokens"]["trained"] > 0
        assert result["step_seconds"]["min"] > 0 and len(result["ratio"]["all"]) == 2
        assert result["predicted"]["tokens"]["trained"] == result["tokens"]["trained"]
        # Two layers of weights, gradients and Adam's moments at the least, and no process's own memory.
        peaks = result["peak_memory_bytes"]
        assert 4 * MIB < peaks["rollout"] <= max(peaks.values()) < 512 * MIB
    assert results["GRPO"]["ratio"]["all"] == [1.0, 1.0] and results["GRPO"]["memory_ratio"] == 1.0
    assert results["GRPO"]["scored"] == 0 and "contexts" not in results["GRPO"]["peak_memory_bytes"]
    defaults = results["GCPO, defaults"]
    assert defaults["scored"] > 0 and defaults["tokens"]["generated_colliders"] > 0
    assert defaults["predicted"]["scored"] == pytest.approx(defaults["scored"], rel=0.1)
    table = capsys.readouterr().out
    assert "| GRPO |" in table and "1.00x" in table
    assert out.with_suffix(".md").read_text().strip() in table
    assert content["environment"]["torch"]


def test_memory_is_charged_to_the_phase_that_holds_it():
    if torch.cuda.is_available():
        pytest.skip("measures a CPU's memory")
    account = MemoryAccount(on_cpu=True)
    before = resident("VmRSS")
    account.begin()
    with account.phase("loss"):
        with account.phase("contexts"):
            held = torch.ones(160 * MIB // 4)  # of a size that malloc always maps afresh
            del held
        small = torch.ones(64 * MIB // 4)
    with account.phase("rollout"):
        del small
    held_by = {phase: peak - before for phase, peak in account.peaks.items()}
    assert 150 * MIB < held_by["contexts"] < 180 * MIB
    assert 60 * MIB < held_by["loss"] < 90 * MIB
    assert 60 * MIB < held_by["rollout"] < 90 * MIB


def test_rows_that_are_the_defaults_are_left_out():
    named = step_overhead.VARIANTS
    assert all(variant.options or variant.paper for name, variant in named.items() if name != "GCPO, defaults")
    assert "shared beginnings off" in named and "paper's settings" in named
    for name, options in {**step_overhead._OFF, **step_overhead._ON}.items():
        changes = {key for key, value in options.items() if step_overhead._DEFAULTS[key] != value}
        assert (name in named) == bool(changes)


@pytest.mark.parametrize("flags", [["--batch_size", "5"], ["--model", "none"], ["--only", "none"]])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit):
        step_overhead.main(flags)
    assert flags[0] in capsys.readouterr().err
