"""The kernel benchmark: its check finds a broken kernel, its measures measure, its files and docs/kernels.md agree."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gcpo_kernels
from bench import baselines, measure, registry, report, roofline, run, tune
from bench.gate import Gate, Outcome, check, expected, outcome
from bench.registry import Case
from gcpo import cli
from gcpo_kernels import reference, torch_backend
from gcpo_kernels.testing import make_head_inputs
from gcpo_kernels.triton_backend import gate

CPU = torch.device("cpu")
HEAD = {"model": "tiny", "batch": 4, "tokens": 9, "hidden": 24, "vocab": 131}
CASES = {
    "linear": Case("linear_loss", **HEAD, masked="ragged"),
    "random": Case("linear_loss", **HEAD, logits="random"),
    "gcpo": Case("linear_loss", **HEAD, objective="gcpo"),
    "scoring": Case("scoring", **HEAD),
    "logits": Case("logits_loss", **HEAD, masked="ragged"),
    "tokens": Case("token_loss", batch=4, tokens=33, objective="gcpo"),
    "causal": Case("causal_weights", batch=3, tokens=4, hidden=16),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Small buffers, two rounds, several blocks of the check; nothing is compiled, not even inside a library."""
    sizes = {"cpu": 1 << 16, "cuda": 1 << 16}
    monkeypatch.setattr(measure, "FLUSH_BYTES", sizes)
    monkeypatch.setattr(measure, "COPY_BYTES", sizes)
    monkeypatch.setattr(measure, "MIN_ROUNDS", 2)
    monkeypatch.setattr(measure, "SHORT_ROUNDS", 2)
    monkeypatch.setattr("bench.gate._BLOCK_BYTES", {"cpu": 8 * 131 * 4, "other": 8 * 131 * 4})
    monkeypatch.setattr(run, "cases", lambda device, quick: list(CASES.values()))
    with torch.compiler.set_stance("force_eager"):
        yield


def results(case: Case) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in run.run_case(case, CPU, 0.0)["results"]}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_implementation_is_right_or_named(case: Case) -> None:
    """What runs on a CPU passes the check and is timed; what does not says why."""
    found = results(case)
    assert set(found) == {x.name for x in baselines.implementations(case)}
    assert found["gcpo"]["status"] == found["eager PyTorch"]["status"] == "ok"
    for name, row in found.items():
        assert row["status"] in ("ok", "missing"), (name, row)
        assert ("times" in row) == (row["status"] == "ok")
        assert row["status"] == "ok" or row["reason"]
        if row["status"] == "ok":
            assert all(0 <= error < 1e-3 for error in row["errors"].values())
    if case.op == "linear_loss" and case.objective == "grpo":
        pytest.importorskip("liger_kernel")
        running = {"TRL", "Liger fused linear GRPO", "torch linear_cross_entropy + loss", "torch linear_cross_entropy"}
        assert {name for name in running if found[name]["status"] == "ok"} == running
        assert found["torch linear_cross_entropy"]["computes_less"]
        assert found["cut cross-entropy, exact + loss"]["reason"] == "needs a CUDA device"


def scaled(function: Any, factor: float) -> Any:
    """`function` with its first result multiplied."""

    def broken(*given: Any, **named: Any) -> Any:
        out = function(*given, **named)
        return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor

    return broken


