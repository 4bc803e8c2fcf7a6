"""The step-overhead benchmark runs, compares like with like, and writes what it prints."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from bench import revision, step_overhead
from bench.overhead_runs import MemoryAccount, Run, Weights, load_model, prepare_model, resident

MIB = 1 << 20


@pytest.mark.slow
def test_step_overhead(tmp_path, capsys, monkeypatch):
    out = tmp_path / "results" / "overhead.json"
    written = []
    write = step_overhead.write
    monkeypatch.setattr(step_overhead, "write", lambda *given: (write(*given), written.append(out.read_text())))
    flags = "--model tiny --steps 2 --prompts 2 --num_generations 4 --batch_size 4 --completion_tokens 6".split()
    rows = ["GCPO, defaults", "share_prompt=True"]
    step_overhead.main([*flags, "--collider_tokens", "4", "--only", *rows, "--out", str(out)])
    content = json.loads(out.read_text())
    assert [json.loads(text)["results"]["GRPO"]["ratio"]["all"] for text in written] == [[1.0], [1.0, 1.0]]
    assert len(content["clocks"]) == 2
    results = content["results"]
    assert list(results) == ["GRPO", "GRPO, prompts shared", *rows]
    shared = [name for name in results if "ratio_shared" in results[name]]
    assert shared == ["GRPO, prompts shared", "share_prompt=True"]
    assert results[shared[0]]["ratio_shared"]["all"] == [1.0, 1.0]
    seconds = [results[name]["step_seconds"]["all"] for name in shared]
    assert results[shared[1]]["ratio_shared"]["all"] == [b / a for a, b in zip(*seconds, strict=True)]
    for name, result in results.items():  # the learning rate is 0: every run rolls out the same tokens
        assert result["tokens"]["generated"] == 2 * 4 * 6
        alike = results[shared[0] if name in shared else "GRPO"]
        assert result["tokens"]["trained"] == alike["tokens"]["trained"] > 0
        assert result["step_seconds"]["min"] > 0 and len(result["ratio"]["all"]) == 2
        trained = alike["tokens"]["trained"]
        if name in shared:  # how many prompts a batch has is chance
            assert result["predicted"]["tokens"]["trained"] == pytest.approx(trained, rel=0.05)
        else:  # planned with prompts of the mean length, which is a whole number of tokens
            assert result["predicted"]["tokens"]["trained"] == 8 * round(trained / 8)
        # Two layers of weights, gradients and Adam's moments at the least, and no process's own memory.
        peaks = result["peak_memory_bytes"]
        assert 4 * MIB < peaks["rollout"] <= max(peaks.values()) < 512 * MIB
    assert results["GRPO"]["ratio"]["all"] == [1.0, 1.0] and results["GRPO"]["memory_ratio"] == 1.0
    assert results[shared[0]]["tokens"]["trained"] < 0.7 * results["GRPO"]["tokens"]["trained"]
    for name in ("GRPO", shared[0]):
        assert results[name]["scored"] == 0 and "contexts" not in results[name]["peak_memory_bytes"]
    defaults = results["GCPO, defaults"]
    assert defaults["scored"] > 0 and defaults["tokens"]["generated_colliders"] > 0
    assert defaults["predicted"]["scored"] == pytest.approx(defaults["scored"], rel=0.1)
    table = capsys.readouterr().out
    assert "| GRPO |" in table and "1.00x" in table and "| to GRPO | to GRPO, prompts shared | predicted |" in table
    assert out.with_suffix(".md").read_text().strip() in table
    assert content["environment"]["torch"] and "uncommitted_changes" in content["environment"]


def test_rollouts_read_prompts_as_the_benchmark_says(tmp_path):
    """TRL's GRPO once per completion; GCPO, and GRPO with prompts shared, once for all."""
    flags = ["--prompts", "1", "--num_generations", "4", "--batch_size", "4", "--completion_tokens", "2"]
    only = ["--only", "GCPO, defaults", "share_prompt=True"]
    args = step_overhead.make_parser().parse_args([*flags, "--collider_tokens", "2", *only])
    args.folder = str(tmp_path)
    prepare_model("tiny", tmp_path)
    weights = Weights(args)
    read = {}
    for name, variant in step_overhead.choose(args).items():
        trainer = Run(weights, args, variant).trainer
        rows = read[name] = []  # of every forward over more than a token

        def note(module, given, kwargs, output, rows=rows):
            if kwargs["input_ids"].shape[1] > 1:
                rows.append(len(kwargs["input_ids"]))

        handle = trainer.model.model.register_forward_hook(note, with_kwargs=True)
        prompt = trainer.processing_class("What is 1 + 1?")["input_ids"]
        with torch.no_grad():
            trainer._generate_single_turn([prompt] * 4, None, {}, 4)
        handle.remove()
    assert read.pop("GRPO") == [4]
    assert list(read) == [step_overhead.SHARED, *only[1:]] and all(rows == [1] for rows in read.values())


def test_gradient_checkpointing_leaves_out_what_it_excludes():
    parser = step_overhead.make_parser()
    assert step_overhead.SHARED in step_overhead.choose(parser.parse_args([]))
    rows = step_overhead.choose(parser.parse_args(["--gradient_checkpointing"]))
    assert len(rows) > 8 and not any(variant is not None and variant.shares_prompts for variant in rows.values())
    only = "num_kl_contexts=None"
    assert list(step_overhead.choose(parser.parse_args(["--only", only]))) == ["GRPO", only]


def test_a_result_says_whether_files_had_changed(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    monkeypatch.setattr(revision, "__file__", str(tmp_path / "revision.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert revision.revision() == {"commit": None, "uncommitted_changes": None}
    (tmp_path / "file").write_text("a")
    git("init", "-q")
    git("add", "file")
    git("commit", "-q", "-m", "a")
    (tmp_path / "result").write_text("not tracked")
    found = revision.revision()
    assert len(found["commit"]) == 40 and found["uncommitted_changes"] is False
    (tmp_path / "file").write_text("b")
    assert revision.revision() == {"commit": found["commit"], "uncommitted_changes": True}


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
    rows = step_overhead.VARIANTS
    assert all(variant.options or variant.paper for name, variant in rows.items() if name != "GCPO, defaults")
    assert "share_prefix=False" in rows and "GCPOConfig.paper()" in rows
    for options in step_overhead._CHANGES:
        changes = {key for key, value in options.items() if step_overhead._DEFAULTS[key] != value}
        assert (step_overhead.named(options) in rows) == bool(changes)


def test_only_takes_every_row_of_a_table_by_its_name():
    parser = step_overhead.make_parser()
    for row in step_overhead.choose(parser.parse_args([])):
        assert row in step_overhead.choose(parser.parse_args(["--only", row]))
    for name, variant in step_overhead.VARIANTS.items():
        if variant.options:  # a name is what one writes to have the row's options
            call = eval(name if variant.paper else f"dict({name})", {"GCPOConfig": SimpleNamespace(paper=dict)})
            assert call == variant.options


@pytest.mark.parametrize("flags", [["--batch_size", "5"], ["--model", "none"], ["--only", "none"]])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit):
        step_overhead.main(flags)
    assert flags[0] in capsys.readouterr().err


def test_random_weights_are_the_same_in_every_process(tmp_path):
    """They are neither saved nor loaded."""
    prepare_model("tiny", tmp_path)
    first, second = (load_model(tmp_path, torch.float32) for _ in range(2))
    assert not list(tmp_path.glob("*.safetensors")) and not first.training
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert len(first.model.layers[0].mlp.up_proj.weight.unique()) > 1000
