"""Files of results, of which a reader never sees half: whoever ends a run in the middle keeps the file before."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(text: str, path: Path) -> None:
    """Beside the file first, then in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def write_json(content: Any, path: Path) -> None:
    write_text(json.dumps(content, indent=1) + "\n", path)