BREAKS = {
    "gradient of hidden off by 1/1000": ("linear", torch_backend.TorchTiles, "to_hidden", 1.001),
    "no gradient of the weight": ("random", torch_backend.TorchTiles, "to_weight", 0.0),
    "linear loss": ("gcpo", gcpo_kernels, "linear_gcpo_loss", 1.001),
    "linear log-probabilities": ("scoring", gcpo_kernels, "linear_logprob", 1.0001),
    "log-probabilities of logits": ("logits", gcpo_kernels, "selective_logprob", 1.001),
    "token loss": ("tokens", gcpo_kernels, "gcpo_loss", 1.001),
    "causal weights": ("causal", gcpo_kernels, "causal_weights", 1.0001),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_fails_the_check(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """It is not timed, its peers are, and the command fails."""
    which, owner, attribute, factor = BREAKS[name]
    right = getattr(owner, attribute)

    def into_out(self: Any, gradient: Any, out: torch.Tensor) -> None:
        right(self, gradient, out)
        out.mul_(factor)

    monkeypatch.setattr(owner, attribute, into_out if attribute == "to_hidden" else scaled(right, factor))
    monkeypatch.setattr(baselines, "IMPLEMENTATIONS", baselines.IMPLEMENTATIONS[:2])
    monkeypatch.setattr(run, "cases", lambda device, quick: [CASES[which]])
    assert run.main(["--device", "cpu", "--seconds", "0.01"]) == 1
    shown = capsys.readouterr().out
    assert f"FAILED {CASES[which].key}: wrong" in shown
    assert "| eager PyTorch | " in shown and "eager PyTorch | wrong" not in shown


def test_a_wrong_peer_is_named_and_fails_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    right = baselines.PLAIN["linear_loss"]
    runs = {
        "half": lambda case, x: right(case, x) * 0.5,
        "raises": lambda case, x: (_ for _ in ()).throw(ValueError("no such option")),
        "gone": right,
        "drops": lambda case, x: right(case, x) * 0.9,
    }
    rows = [baselines.Implementation(name, {"linear_loss": f}, approximate=name == "drops") for name, f in runs.items()]
    rows[2] = baselines.Implementation("gone", {"linear_loss": right}, modules=("no_such_package",))
    monkeypatch.setattr(baselines, "IMPLEMENTATIONS", (baselines.IMPLEMENTATIONS[0], *rows))
    monkeypatch.setattr(run, "cases", lambda device, quick: [CASES["linear"]])
    assert run.main(["--device", "cpu", "--seconds", "0.01"]) == 0
    shown = capsys.readouterr().out
    assert "| half | wrong: value: relative error" in shown
    assert "| raises | error: ValueError: no such option" in shown
    assert "| gone | missing: no_such_package: ModuleNotFoundError" in shown
    assert "| drops; drops small gradients | wrong" not in shown and "| drops; drops small gradients |" in shown


def test_truth_is_that_of_the_reference() -> None:
    """Block by block as at once; for a mean cross-entropy too."""
    for case in (CASES["linear"], CASES["logits"], CASES["gcpo"]):
        x = registry.make_tensors(case, CPU)
        leaves = {name: x[name].double().requires_grad_() for name in registry.LEAVES[case.op]}
        wide = {name: t.double() if t.is_floating_point() else t for name, t in x.items()} | leaves
        if case.op == "logits_loss":
            logp = reference.selective_logprob(leaves["logits"][:, :-1], x["token_ids"])
        else:
            logp = reference.linear_logprob(leaves["hidden"], leaves["weight"], x["token_ids"])
        value = baselines.peers.plain_loss(case, wide, logp)
        want = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
        truth = expected(case, x)
        torch.testing.assert_close(truth.value, value.detach(), rtol=1e-12, atol=0)
        for found, gradient in zip(truth.gradients.values(), want, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-15)
        less = expected(case, x, computes_less=True)
        torch.testing.assert_close(less.value, -logp.detach().mean(), rtol=1e-12, atol=0)


def test_the_check_refuses_missing_and_zero_gradients() -> None:
    case = CASES["linear"]
    x = registry.make_tensors(case, CPU)
    truth, plain = expected(case, x), expected(case, x, exact=False)
    for ours in (True, False):
        assert not check(case, plain, truth, plain, ours=ours).problem
        for gradients in ({}, {name: torch.zeros_like(g) for name, g in plain.gradients.items()}):
            verdict = check(case, Outcome(plain.value, gradients), truth, plain, ours=ours)
            assert "hidden" in verdict.problem and "weight" in verdict.problem
    assert math.isnan(check(case, Outcome(plain.value), truth, plain).errors["weight"])


def test_peaked_logits_are_like_a_models() -> None:
    for vocab, hidden in ((1000, 64), (20_000, 256)):
        medians = {}
        for kind in ("peaked", "random"):
            head = make_head_inputs(400, hidden, vocab, logits=kind)
            logp = reference.linear_logprob(head["hidden"], head["weight"], head["token_ids"])
            medians[kind] = logp.exp().median().item()
        assert 0.5 < medians["peaked"] < 0.98
        assert medians["random"] < 3 / vocab
    with pytest.raises(ValueError, match="`logits` must be one of 'peaked', 'random', got 'flat'"):
        make_head_inputs(4, 4, 4, logits="flat")


def test_large_inputs_are_drawn_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32: a seed means the same numbers again, they are like those of small cases, and no float64 is made."""
    case = Case("token_loss", batch=16, tokens=512, objective="gcpo")
    small = registry.make_tensors(case, CPU)
    monkeypatch.setattr(registry, "LARGE", case.rows)
    drawn: list[torch.dtype] = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: drawn.append(k["dtype"]) or randn(*a, **k))
    first, again, other = (registry.make_tensors(case, CPU, seed) for seed in (0, 0, 1))
    assert set(drawn) == {torch.float32}
    for name, x in first.items():
        assert (x.shape, x.dtype) == (small[name].shape, small[name].dtype)
        assert torch.equal(x, again[name])
        if x.is_floating_point():
            assert not torch.equal(x, other[name])
            assert x.mean().item() == pytest.approx(small[name].mean().item(), abs=0.25)
            assert x.std().item() == pytest.approx(small[name].std().item(), rel=0.2)
    ratio = (first["logp"] - first["old_logp"]).exp()
    assert (ratio > 1.2).any() and (ratio < 0.8).any()


def test_implementations_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    case = Case("linear_loss", **HEAD, compiled=True)

    def names(*flags: str) -> list[str]:
        return [x.name for x in baselines.chosen(run.parser("p").parse_args(flags)).of(case)]

    everyone = names()
    assert {"gcpo", "TRL", "torch.compile", "Liger fused linear GRPO"} < set(everyone)
    compiling = {"torch.compile", "Liger fused linear GRPO"}
    assert names("--no_compile") == [name for name in everyone if name not in compiling]
    assert names("--only", "TRL", "gcpo") == ["gcpo", "TRL"]
    assert names("--without", "TRL", "eager PyTorch") == [n for n in everyone if n not in ("TRL", "eager PyTorch")]
    for flag in ("--only", "--without"):
        with pytest.raises(SystemExit):
            names(flag, "Trl")
    assert "invalid choice: 'Trl' (choose from" in capsys.readouterr().err
    monkeypatch.setattr(run, "cases", lambda device, quick: [CASES["linear"]])
    flags = ["--device", "cpu", "--seconds", "0.01", "--no_plots", "--only", "gcpo", "--out", str(tmp_path)]
    assert run.main(flags) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"kernels.json", "kernels.md"}
    (entry,) = json.loads((tmp_path / "kernels.json").read_text())["cases"]
    assert [row["name"] for row in entry["results"]] == ["gcpo"]
    assert entry["clocks"]["looks"] == 0 and entry["clocks"]["sm_mhz"] is None


def test_the_table_says_what_clocks_did() -> None:
    result = json.loads((report.RESULTS / "cpu" / report.FILE).read_text())
    seen = {"sm_mhz": 1755.0, "sm_mhz_min": 1200.0, "memory_mhz": 2619.0, "power_w": 684.5, "temperature_c": 66.0}
    result["cases"][0]["clocks"] = seen | {"looks": 9, "held_back_by": ["power cap", "power brake"]}
    words = "SM clock 1,755 MHz (least 1,200), memory 2,619 MHz, 684 W, at most 66 °C"
    assert f"{words}; held back by: power cap, power brake.\n" in report.table(result) + "\n"


def test_the_token_sweep_comes_early() -> None:
    """Before what a budget of minutes leaves out."""
    keys = [c.key for c in registry.cases("cuda")]
    sweep = [f"linear_loss/N={n},H=1536,V=151936/bfloat16/grpo" for n in (1024, 2048, 4096, 16_384)]
    assert keys[4:8] == sweep


def test_registry_has_the_published_shapes() -> None:
    found = {(c.op, c.rows, c.hidden, c.vocab, c.dtype) for c in registry.cases("cuda") if c.logits == "peaked"}
    shapes = [(16_384, 2048, 248_320), (8192, 1536, 151_936), (16_384, 3584, 152_064), (2048, 4096, 128_256)]
    for op in ("linear_loss", "scoring"):
        assert {(op, *shape, torch.bfloat16) for shape in shapes} <= found
    keys = {c.key for c in registry.cases("cuda")}
    assert {f"linear_loss/N={n},H={h},V={v}/bfloat16/grpo/random" for n, h, v in shapes} <= keys
    assert "causal_weights/P=64,n=8,L=8,H=3584/bfloat16" in keys
    assert {"token_loss/N=16384/float32/gcpo", "token_loss/N=16777216/float32/gcpo"} <= keys
    assert "linear_loss/N=4096,H=576,V=49152/float32/grpo" in {c.key for c in registry.cases("cpu")}
    for device in ("cpu", "cuda"):
        for quick in (True, False):
            listed = [c.key for c in registry.cases(device, quick)]
            assert len(set(listed)) == len(listed)
            assert {c.group for c in registry.cases(device, quick)} == set(registry.GROUPS)


def test_work_is_what_must_be_done() -> None:
    """N = 36 tokens of 4 x 9; the ragged mask keeps fewer."""
    amounts = {}
    for name, case in CASES.items():
        x = registry.make_tensors(case, CPU)
        amounts[name] = (measure.work(case, x), int(x["mask"].sum()) if "mask" in x else case.rows)
    assert amounts["scoring"][0].flops == (2 * 36 * 24 * 131, 0)
    kept = amounts["linear"][1]
    assert 0 < kept < 36
    assert amounts["linear"][0].flops == (2 * kept * 24 * 131, 4 * kept * 24 * 131)
    assert amounts["logits"][0].bytes == (kept * 131 * 4, (kept + 36) * 131 * 4)
    tokens = 4 * 33  # logp, old, ref, query, 4 contexts, a mask of one byte; the derivative
    assert amounts["tokens"][0].bytes == (tokens * (4 * 8 + 1 + 4), tokens * 8)
    assert amounts["causal"][0].bytes == (3 * 4 * 16 * 4 * (1 + 4) + 3 * 4 * 4, 0)


def test_files_and_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(baselines, "IMPLEMENTATIONS", baselines.IMPLEMENTATIONS[:2])
    monkeypatch.setattr(run, "cases", lambda device, quick: [CASES["tokens"], CASES["linear"], CASES["causal"]])
    flags = ["--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path)]
    assert run.main([*flags, "--group", "token_loss", "linear"]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    plots = {f"kernels_{kind}.png" for kind in ("time", "memory", "error", "roofline")}
    assert names == {"kernels.json", "kernels.md", *plots}
    assert all((tmp_path / name).stat().st_size > 5000 for name in plots)
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert {entry["group"] for entry in result["cases"]} == {"token_loss", "linear"}
    environment = result["environment"]
    assert environment["device"].startswith("CPU: ") and environment["packages"]["torch"] == torch.__version__
    assert "commit" in environment and result["command"].startswith("python -m bench.run --device cpu")
    assert (tmp_path / "kernels.md").read_text().startswith("# CPU: kernels beside their peers")
    for entry in result["cases"]:
        ours = entry["results"][0]
        assert ours["times"][roofline.phase_of(entry)]["to_floor"] > 0 and ours["memory_bytes"] >= 0
    # Times of such sizes are noise: what is compared here is written by hand.
    ratio = result["cases"][0]["results"][0]["times"]["both"]
    old = json.loads(json.dumps(result))
    assert report.regressions(old, result, 0.1) == []
    old["cases"][0]["results"][0]["times"]["both"]["to_floor"] = ratio["to_floor"] / 1.2
    assert len(report.regressions(old, result, 0.1)) == 1
    assert report.regressions(old, result, 0.3) == []
    old["cases"][0]["results"][0]["times"]["both"]["to_floor"] = 1e-9
    (tmp_path / "old.json").write_text(json.dumps(old))
    only = ["--case", result["cases"][0]["key"], "--compare", str(tmp_path / "old.json")]
    capsys.readouterr()
    assert run.main([*flags[:4], *only]) == 1
    assert "SLOWER" in capsys.readouterr().out


def test_a_case_that_cannot_run_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """And what was measured before is in the file."""
    monkeypatch.setattr(baselines, "IMPLEMENTATIONS", baselines.IMPLEMENTATIONS[:2])
    monkeypatch.setattr(run, "cases", lambda device, quick: [CASES["causal"], CASES["tokens"], CASES["scoring"]])
    make, written = registry.make_tensors, []

    def failing(case: Case, device: torch.device) -> Any:
        if case.op == "token_loss":
            written.append(json.loads((tmp_path / "kernels.json").read_text())["cases"][0]["key"])
            raise torch.OutOfMemoryError("no room")
        return make(case, device)

    monkeypatch.setattr(run, "make_tensors", failing)
    assert run.main(["--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path)]) == 1
    assert written == [CASES["causal"].key]
    shown = capsys.readouterr().out
    assert f"FAILED {CASES['tokens'].key}: OutOfMemoryError: no room" in shown
    assert len([e for e in json.loads((tmp_path / "kernels.json").read_text())["cases"] if "floor" in e]) == 2


def test_what_the_budget_leaves_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [CASES["tokens"], CASES["causal"]]
    *_, result = run.run_all(chosen, CPU, 0.0, budget=-1.0)
    assert result["left_out"] == [c.key for c in chosen] and result["cases"] == []


def test_the_committed_summary_is_current() -> None:
    text = report.DOCUMENT.read_text()
    assert report.with_block(text, report.summary()) == text


def test_summary(tmp_path: Path) -> None:
    """Without a result from a GPU it says so; with one it shows that, first."""
    none = "There is no result from a GPU yet"
    assert none in report.summary(tmp_path)
    phase = {"median": 2.0, "low": 1.0, "high": 3.0, "samples": 3, "per_second": 1.0, "to_floor": 1.25}
    row = {"name": "gcpo", "status": "ok", "ours": True, "computes_less": False, "times": {"both": phase}}
    less = row | {"name": "less", "computes_less": True}
    packages = {"torch": "2", "quack-kernels": None}
    environment = {"device": "X", "driver": None, "packages": packages, "commit": "abc", "date": "2000-01-01"}
    for kind in ("cpu", "cuda"):
        entry = {"key": "k", "op": "linear_loss", "floor": {"both": phase}, "results": []}
        entry["results"] = [r | {"memory_bytes": 3 << 20} for r in (row, less)]
        about = environment | {"device_type": kind, "uncommitted_changes": False, "device": f"device {kind}"}
        (tmp_path / kind).mkdir()
        result = {"environment": about, "command": "command", "cases": [entry]}
        (tmp_path / kind / report.FILE).write_text(json.dumps(result))
        block = report.summary(tmp_path)
        assert (none in block) == (kind == "cpu")
        assert "| `k`: 2 ms | 1.25x (3) | 1.25x (3)* |" in block and "computes less" in block
    assert block.index("device cuda") < block.index("device cpu")
    with pytest.raises(ValueError, match="must have a line"):
        report.with_block("no markers", "block")


def test_gcpo_bench(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["bench", "--device", "cpu", "--list", "--group", "causal"]) == 0
    assert capsys.readouterr().out.strip() == CASES["causal"].key
    assert cli.main(["bench", "--device", "cpu", "--case", "nothing"]) == 2
    installed = Path(sys.prefix) / "lib" / "gcpo" / "commands" / "bench.py"
    monkeypatch.setattr("gcpo.commands.bench.__file__", str(installed))
    assert cli.main(["bench"]) == 2
    assert "not installed" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="`--device` cuda:99 does not work here"):
        run.main(["--device", "cuda:99"])


def test_tuning_checks_and_times_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    case = CASES["linear"]
    seen: list[int] = []
    logits = torch_backend.TorchTiles.logits
    monkeypatch.setattr(torch_backend.TorchTiles, "logits", lambda self, x: seen.append(len(x)) or logits(self, x))

    def unscaled(self: Any, gradient: Any, out: torch.Tensor) -> None:
        out.copy_(gradient.tile @ self.weight)

    wrong = tune.Setting("wrong", ((torch_backend.TorchTiles, "to_hidden", unscaled),))
    three = tune.Setting("3 rows", ((torch_backend.TorchTiles, "rows", lambda self, *rest: 3),))
    found = {entry["setting"]: entry for entry in tune.sweep(case, [three, wrong], CPU, 0.0)}
    assert set(found) == {"as it is", "3 rows", "wrong"}
    assert found["3 rows"]["times"]["both"]["to_floor"] > 0 and 3 in seen and max(seen) > 3
    assert found["wrong"]["problem"] and "times" not in found["wrong"]
    assert len(list(tune.tile_rows(Case("linear_loss", **(HEAD | {"tokens": 300}))))) == 4  # 256, 512, 1024, all 1200
    for cases in (tune.sweeps(CPU), tune.sweeps(torch.device("cuda"))):
        for swept, _, make in cases:
            assert list(make(swept))
    monkeypatch.setattr(tune, "sweeps", lambda device, tiny: [(case, "rows", lambda case: iter([three]))])
    words = ["--device", "cpu", "--seconds", "0", "--out", str(tmp_path / "tune.json"), "--sweep"]
    assert tune.main([*words, "order"]) == 0
    assert not capsys.readouterr().out
    assert tune.main([*words, "order", "rows"]) == 0
    assert "| 3 rows | " in capsys.readouterr().out
    content = json.loads((tmp_path / "tune.json").read_text())
    assert content["sweeps"][0]["settings"][1]["setting"] == "3 rows"


def test_sweeps_of_our_own_product_replace_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any device that copies by descriptor: what a row of the table is called is what ran."""
    linear, product = (pytest.importorskip(f"gcpo_kernels.triton_backend.{name}") for name in ("linear", "product"))
    usual = product.BLACKWELL_BLOCKS
    monkeypatch.setattr(product, "tma_blocks", lambda device: usual)
    x = torch.zeros(16, 16, dtype=torch.bfloat16)

    def now() -> tuple[Any, int]:
        blocks, by_descriptors = product.choose_blocks(x, x)
        assert by_descriptors
        return blocks, linear._SCORED_BYTES // (2 * case.hidden)

    case = next(c for c in registry.cases(torch.device("cuda")) if c.op == "scoring" and c.rows == 16_384)
    seen = {setting.name: setting.applied(now)() for setting in tune.tile_order(case)}
    assert seen["16 blocks of rows together, 16384 at a time"] == (usual._replace(group=16), 16_384)
    assert seen["all rows together, 2048 at a time"] == (usual, 2048)
    assert len(set(seen.values())) == len(seen)
    seen = {setting.name: setting.applied(now)() for setting in tune.product_blocks(case)}
    assert seen["blocks of 128 x 256 x 64, 4 stages, 2 parts"][0] == product.Blocks(128, 256, 64, 8, 4, 2)
    assert len(set(seen.values())) == len(seen)
    assert now()[0] == usual


def test_outcome_has_no_gradient_where_none_is_measured() -> None:
    case = CASES["scoring"]
    x = registry.make_tensors(case, CPU)
    x["hidden"].requires_grad_()
    got = outcome(lambda: baselines.PLAIN["scoring"](case, x), case, x)
    assert not got.value.requires_grad and got.gradients == {}
    assert not Gate(case, x).check(baselines.IMPLEMENTATIONS[1], got).problem


def test_gate_table() -> None:
    """The fastest that is right; the default where it is as good; nothing of a device that the gate does not know."""

    def swept(op: str, **took: float | str) -> dict[str, Any]:
        phase = "both" if op == "linear_loss" else "forward"
        settings = [
            {"setting": name, "problem": t}
            if isinstance(t, str)
            else {"setting": name, "times": {phase: {"median": t}}}
            for name, t in {"as it is": 0.1, **took}.items()
        ]
        return {"sweep": tune.KERNELS, "op": op, "hidden": 64, "vocab": 1000, "settings": settings, "key": op}

    results = [
        swept("linear_loss", one_read=3.0, two_reads=4.0, epilogue=2.5),
        swept("linear_loss", one_read=3.0, two_reads=2.99, epilogue="wrong"),
        swept("scoring", product=2.0, slices=1.5),
        swept("scoring", product="out of memory", slices="out of memory"),
        swept("linear_loss", one_read=1.0) | {"sweep": "rows of a tile"},
    ]
    entries = tune.gate_table(results, "NVIDIA H200 NVL")["entries"]
    assert [e["kernel"] for e in entries] == ["epilogue", "one_read", "slices"]
    assert {e["device"] for e in entries} == {"NVIDIA H200"}
    assert all(gate._key(e) is not None for e in entries)
    assert tune.gate_table(results, "NVIDIA A100")["entries"] == []
