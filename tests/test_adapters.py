"""GCPO in other trainers: the loop of one's own, and verl's registry of policy losses (verl's own code, no cluster)."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from tiny_policy import SHORT_TEMPLATES, count_low, make_tokenizer, prompts, save_policy
from transformers import AutoModelForCausalLM

from gcpo import CausalOptions
from gcpo_kernels import gcpo_loss

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def low_share(completions: list[Any], **columns: Any) -> list[float]:
    """Reward: the share of a completion's characters that come before "P"; 0 for an empty one."""
    return [
        low / max(len(text[0]["content"]), 1) for low, text in zip(count_low(completions), completions, strict=True)
    ]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_loop_of_ones_own_learns(seed: int, policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """From a half of the characters to nearly all, with prompts and completions of several lengths."""
    torch.manual_seed(seed)
    model, seen = AutoModelForCausalLM.from_pretrained(policy), set()

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        seen.update(len(completion[0]["content"]) for completion in completions)
        return low_share(completions)

    rewards = load("custom_loop").train(
        model,
        make_tokenizer(),
        CausalOptions(collider_max_completion_length=6, num_colliders=2, **SHORT_TEMPLATES),
        list(prompts(12, conversational=True)),
        reward,
        steps=25,
        learning_rate=2e-2,
        max_completion_length=8,
    )
    assert len(rewards) == 25 and len(seen) > 2
    assert sum(rewards[:3]) / 3 < 0.75 and sum(rewards[-5:]) / 5 > 0.9
    assert "step 24: reward" in capsys.readouterr().out


@pytest.mark.parametrize("off", [{"kappa": 0.0}, {"estimator": "none"}, {"kappa": 0.0, "estimator": "none"}])
def test_the_loop_with_a_part_switched_off(off: dict[str, Any], policy: str) -> None:
    options = CausalOptions(collider_max_completion_length=4, **off, **SHORT_TEMPLATES)
    model = AutoModelForCausalLM.from_pretrained(policy)
    rows = list(prompts(2, conversational=True))
    assert len(load("custom_loop").train(model, make_tokenizer(), options, rows, low_share, steps=1)) == 1


def test_the_loop_needs_torch_and_transformers_alone(policy: str) -> None:
    """The whole script on its own questions, where nothing that comes with TRL can be imported."""
    code = f"""
import runpy, sys
for name in ("trl", "accelerate", "datasets", "peft"):
    sys.modules[name] = None  # an import of it fails
sys.argv = ["custom_loop", {policy!r}, "--steps", "1"]
runpy.run_path({str(EXAMPLES / "custom_loop.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr
    assert "step 0: reward" in done.stdout


@pytest.fixture(scope="module")
def verl() -> Any:
    """
    verl's losses, with this project's registered the way a user's command does it. verl imports ray, which takes 250 MB
    and which no loss touches: where it is not installed, a stand-in is enough.
    """
    if importlib.util.find_spec("verl") is None:
        pytest.skip("verl is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("ray") is None:
            ray = MagicMock(name="ray")
            ray.__path__, ray.__spec__ = [], importlib.util.spec_from_loader("ray", None)
            patch.setitem(sys.modules, "ray", ray)
        patch.syspath_prepend(str(EXAMPLES))
        patch.setenv("VERL_USE_EXTERNAL_MODULES", "verl_gcpo")
        yield importlib.import_module("verl.trainer.ppo.core_algos")


def actor_config(**changed: Any) -> Any:
    from verl.workers.config import ActorConfig

    return ActorConfig(strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=4, clip_ratio_high=0.3, **changed)


def batch(rows: int = 6, length: int = 7) -> dict[str, torch.Tensor]:
    """Log-ratios that reach both clips and the cap on large ratios; rows of all lengths, 0 among them."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    old = -randn(rows, length).abs() - 0.5
    lengths = torch.arange(rows).clamp(max=length)
    return {
        "old_log_prob": old,
        "log_prob": (old + 0.8 * randn(rows, length)).requires_grad_(),
        "advantages": randn(rows, 1).expand(-1, length).contiguous(),
        "response_mask": (torch.arange(length) < lengths[:, None]).float(),
    }


MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


@pytest.mark.parametrize("info", [{}, {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 9}])
@pytest.mark.parametrize("mode", MODES)
def test_without_contexts_it_is_verls_own_loss(mode: str, info: dict[str, int], verl: Any) -> None:
    config = actor_config(loss_agg_mode=mode)
    config.global_batch_info.update(info, loss_scale_factor=5 if info else None)
    weights = torch.rand(6, 7, generator=torch.Generator().manual_seed(2)) + 0.5
    losses, gradients = [], []
    for name in ("vanilla", "gcpo"):
        inputs = batch()
        loss, metrics = verl.get_policy_loss_fn(name)(
            **inputs, loss_agg_mode=mode, config=config, rollout_is_weights=weights
        )
        loss.backward()
        losses.append(loss.detach())
        gradients.append(inputs["log_prob"].grad)
        assert all(isinstance(value, float) for value in metrics.values())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)
    assert gradients[0].abs().max() > 1e-3


