"""What happens when something in a training step is wrong: a clear stop, or that sample counted and left out."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from test_trainer_causal import first_batch, make_trainer
from tiny_policy import SHORT_TEMPLATES, count_low, options, parameters, prompts, save_policy, worst_difference
from transformers import TrainerCallback

from gcpo import GCPOConfig, GCPOTrainer


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


def assert_finite(trainer):
    assert all(value.isfinite().all() for value in parameters(trainer.model).values())


def test_wrong_number_of_rewards_names_the_function(policy, tmp_path):
    def short(completions, **kwargs):
        return [1.0]

    with pytest.raises(ValueError, match="'short' returned 1 rewards, but 8 were expected"):
        make_trainer(policy, tmp_path, reward_funcs=short).train()


@pytest.mark.parametrize("bad", [math.nan, None, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [slice(0, 4), slice(0, 1), slice(0, 8)], ids=["group", "sample", "all"])
def test_rewards_that_are_no_numbers(bad, rows, policy, tmp_path):
    """They count as missing: advantage 0 for that sample, and a metric for groups without any reward."""

    def broken(completions, **kwargs):
        rewards = count_low(completions)
        rewards[rows] = [bad] * len(rewards[rows])
        return rewards

    trainer = make_trainer(policy, tmp_path, reward_funcs=broken, beta=0.01)
    output, _ = first_batch(trainer)
    assert (output["advantages"][rows] == 0).all() and output["advantages"].isfinite().all()
    rest = torch.ones(8, dtype=torch.bool)
    rest[rows] = False
    assert rest.sum() == 0 or output["advantages"][rest].abs().max() > 0
    expected = {4: 0.5, 1: 0.0, 8: 1.0}[rows.stop - rows.start]
    assert trainer._metrics["train"]["gcpo/groups_without_reward"] == [expected]
    trainer._metrics["train"].clear()
    trainer.train()
    assert_finite(trainer)


@pytest.mark.hazard(27)
def test_equal_rewards_leave_only_the_kl_terms(policy, tmp_path):
    """Seen in trl#7068."""

    def equal(completions, **kwargs):
        return [0.1] * len(completions)

    trainer = make_trainer(policy, tmp_path, reward_funcs=equal)
    output, _ = first_batch(trainer)
    assert output["advantages"].abs().max() < 1e-3
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, output)
    assert loss.isfinite() and loss >= 0


def fixed(candidates, colliders):
    """A trainer class whose rollouts are given."""

    class Fixed(GCPOTrainer):
        def _generate_single_turn(self, prompt_ids, images, fields, num_generations, **kwargs):
            rows = colliders if num_generations == 1 else candidates
            return [list(rows[k % len(rows)]) for k in range(len(prompt_ids))], None

    return Fixed


EOS = 1


@pytest.mark.parametrize("estimator", ["loo", "scored"])
def test_identical_candidates(estimator, policy, tmp_path):
    """Every z is the same, so is zbar, and Upsilon is near alpha; rewards are equal and nothing is learned of it."""
    trainer = make_trainer(policy, tmp_path, fixed([[20, 21, EOS]], [[30, EOS], [31, EOS], [32, 33, EOS]]))
    output, captured = first_batch(trainer)
    assert captured["upsilon"].isfinite().all() and captured["upsilon"].max() > 1.5
    assert output["advantages"].abs().max() < 1e-3


@pytest.mark.parametrize(("last", "empty"), [(EOS, "truncated_mean"), (31, "ended_mean")])
def test_a_mean_of_nothing_is_not_logged(last, empty, policy, tmp_path):
    """Loggers warn of None: a metric that has no values is left out."""
    candidates = [[20, 21, last], [22, 23, last], [24, last], [25, 26, 27, last]]
    trainer = make_trainer(policy, tmp_path, fixed(candidates, [[30, EOS], [31, EOS], [32, 33, EOS]]))
    first_batch(trainer)
    metrics = trainer._metrics["train"]
    assert f"gcpo/upsilon/{empty}" not in metrics and len(metrics["gcpo/upsilon/mean"]) == 1
    trainer._log("nothing", math.nan)
    trainer.log(logs := {})
    assert None not in logs.values() and "gcpo/upsilon/mean" in logs and "gcpo/nothing" not in logs


def test_a_trainer_without_init_generates(policy, tmp_path):
    """Tests of TRL's own make one and set what `_generate` reads."""
    trainer = object.__new__(GCPOTrainer)
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=True, gather=lambda x: x)
    trainer.args = SimpleNamespace(report_to=[])
    trainer.model = SimpleNamespace(training=True)
    trainer.state = SimpleNamespace(global_step=2, num_input_tokens_seen=0)
    trainer.use_vllm = trainer.use_transformers_continuous_batching = False
    trainer.tools, trainer.eos_token_ids = None, [2]
    trainer.processing_class = SimpleNamespace(batch_decode=lambda rows, **kwargs: ["decoded" for _ in rows])
    trainer._tokenizer = SimpleNamespace(eos_token_id=2, pad_token_id=0)
    trainer._metrics = {"train": defaultdict(list)}
    trainer.rollout_func = lambda prompts, trainer: {"prompt_ids": [[1]], "completion_ids": [[2]], "logprobs": [[0.0]]}
    assert trainer._generate(["prompt"])[:2] == ([[1]], [[2]])
    assert trainer._account.tokens["generated"] == 1


