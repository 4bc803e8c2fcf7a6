"""
Python that a model wrote, run in a process of its own with limits that the Linux kernel enforces.

Time: a wall clock and a CPU limit. Memory: an address-space limit. Files: Landlock leaves the interpreter's own files
to read and one fresh folder to write to, each file up to a size. Network, other processes and signals: a seccomp
filter refuses the system calls for them. Where the kernel lacks any of these, nothing is run. This contains the
accidents of a model that writes programs; against an adversary, put a virtual machine around all of it.
"""

import ctypes
import json
import math
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass

_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # as seccomp names them
# Numbers on (x86_64, aarch64); 0 where an architecture has no such call.
_REFUSED = {
    "socket": (41, 198), "socketpair": (53, 199), "io_uring_setup": (425, 425), "fork": (57, 0), "vfork": (58, 0),
    "execve": (59, 221), "execveat": (322, 281), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "mount": (165, 40), "umount2": (166, 39), "unshare": (272, 97),
    "setns": (308, 268), "chroot": (161, 51), "pivot_root": (155, 41), "bpf": (321, 280), "reboot": (169, 142),
    "init_module": (175, 105), "finit_module": (313, 273), "kexec_load": (246, 104), "setrlimit": (160, 164),
    "prlimit64": (302, 261),
}  # fmt: skip
_CLONE, _CLONE3, _CLONE_THREAD = (56, 220), 435, 0x10000
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ = 1 << 2 | 1 << 3  # files, folders
# What each version of Landlock can refuse; what it cannot must not be asked of it.
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}


class SandboxError(RuntimeError):
    """Nothing was run: the machine cannot enforce the limits."""


@dataclass(frozen=True)
class Outcome:
    """
    Whether a program ran to its end without an exception, and the reason: `"passed"`, `"time limit"`, `"killed"`,
    `"ended early"` (it called exit), or the exception.
    """

    passed: bool
    reason: str


