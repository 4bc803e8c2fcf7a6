"""
What a run leaves in its output folder for `gcpo report` and `gcpo diagnose`, and how they read it back.

- `gcpo_run.json`: the options it ran with, and versions;
- `gcpo_log.jsonl`: every logged step, as TRL logs it, written while the run goes on;
- `gcpo_samples.jsonl`, with `log_completions`: the prompts of the last rollout before each log, with their candidates,
  rewards, A, Upsilon, B, and the colliders that they led to.
"""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gcpo._version import __version__
from gcpo.run.redaction import redacted

CONFIG, LOG, SAMPLES = "gcpo_run.json", "gcpo_log.jsonl", "gcpo_samples.jsonl"

Step = dict[str, Any]


@dataclass
class Run:
    """
    A run as it was read: its options (empty where they were not recorded), its training steps in order, each a dict of
    metrics with `step`, and prompts with candidates and colliders, in order of their steps.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    log: list[Step] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps at which a metric was logged as a finite number, and its values."""
        logged = [(row["step"], row[key]) for row in self.log if is_number(row.get(key))]
        return [step for step, _ in logged], [value for _, value in logged]

    def values(self, key: str) -> list[float]:
        """The values of `series`."""
        return self.series(key)[1]

    def mean(self, key: str) -> float | None:
        """Mean of a metric over the steps that logged it; None where none did."""
        values = self.values(key)
        return statistics.fmean(values) if values else None

    def median(self, key: str) -> float | None:
        """Its median."""
        values = self.values(key)
        return statistics.median(values) if values else None

    def recent_mean(self, key: str) -> float | None:
        """Its mean over the second half of the steps that logged it."""
        values = recent(self.values(key))
        return statistics.fmean(values) if values else None


