"""A reward function that hangs: stopped, counted as no reward, and nothing left behind."""

import asyncio
import functools
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from test_trainer_causal import first_batch, make_trainer
from tiny_policy import count_low, parameters, prompts, save_policy

from gcpo._trl import get_callable_name, is_async_callable
from gcpo.run.inputs import ArgumentsError
from gcpo.run.reward_timeout import with_timeout


def spins(completions, **kwargs):
    while True:
        pass


def sleeps(completions, **kwargs):
    time.sleep(60)


def retries(completions, **kwargs):
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue


@pytest.mark.parametrize("hanging", [spins, sleeps, retries], ids=lambda f: f.__name__)
def test_what_hangs_is_stopped(hanging):
    start, before = time.monotonic(), signal.getsignal(signal.SIGRTMAX)
    with pytest.warns(UserWarning, match=f"'{hanging.__name__}' took longer than 0.1 s for 2 completions"):
        assert with_timeout(hanging, 0.1)(prompts=["p", "p"], completions=["a", "b"]) == [None, None]
    assert time.monotonic() - start < 5
    assert signal.getsignal(signal.SIGRTMAX) == before
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


def test_what_does_not_hang_is_left_alone():
    limited = with_timeout(count_low, 60)
    assert limited.__name__ == "count_low"  # the name that rewards are logged under
    assert limited(completions=["AAZ", "Z"]) == count_low(["AAZ", "Z"])
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())

    def broken(completions, **kwargs):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        with_timeout(broken, 60)(completions=["a"])


def test_a_function_with_an_alarm_of_its_own():
    """As math-verify: its alarm neither replaces the limit nor is replaced."""
    rung = []

    def alarmed(completions, **kwargs):
        signal.signal(signal.SIGALRM, lambda *a: rung.append(True))
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        time.sleep(0.05)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        time.sleep(60)

    with pytest.warns(UserWarning, match="took longer"):
        assert with_timeout(alarmed, 0.2)(completions=["a"]) == [None]
    assert rung == [True]


def test_asynchronous_functions_are_cancelled():
    async def slow(completions, **kwargs):
        await asyncio.sleep(60)

    async def quick(completions, **kwargs):
        return [1.0]

    with pytest.warns(UserWarning, match="'slow' took longer"):
        assert asyncio.run(with_timeout(slow, 0.05)(completions=["a"])) == [None]
    assert asyncio.run(with_timeout(quick, 5)(completions=["a"])) == [1.0]


def test_callable_objects():
    """Asynchronous where their `__call__` is, as for TRL, and logged under the name that TRL would give them."""

    class Judge:
        async def __call__(self, completions, seconds=0.0, **kwargs):
            await asyncio.sleep(seconds)
            return [1.0] * len(completions)

    class Rule:
        def __call__(self, completions, **kwargs):
            return [2.0] * len(completions)

    judge = with_timeout(Judge(), 5)
    assert is_async_callable(judge) and asyncio.run(judge(completions=["a"])) == [1.0]
    slow = with_timeout(functools.partial(Judge(), seconds=60), 0.05)
    with pytest.warns(UserWarning, match="'Judge' took longer"):
        assert asyncio.run(slow(completions=["a"])) == [None]
    rule = with_timeout(Rule(), 5)
    assert not is_async_callable(rule) and rule(completions=["a"]) == [2.0]
    assert [get_callable_name(reward) for reward in (judge, slow, rule)] == ["Judge", "Judge", "Rule"]


def test_wrong_arguments():
    for seconds in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="`seconds`"):
            with_timeout(count_low, seconds)
    for seconds in (None, "3", True):
        with pytest.raises(TypeError, match="`seconds`"):
            with_timeout(count_low, seconds)
    for reward in (None, "a/reward-model", torch.nn.Linear(1, 1)):
        with pytest.raises(TypeError, match=f"`reward_func` must be a function.*got {type(reward).__name__}"):
            with_timeout(reward, 1.0)
    errors = []

    def elsewhere():
        try:
            with_timeout(count_low, 1.0)(completions=["a"])
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in errors[0]


def test_the_command_line_sets_a_limit(tmp_path, monkeypatch):
    """`--reward_timeout` wraps every function that is named, under its own name."""
    import gcpo.trainer
    from gcpo.commands import train

    policy, data = save_policy(tmp_path / "policy"), tmp_path / "data.json"
    prompts().to_json(data)
    given = {}

    def make(**kwargs):
        given.update(kwargs)
        return SimpleNamespace(processing_class=None, train_dataset=kwargs["train_dataset"])

    monkeypatch.setattr(gcpo.trainer, "GCPOTrainer", make)
    monkeypatch.setattr("gcpo.commands.train.check_chat_template", lambda *args: None)
    argv = ["--model_name_or_path", policy, "--dataset_name", str(data), "--reward_funcs", "tiny_policy.count_low"]
    argv += ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--reward_timeout"]
    monkeypatch.setattr(train, "train", lambda trainer, *args: built.append(trainer) or 0)
    built = []
    with pytest.raises(ArgumentsError, match="`--reward_timeout`"):
        train.run([*argv, "0"])
    assert train.run([*argv, "2.5"]) == 0
    assert built[0].keeps_account  # for `gcpo report`, whatever the other options
    (reward,) = given["reward_funcs"]
    assert reward.__name__ == "count_low"
    assert reward.__wrapped__.__wrapped__ is count_low  # inside what checks what it returns, and the limit


def test_training_goes_on_without_the_reward(tmp_path):
    """One function hangs on the first batch of two: its groups are counted, and the others' rewards still teach."""
    calls = []

    def sometimes(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 1:
            time.sleep(60)
        return count_low(completions)

    policy = save_policy(tmp_path / "policy")
    trainer = make_trainer(policy, tmp_path, reward_funcs=with_timeout(sometimes, 0.3), learning_rate=1e-2)
    with pytest.warns(UserWarning, match="'sometimes' took longer"):
        output, _ = first_batch(trainer)
    assert not output["advantages"].any()
    assert trainer._metrics["train"]["gcpo/groups_without_reward"] == [1.0]
    trainer._metrics["train"].clear()
    trainer.train()
    assert "rewards/sometimes/mean" in trainer.state.log_history[0]
    assert all(value.isfinite().all() for value in parameters(trainer.model).values())
