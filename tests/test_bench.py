"""The step-overhead benchmark runs, compares like with like, and writes what it prints."""

import itertools
import json
import math
import statistics
import subprocess
from collections import Counter
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

from bench import revision, step_overhead
from bench.candidate_lengths import EndsAt
from bench.overhead_runs import MemoryAccount, Run, Weights, load_model, make_config, prepare_model, resident
from gcpo import CausalOptions, GCPOConfig
from gcpo.planning.candidate_lengths import draw_lengths

MIB = 1 << 20


@pytest.mark.slow
def test_step_overhead(tmp_path, capsys, monkeypatch):
    out = tmp_path / "results" / "overhead.json"
    written = []
    write = step_overhead.write
    monkeypatch.setattr(step_overhead, "write", lambda *given: (write(*given), written.append(out.read_text())))
    flags = "--model tiny --steps 3 --prompts 2 --num_generations 4 --batch_size 4 --completion_tokens 6".split()
    rows = ["GCPO, defaults", "padding_free=False"]
    step_overhead.main([*flags, "--only", *rows, "--out", str(out)])
    content = json.loads(out.read_text())
    ratios = [json.loads(text)["results"]["GRPO"]["ratio"] for text in written]
    assert [ratio["all"] for ratio in ratios] == [[1.0], [1.0] * 2, [1.0] * 3]
    assert ["interval" in ratio for ratio in ratios] == [False, False, True]
    assert len(content["clocks"]) == 3
    assert content["candidate_lengths"] == {"kind": "full", "of_rounds": [[6] * 8] * 3}
    results = content["results"]
    assert list(results) == ["GRPO", step_overhead.SAME_SAVINGS, *rows]
    for kind, base in (("ratio", "GRPO"), ("ratio_same_savings", step_overhead.SAME_SAVINGS)):
        assert results[base][kind]["all"] == [1.0] * 3
        for result in results.values():
            seconds = [one["step_seconds"]["all"] for one in (results[base], result)]
            assert result[kind]["all"] == [b / a for a, b in zip(*seconds, strict=True)]
            low, high = result[kind]["interval"]
            assert low <= result[kind]["mean"] <= high
    for name, result in results.items():  # the learning rate is 0: every run rolls out the same tokens
        assert result["tokens"]["generated"] == 2 * 4 * 6
        packs = name in (step_overhead.SAME_SAVINGS, "GCPO, defaults")
        alike = results[step_overhead.SAME_SAVINGS if packs else "GRPO"]
        trained = alike["tokens"]["trained"]
        assert result["tokens"]["trained"] == trained > 0
        assert result["step_seconds"]["min"] > 0 and len(result["ratio"]["all"]) == 3
        seconds = result["seconds"]["loss"]["all"]
        assert result["loss_ms_per_token"]["all"] == pytest.approx([1e3 * one / (2 * 4 * 6) for one in seconds])
        # The prompts of a round are those that are planned; a result has the median of the rounds, a plan the mean.
        assert [len(one) for one in result["prompt_tokens"]] == [2] * 3
        of_rounds = [sum(one) * (1 if packs else 4) + (1 - packs) * 48 for one in result["prompt_tokens"]]
        if packs:  # each completion reads the last token of its prompt itself
            of_rounds = [one + 2 * (4 * (6 + 1) - 1) for one in of_rounds]
        assert trained == statistics.median(of_rounds)
        assert result["predicted"]["tokens"]["trained"] == pytest.approx(statistics.mean(of_rounds))
        # Two layers of weights, gradients and Adam's moments at the least, and no process's own memory.
        peaks = result["peak_memory_bytes"]
        assert 4 * MIB < peaks["rollout"] <= max(peaks.values()) < 512 * MIB
    assert results["GRPO"]["memory_ratio"] == 1.0
    assert results[step_overhead.SAME_SAVINGS]["tokens"]["trained"] < 0.7 * results["GRPO"]["tokens"]["trained"]
    for name in ("GRPO", step_overhead.SAME_SAVINGS):
        assert results[name]["scored"] == 0 and "contexts" not in results[name]["peak_memory_bytes"]
    defaults = results["GCPO, defaults"]
    # Colliders have the length that GCPOConfig makes of that of candidates.
    assert defaults["scored"] > 0 and defaults["tokens"]["generated_colliders"] == 2 * 4 * 16
    assert defaults["predicted"]["scored"] == pytest.approx(defaults["scored"], rel=0.1)
    table = capsys.readouterr().out
    assert "| GRPO |" in table and "1.00x" in table and "| to GRPO | to GRPO, same savings | predicted |" in table
    assert out.with_suffix(".md").read_text().strip() in table
    assert content["environment"]["torch"] and "uncommitted_changes" in content["environment"]


def test_rollouts_read_prompts_as_the_benchmark_says(tmp_path):
    """TRL's GRPO once per completion; GCPO, and GRPO with the same savings, once for all."""
    flags = ["--prompts", "1", "--num_generations", "4", "--batch_size", "4", "--completion_tokens", "2"]
    only = ["--only", "GCPO, defaults", "padding_free=False"]
    args = step_overhead.make_parser().parse_args([*flags, *only])
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
    assert list(read) == [step_overhead.SAME_SAVINGS, *only[1:]] and all(rows == [1] for rows in read.values())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 14])