def run_python(code: str, *, time_limit: float = 10.0, memory_mb: int = 1024, file_mb: int = 8) -> Outcome:
    """
    Run a program and say whether it came to its end. What it prints is thrown away.

    Args:
        code: source text.
        time_limit: seconds, by the wall clock and of CPU time.
        memory_mb: most address space, the interpreter's included.
        file_mb: largest file that it can write, in the folder that it starts in and that is removed afterwards.

    Raises:
        SandboxError: the machine cannot enforce the limits (it needs Linux 5.13 or newer on x86_64 or aarch64, with
            Landlock and seccomp); nothing was run.
        ValueError: a limit that is not positive.
    """
    for name, value in (("time_limit", time_limit), ("memory_mb", memory_mb), ("file_mb", file_mb)):
        if not value > 0:
            raise ValueError(f"`{name}` must be above 0, got {value}.")
    if not sys.platform.startswith("linux") or platform.machine() not in _MACHINES:
        raise SandboxError(f"Programs are run on Linux (x86_64, aarch64) only, this is {platform.platform()}.")
    # Only who knows the token can report success: a program that exits with 0 before its tests does not.
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="gcpo-code-") as folder:
        limits = {"time": time_limit, "memory": memory_mb, "file": file_mb}
        task = {"code": code, "token": token, "folder": folder, **limits}
        process = subprocess.Popen(
            [sys.executable, "-I", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HOME": folder},
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(json.dumps(task).encode(), timeout=time_limit + 1)
        except subprocess.TimeoutExpired:
            return Outcome(False, "time limit")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode == -signal.SIGXCPU:
        return Outcome(False, "time limit")
    try:
        report = json.loads(out)
    except ValueError:
        return Outcome(False, "killed" if process.returncode < 0 else "ended early")
    if "unavailable" in report:
        raise SandboxError(f"This machine cannot enforce the limits of programs: {report['unavailable']}.")
    if report.get("token") != token:
        return Outcome(False, "ended early")
    return Outcome(report["error"] is None, report["error"] or "passed")


# ---------------------------------------------------------------------------------------------------------------------
# In the process that the program runs in
# ---------------------------------------------------------------------------------------------------------------------


def _child() -> None:
    task = json.loads(sys.stdin.buffer.read())
    report_fd = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    try:
        _limit_resources(task)
        _limit_files(task["folder"])
        _limit_calls()
    except OSError as error:
        os.write(report_fd, json.dumps({"unavailable": str(error)}).encode())
        return
    error_text = None
    try:
        exec(compile(task["code"], "<answer>", "exec"), {"__name__": "__main__"})
    except SystemExit:
        os._exit(0)
    except BaseException as error:
        error_text = f"{type(error).__name__}: {error}"[:300]
    os.write(report_fd, json.dumps({"token": task["token"], "error": error_text}).encode())
    os._exit(0)  # without waiting for threads that it left


def _limit_resources(task: dict) -> None:
    import resource

    for kind, value in (
        (resource.RLIMIT_CPU, math.ceil(task["time"])),
        (resource.RLIMIT_AS, task["memory"] * 2**20),
        (resource.RLIMIT_FSIZE, task["file"] * 2**20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # Reaching the hard limit of time kills outright; the soft one, a second earlier, says why.
        above = value + 1 if kind == resource.RLIMIT_CPU and hard == resource.RLIM_INFINITY else value
        resource.setrlimit(kind, (value, above))


def _limit_files(folder: str) -> None:
    """Landlock: read the interpreter and its packages, write to one folder, nothing else."""

    class Ruleset(ctypes.Structure):
        _fields_ = [("fs", ctypes.c_uint64)]

    class Beneath(ctypes.Structure):
        _pack_ = 1
        _layout_ = "ms"
        _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]

    _libc().prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which both mechanisms ask for
    version = _libc().syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        raise OSError("the kernel has no Landlock (5.13 or newer, enabled)")
    rights = _FILE_RIGHTS[min(version, max(_FILE_RIGHTS))]
    attributes = Ruleset(rights)
    ruleset = _checked("Landlock", _LANDLOCK_CREATE, ctypes.byref(attributes), ctypes.c_size_t(8), ctypes.c_uint32(0))
    readable = {sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.__file__)}
    readable |= {"/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/dev/urandom"}
    for path, wanted in [*((path, _READ) for path in sorted(readable)), ("/dev/null", _READ | 2), (folder, rights)]:
        try:
            parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        allowed = wanted if os.path.isdir(path) else wanted & (1 << 1 | 1 << 2)
        rule = Beneath(allowed & rights, parent)
        _checked("Landlock", _LANDLOCK_ADD, ruleset, ctypes.c_int(1), ctypes.byref(rule), ctypes.c_uint32(0))
        os.close(parent)
    _checked("Landlock", _LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0))
    os.close(ruleset)


def _limit_calls() -> None:
    """seccomp: no sockets, no other processes, no signals to any, nothing that needs privileges."""

    class Instruction(ctypes.Structure):
        _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(Instruction))]

    load, equal, at_least, has_bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, not_permitted, not_there = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38
    machine = platform.machine()
    which = list(_MACHINES).index(machine)
    lines = [(load, 0, 0, 4), (equal, 1, 0, _MACHINES[machine]), (give, 0, 0, kill), (load, 0, 0, 0)]
    # x86_64's second numbering, in which every call has another number.
    lines += [(at_least, 0, 1, 0x40000000), (give, 0, 0, not_permitted)] if which == 0 else []
    # Its flags are out of a filter's sight; callers that hear "not there" use clone.
    lines += [(equal, 0, 1, _CLONE3), (give, 0, 0, not_there)]
    for numbers in _REFUSED.values():
        if numbers[which]:
            lines += [(equal, 0, 1, numbers[which]), (give, 0, 0, not_permitted)]
    # Threads are clones too.
    lines += [(equal, 0, 3, _CLONE[which]), (load, 0, 0, 16), (has_bits, 1, 0, _CLONE_THREAD)]
    lines += [(give, 0, 0, not_permitted), (give, 0, 0, allow)]
    instructions = (Instruction * len(lines))(*(Instruction(*line) for line in lines))
    program = Program(len(lines), instructions)
    if _libc().prctl(22, 2, ctypes.byref(program), 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(f"the kernel refuses a seccomp filter ({os.strerror(ctypes.get_errno())})")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(what: str, number: int, *args: object) -> int:
    result = _libc().syscall(ctypes.c_long(number), *args)
    if result < 0:
        raise OSError(f"{what} failed ({os.strerror(ctypes.get_errno())})")
    return result


if __name__ == "__main__":
    _child()
