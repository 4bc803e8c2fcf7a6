"""The end of a process whose gloo threads still have tensors to release."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import CONFIGS, finish, free_port, path_with, spawn
from tiny_policy import save_policy

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
    assert ended.returncode == code and "handlers ran\n" in ended.stdout and "terminate" not in ended.stderr, ended


def test_the_interpreters_own_end_aborts(tmp_path: Path) -> None:
    """What `leave` is for: once this fails, torch or the interpreter has mended it."""
    ended = end(LATE, tmp_path)
    assert ended.returncode == -signal.SIGABRT, ended


def test_what_the_process_has_begun_is_done(tmp_path: Path) -> None:
    """Threads, and what is written to files that are open, whether or not anybody reads the standard output."""
    script = f"""
import sys, threading, time
from gcpo.run.leaving import leave
log = open({str(tmp_path / "log")!r}, "w")
log.write("written")
def late():
    time.sleep(0.3)
    log.write(", late")
threading.Thread(target=late).start()
sys.stdout = sys.__stdout__ = None
leave(3)
"""
    assert end(script, tmp_path).returncode == 3
    assert (tmp_path / "log").read_text() == "written, late"


# A reward whose module the interpreter's own end would take apart.
REWARD = """
class Told:
    def __del__(self):
        print("the interpreter's own end", flush=True)
told = Told()
def length(completions, **columns):
    return [float(len(completion)) for completion in completions]
"""


@pytest.mark.slow
def test_the_train_command_on_two_processes(tmp_path: Path) -> None:
    """It starts them itself, saves once, and no process ends as the interpreter would end it."""
    (tmp_path / "rewards_that_tell.py").write_text(REWARD)
    out = tmp_path / "out"
    flags = {
        "model_name_or_path": save_policy(tmp_path / "policy"),
        "dataset_name": "reasoning_gym:chain_sum",
        "reward_funcs": "rewards_that_tell.length",
        "max_steps": "1",
        "per_device_train_batch_size": "2",
        "num_generations": "4",
        "max_completion_length": "4",
        "report_to": "none",
        "output_dir": str(out),
        "accelerate_config": str(CONFIGS / "accelerate" / "ddp.yaml"),
        "mixed_precision": "no",
        "num_processes": "2",
        "main_process_port": str(free_port()),
    }
    given = [word for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "gcpo.cli", "train", "--use_cpu", *given]
    run = spawn(command, PYTHONPATH=path_with(tmp_path))
    code, told, err = finish(run)
    assert code == 0, err[-6000:]
    assert told.count("steps=1 ") == told.count("saved to") == 1 and "own end" not in told
    assert (out / "model.safetensors").is_file()
