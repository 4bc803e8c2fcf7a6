"""The GPU programme: its parts cannot take each other along, and what was found is in one archive, whatever happens."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_parts, gpu_programme, parts
from bench.parts import Part

ROOT = Path(__file__).resolve().parents[1]
ABSENT = (
    "trl",
    "datasets",
    "reasoning_gym",
    "liger_kernel",
    "cut_cross_entropy",
    "quack",
    "math_verify",
    "gguf",
    "rich",
)
BLOCK = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)
sys.meta_path.insert(0, Block())
"""


def part(name: str, code: str, limit: float = 60.0, **needs: Any) -> Part:
    return Part(name, (sys.executable, "-c", textwrap.dedent(code)), limit, **needs)


def packed(archive: Path) -> dict[str, str]:
    """Names without their folder, and texts."""
    with tarfile.open(archive) as tar:
        return {m.name.split("/", 1)[1]: tar.extractfile(m).read().decode(errors="replace") for m in tar}  # type: ignore


def statuses(summary: str) -> dict[str, str]:
    return {entry["name"]: entry["status"] for entry in json.loads(summary)["parts"]}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_parts_do_not_take_each_other_along(tmp_path: Path, capsys: Any) -> None:
    """One fails, one hangs with a child of its own, one is killed as for want of memory, two lack something."""
    hangs = """
        import subprocess, sys, time
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"
        child = subprocess.Popen([sys.executable, "-c", code])
        open(r"{work}/child", "w").write(str(child.pid))
        print("begun", flush=True)
        time.sleep(100)
    """
    chosen = [
        part("fails", "print('the reason'); raise SystemExit(3)"),
        part("hangs", hangs, limit=6.0),
        part("killed", "import os, signal; print('big', flush=True); os.kill(os.getpid(), signal.SIGKILL)"),
        part("no module", "", modules=("torch", "no_such_module")),
        part("no program", "", programs=("no-such-program",)),
        Part("no file", (str(tmp_path / "nothing"),), 60.0),
        part("writes", "open(r'{work}/made', 'w').write('x'); print('done')"),
    ]
    work, archive = tmp_path / "work", tmp_path / "out" / "first.tar.gz"
    assert parts.run_parts(chosen, work, archive, limit=100.0) == 1
    files = packed(archive)
    found = {e["name"]: (e["status"], e["last_line"]) for e in json.loads(files["summary.json"])["parts"]}
    assert found["fails"] == ("failed", "the reason")
    assert found["hangs"] == ("too long", "begun")
    assert found["killed"] == ("killed", "SIGKILL; big")
    assert found["no module"] == ("skipped", "not here: no_such_module")
    assert found["no program"] == ("skipped", "not here: no-such-program")
    assert found["no file"][0] == "failed" and "nothing" in found["no file"][1]
    assert found["writes"] == ("ok", "done")
    assert files["made"] == "x" and "the reason" in files["fails.log"]
    assert not is_alive(int(files["child"]))
    assert os.listdir(archive.parent) == ["first.tar.gz"]


def test_what_does_not_fit_the_limit_is_said(tmp_path: Path) -> None:
    assert parts.run_parts([part("late", "")], tmp_path / "work", tmp_path / "a.tar.gz", limit=1.0) == 1
    assert statuses(packed(tmp_path / "a.tar.gz")["summary.json"]) == {"late": "no time"}


def test_the_archive_is_written_while_a_part_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And when the programme itself is told to end: then the part ends with it."""
    monkeypatch.setattr(parts, "PACK_EVERY", 0.2)
    monkeypatch.setattr(signal, "signal", lambda *given: None)
    code = """
        import os, time
        open(r"{work}/round", "w").write(str(os.getpid()))
        time.sleep(100)
    """
    archive, seen = tmp_path / "first.tar.gz", []
    pack = parts.pack

    def stop_later(work: Path, at: Path) -> None:
        pack(work, at)
        seen.append(packed(at))
        if "round" in seen[-1]:
            raise SystemExit(143)

    monkeypatch.setattr(parts, "pack", stop_later)
    with pytest.raises(SystemExit):
        parts.run_parts([part("long", code)], tmp_path / "work", archive, limit=60.0)
    assert "summary.json" not in seen[0]  # the part had not ended
    assert statuses(seen[-1]["summary.json"]) == {"long": "interrupted"}
    assert not is_alive(int(seen[-1]["round"]))


def test_limits_of_the_runs() -> None:
    """Parts that are usually skipped come last, and have what is left."""
    for run, limit, rare in (("first", 480, 0), ("second", 300, 2)):
        listed = gpu_parts.parts(run, gpu_parts.Options())
        assert sum(x.limit for x in listed[: len(listed) - rare]) <= limit == gpu_parts.LIMITS[run]
        assert len({x.name for x in listed}) == len(listed)
        for x in listed:
            if "--budget" in x.command:
                assert float(x.command[x.command.index("--budget") + 1]) < x.limit


def test_flags(capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[Part] = []
    monkeypatch.setattr(gpu_programme, "run_parts", lambda chosen, *rest: ran.extend(chosen) or 0)
    monkeypatch.setattr(signal, "signal", lambda *given: None)
    out = ["--out", str(tmp_path)]
    assert gpu_programme.main([*out, "--run", "first", "--parts", "kernels", "--without", "eager PyTorch"]) == 0
    assert ran.pop().command[-3:] == ("--no_compile", "--without", "eager PyTorch")
    assert gpu_programme.main([*out, "--run", "first", "--parts", "kernels", "--compile"]) == 0
    assert "--no_compile" not in ran.pop().command
    assert gpu_programme.main([*out, "--run", "second", "--parts", "again", "--failed", "test_a", "test_b"]) == 0
    assert "test_a or test_b or test_no_sync" in ran.pop().command
    assert not ran
    for wrong in (["--run", "third"], [], ["--run", "first", "--parts", "tune"], ["--run", "first", "--only", "x"]):
        with pytest.raises(SystemExit):
            gpu_programme.main([*out, *wrong])
    assert "invalid choice: 'x'" in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_gpu_runs_imports_without_what_it_may_lack(tmp_path: Path) -> None:
    """And the part that needs these packages is skipped, with the reason."""
    modules = "bench.run bench.tune bench.gpu_programme bench.foundations bench.profile_calls bench.outcomes gcpo.cli"
    dry = "--dry_run --parts kernels step_overhead fidelity"
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    imports = "\n".join(f"import {name}" for name in [*modules.split(), "gcpo.commands.doctor"])
    for command in (
        ["-c", imports],
        ["-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "--collect-only"],
        ["-m", "bench.gpu_programme", *dry.split(), "--out", str(tmp_path), "--work", str(tmp_path / "work")],
    ):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    second = json.loads(packed(tmp_path / "dry-second.tar.gz")["summary.json"])
    found = {entry["name"]: entry["last_line"] for entry in second["parts"] if entry["status"] == "skipped"}
    assert found["step_overhead"] == "not here: trl, datasets, reasoning_gym"
    assert found["fidelity"].startswith("not here: trl, datasets, reasoning_gym")
    assert statuses(packed(tmp_path / "dry-first.tar.gz")["summary.json"]) == {"kernels": "ok"}


TESTS = """
import os, pytest
from bench import outcomes

