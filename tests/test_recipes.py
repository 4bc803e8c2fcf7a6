"""The recipes under examples/configs: each is read as it stands, run with a tiny model, and costs what it says."""

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from gcpo.causal.contexts import longest_prompt
from gcpo.cli import main
from gcpo.commands.train import parse

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "examples" / "configs").glob("paper_*.yaml"))
MODELS = {
    "paper_deepseek_1.5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "paper_deepseek_7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "paper_deepscaler_1.5b": "agentica-org/DeepScaleR-1.5B-Preview",
}
# What a machine without GPUs and without the models changes, and how long a test may take.
TINY = {
    "gradient_accumulation_steps": 8,
    "max_completion_length": 6,
    "collider_max_completion_length": 4,
    "max_steps": 1,
    "save_strategy": "no",
    "use_vllm": False,
    "use_cpu": True,
    "bf16": False,
    "dtype": "float32",
    "disable_tqdm": True,
}


def paper_data_module() -> Any:
    spec = importlib.util.spec_from_file_location("paper_data", ROOT / "examples" / "paper_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tables(problems: int = 6) -> tuple[Dataset, Dataset]:
    """Rows with the columns of the two data sets that the recipes train on."""
    years = [1983, 2023, 2024]
    aime = {"Year": years, "Question": [f"AIME {year}?" for year in years], "Answer": ["7", "8", "9"]}
    solutions = [f"It is $\\boxed{{{k}}}$." if k != 3 else "No box." for k in range(problems)]
    numina = {"source": ["x"] * problems, "problem": [f"Problem {k}?" for k in range(problems)], "solution": solutions}
    return Dataset.from_dict(aime), Dataset.from_dict(numina)


def test_there_is_a_recipe_for_every_model_of_the_paper() -> None:
    assert {path.stem for path in RECIPES} == set(MODELS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_has_the_papers_settings(path: Path) -> None:
    script_args, config, model_args, _, launch_args = parse(["--config", str(path)])
    assert model_args.model_name_or_path == MODELS[path.stem]
    assert (config.alpha, config.kappa, config.learning_rate, config.weight_decay) == (2.0, 0.06, 1e-6, 0.01)
    assert config.max_completion_length == 16_384 and config.num_colliders == config.num_generations
    processes = 8
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps * processes == 256
    assert config.use_vllm and config.bf16 and config.gradient_checkpointing
    assert config.vllm_max_model_length >= longest_prompt(config, config.num_generations, 16_384) + 1024
    assert config.output_dir == f"runs/{path.stem}" and script_args.reward_funcs == ["accuracy_reward"]
    assert launch_args[0] == "--accelerate_config"
    accelerate = yaml.safe_load((ROOT / launch_args[1]).read_text())
    assert accelerate["deepspeed_config"]["zero_stage"] == 3 and accelerate["num_processes"] == processes
    # No setting is one that nobody reads.
    unread = [name for name in yaml.safe_load(path.read_text()) if name != "accelerate_config"]
    known = vars(config) | vars(model_args) | vars(script_args)
    assert [name for name in unread if name not in known] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_with_a_tiny_model(path: Path, tmp_path: Path) -> None:
    """A step on the data that examples/paper_data.py makes, with all that does not need a GPU as the recipe says."""
    from gcpo.demo.tiny import save_tiny, tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer(["a"])
    model = tiny_model(tokenizer, hidden_size=16, num_layers=1)
    model.config.max_position_embeddings = 131_072
    save_tiny(model, tokenizer, tmp_path / "model")
    paper_data_module().paper_data(*tables(), size=4).to_json(tmp_path / "data.jsonl")
    settings = yaml.safe_load(path.read_text())
    del settings["accelerate_config"]
    settings |= TINY | {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "data.jsonl"),
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert (
        main(["train", "--config", str(tmp_path / "config.yaml"), "--save_strategy", "steps", "--save_steps", "1"]) == 0
    )
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    logged = state["log_history"][0]
    assert logged["gcpo/upsilon/fallback"] == 0 and logged["gcpo/tokens/scored_contexts"] > 0
    assert logged["learning_rate"] == 1e-6


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_what_the_plan_says(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comment = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    command = next(line for line in comment if line.startswith("gcpo plan"))
    assert f"--config examples/configs/{path.name}" in command
    words = [word.replace("examples/configs", str(path.parent)) for word in shlex.split(command)[1:]]
    assert main(words) == 0
    said = re.sub(r"\s+", " ", " ".join(comment))
    planned = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("GCPO to GRPO", "memory of a device", "device-hours"))
    ]
    assert len(planned) == 5
    for line in planned:
        assert re.sub(r"\s+", " ", line) in said, f"{path.name} must say: {line}"


def test_paper_data_keeps_what_can_be_scored() -> None:
    from trl.rewards import accuracy_reward

    paper_data = paper_data_module().paper_data
    rows = list(paper_data(*tables(), size=4))
    assert len(rows) == 2 + 4  # 1983 and 2023
    questions = [row["prompt"][0]["content"].splitlines()[0] for row in rows]
    assert questions[:2] == ["AIME 1983?", "AIME 2023?"] and "Problem 3?" not in questions
    assert len(set(questions)) == 6
    other = list(paper_data(*tables(), size=4, seed=1))
    assert [row["prompt"] for row in other] != [row["prompt"] for row in rows]
    # An AIME answer and a solution with a box are both what a boxed answer is compared with.
    solutions = [rows[0]["solution"], next(row["solution"] for row in rows if "Problem 5" in str(row["prompt"]))]
    for right, scores in (("7", [1.0, 0.0]), ("5", [0.0, 1.0])):
        completions = [[{"role": "assistant", "content": f"So it is $\\boxed{{{right}}}$."}]] * 2
        assert accuracy_reward(completions, solution=solutions) == scores
    with pytest.raises(ValueError, match="`size` must be at most 5"):
        paper_data(*tables(), size=6)
