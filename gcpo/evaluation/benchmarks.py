"""The benchmarks of the paper as TRL datasets, and the verifiers of mathematical and code answers."""

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from math_verify import parse, verify

from gcpo.evaluation.sandbox import run_python
from gcpo.evaluation.tasks import Completion

MATH_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
CODE_PROMPT = "Complete this Python function. Answer with the whole function, in one Python code block."

_CODE_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
# Where a base model goes on after the body of a function.
_AFTER_BODY = re.compile(r"\n(?=\S)(?!\s*[)\]}#@])")


@dataclass(frozen=True)
class Benchmark:
    """
    Where a benchmark's problems are, and under which names.

    Attributes:
        repository: its name on the hub.
        split: split of the problems.
        kind: `"math"` (columns `problem`, `answer`) or `"code"` (`prompt`, `test`, `entry_point`).
        size: number of problems.
    """

    repository: str
    split: str
    kind: str
    size: int

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """The columns that are needed, and the names that each may have."""
        if self.kind == "code":
            return {"prompt": ("prompt",), "test": ("test",), "entry_point": ("entry_point",)}
        return {"problem": ("problem", "question"), "answer": ("answer",)}


BENCHMARKS = {
    "aime24": Benchmark("math-ai/aime24", "test", "math", 30),
    "aime25": Benchmark("math-ai/aime25", "test", "math", 30),
    "amc23": Benchmark("math-ai/amc23", "test", "math", 40),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", "math", 500),
    "minervamath": Benchmark("math-ai/minervamath", "test", "math", 272),
    "humaneval": Benchmark("openai/openai_humaneval", "test", "code", 164),
}


def load_benchmark(name: str, data_dir: str | Path | None = None, conversational: bool = True) -> Dataset:
    """
    The problems of a benchmark.

    Args:
        name: one of `BENCHMARKS`.
        data_dir: a folder with `NAME.jsonl`, read instead of the hub.
        conversational: prompts as message lists (for chat models) rather than as text.

    Returns:
        Column `prompt`, and what the verifier needs: `answer` for `math_reward`; `stub`, `test`, `entry_point` for
        `code_reward`.

    Raises:
        ValueError: an unknown name, or rows without a column that is needed.
        FileNotFoundError: no file in `data_dir`, or, without one, no hub; says which file would do instead.
    """
    if name not in BENCHMARKS:
        close = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"`name` must be a benchmark, one of {', '.join(BENCHMARKS)}, got {name!r}{hint}.")
    benchmark = BENCHMARKS[name]
    if data_dir is not None:
        path = Path(data_dir) / f"{name}.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"`data_dir` must hold {path.name}, got {str(data_dir)!r}. {_layout(name)}")
        rows = [_read_line(path, k, line) for k, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
        where = str(path)
    else:
        try:
            rows = list(load_dataset(benchmark.repository, split=benchmark.split))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{name!r} could not be loaded from the hub as {benchmark.repository} ({type(error).__name__}: "
                f"{str(error)[:200]}). {_layout(name)}"
            ) from error
        where = benchmark.repository
    if not rows:
        raise ValueError(f"{where} has no rows. {_layout(name)}")
    taken = [_take(row, benchmark, f"{where}, row {k}", name) for k, row in enumerate(rows, 1)]
    ask = _ask_code if benchmark.kind == "code" else ask_math
    return Dataset.from_list([ask(row, conversational) for row in taken])


def verifier(name: str, allow_code: bool = False) -> Callable[..., list[float]]:
    """
    The reward function of a benchmark.

    Raises:
        ValueError: programs would have to be run, and `allow_code` is off.
    """
    if BENCHMARKS[name].kind == "math":
        return math_reward
    if not allow_code:
        raise ValueError(
            f"{name!r} runs what the model writes. `--allow_code_execution` permits it, in separate processes "
            "without network or other processes, and with limits of time, memory and files (see docs/studies.md)."
        )
    return code_reward


def math_reward(completions: list[Completion], answer: list[str], **kwargs: Any) -> list[float]:
    """
    1.0 for completions whose final answer equals the right one as mathematics, else 0.0 (math-verify). A TRL reward.

    Args:
        completions: B texts, or B lists of messages, of which the last one is judged.
        answer: B right answers, as LaTeX or plain text, with or without a box around it.
    """
    scores = []
    for completion, right in zip(completions, answer, strict=True):
        gold = parse(right if "\\boxed" in right or "$" in right else f"${right}$") or [right.strip()]
        scores.append(float(verify(gold, parse(_text(completion)))))
    return scores


def code_reward(
    completions: list[Completion], stub: list[str], test: list[str], entry_point: list[str], **kwargs: Any
) -> list[float]:
    """
    1.0 for completions that pass their tests, else 0.0. Runs each in a sandbox (`gcpo.evaluation.sandbox.run_python`).

    Args:
        completions: B texts or lists of messages: a whole function in a code block, or the rest of `stub`.
        stub: B beginnings of a program, up to and with a function's docstring.
        test: B texts that define `check(candidate)`.
        entry_point: B names of the function to check.
    """
    scores = []
    for completion, beginning, tests, name in zip(completions, stub, test, entry_point, strict=True):
        program = f"{complete_program(_text(completion), beginning, name)}\n\n{tests}\n\ncheck({name})\n"
        scores.append(float(run_python(program).passed))
    return scores


def complete_program(text: str, stub: str, entry_point: str) -> str:
    """The program in a completion: its code block if there is one, otherwise `stub` and what continues it."""
    blocks = _CODE_BLOCK.findall(text)
    code = blocks[0] if blocks else text
    if re.search(rf"^def\s+{re.escape(entry_point)}\b", code, re.MULTILINE):
        # The stub's imports and helpers stay; the answer's own definition replaces the one without a body.
        return f"{stub}    pass\n\n{code}" if stub.rstrip().endswith(('"""', "'''", ":")) else code
    return stub + _AFTER_BODY.split(code, maxsplit=1)[0]


def ask_math(row: dict[str, Any], conversational: bool = True) -> dict[str, Any]:
    """A row with `problem` and `answer` as one with `prompt` and `answer`."""
    text = f"{row['problem']}\n\n{MATH_PROMPT}"
    return {"prompt": _as_prompt(text, conversational), "answer": str(row["answer"])}


def _ask_code(row: dict[str, Any], conversational: bool) -> dict[str, Any]:
    stub = row["prompt"]
    prompt = _as_prompt(f"{CODE_PROMPT}\n\n```python\n{stub}```", True) if conversational else stub
    return {"prompt": prompt, "stub": stub, "test": row["test"], "entry_point": row["entry_point"]}


def _as_prompt(text: str, conversational: bool) -> Any:
    return [{"role": "user", "content": text}] if conversational else text


def _take(row: dict[str, Any], benchmark: Benchmark, where: str, name: str) -> dict[str, Any]:
    taken = {}
    for column, names in benchmark.columns.items():
        found = next((key for key in names if row.get(key) is not None), None)
        if found is None:
            raise ValueError(f"{where}: needs {' or '.join(map(repr, names))}, has {', '.join(row)}. {_layout(name)}")
        taken[column] = row[found]
    return taken


def _read_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is not JSON ({error}).") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number} must be a JSON object, got {type(row).__name__}.")
    return row


def _layout(name: str) -> str:
    example = dict.fromkeys(BENCHMARKS[name].columns, "...")
    return (
        f"Without a hub, `--data_dir FOLDER` reads FOLDER/{name}.jsonl, one JSON object per line: {json.dumps(example)}"
    )


def _text(completion: Completion) -> str:
    return completion if isinstance(completion, str) else completion[-1].get("content") or ""