def test_passes():
    pass

def test_fails():
    assert 1 == 2, "the reason"

@pytest.mark.skip(reason="why not")
def test_skipped():
    pass

def test_never_ends():
    if os.environ.get("ENDS") != "1":
        os.kill(os.getpid(), 9)

def test_loses_the_device():
    outcomes.device_is_lost = lambda: True

def test_after():
    pass
"""


def run_tests(folder: Path, *flags: str, **environment: str) -> dict[str, str]:
    (folder / "test_few.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.outcomes"]
    command += ["--outcomes", str(folder / "lines.jsonl"), *flags, "test_few.py"]
    subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True)
    lines = [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]
    for line in lines:
        if line["outcome"] != "passed":
            assert any(word in line["reason"] for word in ("the reason", "why not", "crashed")), line
    return {line["test"].split("::")[1]: line["outcome"] for line in lines}


def test_outcomes_survive_the_end_of_their_process(tmp_path: Path) -> None:
    found = run_tests(tmp_path)
    assert found == {"test_passes": "passed", "test_fails": "failed", "test_skipped": "skipped"}


def test_a_lost_device_costs_one_test(tmp_path: Path) -> None:
    """With xdist: the process that lost it ends, and another runs what is left."""
    pytest.importorskip("xdist")
    found = run_tests(tmp_path, "-n", "1", ENDS="1")
    assert found["test_loses_the_device"] == "failed" and found["test_after"] == "passed"
    assert found["test_fails"] == "failed" and found["test_never_ends"] == "passed"


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    """Every part of both runs, at tiny sizes, as on a machine with a GPU."""
    command = [sys.executable, "-m", "bench.gpu_programme", "--dry_run", "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--work", str(tmp_path / "work")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(os.listdir(tmp_path / "out")) == ["dry-first.tar.gz", "dry-second.tar.gz"]
    first, second = (packed(tmp_path / "out" / f"dry-{run}.tar.gz") for run in ("first", "second"))
    for files, run in ((first, "first"), (second, "second")):
        found = statuses(files["summary.json"])
        assert list(found) == [x.name for x in gpu_parts.parts(run, gpu_parts.Options())]
        assert set(found.values()) <= {"ok", "skipped"}
        assert {f"{name}.log" for name, status in found.items() if status == "ok"} <= set(files)
    assert statuses(first["summary.json"])["kernels"] == statuses(second["summary.json"])["step_overhead"] == "ok"
    assert "copy" in json.loads(first["foundations.json"]) and json.loads(first["foundations.json"])["products"]
    calls = json.loads(first["profile_calls.json"])["calls"]
    assert {call["key"].split("/")[0] for call in calls} == {"token_loss", "causal_weights", "linear_loss", "scoring"}
    assert {call["counts"] for call in calls} == {"bytes", "flops"}
    assert all(call["kernels"] and call["clocks"]["sm_mhz"] is None for call in calls)
    case = json.loads(first["kernels/kernels.json"])["cases"][0]
    assert {row["name"] for row in case["results"]} == {"gcpo", "eager PyTorch"} and case["clocks"]["looks"] == 0
    outcomes = [json.loads(line) for line in first["tests.jsonl"].splitlines()]
    assert len(outcomes) > 100 and {line["outcome"] for line in outcomes} <= {"passed", "skipped"}
    assert json.loads(second["tune.json"])["sweeps"]
    assert json.loads(second["step_overhead.json"])["results"]["GCPO, defaults"]["ratio"]["all"]
