"""Tasks, their verifiers, and the measurement of pass@1."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import WatermarkingConfig

from gcpo.demo.tiny import tiny_model, tiny_tokenizer
from gcpo.evaluation.evaluate import EvaluationError, evaluate_pass_at_k, mean_and_standard_error
from gcpo.evaluation.tasks import extract_answer, reasoning_gym_dataset, reasoning_gym_reward, train_and_held_out

# One task each with the default verifier, with one of its own, with multi-line answers, with tuples among its data.
TASKS = ("gcd", "spell_backward", "chain_sum", "mini_sudoku", "rearc")


def score(dataset, completions):
    return reasoning_gym_reward(completions, task=dataset["task"], entry=dataset["entry"], unused=[1])


@pytest.mark.parametrize("name", TASKS)
def test_the_right_answer_scores_one_and_a_wrong_one_less(name):
    dataset = reasoning_gym_dataset(name, 2, seed=1)
    answers = dataset["answer"]
    assert score(dataset, list(answers)) == [1.0, 1.0]
    assert score(dataset, [f"Let me think: 1 2 3\n<answer>\n{answer}\n</answer> So." for answer in answers]) == [1, 1]
    assert score(dataset, [[{"role": "assistant", "content": answer}] for answer in answers]) == [1.0, 1.0]
    assert max(score(dataset, ["<answer>wrong</answer>", ""])) < 1.0


def test_the_verifier_uses_the_options_of_the_dataset():
    dataset = reasoning_gym_dataset("chain_sum", 3, min_terms=2, max_terms=2)
    assert json.loads(dataset[0]["entry"])["config"] == {"min_terms": 2, "max_terms": 2}
    assert score(dataset, list(dataset["answer"])) == [1.0] * 3


@pytest.mark.parametrize(
    ("text", "reference", "answer"),
    [
        ("I think.\n\n sun. \n", "nus", "sun."),
        ("<answer>11</answer> no, <ANSWER> 12\n</ANSWER> of 13", "12", "12"),
        ("1 2\n3 4\n", "1 2\n3 4", "1 2\n3 4"),
        ("<answer>1 2\n3 4</answer>", "1 2\n3 4", "1 2\n3 4"),
        ("15 - 43 equals -28.\nDone", "-28", "-28"),
        ("7-3=4, or 1,234.50 dollars.", "4", "1234.50"),
        ("I do not know", "4", ""),
        ("", "nus", ""),
    ],
)
def test_extract_answer(text, reference, answer):
    assert extract_answer(text, reference) == answer


def test_an_answer_that_the_verifier_fails_on_scores_zero():
    dataset = reasoning_gym_dataset("prime_factorization", 1)
    assert score(dataset, ["The factors are two and three"]) == [0.0]
    assert score(dataset, list(dataset["answer"])) == [1.0]


def test_prompts():
    chat = reasoning_gym_dataset("gcd", 1, system_prompt="Be brief.")[0]["prompt"]
    assert [message["role"] for message in chat] == ["system", "user"]
    text = reasoning_gym_dataset("gcd", 1, conversational=False, system_prompt="Be brief.")[0]["prompt"]
    assert text == f"Be brief.\n\n{chat[1]['content']}"
    assert reasoning_gym_dataset("gcd", 1)[0]["prompt"] == chat[1:]
    assert reasoning_gym_dataset("gcd", 5, seed=3)["prompt"] == reasoning_gym_dataset("gcd", 5, seed=3)["prompt"]


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"`name` .*'chain_sm'.*'chain_sum'"):
        reasoning_gym_dataset("chain_sm", 1)
    with pytest.raises(ValueError, match="106 tasks"):
        reasoning_gym_dataset("zzzzzz", 1)
    with pytest.raises(ValueError, match="`size`"):
        reasoning_gym_dataset("gcd", 0)
    with pytest.raises(TypeError, match="min_terms"):
        reasoning_gym_dataset("chain_sum", 1, terms=2)
    with pytest.raises(ValueError, match="refuses"):
        reasoning_gym_dataset("chain_sum", 1, min_terms=-1)
    with pytest.raises(ValueError, match=r"`num_train`.*distinct"):
        train_and_held_out("chain_sum", 500, 5, min_terms=2, max_terms=2, min_digits=1, max_digits=1)


def test_held_out_questions_are_new():
    # 200 sums exist, so that a split that does not look would share some.
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    train, held_out = train_and_held_out("chain_sum", 60, 60, seed=4, **options)
    questions = [prompt[-1]["content"] for part in (train, held_out) for prompt in part["prompt"]]
    assert len(set(questions)) == len(questions) == 120


def test_standard_error_by_hand():
    # Prompt means 1, 0.5, 0: mean 0.5, variance (0.25 + 0 + 0.25) / 2, so the error is sqrt(0.25 / 3).
    mean, error = mean_and_standard_error(np.array([[1, 1], [0, 1], [0, 0]]))
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx(math.sqrt(0.25 / 3))
    assert math.isnan(mean_and_standard_error(np.ones((1, 4)))[1])


@pytest.fixture(scope="module")
def tiny():
    tokenizer = tiny_tokenizer(["What is a?", "What is b?"])
    return tiny_model(tokenizer, hidden_size=32, num_layers=1), tokenizer


def make_rows(conversational):
    texts = ["What is a?", "What is bbbbbb?", "What is c?"]
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": text}] if conversational else text, "good": k}
            for k, text in enumerate(texts)
        ]
    )


@pytest.mark.parametrize("conversational", [True, False])
def test_evaluation(tiny, conversational):
    model, tokenizer = tiny
    seen = []

    def reward(completions, good, **kwargs):
        seen.extend(completions)
        random.random(), np.random.rand(), torch.rand(1)
        return [1.0 if k == 0 else 0.5 if k == 1 else 0.0 for k in good]

    model.train()
    model.lm_head.eval()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    options = {"max_new_tokens": 4, "batch_size": 4, "num_samples": 3, "progress": False}
    result = evaluate_pass_at_k(model, tokenizer, make_rows(conversational), reward, **options)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert model.training
    assert not model.lm_head.training
    model.train()
    assert (result.num_prompts, result.num_samples) == (3, 3)
    assert (result.pass_at_1, result.mean_score) == pytest.approx((1 / 3, 0.5))
    assert (result.pass_at_1_se, result.mean_score_se) == pytest.approx((1 / 3, math.sqrt(0.25 / 3)))
    assert 1 <= result.mean_completion_length <= 4
    assert isinstance(seen[0], list if conversational else str)
    assert evaluate_pass_at_k(model, tokenizer, make_rows(conversational), reward, **options) == result


def test_evaluation_restores_when_it_fails(tiny):
    model, tokenizer = tiny
    model.train()
    state = torch.get_rng_state()
    for returned in ([None] * 3, [1.0], None, 1.0, ["a"] * 3):

        def bad(completions, returned=returned, **kwargs):
            return returned

        with pytest.raises(EvaluationError, match=r"`reward_func` must .* 3 completions, bad returned ") as error:
            evaluate_pass_at_k(model, tokenizer, make_rows(True), bad, max_new_tokens=2, progress=False)
        assert str(error.value).endswith(f"returned {returned!r}.")

    def raises(completions, **kwargs):
        return len(None)

    with pytest.raises(TypeError, match="NoneType"):  # the function's own error stays what it is
        evaluate_pass_at_k(model, tokenizer, make_rows(True), raises, max_new_tokens=2, progress=False)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="`dataset`"):
        evaluate_pass_at_k(model, tokenizer, Dataset.from_list([]), bad, max_new_tokens=2)
    with pytest.raises(ValueError, match="`num_samples`"):
        evaluate_pass_at_k(model, tokenizer, make_rows(True), bad, max_new_tokens=2, num_samples=0)
    for temperature in (-1.0, math.nan, math.inf):
        with pytest.raises(EvaluationError, match=f"`temperature` must be finite and at least 0, got {temperature}"):
            evaluate_pass_at_k(model, tokenizer, make_rows(True), bad, max_new_tokens=2, temperature=temperature)
    with pytest.raises(EvaluationError, match=r"`num_samples` must be 1 at `temperature` 0.*got 4"):
        evaluate_pass_at_k(model, tokenizer, make_rows(True), bad, max_new_tokens=2, num_samples=4, temperature=0)


def test_left_padding_does_not_change_what_is_generated(tiny):
    model, tokenizer = tiny
    runs = []
    for batch_size in (1, 3):
        texts = []

        def record(completions, texts=texts, **kwargs):
            texts.extend(completions)
            return [0.0] * len(completions)

        options = {"max_new_tokens": 5, "temperature": 0, "batch_size": batch_size, "progress": False}
        evaluate_pass_at_k(model, tokenizer, make_rows(False), record, **options)
        runs.append(texts)
    assert runs[0] == runs[1]


# Fields of a model's generation config that change what `generate` returns, or make it raise, where a call leaves them
# unset. The tiny model's end token is 2, its bytes begin at 3.
CONFIGURED = {
    "min_p": 0.5,
    "top_h": 0.1,
    "typical_p": 0.3,
    "epsilon_cutoff": 0.0045,
    "no_repeat_ngram_size": 1,
    "repetition_penalty": 5.0,
    "suppress_tokens": list(range(3, 150)),
    "begin_suppress_tokens": list(range(3, 150)),
    "bad_words_ids": [[k] for k in range(3, 150)],
    "sequence_bias": [[[40], 20.0]],
    "forced_eos_token_id": 2,
    "exponential_decay_length_penalty": (1, 9.0),
    "max_time": 1e-9,
    "stop_strings": ["a"],
    "num_beams": 3,
    "penalty_alpha": 0.6,
    "guidance_scale": 5.0,
    "watermarking_config": WatermarkingConfig(greenlist_ratio=0.1, bias=20.0),
    "token_healing": True,
    "prompt_lookup_num_tokens": 3,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
}


def sampled(model, tokenizer, temperature):
    texts = []

    def record(completions, **kwargs):
        texts.extend(completions)
        return [0.0] * len(completions)

    options = {"max_new_tokens": 8, "num_samples": 3 if temperature else 1, "progress": False}
    evaluate_pass_at_k(model, tokenizer, make_rows(False), record, temperature=temperature, **options)
    return texts


@pytest.fixture(scope="module")
def unconfigured(tiny):
    return {temperature: sampled(*tiny, temperature) for temperature in (1.0, 0)}


@pytest.mark.parametrize("name", CONFIGURED)
def test_the_models_generation_config_does_not_change_what_is_sampled(name, tiny, unconfigured, monkeypatch):
    model, tokenizer = tiny
    config = copy.deepcopy(model.generation_config)
    setattr(config, name, CONFIGURED[name])
    monkeypatch.setattr(model, "generation_config", config)
    assert {temperature: sampled(model, tokenizer, temperature) for temperature in (1.0, 0)} == unconfigured
    assert model.generation_config is config


def test_nor_does_that_of_a_model_with_an_adapter(tiny, unconfigured):
    from peft import LoraConfig, get_peft_model

    tokenizer = tiny[1]
    model = get_peft_model(copy.deepcopy(tiny[0]), LoraConfig(target_modules=["q_proj"]))  # changes nothing yet
    config = model.get_base_model().generation_config
    config.min_p = 0.5
    assert sampled(model, tokenizer, 1.0) == unconfigured[1.0]
    assert model.generation_config is config and config.min_p == 0.5


def test_a_reward_function_is_called_as_in_training(tiny):
    seen = {}

    def reward(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, environments, good):
        log_extra("column", completions)
        log_metric("share", 0.5)
        seen.update(steps=trainer_state.global_step, ids=completion_ids, environments=environments)
        return [0.0] * len(completions)

    rows = make_rows(False)
    for name in ("completion", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"):
        rows = rows.add_column(name, ["taken"] * 3)
    evaluate_pass_at_k(*tiny, rows, reward, max_new_tokens=2, progress=False)
    assert seen["steps"] == 0
    assert all(isinstance(token, int) for ids in seen["ids"] for token in ids)
    assert seen["environments"] == ["taken"] * 3  # a column like any other to a trainer without environments
    for name in ("prompts", "completions"):
        wanted = f"`dataset` must not have a column '{name}'"
        with pytest.raises(EvaluationError, match=wanted):
            evaluate_pass_at_k(*tiny, make_rows(False).add_column(name, ["a"] * 3), reward, max_new_tokens=2)
