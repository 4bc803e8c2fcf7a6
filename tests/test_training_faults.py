"""
Faults under a run's feet: broken numbers, tokenizers without pad or eos, rollouts at their limits, a full disk.

After each, either training went on with that sample left out and counted, or it stopped with a message that says what
and where; the parameters are finite in any case. Faults of rewards, colliders and interrupts: test_trainer_faults.py,
test_reward_timeout.py.
"""

import errno
from pathlib import Path

import pytest
import torch
from safetensors import torch as safetensors_torch
from test_trainer_causal import first_batch, make_trainer
from test_trainer_faults import EOS, assert_finite, fixed
from tiny_policy import count_low, make_tokenizer, options, parameters, prompts, save_policy, worst_difference
from transformers import AutoModelForCausalLM, AutoTokenizer

from gcpo import GCPOConfig, GCPOTrainer
from gcpo.run.guard import PATIENCE, SkipNonFiniteSteps


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


def break_logits(trainer, steps, value=float("nan")):
    """The hidden states of one row become `value` in the training forwards of these steps (from 0)."""

    def hook(module, args, output):
        if torch.is_grad_enabled() and trainer.state.global_step in steps:
            bad = torch.zeros_like(output[:, :1, :1])
            bad[0] = value
            return output + bad
        return output

    return trainer.model.model.norm.register_forward_hook(hook)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("guard_first", [True, False])
def test_broken_logits_in_one_row_skip_the_step(value, guard_first, policy, tmp_path):
    """The step is left out and counted; the next ones go on from the same parameters and optimizer state."""
    trainer = make_trainer(policy, tmp_path, max_steps=3, learning_rate=1e-2)
    guard = next((c for c in trainer.callback_handler.callbacks if isinstance(c, SkipNonFiniteSteps)), None)
    if guard is None:
        guard = SkipNonFiniteSteps(trainer._log)
        trainer.add_callback(guard)
    seen = []

    class Watch(SkipNonFiniteSteps):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append(parameters(kwargs["model"]))

    trainer.add_callback(Watch())
    break_logits(trainer, steps={1} if guard_first else {0}, value=value)
    with pytest.warns(UserWarning, match=rf"step {2 if guard_first else 1}: gradients that are not finite"):
        trainer.train()
    assert guard.skipped == 1
    shares = [entry["gcpo/skipped_steps"] for entry in trainer.state.log_history if "gcpo/skipped_steps" in entry]
    assert sorted(shares) == [0.0, 0.0, 1.0]
    assert trainer.state.global_step == 3
    assert_finite(trainer)
    seen.append(parameters(trainer.model))
    moved = [worst_difference(seen[k], seen[k + 1]) > 0 for k in range(3)]
    assert moved == ([True, False, True] if guard_first else [False, True, True])


