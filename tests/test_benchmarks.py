"""Benchmarks: their layout, their verifiers, pass@k, and `gcpo eval` on local files."""

import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcpo.cli import main
from gcpo.evaluation import benchmarks
from gcpo.evaluation.benchmarks import BENCHMARKS, code_reward, complete_program, load_benchmark, math_reward, verifier
from gcpo.evaluation.evaluate import pass_at_k

STUB = 'from typing import List\n\n\ndef add(a: int, b: int) -> int:\n    """ Add.\n    >>> add(1, 2)\n    3\n    """\n'
CHECK = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n"


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(("samples", "passed"), [(1, 0), (1, 1), (4, 0), (4, 1), (4, 3), (5, 2), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(samples: int, passed: int) -> None:
    table = np.array([[k < passed for k in range(samples)]])
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(table[0], k))
        assert pass_at_k(table, k)[0] == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_has_no_bias() -> None:
    rng = np.random.default_rng(0)
    table = rng.random((40_000, 6)) < 0.3
    estimate = pass_at_k(table, 3)
    assert abs(estimate.mean() - (1 - 0.7**3)) < 4 * estimate.std() / 200


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("so \\boxed{\\frac12}", "\\frac{1}{2}", 1.0),
        ("the answer is 0.5", "1/2", 1.0),
        ("First I had \\boxed{3}. That was wrong.\n\nIt is \\boxed{2}.", "2", 1.0),
        ("$\\boxed{1{,}000}$", "1000", 1.0),
        ("\\boxed{x^2 + 1}", "1+x^2", 1.0),
        ("\\boxed{(1, 2)}", "(1,2)", 1.0),
        ("\\boxed{204}", "204", 1.0),
        ("\\boxed{\\text{even}}", "\\text{even}", 1.0),
        ("\\boxed{36}", "\\$36", 1.0),
        ("\\boxed{\\$32{,}348}", "\\$32,\\!348", 1.0),
        ("It costs \\$18.90.", "18.9", 1.0),
        ("\\boxed{35}", "\\$36", 0.0),
        ("\\boxed{7}", 7, 1.0),
        ("\\boxed{7.5}", 7.5, 1.0),
        ("\\boxed{7}", 8, 0.0),
        ("\\boxed{0.00001}", 1e-5, 1.0),
        ("\\boxed{e-5}", 1e-5, 0.0),
        ("\\boxed{100000000000000000000}", 1e20, 1.0),
        # Of several boxes the last one counts; those that it is joined to are parts of one answer.
        ("I get \\boxed{8}. No: \\boxed{7}.", "7", 1.0),
        ("I get \\boxed{8}. No: \\boxed{7}.", "8", 0.0),
        ("First \\boxed{8}, then \\boxed{\\frac{7}{2}}", "7/2", 1.0),
        ("$\\boxed{8}$ and $\\boxed{7}$", "7,8", 1.0),
        ("$\\boxed{8} \\text{ or } \\boxed{7}$", "7", 0.0),
        ("\\boxed{\\boxed{7}} was sure", "7", 1.0),
        ("\\boxed{7}. Check: \\boxed{}, \\boxed{\\frac{8", "7", 1.0),
        ("\\boxed{\\{1, 2\\}}", "\\{1,2\\}", 1.0),
        ("\\boxed{3}", "2", 0.0),
        ("no idea", "2", 0.0),
        ("", "2", 0.0),
    ],
)
def test_math_answers(completion: str, answer: str | float, score: float) -> None:
    assert math_reward([completion], [answer]) == [score]
    assert math_reward([[{"role": "assistant", "content": completion}]], [answer]) == [score]


def test_math_answers_in_another_thread() -> None:
    with ThreadPoolExecutor(1) as pool:
        judged = pool.submit(math_reward, ["\\boxed{7}", "\\boxed{8}"], ["7", "7"])
        assert judged.result() == [1.0, 0.0]


