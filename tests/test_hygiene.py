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


def modules() -> dict[str, Path]:
    """Every module of the two packages, by its name."""
    paths = [path.relative_to(ROOT) for top in ("gcpo", "gcpo_kernels") for path in ROOT.glob(f"{top}/**/*.py")]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): ROOT / path for path in paths}


def imported_by(source: str, known: dict[str, Path]) -> set[str]:
    """What a module imports, anywhere in it: inside functions, and for type checkers alone."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inner & known.keys()) | ({node.module} if inner - known.keys() else set())
    return names


@functools.cache
def imports() -> dict[str, set[str]]:
    known = modules()
    return {name: imported_by(read(path), known) for name, path in known.items()}


def outside(folder: str, *allowed: str, of: str = "") -> set[tuple[str, str]]:
    """(module, import) of a folder's modules, of those imports that begin with `of`, but for what is allowed."""

    def within(name: str, place: str) -> bool:
        return name == place or name.startswith(f"{place}.")

    return {
        (module, name)
        for module, names in imports().items()
        for name in names
        if within(module, folder) and (not of or within(name, of)) and not any(within(name, one) for one in allowed)
    }


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: (found & imports().keys()) - {name} for name, found in imports().items()}
    assert len(graph) > 100 and sum(map(len, graph.values())) > 250
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
    graph["gcpo.causal.port"].add("gcpo.trainer")
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


def test_imports_point_downwards() -> None:
    """The arrows of DESIGN.md: kernels, the causal step, models, what is around a run, the trainer, the commands."""
    standard = sys.stdlib_module_names
    assert outside("gcpo_kernels", "gcpo_kernels", "torch", "triton", *standard) == set()
    assert outside("gcpo.causal", "gcpo.causal", "gcpo_kernels", "torch", *standard) == set()
    upwards = outside("gcpo.forward", "gcpo.forward", "gcpo.causal", of="gcpo")
    assert upwards == {("gcpo.forward.trl_policy", name) for name in ("gcpo._trl", "gcpo.run.meter")}
    for above in ("gcpo.forward", "gcpo.trainer", "gcpo.kl_terms", "gcpo.commands"):
        assert outside("gcpo.run", of=above) == set()
    of_commands = outside("gcpo", of="gcpo.commands")
    assert {module for module, _ in of_commands if not module.startswith("gcpo.commands.")} == {"gcpo.cli"}


def test_who_imports_trl() -> None:
    """Where TRL's own trainer, options or scripts are built upon: nowhere else."""
    assert {module for module, _ in outside("gcpo", of="trl")} == {
        "gcpo._trl",
        "gcpo.config",
        "gcpo.trainer",
        "gcpo.forward.trl_policy",
        *(f"gcpo.run.{name}" for name in ("cycle", "inputs", "processes", "recording", "resume")),
        *(f"gcpo.commands.{name}" for name in ("demo", "flags", "plan", "study", "train")),
        "gcpo.study.workbench",
    }


def test_the_walk_over_imports_sees_them_all() -> None:
    source = """
import os.path, trl
from typing import TYPE_CHECKING
from gcpo.causal import CausalStep, port
if TYPE_CHECKING:
    from gcpo.trainer import GCPOTrainer
def later():
    from gcpo import cli
"""
    found = {"os.path", "trl", "typing", "gcpo.causal", "gcpo.causal.port", "gcpo.trainer", "gcpo.cli"}
    assert imported_by(source, modules()) == found


def test_the_causal_step_imports_without_what_trl_brings() -> None:
    code = """
import sys
for name in ("trl", "accelerate", "transformers", "datasets", "peft"):
    sys.modules[name] = None  # an import of it fails
import gcpo.causal, gcpo.causal.loss
from gcpo import CausalOptions, CausalStep, Policy
print(CausalOptions(alpha=1.0).alpha, CausalStep.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1.0 CausalStep"


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
    # `gcpo/__init__.py` names the public classes, which are imported when someone asks for them.
    graph = {name: {m for m in found if m in modules() and m != "gcpo"} for name, found in imports().items()}
    del graph["gcpo"]
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert len(done) == len(graph) > 80


# What the rooms of `gcpo` may import of each other, and of trl beside.
ARROWS = {
    "gcpo_kernels": set(),
    "gcpo._trl": set(),
    "gcpo.causal": {"gcpo_kernels"},
    "gcpo.forward": {"gcpo_kernels", "gcpo.causal", "gcpo._trl"},
    "gcpo.run": {"gcpo_kernels", "gcpo.causal", "gcpo._trl", "gcpo"},
    "gcpo.config": {"gcpo_kernels", "gcpo.causal", "gcpo.run"},
    "gcpo.kl_terms": {"gcpo_kernels", "gcpo.causal", "gcpo.run"},
    "gcpo.trainer": {"gcpo.causal", "gcpo.forward", "gcpo.run", "gcpo.config", "gcpo.kl_terms", "gcpo._trl"},
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
    assert {name for name in of_trl if name.startswith("gcpo.forward")} == {"gcpo.forward.trl_policy"}


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
