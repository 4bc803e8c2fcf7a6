"""
The parts of a programme: each a command in a process group of its own with a limit of its own, so that one that fails,
hangs or is killed takes nothing else with it; and the one archive that holds what they wrote.
"""

import contextlib
import importlib.util
import io
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.files import write_json

ROOT = Path(__file__).resolve().parents[1]
PACK_EVERY = 15.0  # seconds: what a part has written so far is in the archive no later than that
GIVE_UP = 10.0  # seconds after which a killed process that does not end, as one may in a driver, is left behind
SHORTEST = 5.0  # seconds: with less than that left, a part is not begun


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        name: also of its log.
        command: {work} stands for the folder of results.
        limit: seconds.
        modules, programs: without one of these the part is skipped; a module is looked for, not imported.
        environment: variables on top of the programme's own.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    def missing(self) -> str:
        """What it cannot run without and is not here; "" if nothing is."""
        lacking = [name for name in self.modules if not _is_installed(name)]
        lacking += [name for name in self.programs if shutil.which(name, path=_path()) is None]
        return ", ".join(lacking)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def run_parts(parts: list[Part], work: Path, archive: Path, limit: float) -> int:
    """
    Run them one after the other, within `limit` seconds in all; 1 unless all that ran went well. `summary.json` and
    the archive are written after each, and the archive every PACK_EVERY seconds as well.
    """
    work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    done: list[dict[str, Any]] = []
    for part in parts:
        left = limit - (time.monotonic() - began)
        entry: dict[str, Any] = {"name": part.name, "status": "interrupted", "seconds": 0.0, "last_line": ""}
        done.append(entry)
        try:
            if lacking := part.missing():
                entry |= {"status": "skipped", "last_line": f"not here: {lacking}"}
            elif left < SHORTEST:
                entry |= {"status": "no time", "last_line": "nothing is left of the limit"}
            else:
                entry |= run_part(part, work, archive, min(part.limit, left))
        finally:
            summary = {"seconds": time.monotonic() - began, "limit": limit, "parts": done}
            write_json(summary, work / "summary.json")
            pack(work, archive)
        print(f"{part.name:<14} {entry['status']:<10} {entry['seconds']:6.1f} s  {entry['last_line']}", flush=True)
    return 0 if all(entry["status"] in ("ok", "skipped") for entry in done) else 1


def run_part(part: Part, work: Path, archive: Path, limit: float) -> dict[str, Any]:
    """Its status ("ok", "failed", "killed" by a signal, "too long"), seconds, exit code and last line."""
    command = [word.replace("{work}", str(work.resolve())) for word in part.command]
    log = work / f"{part.name}.log"
    began = time.monotonic()
    with log.open("w") as file:
        file.write(" ".join(command) + "\n")
        file.flush()
        try:
            # A process group, so that what it started ends with it; in this session, so that it ends with this one.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=_environment(part),
                process_group=0,
            )
        except OSError as error:
            return {"status": "failed", "last_line": str(error)}
        try:
            _offer_to_the_kernel(process.pid)
            code = _wait(process, began + limit, lambda: pack(work, archive))
        finally:  # whatever happens here, a signal too
            _end(process)
    status = "too long" if code is None else "ok" if code == 0 else "killed" if code < 0 else "failed"
    last = last_line(log)
    if code is not None and code < 0:
        last = f"{signal.Signals(-code).name}; {last}"
    return {"status": status, "code": code, "seconds": time.monotonic() - began, "last_line": last}


def _wait(process: subprocess.Popen[bytes], deadline: float, meanwhile: Callable[[], None]) -> int | None:
    """The exit code, or None after the deadline; `meanwhile` runs every PACK_EVERY seconds."""
    while (left := deadline - time.monotonic()) > 0:
        try:
            return process.wait(min(PACK_EVERY, left))
        except subprocess.TimeoutExpired:
            if deadline - time.monotonic() > 0:
                meanwhile()
    return process.poll()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the group, the part's own children included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GIVE_UP)


def _offer_to_the_kernel(pid: int) -> None:
    """Where memory runs out, the kernel ends the part and not the programme."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def _environment(part: Part) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"PATH": _path(), "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return os.environ | fixed | dict(part.environment)


def _path() -> str:
    """The tools of the CUDA toolkit are often installed, and not on PATH."""
    return os.environ.get("PATH", "") + os.pathsep + "/usr/local/cuda/bin"


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


def pack(work: Path, archive: Path) -> None:
    """
    Everything in the folder, into one file: beside the archive first, then in its place, so that the one before is
    whole until this one is. A file that changes meanwhile, or goes, does no harm: it comes again with the next.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    beside = archive.with_name(f".{archive.name}.part")
    with tarfile.open(beside, "w:gz") as tar:
        for path in sorted(work.rglob("*")):
            if not path.is_file() or path.name.startswith("."):
                continue
            with contextlib.suppress(FileNotFoundError):
                content = path.read_bytes()
                info = tarfile.TarInfo(str(Path(archive.name.split(".")[0]) / path.relative_to(work)))
                info.size, info.mtime = len(content), int(path.stat().st_mtime)
                tar.addfile(info, io.BytesIO(content))
    beside.replace(archive)