@pytest.mark.parametrize("wrong", [None, True, ["7"], float("nan")], ids=str)
def test_a_right_answer_that_is_no_answer_is_refused(wrong: Any, tmp_path: Path) -> None:
    wanted = rf"`answer` must be text or a number, got {re.escape(repr(wrong))}"
    with pytest.raises(ValueError, match=f"Row 2 of the batch: {wanted}"):
        math_reward(["\\boxed{7}"] * 2, ["7", wrong])
    write(tmp_path / "aime24.jsonl", {"problem": "1 + 1", "answer": 2}, {"problem": "1 + 2", "answer": wrong})
    with pytest.raises(ValueError, match=rf"aime24.jsonl, row 2: {wanted}"):
        load_benchmark("aime24", tmp_path)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("    return a + b\n\n\ndef main():\n    ", 1.0),
        ("    # add\n    if a:\n        return a + b\n\n    return b\nprint(add(", 1.0),
        ("Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", 1.0),
        ("```python\nfrom math import *\ndef add(a: List[int], b):\n    return a + b", 1.0),
        ("```\n    return a + b\n```", 1.0),
        ("    return a - b", 0.0),
        ("    exit()", 0.0),
        ("I cannot", 0.0),
    ],
)
def test_code_answers(completion: str, score: float) -> None:
    try:
        assert code_reward([completion], [STUB], [CHECK], ["add"]) == [score]
    except benchmarks.SandboxError as error:
        pytest.skip(str(error))


def test_a_program_keeps_the_imports_of_its_stub() -> None:
    program = complete_program("```python\ndef add(a: List, b):\n    return 1\n```", STUB, "add")
    assert program.startswith("from typing import List")
    assert program.rstrip().endswith("return 1")
    compile(program, "x", "exec")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_read_from_a_file_of_the_layout_that_its_message_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"FOLDER/{name}.jsonl") as error:
        load_benchmark(name, tmp_path)
    row = json.loads(str(error.value).split("per line: ")[1])
    write(tmp_path / f"{name}.jsonl", row)
    dataset = load_benchmark(name, tmp_path)
    assert len(dataset) == 1
    assert dataset[0]["prompt"][0]["role"] == "user"
    assert isinstance(load_benchmark(name, tmp_path, conversational=False)[0]["prompt"], str)
    given = {key: [dataset[0][key]] for key in dataset.column_names if key != "prompt"}
    if BENCHMARKS[name].kind == "math":
        assert verifier(name)(completions=["7"], **given) == [0.0]
    else:
        with pytest.raises(ValueError, match="`--allow_code_execution`"):
            verifier(name)
        assert verifier(name, allow_code=True) is code_reward


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "must be a JSON object, got list"),
        ('{"problem": "a"}', "row 1: needs 'answer', has problem"),
        ("", "has no rows"),
    ],
)
def test_files_of_another_layout(text: str, wanted: str, tmp_path: Path) -> None:
    (tmp_path / "aime24.jsonl").write_text(text)
    with pytest.raises(ValueError, match=wanted):
        load_benchmark("aime24", tmp_path)
    with pytest.raises(ValueError, match="did you mean math500"):
        load_benchmark("math50", tmp_path)


def test_a_file_with_a_byte_order_mark_and_line_separators_inside_of_strings(tmp_path: Path) -> None:
    rows = [{"problem": f"a{mark}b", "answer": 7} for mark in "\u2028\u2029\x85\x1e\x0c"]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "aime24.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    dataset = load_benchmark("aime24", tmp_path, conversational=False)
    assert [text.split("\n\n")[0] for text in dataset["prompt"]] == [row["problem"] for row in rows]
    assert list(dataset["answer"]) == ["7"] * 5
    (tmp_path / "aime24.jsonl").write_bytes("{}".encode("utf-16"))
    with pytest.raises(ValueError, match=r"aime24\.jsonl must be text in UTF-8"):
        load_benchmark("aime24", tmp_path)


def test_without_a_hub_the_message_says_which_file_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(benchmarks, "load_dataset", unreachable)
    with pytest.raises(FileNotFoundError, match=r"HuggingFaceH4/MATH-500.*`--data_dir FOLDER` reads FOLDER/math500"):
        load_benchmark("math500")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gcpo.demo.tiny import save_tiny, tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer(["a"])
    folder = tmp_path_factory.mktemp("model")
    save_tiny(tiny_model(tokenizer, hidden_size=16, num_layers=1), tokenizer, folder)
    return folder