def test_no_row_has_a_place_or_a_predecessor_of_its_own(count):
    rounds = [step_overhead.turns(count, number) for number in range(count * (2 if count % 2 else 1))]
    each = 2 if count % 2 else 1
    places = Counter((row, place) for order in rounds for place, row in enumerate(order))
    assert set(places.values()) == {each} and len(places) == count**2
    follows = Counter(pair for order in rounds for pair in itertools.pairwise(order))
    assert set(follows.values()) <= {each} and len(follows) == count * (count - 1)


@pytest.mark.slow
def test_drawn_lengths_are_those_of_every_row_and_of_the_plan(tmp_path):
    """Candidates end where they are drawn to end, in TRL's rollout and in ours; colliders keep their length."""
    out = tmp_path / "overhead.json"
    flags = "--model tiny --steps 2 --prompts 2 --num_generations 4 --batch_size 4 --completion_tokens 24 --no_memory"
    rows = ["GCPO, defaults", "fused_loss=False, padding_free=False", "GCPOConfig.paper()"]
    only = ["--only", *rows, "--lengths", "lognormal", "--num_colliders", "2", "--collider_tokens", "3"]
    step_overhead.main([*flags.split(), *only, "--out", str(out)])
    content = json.loads(out.read_text())
    lengths = content["candidate_lengths"]
    assert lengths["kind"] == "lognormal" and (lengths["mean_before_clipping"], lengths["sigma"]) == (0.4, 0.8)
    drawn = lengths["of_rounds"]
    assert len(drawn) == 2 and drawn[0] != drawn[1] and all(len(set(row)) > 2 for row in drawn)
    generated = statistics.mean(map(sum, drawn))
    for name, result in content["results"].items():
        tokens, planned = result["tokens"], result["predicted"]["tokens"]
        assert tokens["generated"] == planned["generated"] == generated
        # The paper's settings have n colliders. Here all have a length that no row has without saying so.
        assert tokens["generated_colliders"] == (
            0 if name.startswith("GRPO") else 2 * (2 if "paper" not in name else 4) * 3
        )
        assert name.startswith("GRPO") or "collider_max_completion_length=3" in name
        if "paper" not in name:
            for kind in ("trained", "trained_padding"):
                assert tokens[kind] == planned.get(kind, 0)
    paper = content["results"]["GCPOConfig.paper(collider_max_completion_length=3)"]["tokens"]
    assert 0 < paper["generated_contexts"] < 8 * 4 * 24 and paper["generated_contexts"] % 24


def test_lengths_are_forced_on_the_rows_that_they_belong_to():
    ends, prompt = EndsAt([1, 3, 2], 4, [7, 8]), torch.zeros(3, 4, dtype=torch.long)
    scores = torch.randn(3, 9)
    for step, ending in enumerate([[0], [0, 2], [0, 1, 2]]):  # whoever has ended goes on ending
        given = scores.clone()
        forced = ends(torch.cat([prompt, torch.zeros(3, step, dtype=torch.long)], dim=1), scores)
        assert torch.equal(scores, given)
        for row in range(3):
            possible = forced[row].isfinite().nonzero().flatten().tolist()
            assert possible == ([7] if row in ending else list(range(7)))
            if row not in ending:
                assert torch.equal(forced[row, :7], scores[row, :7])


def test_lognormal_lengths_have_the_mean_they_say():
    lengths = draw_lengths("lognormal", 512, 20_000, seed=1)
    assert lengths == draw_lengths("lognormal", 512, 20_000, seed=1) != draw_lengths("lognormal", 512, 20_000, seed=2)
    assert min(lengths) >= 1 and max(lengths) == 512
    # The median is not moved by clipping: exp(mean of logs), which is the mean times exp(-sigma^2 / 2).
    assert statistics.median(lengths) == pytest.approx(0.4 * 512 * math.exp(-0.32), rel=0.03)
    logs = [math.log(length) for length in lengths if length < 512]
    share = 1 - len(logs) / len(lengths)
    assert share == pytest.approx(0.5 * math.erfc((math.log(511.5 / (0.4 * 512)) + 0.32) / 0.8 / 2**0.5), rel=0.1)
    assert draw_lengths("full", 512, 3, seed=1) == [512] * 3


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


@pytest.mark.parametrize(("tokens", "default"), [(32, 16), (512, 16), (2048, 64)])
def test_the_defaults_are_the_defaults(tokens, default, tmp_path):
    """Nothing that the row "GCPO, defaults" runs with differs from GCPOConfig, and other colliders change its name."""
    parse = step_overhead.make_parser().parse_args
    flags = ["--completion_tokens", str(tokens), "--only", "GCPO, defaults", "kappa=0.0", "GCPOConfig.paper()"]
    args = parse(flags)
    args.folder = str(tmp_path)
    rows = step_overhead.choose(args)
    config = make_config(args, rows["GCPO, defaults"])
    assert config.collider_max_completion_length == default
    names = {item.name for item in fields(CausalOptions)} | {"fused_loss", "padding_free", "overlap_rewards"}
    plain = GCPOConfig(use_cpu=True, bf16=False, max_completion_length=tokens)
    assert {name for name in names if getattr(config, name) != getattr(plain, name)} == set()
    assert make_config(args, rows["GCPOConfig.paper()"]).collider_max_completion_length == tokens
    assert list(step_overhead.choose(parse([*flags, "--collider_tokens", str(default)])))[:4] == list(rows)[:4]
    other = step_overhead.choose(parse([*flags, "--collider_tokens", "5"]))
    changed = "collider_max_completion_length=5"
    assert list(other)[2:] == [changed, f"kappa=0.0, {changed}", f"GCPOConfig.paper({changed})"]
    assert all(make_config(args, other[name]).collider_max_completion_length == 5 for name in list(other)[2:])


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
