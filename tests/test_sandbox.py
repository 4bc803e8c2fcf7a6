"""Programs that a model wrote: what they may do, and that each limit holds."""

import os
import time

import pytest

from gcpo.evaluation.sandbox import SandboxError, run_python

try:
    run_python("")
except SandboxError as error:
    pytest.skip(f"no sandbox here: {error}", allow_module_level=True)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import math, re, collections, itertools\nassert math.sqrt(4) == 2", "passed"),
        ("open('a', 'w').write('x'); assert open('a').read() == 'x'", "passed"),
        ("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()", "passed"),
        ("print('x' * 10**7)", "passed"),
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def (", "SyntaxError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        # Leaving before the tests is not passing them.
        ("import sys; sys.exit(0)", "ended early"),
        ("import os; os._exit(0)", "ended early"),
        ('print(\'{"token": "", "error": null}\'); import os; os._exit(0)', "ended early"),
        ("x = [0] * 10**9", "MemoryError"),
        ("open('/etc/passwd').read()", "PermissionError"),
        ("import os; os.listdir('/')", "PermissionError"),
        ("open('../outside', 'w')", "PermissionError"),
        ("open('a', 'w').write('x' * 20 * 2**20)", "OSError"),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "PermissionError"),
        ("import socket; socket.socketpair()", "PermissionError"),
        ("import os; os.fork()", "PermissionError"),
        ("import subprocess; subprocess.run(['/bin/true'])", "PermissionError"),
        ("import os; os.kill(os.getppid(), 0)", "PermissionError"),
        ("input()", "EOFError"),
    ],
)
def test_what_becomes_of_a_program(code: str, reason: str) -> None:
    outcome = run_python(code, time_limit=20)
    assert outcome.reason.startswith(reason)
    assert outcome.passed == (reason == "passed")


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)"])
def test_time_runs_out(code: str) -> None:
    began = time.monotonic()
    assert run_python(code, time_limit=1.0).reason == "time limit"
    assert time.monotonic() - began < 20


def test_a_file_of_the_user_survives(tmp_path) -> None:
    path = tmp_path / "mine"
    path.write_text("kept")
    for code in (f"import os; os.remove({str(path)!r})", f"open({str(path)!r}, 'w')", f"open({str(path)!r}).read()"):
        assert run_python(code).reason.startswith("PermissionError")
    assert path.read_text() == "kept"


def test_the_environment_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCPO_SECRET", "s")
    assert "GCPO_SECRET" in os.environ
    assert run_python("import os; assert 'GCPO_SECRET' not in os.environ").passed


@pytest.mark.parametrize("limit", [{"time_limit": 0}, {"memory_mb": -1}, {"file_mb": 0}])
def test_bad_limits(limit: dict) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(limit))}` must be above 0"):
        run_python("", **limit)


def test_nothing_runs_where_the_limits_cannot_be_enforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcpo.evaluation.sandbox.platform.machine", lambda: "riscv64")
    with pytest.raises(SandboxError, match="x86_64, aarch64"):
        run_python("")
