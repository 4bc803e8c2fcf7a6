"""
The bug classes that hit fused reinforcement-learning losses, and the tests that try each of them here.

A test says which it tries with `@pytest.mark.hazard(N)` and names a thread of it in its docstring.
`python tests/hazard_rows.py` writes the table of docs/hazards.md; a test checks that it is current.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "hazards.md"
BEGIN, END = "<!-- begin: python tests/hazard_rows.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Row:
    """A bug class: what goes wrong, threads where it did, and what is out of a test's reach here."""

    title: str
    threads: str
    note: str = ""


ROWS = {
    1: Row("A fused loss drifts from the plain loss", "Liger#1082 trl#6808 trl#7270 trl#7063"),
    2: Row("The loss runs on the unwrapped model: gradients are never all-reduced", "trl#7245 trl#7247"),
    3: Row(
        "ZeRO-3: an empty output layer in the forward, or one re-sharded before the backward",
        "trl#5891 trl#3368 trl#6859 trl#6384",
        "The trainer takes every score from the model's own forward and never touches the output layer, so gathering "
        "it is TRL's and DeepSpeed's part.",
    ),
    4: Row(
        "FSDP2: a DTensor as output layer",
        "torchtune#2507 ml-cross-entropy#31 verl#7520",
        "The trainer: as row 3. `gcpo_kernels` gathers a DTensor once, in the forward.",
    ),
    5: Row(
        "Tied embeddings are untied in silence, or get half of their gradient", "verl#7834 verl#7835 accelerate#4171"
    ),
    6: Row("LoRA on the output layer is ignored", "trl#4612 trl#5977"),
    7: Row("Softcap or logit scale is dropped or wrong", "unsloth#11277 unsloth-zoo#593 vllm#52158"),
    8: Row(
        "The tail of the vocabulary poisons the log-sum-exp",
        "verl#2656 verl#5349 unsloth#10616 ml-cross-entropy#59",
    ),
    9: Row("-inf - -inf in an online softmax; a large common offset", "flash-attention#1930 pytorch#195829"),
    10: Row("A masked row makes inf * 0: a finite loss with a NaN gradient", "Soup#342 Soup#1084 NeMo-RL#4154"),
    11: Row("Offsets in 32 bits wrap", "fla#1080 megablocks#186 DeepSpeed#8590"),
    12: Row("A grid's y or z axis beyond 65,535", "triton#3299 fla#1077 Liger#1294"),
    13: Row("Strides of inputs and of upstream gradients are taken for contiguous", "TE#2734 verl#6960 TE#623"),
    14: Row("A gradient written in place destroys a saved tensor", "Liger#272 Liger#1251 unsloth#5002 trl#6621"),
    15: Row("Sums in bfloat16, and cancellation in p - 1", "Liger#830 Liger#1419 ml-cross-entropy#18"),
    16: Row("Types are mixed under autocast and quantised weights", "Liger#305 Liger#501 unsloth#7020"),
    17: Row(
        "A float32 `tl.dot` is TF32",
        "triton#5895",
        "Our own product asks for IEEE; the vendor library's are under torch's own TF32 switch.",
    ),
    18: Row("Autotuning re-runs a kernel that works in place", "triton#6547 triton#7181", "No kernel is autotuned."),
    19: Row("A compilation for every new length", "flash-attention#911 fla#1207 helion#2426"),
    20: Row(
        "Processes race for one compiler cache",
        "triton#2688 prime-rl#2305 miles#3158",
        "On a network file system, point `TRITON_CACHE_DIR` at a local folder of each node. `gcpo doctor` compiles "
        "and runs every kernel once: run it on each node before a job to start it with a warm cache.",
    ),
    21: Row("Triton's interpreter is wrong in bfloat16", "triton#11584 triton#10945"),
    22: Row(
        "torch.compile: wrong values, graph breaks, lost checkpointing",
        "fla#52 pytorch#147828 pytorch#171289 pytorch#177396",
    ),
    23: Row(
        "Temperature is missing, applied twice, or not applied to old and reference scores", "unsloth-zoo#832 trl#4159"
    ),
    24: Row(
        "The sampler's probabilities differ from the trainer's",
        "trl#4303 open-instruct#1387 trl#6789 trl#6266",
        "Sampling with vLLM, its importance-sampling correction and the warning about `top_p` are TRL's code, "
        "unchanged. What GCPO adds is scored by the trainer's own model, whatever sampled.",
    ),
    25: Row("Gradient accumulation divides by the wrong count", "trl#5619 trl#6024 ms-swift#10117"),
    26: Row("Groups are split over ranks or put in another order", "R1-V#67 trl#3896"),
    27: Row("A group of equal rewards still gets a push; almost equal ones explode", "trl#5588 trl#7068 NeMo-RL#4158"),
    28: Row("Empty, fully masked and truncated rows", "unsloth-zoo#1262 trl#4976 trl#6654"),
    29: Row("Tool tokens take part in the loss", "trl#4975"),
    30: Row("Out of resources; warps of 64; no bfloat16", "Liger#51 Liger#231 vllm#36802"),
    31: Row("The load-balancing loss of a mixture of experts is dropped", "trl#7009"),
}


@dataclass(frozen=True)
class Marked:
    """A test that tries a row."""

    row: int
    place: str  # path::name
    docstring: str


def _numbers(decorators: list[ast.expr]) -> list[int]:
    found = []
    for node in decorators:
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.hazard":
            found += [value for x in node.args if isinstance(value := ast.literal_eval(x), int)]
    return found


def collect(folder: Path = ROOT / "tests") -> list[Marked]:
    """Every marked test, read from the sources: those that need a GPU or an interpreter are there too."""
    found = []
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                place = f"{path.relative_to(folder.parent)}::{node.name}"
                found += [Marked(row, place, ast.get_docstring(node) or "") for row in _numbers(node.decorator_list)]
    return found


def table() -> str:
    """Markdown: every row with its threads, its tests by file, and its note."""
    lines = ["| | what goes wrong | seen in | tried by |", "|---|---|---|---|"]
    marked = collect()
    for number, row in ROWS.items():
        files: dict[str, list[str]] = {}
        for test in marked:
            if test.row == number:
                path, name = test.place.split("::")
                files.setdefault(path, []).append(f"`{name}`")
        tests = "; ".join(f"`{path}`: {', '.join(names)}" for path, names in files.items())
        cell = ". ".join(part for part in (tests, row.note) if part)
        lines.append(f"| {number} | {row.title} | {', '.join(row.threads.split())} | {cell} |")
    return "\n".join(lines)


def write() -> None:
    head, rest = DOCUMENT.read_text().split(BEGIN)
    DOCUMENT.write_text(f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    write()
