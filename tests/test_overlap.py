"""Rewards beside the decoding of colliders: the numbers of a run without, in less time; and engines that sleep."""

import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from tiny_policy import count_low, options, parameters, prompts, save_policy, worst_difference

from gcpo import GCPOConfig, GCPOTrainer
from gcpo.causal.account import StepAccount
from gcpo.causal.sampling import own_random_stream
from gcpo.forward.trl_policy import TrlPolicy
from gcpo.run.overlap import against_overlap, beside

TIMES = ("gcpo/seconds/", "step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


def trained(policy, folder, reward=count_low, **changed):
    args = GCPOConfig(**options(folder, **changed))
    trainer = GCPOTrainer(policy, reward, args, train_dataset=prompts())
    trainer.train()
    return trainer


def history(trainer):
    return [
        {name: value for name, value in row.items() if not name.startswith(TIMES)} for row in trainer.state.log_history
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"collider_choice": "reward"},
        {"collider_choice": "greedy", "context_attention": "full"},
        {"estimator": "sampled", "num_iterations": 2},
        {"reuse_rollout": False, "beta": 0.1, "shuffle_candidates": True},
    ],
    ids=str,
)
def test_overlap_changes_no_number(settings, policy, tmp_path):
    runs = [
        trained(policy, tmp_path / str(overlaps), overlap_rewards=overlaps, **settings) for overlaps in (False, True)
    ]
    assert history(runs[0]) == history(runs[1])
    assert worst_difference(*(parameters(run.model) for run in runs)) == 0


def test_rewards_stay_in_the_main_thread_while_colliders_are_decoded(policy, tmp_path, monkeypatch):
    """A reward function may set an alarm. It waits here for the decoding to begin, so that the two do overlap."""
    began, threads = threading.Event(), []
    generate = TrlPolicy.generate

    def noted(self, prompts, seed, **settings):
        threads.append(threading.current_thread())
        began.set()
        return generate(self, prompts, seed, **settings)

    def reward(completions, **columns):
        signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGALRM))  # raises outside the main thread
        assert began.wait(timeout=60)
        began.clear()
        return count_low(completions)

    monkeypatch.setattr(TrlPolicy, "generate", noted)
    trained(policy, tmp_path, reward, overlap_rewards=True, collider_attention="full")
    assert len(threads) == 2 and threading.main_thread() not in threads


def test_seconds_are_counted_once(policy, tmp_path):
    """Rewards of 0.3 s hide the colliders: the phases add up to no more than the step."""

    def reward(completions, **columns):
        time.sleep(0.3)
        return count_low(completions)

    trainer = trained(policy, tmp_path, reward, overlap_rewards=True, collider_max_completion_length=4)
    for row in trainer.state.log_history[:2]:
        assert row["gcpo/seconds/rewards"] >= 0.3 > row["gcpo/seconds/colliders"]
        phases = sum(value for name, value in row.items() if name.startswith("gcpo/seconds/"))
        assert phases <= row["step_time"] * 1.01


def test_an_account_is_of_the_thread_that_trains():
    """Whoever made it: a trainer that was built, or evaluated, in one thread may train in another."""
    account, found = StepAccount(), []

    def train():
        with account.phase("loss"):
            other = threading.Thread(target=beside_it, name="beside it")
            other.start()
            other.join()
        found.append(account.flush()[0])

    def beside_it():
        with account.phase("colliders"):
            time.sleep(0.05)

    trains = threading.Thread(target=train, name="trains")
    trains.start()
    trains.join()
    assert found[0]["loss"] >= 0.05 and found[0]["colliders"] == 0


@pytest.mark.parametrize("fails", ["rewards", "colliders", "both"])
def test_what_fails_is_raised_once_both_have_ended(fails):
    ended = []

    def task():
        time.sleep(0.2)
        ended.append(True)
        if fails != "rewards":
            raise ValueError("in colliders")

    def body():
        with beside(task, torch.device("cpu")):
            if fails != "colliders":
                raise ValueError("in rewards")

    with pytest.raises(ValueError, match="in colliders" if fails == "colliders" else "in rewards"):
        body()
    assert ended == [True]


def test_a_thread_beside_has_no_gradients():
    found = []
    with beside(lambda: found.append(torch.is_grad_enabled()), torch.device("cpu")):
        assert torch.is_grad_enabled()
    assert found == [False]


@pytest.mark.parametrize(
    ("changed", "gathers", "reason"),
    [
        ({}, "FSDP", "FSDP gathers weights"),
        ({}, "DeepSpeed ZeRO-3", "ZeRO-3 gathers weights"),
        ({"use_vllm": True, "vllm_mode": "server"}, None, "vllm_mode='server'"),
        ({"use_vllm": True, "vllm_tensor_parallel_size": 2}, None, "vllm_tensor_parallel_size=2"),
        ({"use_vllm": True, "vllm_enable_sleep_mode": True}, None, "vllm_enable_sleep_mode=True"),
        ({"use_vllm": True}, None, None),
        ({"vllm_mode": "server"}, None, None),
    ],
    ids=str,
)
def test_what_overlap_does_not_go_with(changed, gathers, reason):
    engine = {
        "use_vllm": False,
        "vllm_mode": "colocate",
        "vllm_tensor_parallel_size": 1,
        "vllm_enable_sleep_mode": False,
    }
    found = against_overlap(SimpleNamespace(**{**engine, **changed}), gathers)
    assert found is None if reason is None else reason in found


