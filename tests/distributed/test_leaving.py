"""The end of a process whose gloo threads still have tensors to release."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

# A thread of the group, which default arguments of torch.distributed.nn keep, is in the middle of releasing a tensor
# when this process ends.
LATE = """
import atexit, sys, threading, time, torch
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
import torch.distributed.nn.functional
group, main, begun = torch.distributed.group.WORLD, threading.current_thread(), threading.Event()
class Slow(torch.Tensor):
    def __del__(self):
        if threading.current_thread() is not main:
            begun.set()
            time.sleep(5)
while not begun.wait(0.5):  # until the thread is the last to hold one
    group.allreduce([torch.ones(300).as_subclass(Slow)])
torch.distributed.destroy_process_group()
atexit.register(print, "handlers ran")
"""
LEAVE = "from gcpo.run.leaving import leave; leave({})"


def end(script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "rendezvous")],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("code", [0, 3])
def test_threads_that_are_late(code: int, tmp_path: Path) -> None:
    ended = end(LATE + LEAVE.format(code), tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "handlers ran\n", "")


def test_the_interpreters_own_end_aborts(tmp_path: Path) -> None:
    """What `leave` is for: once this fails, torch has mended it."""
    ended = end(LATE, tmp_path)
    assert ended.returncode == -signal.SIGABRT, ended


def test_threads_of_the_process_are_waited_for(tmp_path: Path) -> None:
    script = "import threading, time\ndef late():\n    time.sleep(0.3)\n    print('done')\n"
    assert end(f"{script}threading.Thread(target=late).start()\n{LEAVE.format(0)}", tmp_path).stdout == "done\n"