def test_the_command_on_local_files(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "aime24.jsonl", *({"problem": f"What is {k} + 1?", "answer": k + 1} for k in range(3)))
    common = ["eval", "--model_name_or_path", str(model), "--max_new_tokens", "3", "--num_samples", "4"]
    result = tmp_path / "result.json"
    flags = ["--pass_at", "1", "4", "--data_dir", str(tmp_path), "--output", str(result)]
    assert main([*common, "--dataset_name", "benchmark:aime24", *flags]) == 0
    shown = capsys.readouterr().out
    written = json.loads(result.read_text())["result"]
    assert set(written["pass_at_k"]) == {"1", "4"}
    assert len(written["num_passed"]) == 3
    for k in ("1", "4"):
        value, error = written["pass_at_k"][k]
        assert f"pass@{k}             {value:.4f} ± {error:.4f} (score >= 1)" in shown
    aime = ["--dataset_name", "benchmark:aime24", "--data_dir", str(tmp_path)]
    (tmp_path / "rewards_of_test.py").write_text(
        "def nothing(completions, **kwargs):\n    pass\n\n\ndef fails(completions, **kwargs):\n    return len(None)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    # The same file by its path: rows with a problem and an answer are judged as mathematics.
    assert main([*common, "--dataset_name", str(tmp_path / "aime24.jsonl"), "--limit", "2"]) == 0
    assert "prompts            2" in capsys.readouterr().out
    # So are rows with a prompt and an answer; columns that a reward function is passed otherwise change nothing.
    asked = tmp_path / "asked.jsonl"
    write(asked, *({"prompt": f"{k} + 1 = ", "answer": k, "completion_ids": [1], "log_metric": 2} for k in range(2)))
    assert main([*common, "--dataset_name", str(asked)]) == 0
    assert "prompts            2" in capsys.readouterr().out
    # A row without its question or answer is named before the model is loaded.
    for name, row in (
        ("null_answer", {"problem": "a", "answer": None}),
        ("null_problem", {"problem": None, "answer": 1}),
        ("null_given", {"prompt": "a", "answer": None}),
    ):
        write(tmp_path / f"{name}.jsonl", {key: value or 1 for key, value in row.items()}, row)
    for more, wanted in (
        (["--dataset_name", "benchmark:humaneval"], "`--allow_code_execution` permits it"),
        (["--dataset_name", "benchmark:aime25", "--data_dir", str(tmp_path)], "FOLDER/aime25.jsonl"),
        (["--dataset_name", "benchmark:aime24", "--pass_at", "5"], "`--pass_at` must be between 1 and"),
        (["--dataset_name", "benchmark:none"], "`name` must be a benchmark"),
        ([*aime, "--limit", "-2"], "`--limit` must be at least 1, got -2"),
        ([*aime, "--output", str(tmp_path)], "`--output` must be a file, got the folder"),
        ([*aime, "--output", str(tmp_path / "no" / "file")], "`--output` must be in a folder that exists"),
        ([*aime, "--output", "/proc/version"], "`--output` must be a file that can be written, got '/proc/version'"),
        (["--dataset_name", str(tmp_path / "null_answer.jsonl")], "row 2: `answer` must be text or a number, got None"),
        (["--dataset_name", str(tmp_path / "null_problem.jsonl")], "row 2: `problem` must be text or a number, got No"),
        (["--dataset_name", str(tmp_path / "null_given.jsonl")], "row 2: `answer` must be text or a number, got None"),
        ([*aime, "--device", "nonsense"], "`--device` nonsense does not work here"),
        ([*aime, "--temperature", "nan"], "`temperature` must be finite and at least 0, got nan"),
        ([*aime, "--temperature", "0"], "`num_samples` must be 1 at `temperature` 0"),
        ([*aime, "--reward_funcs", "rewards_of_test.nothing"], "12 completions, nothing returned None."),
    ):
        assert main([*common, *more]) == 2
        assert wanted in capsys.readouterr().err
    with pytest.raises(TypeError, match="has no len"):  # in the reward function: a traceback shows where
        main([*common, *aime, "--reward_funcs", "rewards_of_test.fails"])
    ran: list[str] = []
    monkeypatch.setattr(benchmarks, "run_python", lambda code: ran.append(code) or benchmarks_outcome())
    write(tmp_path / "humaneval.jsonl", {"prompt": STUB, "test": CHECK, "entry_point": "add"})
    flags = ["--dataset_name", "benchmark:humaneval", "--data_dir", str(tmp_path), "--allow_code_execution"]
    assert main([*common, *flags]) == 0
    assert len(ran) == 4
    assert all(code.rstrip().endswith("check(add)") for code in ran)


def benchmarks_outcome() -> Any:
    from gcpo.evaluation.sandbox import Outcome

    return Outcome(True, "passed")
