"""Starting scripts of this folder on two processes."""

import os
import signal
import socket
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parents[1] / "examples" / "configs"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def spawn(command: list[str], **environment: str) -> subprocess.Popen[str]:
    """`command`, in a session of its own, so that all that it starts can be ended."""
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def path_with(folder: Path) -> str:
    """PYTHONPATH, with a folder before what it has."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def start(launcher: list[str], script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`launcher`, with two processes on a port of their own, running `script` of this folder."""
    processes = (
        ["--num_processes", "--main_process_port"] if "launch" in launcher else ["--nproc-per-node", "--master-port"]
    )
    options = [word for pair in zip(processes, ("2", str(free_port())), strict=True) for word in pair]
    command = [*launcher, *options, str(HERE / script), *arguments]
    return spawn(command, **{"PYTHONPATH": path_with(HERE.parent), **environment})


def finish(run: subprocess.Popen[str], timeout: float = 300.0) -> tuple[int, str, str]:
    """Exit code, standard output and standard error, once it has ended; none of it is left behind."""
    try:
        out, err = run.communicate(timeout=timeout)
        return run.returncode, out, err
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()


def launch(launcher: list[str], script: str, *arguments: str, **environment: str) -> str:
    """What a run that succeeds prints."""
    code, out, err = finish(start(launcher, script, *arguments, **environment))
    assert code == 0, err[-6000:]
    return out