def test_overlap_is_refused_before_training(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(TrlPolicy, "gathers_weights", "FSDP")
    with pytest.raises(ValueError, match="`overlap_rewards` must be False: FSDP gathers weights"):
        GCPOTrainer(policy, count_low, GCPOConfig(**options(tmp_path, overlap_rewards=True)), train_dataset=prompts())


# ---------------------------------------------------------------------------------------------------------------------
# Reward functions that cannot score colliders
# ---------------------------------------------------------------------------------------------------------------------


def strict(prompts, completions, **columns):
    """Knows the candidates of one group of four, and no more rows at once."""
    if len(prompts) != 4:
        raise KeyError("answer")
    return count_low(completions)


async def strict_async(prompts, completions, **columns):
    return strict(prompts, completions)


@pytest.mark.parametrize("reward", [strict, strict_async])
@pytest.mark.parametrize("overlaps", [False, True])
def test_the_reward_function_that_failed_on_colliders_is_named(reward, overlaps, policy, tmp_path):
    one_group = {"gradient_accumulation_steps": 1, "num_colliders": 3}
    message = rf"'{reward.__name__}' raised KeyError: 'answer'.* colliders.*`collider_choice='sample'`"
    with pytest.raises(RuntimeError, match=message) as caught:
        trained(policy, tmp_path, [count_low, reward], collider_choice="reward", overlap_rewards=overlaps, **one_group)
    assert isinstance(caught.value.__cause__.__cause__, KeyError)


def test_a_reward_function_that_fails_on_candidates_is_as_ever(policy, tmp_path):
    def fails(completions, **columns):
        raise KeyError("answer")

    with pytest.raises(KeyError, match="answer"):
        trained(policy, tmp_path, fails, collider_choice="reward")


# ---------------------------------------------------------------------------------------------------------------------
# Engines and devices
# ---------------------------------------------------------------------------------------------------------------------


class Engine:
    """vLLM beside the trainer, as TRL's VLLMGeneration has it in the part that is about sleep."""

    mode, enable_sleep_mode, _llm_weights_sleeping = "colocate", True, True

    def __init__(self):
        self.calls = []
        self.llm = SimpleNamespace(
            sleep=lambda level: self.calls.append(f"sleep {level}"),
            wake_up=lambda tags: self.calls.append(f"wake {tags[0]}"),
        )

    def sync_weights(self):
        if self.enable_sleep_mode:
            self.llm.wake_up(tags=["weights"])
            self._llm_weights_sleeping = False
        self.calls.append("push")

    def generate(self):
        if self.enable_sleep_mode and self._llm_weights_sleeping:
            self.sync_weights()
        if self.enable_sleep_mode:
            self.llm.wake_up(tags=["kv_cache"])
        self.calls.append("generate")
        if self.enable_sleep_mode:
            self.llm.sleep(level=2)
            self._llm_weights_sleeping = True


def test_weights_are_pushed_once_to_an_engine_that_sleeps():
    engine = Engine()
    trainer = SimpleNamespace(
        use_vllm=True, vllm_generation=engine, state=SimpleNamespace(global_step=3), _last_loaded_step=2
    )
    policy = TrlPolicy.__new__(TrlPolicy)
    policy.trainer = trainer
    for step in (3, 4):
        trainer.state.global_step = step
        with policy.staying_awake():
            for _ in ("candidates", "colliders"):
                if trainer.state.global_step != trainer._last_loaded_step:  # as TRL does
                    engine.sync_weights()
                    trainer._last_loaded_step = trainer.state.global_step
                engine.generate()
    assert engine.calls == ["wake weights", "push", "wake kv_cache", "generate", "generate", "sleep 2"] * 2
    engine.calls.clear()
    with pytest.raises(KeyboardInterrupt), policy.staying_awake():
        raise KeyboardInterrupt
    assert engine.calls[-1] == "sleep 2" and engine.enable_sleep_mode and engine._llm_weights_sleeping
    # Without sleep mode, or beside a server, nothing is done.
    engine.calls.clear()
    for mode, sleeps in (("server", True), ("colocate", False)):
        engine.mode, engine.enable_sleep_mode = mode, sleeps
        with policy.staying_awake():
            pass
    assert engine.calls == []


def test_only_the_generators_that_are_restored_are_seeded(monkeypatch):
    """Two accelerators, of which this process has the second: the first one's stream goes on as it was."""
    states = {0: torch.tensor([1]), 1: torch.tensor([2])}
    module = SimpleNamespace(
        manual_seed=lambda seed: states.update({1: torch.tensor([seed])}),
        get_rng_state=lambda index: states[int(torch.device(index).index if not isinstance(index, int) else index)],
        set_rng_state=lambda state, index: states.update({index: state}),
        device_count=lambda: 2,
    )
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *args: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch, "cuda", module)
    before = torch.get_rng_state()
    with own_random_stream(7):
        first = torch.rand(3)
        assert states == {0: torch.tensor([1]), 1: torch.tensor([7])}
    assert states == {0: torch.tensor([1]), 1: torch.tensor([2])}
    assert torch.equal(torch.get_rng_state(), before)
    with own_random_stream(7):
        assert torch.equal(torch.rand(3), first)
