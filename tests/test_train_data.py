"""Datasets and reward functions that a run is given: read by name, and checked."""

import asyncio
import re
import sys
from pathlib import Path

import pytest
import torch

from gcpo.evaluation import rewards, sources
from gcpo.run import inputs

TASK = "reasoning_gym:chain_sum"


def test_files_and_saved_datasets_are_read_and_their_splits_checked(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"prompt": "1 + 1", "solution": "2"}])
    rows.to_json(tmp_path / "rows.jsonl")
    rows.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "two"))
    for name, splits in (("rows.jsonl", {"train"}), ("one", {"train"}), ("two", {"train", "test"})):
        loaded = sources.load_named(str(tmp_path / name))
        assert set(loaded) == splits
        assert loaded["train"][0] == {"prompt": "1 + 1", "solution": "2"}
    with pytest.raises(ValueError, match="`--dataset_test_split` must be one of 'train', got 'test'"):
        sources.take_split({"train": rows}, "dataset_test_split", "test")
    (tmp_path / "rows.xml").write_text("")
    with pytest.raises(ValueError, match="`--dataset_name` must end in one of"):
        sources.load_named(str(tmp_path / "rows.xml"))


def test_held_out_items_are_those_of_eval_and_not_trained_on() -> None:
    train, held_out = sources.load_task(TASK, sources.TaskArguments(task_size=50), 20)
    other = sources.load_task(TASK, sources.TaskArguments(task_size=1), 20)[1]
    assert held_out["entry"] == other["entry"]
    questions = [row[-1]["content"] for row in train["prompt"]]
    assert not set(questions) & {row[-1]["content"] for row in held_out["prompt"]}


def test_rewards_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_cli.py").write_text(
        "def length(completions, **kwargs):\n    return [1.0] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = [*rewards.TRL_REWARDS, "reasoning_gym", "mine_for_cli.length"]
    loaded = rewards.load_rewards(names, None, ["solution", "task", "entry"])
    assert len(loaded) == len(names)
    assert loaded[-1](["a", "b"]) == [1.0, 1.0]
    assert rewards.load_rewards(None, TASK, None) == rewards.load_rewards(["reasoning_gym"], None, None)


@pytest.mark.parametrize("returned", [None, 1.0, [1.0], ["a", "b"], "ab"], ids=str)
def test_a_reward_that_is_no_list_of_numbers_is_named(returned: object) -> None:
    def mine(completions, **kwargs):
        return returned

    async def later(completions, **kwargs):
        return returned

    wanted = f"must return a list with a number for each of 2 completions, it returned {re.escape(repr(returned))}"
    with pytest.raises(inputs.ArgumentsError, match=f"'mine' {wanted}"):
        rewards.checked(mine)(prompts=["p", "p"], completions=["a", "b"])
    with pytest.raises(inputs.ArgumentsError, match=f"'later' {wanted}"):
        asyncio.run(rewards.checked(later)(completions=["a", "b"]))


def test_rewards_that_are_right_pass() -> None:
    class Mine:
        def __call__(self, completions, **kwargs):
            return torch.tensor([1.0, 0.5])

    reward = rewards.checked(Mine())
    assert reward(completions=["a", "b"]) == [1.0, 0.5] and reward.__name__ == "Mine"
    assert rewards.checked(lambda completions, **kwargs: (None, True))(completions=["a", "b"]) == [None, 1.0]
