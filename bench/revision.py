"""Which code a result was made with."""

import subprocess
from pathlib import Path
from typing import Any


def revision() -> dict[str, Any]:
    """The commit, and whether a file that git tracks differs from it; None where that is unknown, as without git."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": _git("rev-parse", "HEAD"), "uncommitted_changes": None if changes is None else bool(changes)}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