def test_empty_colliders_are_masked(policy, tmp_path):
    """One that says nothing is put last and left out of every mean."""
    candidates = [[20, 21, EOS], [22, EOS], [23, 24, 25, EOS], [26, 27]]
    some = make_trainer(policy, tmp_path, fixed(candidates, [[EOS], [30, EOS], [31, 32, EOS]]))
    output, captured = first_batch(some)
    assert captured["groups"][0].has_content == [True, True, False]
    assert output["context_weights"][0].tolist() == [0.5, 0.5]
    assert output["has_collider"].all()
    without = make_trainer(policy, tmp_path, fixed(candidates, [[30, EOS], [31, 32, EOS]]), num_colliders=2)
    expected = first_batch(without)[1]["upsilon"]
    torch.testing.assert_close(captured["upsilon"], expected, atol=1e-5, rtol=1e-5)


def test_truncated_colliders_are_masked_on_request(policy, tmp_path):
    candidates, colliders = [[20, 21, EOS], [22, EOS], [23, EOS], [26, 27]], [[30, 31], [32, EOS], [33, 34]]
    for masked, expected in ((False, [True, True, True]), (True, [True, False, False])):
        trainer = make_trainer(policy, tmp_path, fixed(candidates, colliders), mask_truncated_colliders=masked)
        _, captured = first_batch(trainer)
        assert captured["groups"][0].has_content == expected
        assert captured["groups"][0].colliders[0] == ([32, EOS] if masked else [30, 31])


def test_without_any_collider_the_second_kl_is_left_out(policy, tmp_path):
    candidates = [[20, 21, EOS], [22, EOS], [23, 24, 25, EOS], [26, 27]]
    trainer = make_trainer(policy, tmp_path, fixed(candidates, [[EOS]]))
    output, captured = first_batch(trainer)
    assert not output["has_collider"].any() and captured["upsilon"].isfinite().all()
    assert trainer._metrics["train"]["gcpo/colliders/masked"] == [1.0]
    trainer.current_gradient_accumulation_steps = 1
    with_inputs = trainer._compute_loss(trainer.model, output)
    plain = {k: v for k, v in output.items() if k != "context_logps"}
    assert with_inputs == trainer._compute_loss(trainer.model, plain)
    trainer.log({})
    (logged,) = trainer.state.log_history
    assert "gcpo/colliders/masked" in logged and not {"gcpo/kl_causal", "gcpo/proj_clamped"} & logged.keys()


def test_undefined_weights_fall_back_to_grpo(policy, tmp_path):
    """NaN hidden states in one candidate: its group is weighted by 1 and counted, the other group as ever."""

    trainer = make_trainer(policy, tmp_path)
    causal_terms = trainer.causal_terms

    def broken(rollout, *args):
        rollout.states.z[1] = torch.nan
        return causal_terms(rollout, *args)

    trainer.causal_terms = broken
    output, captured = first_batch(trainer)
    assert (captured["upsilon"][:4] == 1).all() and (captured["upsilon"][4:] != 1).all()
    assert trainer._metrics["train"]["gcpo/upsilon/fallback"] == [0.5]
    assert output["advantages"].isfinite().all()


def test_context_longer_than_the_model_is_refused_before_training(policy, tmp_path):
    short = save_policy(tmp_path / "short", max_positions=40)
    with pytest.raises(ValueError, match=r"46 tokens, more than the model's 40 positions.*`candidate_context_tokens`"):
        make_trainer(short, tmp_path)
    # Short enough without the prompt, whose length is not known before in a stream: it goes on without colliders.
    almost = save_policy(tmp_path / "almost", max_positions=48)
    template = "{question}{candidates}{collider}" + "x" * 20
    args = GCPOConfig(**options(tmp_path, **SHORT_TEMPLATES | {"context_prompt_template": template}, num_colliders=3),
                      collider_max_completion_length=6, collider_attention="full")  # fmt: skip
    trainer = GCPOTrainer(almost, count_low, args, train_dataset=prompts().to_iterable_dataset())
    with pytest.warns(UserWarning, match=r"more than the model's 48 positions.*`candidate_context_tokens`"):
        trainer.train()
    assert {row["gcpo/groups_without_colliders"] for row in trainer.state.log_history if "loss" in row} == {1.0}


@pytest.mark.parametrize("exception", [KeyboardInterrupt, RuntimeError])
def test_interrupted_training_leaves_its_checkpoint_loadable(exception, policy, tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise exception

    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    trainer = make_trainer(policy, tmp_path, **settings)
    trainer.add_callback(Interrupt())
    with pytest.raises(exception):
        trainer.train()
    at_two = parameters(trainer.model)
    resumed = make_trainer(policy, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert_finite(resumed)
    again = GCPOTrainer(
        model=str(tmp_path / "out" / "checkpoint-2"),
        reward_funcs=count_low,
        args=GCPOConfig(**options(tmp_path)),
        train_dataset=prompts(),
    )
    assert worst_difference(at_two, parameters(again.model)) == 0