def recent(values: list[Any]) -> list[Any]:
    """The second half of a list."""
    return values[len(values) // 2 :]


def is_number(value: Any) -> bool:
    """Whether a logged value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_run(path: str | Path, name: str | None = None) -> Run:
    """
    Read a run from its output folder, or from a `trainer_state.json`.

    Looks for `gcpo_log.jsonl`, then `trainer_state.json`, then that of the newest checkpoint. Where a run was resumed,
    the last entry of a step counts.

    Raises:
        FileNotFoundError: nothing of the kind is there.
        ValueError: there is, and it is not what it should be, or no training step was logged.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    log_file = path if path.is_file() else _find_log(path)
    if log_file is None:
        raise FileNotFoundError(
            f"`RUN` must be the output folder of a run, with {LOG}, trainer_state.json or a checkpoint in it, "
            f"got {str(path)!r}."
        )
    if log_file.suffix == ".jsonl":
        rows = list(read_rows(log_file, may_be_cut=True))
    else:
        try:
            rows = json.loads(log_file.read_text(encoding="utf-8-sig"))["log_history"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{log_file} must be JSON with a `log_history` ({error!r}).") from error
    # Evaluations and the summary at the end are no training steps.
    steps = {row["step"]: row for row in rows if "step" in row and ("reward" in row or "grad_norm" in row)}
    if not steps:
        raise ValueError(f"{log_file} holds no training step that was logged.")
    config_file, samples_file = folder / CONFIG, folder / SAMPLES
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    samples: dict[int, list[dict[str, Any]]] = {}
    if samples_file.is_file():
        for row in read_rows(samples_file, may_be_cut=True):
            samples[row["step"]] = row["groups"]
    return Run(
        name or folder.resolve().name,
        config,
        [steps[step] for step in sorted(steps)],
        [{"step": step, **group} for step in sorted(samples) for group in samples[step]],
    )


def read_runs(paths: list[str]) -> list[Run]:
    """
    Runs under several paths; a folder that holds no run itself stands for those right below it. Names that would be the
    same get their parent folder's before them.
    """
    folders: list[Path] = []
    for path in map(Path, paths):
        below = sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []
        inner = [child for child in below if (child / LOG).is_file()]
        folders += inner if inner and _find_log(path) is None else [path]
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for folder, run in zip(folders, runs, strict=True):
        if names.count(run.name) > 1:
            run.name = str(folder)
    return runs


def start_record(folder: Path, trainer: str, options: dict[str, Any], resumed: bool) -> None:
    """
    Write `gcpo_run.json`: the trainer's class, versions, and the options without the secrets in them. A run that is not
    `resumed` removes the log and the samples of an earlier one in the same folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not resumed:
        for name in (LOG, SAMPLES):
            (folder / name).unlink(missing_ok=True)
    versions = {"gcpo": __version__, "trl": version("trl")}
    content = {"trainer": trainer, "versions": versions, **redacted(options)}
    (folder / CONFIG).write_text(json.dumps(content, indent=1, default=str) + "\n")


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Add a line to a file that one process writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_clean(row), default=str) + "\n")


def groups_of_last_rollout(
    logs: dict[str, Any], num_generations: int, colliders: list[list[str]] | None
) -> list[dict[str, Any]]:
    """
    The prompts of a rollout from what TRL keeps for its completions table: for each its candidates with reward, A,
    Upsilon and B, and its colliders.

    Args:
        logs: the trainer's `_logs`; `advantages` are B.
        colliders: L texts for each prompt; None for GRPO.
    """
    advantages, prompts = list(logs["advantages"]), list(logs["prompt"])
    columns = {
        "text": list(map(text_of, logs["completion"])),
        "A": list(logs["extra"].get("plain_advantage", advantages)),
        "upsilon": list(logs["extra"].get("upsilon") or [None] * len(prompts)),
        "B": advantages,
    }
    rewards = {name: list(values) for name, values in logs["rewards"].items()}
    groups = []
    for group in range(len(prompts) // num_generations):
        rows = range(group * num_generations, (group + 1) * num_generations)
        candidates = [
            {name: values[row] for name, values in columns.items()}
            | {"rewards": {name: values[row] for name, values in rewards.items()}}
            for row in rows
        ]
        shown = colliders[group] if colliders and group < len(colliders) else []
        groups.append({"prompt": text_of(prompts[rows[0]]), "candidates": candidates, "colliders": shown})
    return groups


def text_of(message: str | list[dict[str, Any]]) -> str:
    """A prompt or completion as text, whether TRL holds it as text or as messages."""
    if isinstance(message, str):
        return message
    return "\n".join(str(part.get("content") or "") for part in message)


def read_rows(path: Path, may_be_cut: bool = False) -> Iterator[dict[str, Any]]:
    """
    The rows of a file of JSON lines in UTF-8, with a byte order mark or without. `may_be_cut`: the last line may be one
    that a run was killed over, or is writing now.

    Raises:
        ValueError: the file is not UTF-8, or a line is no JSON object; naming the line, counted from 1.
    """
    try:  # `str.splitlines` would also split at U+2028 and others that may stand inside a JSON string
        lines = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8 ({error}).") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if may_be_cut and number == len(lines):
                return
            raise ValueError(f"{path}, line {number} is not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} must be a JSON object, got {type(row).__name__}.")
        yield row


def _find_log(folder: Path) -> Path | None:
    if not folder.is_dir():
        return None
    checkpoints = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: _number(path.parent.name))
    places = [folder / LOG, folder / "trainer_state.json", *checkpoints[::-1]]
    return next((place for place in places if place.is_file()), None)


def _number(checkpoint: str) -> int:
    tail = checkpoint.rpartition("-")[2]
    return int(tail) if tail.isdigit() else -1


def _clean(value: Any) -> Any:
    """JSON has no NaN: None instead, as TRL logs a metric without values."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items()}
    return [_clean(inner) for inner in value] if isinstance(value, list | tuple) else value


def write_whole(file: Path, content: Any) -> None:
    """Write JSON such that the file is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(file)