def test_an_unknown_reduction_is_refused(verl: Any) -> None:
    with pytest.raises(ValueError, match="`loss_agg_mode` must be one of"):
        verl.get_policy_loss_fn("gcpo")(**batch(), loss_agg_mode="mean", config=actor_config())


@pytest.mark.parametrize("with_weights", [False, True])
def test_scores_in_the_batch_reach_the_loss_through_verls_actor(
    with_weights: bool, verl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of verl's actor loss, its own KL included, plus kappa times the second KL."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils
    from verl.workers.config import PolicyLossConfig

    module = sys.modules["verl_gcpo"]
    monkeypatch.setenv("GCPO_KAPPA", "0.5")
    rows, prompt, length, contexts = 5, 2, 4, 3
    inputs = {name: value.detach() for name, value in batch(rows + 1, length).items()}
    inputs = {name: value[1:] for name, value in inputs.items()}  # verl has no empty responses here
    generator = torch.Generator().manual_seed(3)
    scores = -torch.rand(rows, length, contexts, generator=generator) - 0.2
    weights = torch.rand(rows, contexts, generator=generator)
    mask = inputs["response_mask"]
    data = {
        "prompts": torch.ones(rows, prompt, dtype=torch.long),
        "responses": torch.ones(rows, length, dtype=torch.long),
        "attention_mask": torch.cat([torch.ones(rows, prompt), mask], dim=1).long(),
        "response_mask": mask,
        "old_log_probs": inputs["old_log_prob"],
        "advantages": inputs["advantages"],
        "ref_log_prob": inputs["old_log_prob"] + 0.1,
    }
    if with_weights:
        data["context_weights"] = weights
    # The model's output: all tokens of all rows, one after the other, each predicting the next.
    flat = torch.cat(
        [
            torch.cat([torch.zeros(prompt - 1), inputs["log_prob"][k, : int(mask[k].sum())], torch.zeros(1)])
            for k in range(rows)
        ]
    )
    config = actor_config(policy_loss=PolicyLossConfig(loss_mode="gcpo"), use_kl_loss=True)

    def loss(extra: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        output = {"log_probs": flat.clone().requires_grad_()}
        tensors = TensorDict({**data, **extra}, batch_size=[rows])
        tensordict_utils.assign_non_tensor(tensors, dp_size=1, batch_num_tokens=None, global_batch_size=None)
        value, _ = module.ppo_loss(config, output, tensors)
        value.backward()
        return value.detach(), output["log_probs"].grad

    without, _ = loss({})
    value, gradient = loss({"context_log_probs": scores})
    expected, _ = gcpo_loss(
        inputs["log_prob"],
        torch.zeros(rows),
        mask,
        old_logp=inputs["old_log_prob"],
        context_logp=scores,
        context_weights=weights if with_weights else None,
        kappa=0.5,
        loss_type="bnpo",
    )
    assert expected > 0.01
    torch.testing.assert_close(value - without, expected, rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all() and gradient.abs().max() > 1e-3
    assert module._SCORES.get() is None  # nothing stays behind for the next batch
