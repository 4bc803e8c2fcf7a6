"""Prompts that cannot be trained on: refused by row before a model is loaded, or when a stream comes to them."""

import contextlib
import json
import re
from types import SimpleNamespace

import pytest
from datasets import Dataset, IterableDataset, load_dataset
from tiny_policy import SHORT_TEMPLATES, count_low, options, save_policy

from gcpo import GCPOConfig, GCPOTrainer
from gcpo.cli import main
from gcpo.run.lengths import refuse_nothing
from gcpo.run.prompts import PromptError, check_prompts

USER = {"role": "user", "content": "1+1="}
BAD = [
    ([None], "got null"),
    ([5], "got int: 5"),
    ([[]], "got an empty list"),
    ([["1+1="]], "got a list with '1.1='"),
    ([USER], "got dict"),
    ([[{"from": "human", "value": "1+1="}]], r"got a message with `from` and `value`: .*`human` and `gpt` to `user`"),
    ([[{"role": "user", "text": "1+1="}]], "got a message without `content`"),
    ([[{"content": "1+1="}]], "got a message without `role`"),
    ([[USER, {"role": None, "content": "1"}]], "got a message without `role`"),
    ([[{"role": "user", "content": 7}]], "got a message whose `content` is no text"),
]


def lines_of(tmp_path, prompts):
    """A dataset as a JSON file gives it: prompts of several kinds, or with other keys, stay what they are."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path))["train"]


@pytest.mark.parametrize(("bad", "wanted"), BAD)
def test_a_row_is_named(bad, wanted, tmp_path):
    """The third of five, of which the second is filtered out: it counts as the trainer counts."""
    good = "1+1=" if not isinstance(bad[0], list | dict) else [USER]
    start = "The dataset's row 2: `prompt` must be text, or a list of messages with `role` and `content`, "
    wanted = re.escape(start) + wanted
    rows = [good, good, *bad, good]
    if bad != [5]:
        with pytest.raises(PromptError, match=wanted):
            check_prompts(lines_of(tmp_path, rows).select([0, 2, 3]))
    stream = check_prompts(IterableDataset.from_generator(lambda: ({"prompt": p} for p in (good, *bad, good))))
    rows = iter(stream)
    assert next(rows)["prompt"] == good
    with pytest.raises(PromptError, match=wanted):
        next(rows)


def test_rows_of_one_type_in_arrow():
    """Columns whose type says it all: numbers, and messages with other keys."""
    for rows, wanted in (([5, 6], "row 1: .* got int: 5"), ([[{"from": "a", "value": "b"}]], "row 1: .*`from`")):
        with pytest.raises(PromptError, match=wanted):
            check_prompts(Dataset.from_dict({"prompt": rows}))


def test_text_and_messages_do_not_mix(tmp_path):
    for rows, wanted in ((["a", "b", [USER]], "text .* row 1, got messages"), ([[USER], "a"], "messages .*got text")):
        with pytest.raises(PromptError, match=f"row {len(rows)}: `prompt` must be {wanted}"):
            check_prompts(lines_of(tmp_path, rows))


@pytest.mark.parametrize(
    ("columns", "probable"),
    [
        (["prompts", "answer"], "prompts"),
        (["id", "question", "answer"], "question"),
        (["Prompt"], "Prompt"),
        (["conversations"], "conversations"),
        (["promt"], "promt"),
    ],
)
def test_a_column_of_another_name_is_found(columns, probable):
    with pytest.raises(PromptError, match=f"must have a column `prompt`, got {', '.join(columns)}: .*`{probable}`"):
        check_prompts(Dataset.from_dict({name: ["a"] for name in columns}))
    with pytest.raises(PromptError, match=r"must have a column `prompt`, got image\.$"):
        check_prompts(Dataset.from_dict({"image": ["a"]}))


def test_good_prompts_pass(tmp_path):
    """Whatever the chat template takes: systems alone, tool calls, parts, no content."""
    calls = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "1+1="}]}
    for rows in (
        ["a", "b"],
        [[USER], [{"role": "system", "content": "s"}]],
        [[calls, USER]],
        [[parts]],
        [[calls, parts]],
    ):
        dataset = lines_of(tmp_path, rows)
        assert check_prompts(dataset) is dataset
        assert [row["prompt"] for row in check_prompts(dataset.to_iterable_dataset())] == dataset["prompt"][:]
    made = Dataset.from_dict({"number": [1]})
    made.set_transform(lambda batch: {"prompt": [str(n) for n in batch["number"]]})
    assert check_prompts(made) is made


@pytest.mark.parametrize("evaluated", [False, True])
def test_the_trainer_looks_before_it_loads_a_model(evaluated, tmp_path):
    good, bad = Dataset.from_dict({"prompt": ["a"] * 8}), Dataset.from_dict({"prompt": ["a", None]})
    data = {"train_dataset": good, "eval_dataset": {"b": bad}} if evaluated else {"train_dataset": bad}
    name = r"`eval_dataset\['b'\]`" if evaluated else "`train_dataset`"
    with pytest.raises(ValueError, match=f"{name}'s row 2: `prompt`"):
        GCPOTrainer("./nowhere", count_low, GCPOConfig(**options(tmp_path)), **data)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"), max_positions=200)


def test_a_row_of_a_stream_ends_the_command_with_one_line(policy, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1="}\n' * 2 + '{"prompt": null}\n' * 8)
    flags = ["--model_name_or_path", policy, "--dataset_name", tmp_path / "rows.jsonl", "--dataset_streaming"]
    flags += ["--reward_funcs", "get_soft_overlong_punishment", "--use_cpu", "--bf16", "false", "--max_steps", "4"]
    flags += ["--num_generations", "2", "--per_device_train_batch_size", "2", "--max_completion_length", "2"]
    flags += ["--collider_max_completion_length", "2", "--no_gradient_checkpointing", "--output_dir", tmp_path / "out"]
    flags += [part for name, text in SHORT_TEMPLATES.items() for part in (f"--{name}", text)]
    flags += ["--num_colliders", "2", "--no_shuffle_dataset"]
    assert main(["train", *map(str, flags)]) == 2
    assert "gcpo train: error: The dataset's row 3: `prompt` must be text" in capsys.readouterr().err


def make_trainer(policy, tmp_path, dataset, **changes):
    limits = {"max_completion_length": 20, "collider_max_completion_length": 10, "candidate_context_tokens": 8}
    config = GCPOConfig(**options(tmp_path, **{"num_colliders": 2, **limits, **SHORT_TEMPLATES, **changes}))
    return GCPOTrainer(policy, count_low, config, train_dataset=dataset)


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        # 200 positions; four candidates of 8 tokens with "1:" and two line breaks between, and "||?".
        ({"kappa": 0.0}, 200 - (4 * 10 + 3 * 2 + 3) - 10),
        # Three of them and a collider of 10 with "|||", then the candidate's 20.
        ({"context_attention": "full"}, 200 - (3 * 10 + 2 * 2 + 10 + 3) - 20),
        ({"context_attention": "parallel"}, 200 - (4 * 10 + 3 * 2 + 3) - 10),
        ({"context_attention": "parallel", "max_completion_length": 70}, 200 - 70 - 70),
    ],
)
@pytest.mark.parametrize("conversational", [False, True])
def test_a_prompt_without_room_is_refused_before_the_first_step(changes, longest, conversational, policy, tmp_path):
    """To the token: the longest that fits is taken, one more is refused with its row."""

    def dataset(length):
        texts = ["1" * (length - 3 * conversational), "2", "3"]  # beside "<|user|>", "<eos>" and "<|assistant|>"
        texts = [texts[k] for k in (1, 0, 2)]
        return Dataset.from_dict({"prompt": [[{"role": "user", "content": t}] if conversational else t for t in texts]})

    make_trainer(policy, tmp_path, dataset(longest), **changes)
    wanted = f"Row 2 of `train_dataset` does not fit .* 200 positions: its prompt has {longest + 1} tokens"
    with pytest.raises(ValueError, match=wanted + ".*up to 201.*`candidate_context_tokens`"):
        make_trainer(policy, tmp_path, dataset(longest + 1), **changes)


def test_a_template_adds_to_every_message(policy, tmp_path):
    """Short texts in many turns are a long prompt."""
    turns = [{"role": role, "content": "1"} for _ in range(40) for role in ("user", "assistant")]
    rows = Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": "1"}], [*turns, {"role": "user", "content": "1"}]]}
    )
    with pytest.raises(ValueError, match="Row 2 of `train_dataset` does not fit"):
        make_trainer(policy, tmp_path, rows)


@pytest.mark.parametrize(("limit", "given", "fits"), [(120, 4, True), (4, 120, False)])
def test_room_is_for_candidates_as_they_are_generated(limit, given, fits, policy, tmp_path):
    """`generation_kwargs` wins over `max_completion_length`."""
    rows = Dataset.from_dict({"prompt": ["1" * 60, "2"]})
    changes = {"max_completion_length": limit, "generation_kwargs": {"max_new_tokens": given}}
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=r"Row 1 .* does not fit"):
        make_trainer(policy, tmp_path, rows, context_attention="parallel", **changes)


def test_an_empty_text_is_a_prompt_where_the_tokenizer_begins_texts(policy, tmp_path):
    rows = Dataset.from_dict({"prompt": ["1", ""]})
    with pytest.raises(ValueError, match="Row 2 of `train_dataset` must hold a prompt, got an empty text"):
        make_trainer(policy, tmp_path, rows)
    for ids in ([0], []):
        stand_in = SimpleNamespace(train_dataset=rows, _tokenizer=lambda text, ids=ids: {"input_ids": ids})
        with contextlib.nullcontext() if ids else pytest.raises(ValueError, match="Row 2"):
            refuse_nothing(stand_in)


def test_without_causal_parts_all_goes_on_as_in_trl(policy, tmp_path):
    rows = Dataset.from_dict({"prompt": ["1" * 300, "", *"23456"]})
    make_trainer(policy, tmp_path, rows, kappa=0.0, estimator="none")