def test_logits_that_stay_broken_stop_the_run(policy, tmp_path):
    trainer = make_trainer(policy, tmp_path, max_steps=PATIENCE + 3, learning_rate=1e-2)
    if not any(isinstance(c, SkipNonFiniteSteps) for c in trainer.callback_handler.callbacks):
        trainer.add_callback(SkipNonFiniteSteps())
    break_logits(trainer, steps=range(1, 100))
    message = rf"step {PATIENCE + 1}: .*parameters, such as .* those after step 1\b"
    with pytest.warns(UserWarning, match="is left out"), pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert_finite(trainer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_scores_of_a_candidate_are_counted_and_left_out(value, policy, tmp_path):
    """NaN while scoring, not while training: Upsilon falls back to 1 for the group, and is counted."""
    candidates = [[20, 21, EOS], [22, EOS], [23, 24, 25, EOS], [26, 27]]
    trainer = make_trainer(policy, tmp_path, fixed(candidates, [[30, EOS], [31, 32, EOS]]), num_colliders=2)

    def hook(module, args, output):
        bad = torch.zeros_like(output[:, :1, :1])
        bad[0] = value
        return output + bad

    handle = trainer.model.model.norm.register_forward_hook(hook)
    output, captured = first_batch(trainer)
    handle.remove()
    assert captured["upsilon"].isfinite().all()
    assert output["advantages"].isfinite().all()
    assert trainer._metrics["train"]["gcpo/upsilon/fallback"][0] > 0


def test_a_reward_that_raises_stops_with_its_own_error(policy, tmp_path):
    def broken(completions, **kwargs):
        raise RuntimeError("the judge is not there")

    trainer = make_trainer(policy, tmp_path, reward_funcs=broken)
    before = parameters(trainer.model)
    with pytest.raises(RuntimeError, match="the judge is not there"):
        trainer.train()
    assert worst_difference(before, parameters(trainer.model)) == 0


def without(tokenizer, folder, name):
    """`save_policy` with a tokenizer that lacks its pad or eos token."""
    setattr(tokenizer, f"{name}_token", None)
    path = save_policy(folder)
    tokenizer.save_pretrained(path)
    return path


def test_a_tokenizer_without_pad_pads_with_eos(tmp_path):
    path = without(make_tokenizer(), tmp_path / "policy", "pad")
    assert AutoTokenizer.from_pretrained(path).pad_token is None
    trainer = make_trainer(path, tmp_path)
    before = parameters(trainer.model)
    trainer.train()
    assert_finite(trainer)
    assert worst_difference(before, parameters(trainer.model)) > 0
    assert trainer.state.log_history[0]["gcpo/upsilon/fallback"] == 0


def test_a_tokenizer_without_eos_stops_before_a_step(tmp_path):
    """There is nothing to end a completion with, nor to pad with after one."""
    path = without(make_tokenizer(), tmp_path / "policy", "eos")
    assert AutoTokenizer.from_pretrained(path).eos_token is None
    with pytest.raises((ValueError, TypeError)):
        make_trainer(path, tmp_path).train()


LENGTHS = {
    "nothing but the end": [[EOS]],
    "one of nothing": [[EOS], [20, 21, EOS], [22, EOS], [23, 24, EOS]],
    "all cut off at the limit": [[20 + k] * 10 for k in range(4)],
    "one token each": [[20], [21], [22], [23]],
}


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_at_their_limits(name, truncated, policy, tmp_path):
    """Empty, and of the maximal length, with truncated ones masked (a batch without any token) or not."""
    rollouts = fixed(LENGTHS[name], [[30, EOS], [31, EOS]])
    trainer = make_trainer(policy, tmp_path, rollouts, mask_truncated_completions=truncated, num_colliders=2, beta=0.1)
    trainer.train()
    assert_finite(trainer)
    assert all(entry["loss"] == entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("settings", [{}, {"estimator": "scored"}, {"context_attention": "parallel"}], ids=str)
def test_identical_candidates_and_empty_colliders_train(settings, policy, tmp_path):
    rollouts = fixed([[20, 21, EOS]], [[EOS]])
    trainer = make_trainer(policy, tmp_path, rollouts, **settings)
    trainer.train()
    assert_finite(trainer)
    for entry in trainer.state.log_history:
        assert all(value == value for key, value in entry.items() if key in ("loss", "grad_norm")), entry


def test_a_disk_that_fills_leaves_the_checkpoint_before(policy, tmp_path, monkeypatch):
    """Half of the weights are written when the disk is full: the error says so, and the run goes on from before."""
    save = safetensors_torch.save_file
    written = []

    def fills(tensors, filename, *args, **kwargs):
        written.append(filename)
        save(tensors, filename, *args, **kwargs)
        if "checkpoint-2" in str(filename):
            whole = Path(filename).read_bytes()
            Path(filename).write_bytes(whole[: len(whole) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(filename))

    for module in ("transformers.modeling_utils", "safetensors.torch"):
        for name in ("save_file", "safe_save_file"):
            monkeypatch.setattr(f"{module}.{name}", fills, raising=False)
    trainer = make_trainer(policy, tmp_path, save_strategy="steps", save_steps=1, max_steps=3)
    with pytest.raises(OSError, match=r"No space left on device.*checkpoint-2"):
        trainer.train()
    assert any("checkpoint-2" in str(name) for name in written), "the fault was not reached"
    assert_finite(trainer)
    monkeypatch.undo()
    first = tmp_path / "out" / "checkpoint-1"
    weights = AutoModelForCausalLM.from_pretrained(first)
    assert all(torch.isfinite(x).all() for x in weights.parameters())
    resumed = make_trainer(policy, tmp_path, save_strategy="no", max_steps=3)
    resumed.train(resume_from_checkpoint=str(first))
    assert resumed.state.global_step == 3
    assert_finite(resumed)


def test_a_run_of_the_plain_trainer_class_has_its_faults_too(policy, tmp_path):
    """With the causal parts off the same guard works: nothing of it depends on them."""
    config = GCPOConfig(**options(tmp_path, max_steps=2), kappa=0.0, estimator="none")
    trainer = GCPOTrainer(model=policy, reward_funcs=count_low, args=config, train_dataset=prompts())
    if not any(isinstance(c, SkipNonFiniteSteps) for c in trainer.callback_handler.callbacks):
        trainer.add_callback(SkipNonFiniteSteps())
    break_logits(trainer, steps={0})
    with pytest.warns(UserWarning, match="step 1: gradients that are not finite"):
        trainer.train()
    assert_finite(trainer)
