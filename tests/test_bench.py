"""The step-overhead benchmark runs, compares like with like, and writes what it prints."""

import json
import sys

import pytest

from bench import step_overhead


@pytest.mark.slow
def test_step_overhead(monkeypatch, tmp_path, capsys):
    out = tmp_path / "results" / "overhead.json"
    flags = "--model tiny --steps 1 --num_generations 4 --batch_size 4 --completion_tokens 6 --collider_tokens 4"
    variants = ["GCPO, defaults", "parallel contexts", "without the second KL"]
    monkeypatch.setattr(sys, "argv", ["step_overhead", *flags.split(), "--only", *variants, "--out", str(out)])
    step_overhead.main()
    content = json.loads(out.read_text())
    results = content["results"]
    assert list(results) == ["GRPO", *variants]
    for result in results.values():  # the learning rate is 0: every run rolls out the same tokens
        assert result["tokens"]["generated"] == results["GRPO"]["tokens"]["generated"] == 4 * 6
        assert result["tokens"]["trained"] == results["GRPO"]["tokens"]["trained"] > 0
        assert result["step_seconds"] > 0
    contexts = [results[name]["tokens"]["scored_contexts"] for name in ("GRPO", *variants)]
    assert contexts[0] == contexts[3] == 0 and contexts[1] > contexts[2] > 0
    assert results["GCPO, defaults"]["tokens"]["generated_colliders"] > 0
    table = capsys.readouterr().out
    assert "| GRPO |" in table and "1.00x" in table
    assert content["environment"]["torch"]
