"""What the repository says about itself is true: imports, paths, make targets and commands that its texts name."""

import ast
import contextlib
import functools
import importlib.util
import inspect
import io
import re
import shlex
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import gcpo_kernels
from gcpo import cli
from gcpo.commands.eval import eval_parser

ROOT = Path(__file__).resolve().parents[1]
ENDINGS = (".py", ".md", ".toml", ".txt", ".yaml", ".yml")
# Names of logged metrics start like paths. A path into gcpo/ ends in .py.
METRIC = re.compile(
    r"gcpo/(upsilon|projection|colliders|seconds|tokens|kl_causal|kl_clipped|proj_clamped|groups_without|skipped_steps)"
)
CODE_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FENCE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)\s#]+)")
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:work|tmp|root|home|Users)/")
CONFLICT = re.compile(r"^(?:<{7}|>{7}) ", re.MULTILINE)


def repository_files() -> list[Path]:
    """Files that git tracks, and new ones that it does not ignore."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listing.splitlines() if (path := ROOT / name).is_file()]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")


def documents() -> list[Path]:
    return [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def code_in(markdown: str) -> list[str]:
    """Code spans and the lines of fenced blocks, continued lines joined."""
    fences = FENCE.findall(markdown)
    lines = [line.strip() for block in fences for line in block.replace("\\\n", " ").splitlines()]
    return CODE_SPAN.findall(FENCE.sub("", markdown)) + lines


def comments_and_docstrings(source: str) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def missing_paths(spans: list[str], folders: set[str]) -> list[str]:
    """Of what looks like a path: those that neither this repository nor an installed package has."""
    missing = []
    for span in spans:
        name = span.split("::")[0].rstrip("/:")
        first = name.split("/")[0]
        if "/" not in span or not re.fullmatch(r"[\w./*-]+", name) or span.startswith("/") or first == "runs":
            continue
        if not (name.endswith(ENDINGS) or first in folders):
            continue
        if METRIC.match(name) or any(ROOT.glob(name)):
            continue
        spec = importlib.util.find_spec(first) if first.isidentifier() and first not in folders else None
        bases = [Path(place).parent for place in (spec.submodule_search_locations or ())] if spec else []
        if not any((base / name).exists() for base in bases):
            missing.append(span)
    return missing


def unknown_flags(command: str) -> list[str]:
    """What is not a subcommand of `gcpo`, or not a flag of that one, in a command line."""
    words = shlex.split(command.split("#")[0])
    while words and re.fullmatch(r"\w+=.*|\$", words[0]):
        words = words[1:]
    if not words or words[0].rsplit("/", 1)[-1] != "gcpo" or len(words) == 1:
        return []
    name = words[1]
    if name.startswith("-"):
        return [] if name in ("--help", "-h", "--version") else [name]
    if name not in cli.COMMANDS:
        return [name]
    known = known_flags(name)
    given = [word.split("=")[0] for word in words[2:] if word.startswith("--")]
    return [flag for flag in given if flag not in known]


@functools.cache
def known_flags(command: str) -> set[str]:
    if command == "train":
        from accelerate.commands.launch import launch_command_parser

        from gcpo.commands.train import make_parser

        launch = set(launch_command_parser()._option_string_actions) | {"--accelerate_config", "--config"}
        return launch | set(make_parser()._option_string_actions)
    if command == "eval":
        return set(eval_parser()._option_string_actions)
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    return set(re.findall(r"--[\w-]+", shown.getvalue()))


def test_kernels_import_nothing_but_torch_and_triton() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "gcpo_kernels"}
    for path in ROOT.glob("gcpo_kernels/**/*.py"):
        for node in ast.walk(ast.parse(read(path))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module or "")
            wrong = [name for name in names if name.split(".")[0] not in allowed]
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def modules() -> dict[str, Path]:
    """Every module of the two packages, by name."""
    found = {}
    for path in (*ROOT.glob("gcpo/**/*.py"), *ROOT.glob("gcpo_kernels/**/*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def imports() -> dict[str, set[str]]:
    """
    What each module imports, wherever in the file: those within a function and for type checkers, too. A package's name
    alone stands for what is taken from its `__init__`.
    """
    known, found = modules(), {}
    for name, path in known.items():
        found[name] = set()
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found[name] |= {module if module in known else node.module for module in inner}
    return found


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: (found & modules().keys()) - {name} for name, found in imports().items()}
    assert len(graph) > 80 and "gcpo.trainer" in graph["gcpo"]  # which stands there for type checkers
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
    graph["gcpo.causal.port"].add("gcpo.trainer")
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


# What the rooms of `gcpo` may import of each other, and of trl beside.
ARROWS = {
    "gcpo_kernels": set(),
    "gcpo._trl": set(),
    "gcpo.causal": {"gcpo_kernels"},
    "gcpo.forward": {"gcpo_kernels", "gcpo.causal", "gcpo._trl"},
    "gcpo.run": {"gcpo_kernels", "gcpo.causal", "gcpo._trl", "gcpo._version"},
    "gcpo.config": {"gcpo_kernels", "gcpo.causal", "gcpo.run"},
    "gcpo.kl_terms": {"gcpo_kernels", "gcpo.causal", "gcpo.run"},
    "gcpo.own_loss": {"gcpo_kernels", "gcpo.config", "gcpo.forward", "gcpo.kl_terms", "gcpo._trl"},
    "gcpo.trainer": {"gcpo.causal", "gcpo.forward", "gcpo.run", "gcpo.config", "gcpo.own_loss", "gcpo._trl"},
}


def room_of(module: str) -> str:
    return ".".join(module.split(".")[: 1 if module.startswith("gcpo_kernels") else 2])


def test_arrows_between_rooms() -> None:
    wrong = []
    for name, found in imports().items():
        room = room_of(name)
        rooms = {room_of(module) for module in found if module.split(".")[0] in ("gcpo", "gcpo_kernels")} - {room}
        if room in ARROWS:
            wrong += [(name, other) for other in rooms - ARROWS[room]]
        elif room not in ("gcpo.cli", "gcpo.commands", "gcpo"):
            wrong += [(name, other) for other in rooms & {"gcpo.cli", "gcpo.commands"}]
    assert not wrong
    outside = set(sys.stdlib_module_names) | {"torch", "gcpo", "gcpo_kernels"}
    of_causal = {m for name, found in imports().items() if room_of(name) == "gcpo.causal" for m in found}
    assert {module.split(".")[0] for module in of_causal} <= outside
    of_trl = {name for name, found in imports().items() if any(m.split(".")[0] == "trl" for m in found)}
    assert of_trl == {
        "gcpo._trl",
        "gcpo.config",
        "gcpo.trainer",
        "gcpo.forward.trl_policy",
        *(f"gcpo.run.{name}" for name in ("cycle", "processes", "resume")),
        *(f"gcpo.commands.{name}" for name in ("flags", "plan", "train")),
        *(f"gcpo.evaluation.{name}" for name in ("rewards", "sources")),
        "gcpo.demo.compare",
        "gcpo.study.workbench",
    }


def test_the_method_imports_without_trl_accelerate_or_transformers() -> None:
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("trl", "accelerate", "transformers", "datasets", "peft"):
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Block())
import gcpo.causal
from gcpo import CausalOptions, CausalStep, Policy
print(CausalOptions().estimator)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "loo"


def test_kernels_import_without_triton_transformers_or_trl() -> None:
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "transformers", "trl", "gcpo"):
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Block())
import torch, gcpo_kernels
x = torch.randn(2, 3, requires_grad=True)
loss, _ = gcpo_kernels.gcpo_loss(-x.abs(), torch.ones(2), torch.ones(2, 3))
loss.backward()
print(gcpo_kernels.available_backends("cpu"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "('torch',)"


def test_the_oracle_stands_alone() -> None:
    """Nothing that it judges runs it, and it runs nothing of that: a mistake in one place would be in both."""
    for path in [*ROOT.glob("gcpo_kernels/**/*.py"), *ROOT.glob("gcpo/**/*.py")]:
        imported = set()
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names}
                imported |= {f"{node.module}.{name}" for name in names} if isinstance(node, ast.ImportFrom) else names
        name = path.relative_to(ROOT).as_posix()
        if name == "gcpo_kernels/reference.py":
            assert {module.split(".")[0] for module in imported} <= {"math", "typing", "torch"}
        elif name != "gcpo/run/machine.py":
            assert not [module for module in imported if module.startswith("gcpo_kernels.reference")], name


def test_every_public_function_is_met() -> None:
    """A function that is exported is documented, and is among what the tests of every function go through."""
    functions = {name: getattr(gcpo_kernels, name) for name in gcpo_kernels.__all__ if name != "available_backends"}
    with_backend = {name for name, function in functions.items() if "backend" in inspect.signature(function).parameters}
    places = {
        "README.md": set(functions),
        "docs/api/gcpo_kernels.md": set(functions),
        "tests/fuzz_cases.py": set(functions),
        "tests/test_layout.py": with_backend,
        "tests/test_transforms.py": with_backend,
        "tests/gpu/test_gpu_budget.py": with_backend,
        "tests/triton/*.py": with_backend,
        "gcpo/run/machine.py": with_backend,
    }
    assert len(with_backend) == 7
    for place, wanted in places.items():
        text = "".join(read(path) for path in ROOT.glob(place))
        assert {name for name in wanted if not re.search(rf"\b{name}\b", text)} == set(), place


def test_paths_named_in_texts_exist() -> None:
    files = repository_files()
    folders = {path.relative_to(ROOT).parts[0] for path in files if path.parent != ROOT}
    bare = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, folders))})/[\w./-]*\w")
    wrong = []
    for path in documents():
        text = read(path)
        wrong += [(path.name, span) for span in missing_paths(CODE_SPAN.findall(text) + bare.findall(text), folders)]
        wrong += [(path.name, link) for link in LINK.findall(text) if not (path.parent / link).exists()]
    for path in files:
        if path.suffix == ".py":
            spans = [span for text in comments_and_docstrings(read(path)) for span in CODE_SPAN.findall(text)]
            wrong += [(path.name, span) for span in missing_paths(spans, folders)]
    assert not wrong


def test_no_page_has_a_heading_twice() -> None:
    """As happens where a text is put before a mark that stands more than once."""
    wrong = []
    for path in documents():
        headings = re.findall(r"^#+ .+$", FENCE.sub("", read(path)), re.MULTILINE)
        wrong += [(path.name, heading) for heading in set(headings) if headings.count(heading) > 1]
    assert not wrong


def test_make_targets_named_in_texts_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):(?!=)", read(ROOT / "Makefile"), re.MULTILINE))
    assert "test" in targets
    texts = [(path.name, line) for path in documents() for line in code_in(read(path))]
    texts += [("run", line) for line in read(ROOT / ".ci" / "run").splitlines()]
    named = [(where, target) for where, line in texts for target in re.findall(r"^(?:\$ )?make ([a-z][\w-]*)", line)]
    assert [pair for pair in named if pair[1] not in targets] == []


def test_commands_named_in_texts_exist() -> None:
    wrong = []
    for path in documents():
        for line in code_in(read(path)):
            if re.match(r"(?:\$ )?(?:\w+=\S+ )*(?:[\w.]+/)*gcpo ", line):
                wrong += [(path.name, line, unknown) for unknown in unknown_flags(line)]
    assert not wrong


def test_no_machine_paths_and_no_conflict_markers() -> None:
    wrong = []
    for path in repository_files():
        name, text = path.relative_to(ROOT), read(path)
        if name.parts[0] != "tests" and MACHINE_PATH.search(text):
            wrong.append(f"{name}: {MACHINE_PATH.search(text)}")
        if CONFLICT.search(text):
            wrong.append(f"{name}: conflict marker")
    assert not wrong


def test_every_package_is_installed() -> None:
    listed = set(tomllib.loads(read(ROOT / "pyproject.toml"))["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("gcpo", "gcpo_kernels")
        for path in (ROOT / top).glob("**/__init__.py")
    }
    assert listed == found


def test_every_top_package_says_that_it_is_typed() -> None:
    data = tomllib.loads(read(ROOT / "pyproject.toml"))["tool"]["setuptools"]["package-data"]
    for top in ("gcpo", "gcpo_kernels"):
        assert (ROOT / top / "py.typed").is_file() and "py.typed" in data[top], top


def test_the_checks_find_what_they_look_for() -> None:
    folders = {"gcpo", "tests", "docs"}
    named = ["gcpo/cli.py", "gcpo/nowhere.py", "tests/", "docs/nowhere", "bench/run_nowhere.py", "trl/scripts/grpo.py"]
    named += ["tests/*.py", "tests/test_hygiene.py::test", "a/b", "read/write", "n*L/m"]
    assert missing_paths(named, folders) == ["gcpo/nowhere.py", "docs/nowhere", "bench/run_nowhere.py"]
    assert code_in("`make x` and\n```bash\ngcpo train \\\n  --a\n```\n") == ["make x", "gcpo train    --a"]
    assert unknown_flags("$ GCPO_DEBUG=1 gcpo train --kappa 0 --kapa=1 --num_processes 2  # --no") == ["--kapa"]
    assert unknown_flags("gcpo eval --task_size 3 --size 3") == ["--size"]
    assert unknown_flags(".venv/bin/gcpo tune") == ["tune"]
    assert unknown_flags("gcpo doctor") == []
    assert list(comments_and_docstrings('"""a"""\nx = "b"  # c\n')) == ["# c", "a"]
    assert MACHINE_PATH.search("see /tmp/x")
    assert not MACHINE_PATH.search("~/work/x https://a.b/tmp/x")
    assert CONFLICT.search("a\n" + "<" * 7 + " HEAD\n")
