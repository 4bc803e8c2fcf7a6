"""The benchmarks of the paper as TRL datasets, and the verifiers of mathematical and code answers."""

import difflib
import json
import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from math_verify import parse, verify

from gcpo.evaluation.sandbox import run_python
from gcpo.evaluation.tasks import Completion, as_prompt, judged_text
from gcpo.run.records import read_rows

MATH_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
CODE_PROMPT = "Complete this Python function. Answer with the whole function, in one Python code block."

_CODE_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
# A box, any other command or escaped character (which may be an escaped brace), or a brace.
_LATEX_PART = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|[{}]", re.DOTALL)
# What says nothing between two boxes, and what is left between those that are one answer of several parts.
_SPACING = re.compile(r"\\(?:text|q?quad|[^a-zA-Z])|[\s${}]")
_JOINS = {",", "and", "or", ",and", ",or"}
_CURRENCY = re.compile(r"(?<!\\)\\\$")
_SECONDS_TO_PARSE, _SECONDS_TO_VERIFY = 5, 5  # math-verify's own limits
# Where a base model goes on after the body of a function.
_AFTER_BODY = re.compile(r"\n(?=\S)(?!\s*[)\]}#@])")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's name on the hub and split, its kind (`"math"` or `"code"`), and how many problems it has."""

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
        rows = list(read_rows(path))
        where = str(path)
    else:
        try:
            rows = list(load_dataset(benchmark.repository, split=benchmark.split))
        except (OSError, ValueError) as error:
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            raise FileNotFoundError(
                f"{name!r} could not be loaded from the hub as {benchmark.repository} ({reason}). {_layout(name)}"
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
            "without network or other processes, and with limits of time, memory and files (see docs/commands.md)."
        )
    return code_reward


def math_reward(completions: list[Completion], answer: list[str | float], **kwargs: Any) -> list[float]:
    """
    1.0 for completions whose final answer equals the right one as mathematics, else 0.0 (math-verify). A TRL reward.

    A completion's answer is what stands in its last box, together with the boxes that a comma, "and" or "or" joins to
    it; without a box, math-verify looks for one in the text. Outside the main thread nothing limits how long
    math-verify may take: its limits are alarms, which only the main thread can set.

    Args:
        completions: B texts, or B lists of messages, of which the last one is judged.
        answer: B right answers, as numbers, LaTeX or plain text, with or without a box around it.

    Raises:
        ValueError: a right answer that is neither text nor a number, such as None.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    parse_limit, verify_limit = (_SECONDS_TO_PARSE, _SECONDS_TO_VERIFY) if in_main_thread else (None, None)
    scores = []
    for k, (completion, right) in enumerate(zip(completions, answer, strict=True), 1):
        gold_text = as_text(right, "answer", f"Row {k} of the batch")
        bare = "\\boxed" not in gold_text and not re.search(r"(?<!\\)\$", gold_text)
        gold = parse(_final_answer(f"${gold_text}$" if bare else gold_text), parsing_timeout=parse_limit)
        given = parse(_final_answer(judged_text(completion)), parsing_timeout=parse_limit)
        scores.append(float(verify(gold or [gold_text.strip()], given, timeout_seconds=verify_limit)))
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
        program = f"{complete_program(judged_text(completion), beginning, name)}\n\n{tests}\n\ncheck({name})\n"
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


def ask_math(row: dict[str, Any], conversational: bool = True, where: str = "The row") -> dict[str, Any]:
    """
    A row with `problem` and `answer` as one with `prompt` and `answer`, the latter as text. A ValueError, which names
    the row as `where`, if one of the two is neither text nor a number.
    """
    text = f"{as_text(row['problem'], 'problem', where)}\n\n{MATH_PROMPT}"
    return {"prompt": as_prompt(text, conversational), "answer": as_text(row["answer"], "answer", where)}


def as_text(value: Any, column: str, where: str) -> str:
    """A text as it is and a number as it is written; a ValueError that names row and column for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return format(Decimal(str(value)), "f")  # 1e-05 would be read as a difference with the number e
    raise ValueError(f"{where}: `{column}` must be text or a number, got {value!r:.200}.")


def _ask_code(row: dict[str, Any], conversational: bool) -> dict[str, Any]:
    stub = row["prompt"]
    prompt = as_prompt(f"{CODE_PROMPT}\n\n```python\n{stub}```", True) if conversational else stub
    return {"prompt": prompt, "stub": stub, "test": row["test"], "entry_point": row["entry_point"]}


def _take(row: dict[str, Any], benchmark: Benchmark, where: str, name: str) -> dict[str, Any]:
    taken = {}
    for column, names in benchmark.columns.items():
        there = [key for key in names if key in row]
        if not there:
            raise ValueError(f"{where}: needs {' or '.join(map(repr, names))}, has {', '.join(row)}. {_layout(name)}")
        found = next((key for key in there if row[key] is not None), there[0])
        taken[column] = as_text(row[found], found, where)
    return taken


def _final_answer(text: str) -> str:
    """
    The last box of a text, as a text of its own; the whole text where there is none that is closed and holds something.
    Boxes that only a comma, "and" or "or" joins to it become one box with it. Dollar signs of amounts, `\\$`, are left
    out: math-verify takes them for the start of a formula.
    """
    text = _CURRENCY.sub("", text)
    opened: list[re.Match[str]] = []
    boxes: list[tuple[int, int, str]] = []  # where each begins and ends, and what is in it, by their ends
    for part in _LATEX_PART.finditer(text):
        if part["box"] or part[0] == "{":
            opened.append(part)
        elif part[0] == "}" and opened and (start := opened.pop())["box"]:
            content = text[start.end() : part.start()].strip()
            if content:
                boxes.append((start.start(), part.end(), content))
    if not boxes:
        return text
    begin, _, answer = boxes.pop()
    while boxes and _SPACING.sub("", text[boxes[-1][1] : begin]) in _JOINS:
        begin, _, content = boxes.pop()
        answer = f"{content}, {answer}"
    return f"\\boxed{{{answer}}}"


def _layout(name: str) -> str:
    example = dict.fromkeys(BENCHMARKS[name].columns, "...")
    return (
        f"Without a hub, `--data_dir FOLDER` reads FOLDER/{name}.jsonl, one JSON object per line: {json.dumps(example)}"
    )
