"""`fused_loss` and `padding_free` with something around the model or in its output layer: adapters, a bias, types."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fixed_rollouts import FixedRollouts
from peft import PrefixTuningConfig, PromptTuningConfig
from test_own_loss import FUSED, LONG, OWN, PACKED, TRL, assert_alike, off_policy
from test_peft import lora, shake
from test_trainer_causal import first_batch, make_trainer
from tiny_policy import make_tokenizer, parameters, prompts, save_policy
from transformers import PhiConfig, PhiForCausalLM

WAYS = {"fused": FUSED, "packed": PACKED, "both": OWN}


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("policies")
    found = {name: save_policy(folder / name, name == "tied") for name in ("tied", "untied")}
    return found | {"bias": save_with_bias(folder / "bias")}


def save_with_bias(folder: Path) -> str:
    """A policy whose output layer has a bias."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = PhiForCausalLM(PhiConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes, **ends))
    model.lm_head.bias.data.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def build(policy: str, tmp_path: Path, settings: dict[str, Any], way: dict[str, bool]) -> Any:
    torch.manual_seed(0)
    trainer = make_trainer(policy, tmp_path, **LONG, **settings, **way)
    shake(trainer.model)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def loss_of(trainer: Any, output: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor], dict[str, Any]]:
    """Loss, gradients and metrics of one micro-batch."""
    torch.manual_seed(1)  # dropout
    loss = trainer._compute_loss(trainer.model, dict(output))
    loss.backward()
    grads = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    return loss.item(), grads, {k: v for k, v in trainer._metrics["train"].items() if "_sums" not in k}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("tied", {"peft_config": lora()}),
    "LoRA, untied": ("untied", {"peft_config": lora(target_modules="all-linear"), "gradient_checkpointing": True}),
    "LoRA under contexts": ("tied", {"peft_config": lora(), "causal_policy_context": "context"}),
    "whole head": ("untied", {"peft_config": lora(modules_to_save=["lm_head"])}),
    "whole head, tied": ("tied", {"peft_config": lora(modules_to_save=["lm_head"])}),
    "embeddings": ("tied", {"peft_config": lora(target_modules=["embed_tokens", "q_proj"])}),
    "tokens": ("untied", {"peft_config": lora(trainable_token_indices=[20, 21, 22])}),
    "bias": ("bias", {}),
    "bias, LoRA": ("bias", {"peft_config": lora(), "temperature": 0.7}),
    "head in float32": ("untied", {"cast_lm_head_to_fp32": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_same_loss_gradients_and_metrics(name: str, policies: dict[str, str], tmp_path: Path) -> None:
    policy, settings = CASES[name]
    trainer = build(policies[policy], tmp_path, settings, TRL)
    output = off_policy(first_batch(trainer)[0])
    want = loss_of(build(policies[policy], tmp_path, settings, TRL), output)
    for way in WAYS.values():
        ours = build(policies[policy], tmp_path, settings, way)
        assert (ours.fuses_loss, ours.leaves_padding_out) == tuple(way.values())
        assert_alike(loss_of(ours, output), want)


def test_dropout_of_an_adapter(policies: dict[str, str], tmp_path: Path) -> None:
    """The rows of TRL's batch, fused, lose what they lose on TRL's path; packed rows lose something else."""
    settings = {"peft_config": lora(lora_dropout=0.5)}
    output = off_policy(first_batch(build(policies["tied"], tmp_path, settings, TRL))[0])
    want, fused, packed = (
        loss_of(build(policies["tied"], tmp_path, settings, way), output) for way in (TRL, FUSED, PACKED)
    )
    assert_alike(fused, want)
    assert packed[0] != pytest.approx(want[0], rel=1e-5)


def test_an_adapters_reference_and_old_scores(policies: dict[str, str], tmp_path: Path) -> None:
    """TRL's passes with the adapter and without it, over one model; representations are of the first."""
    settings = {"peft_config": lora(), "steps_per_generation": 2, "per_device_train_batch_size": 4}
    found = []
    for way in (TRL, PACKED):
        output, captured = first_batch(
            build(policies["tied"], tmp_path, settings | {"reuse_rollout": False}, way),
        )
        found.append((output, captured["upsilon"]))
    (want, upsilon), (ours, our_upsilon) = found
    mask = want["completion_mask"] != 0
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        torch.testing.assert_close(ours[name][mask], want[name][mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_upsilon, upsilon, atol=1e-5, rtol=1e-5)
    assert (ours["old_per_token_logps"] - ours["ref_per_token_logps"])[mask].abs().max() > 0.1


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
@pytest.mark.filterwarnings("ignore:`share_prefix` needs")
def test_virtual_tokens_leave_both_off(
    kind: Any, policies: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"peft_config": kind(task_type="CAUSAL_LM", num_virtual_tokens=3)}
    with caplog.at_level(logging.INFO, logger="gcpo.own_loss"):
        trainer = make_trainer(policies["tied"], tmp_path, **settings)
    assert not trainer.fuses_loss and not trainer.leaves_padding_out
    lines = [record.getMessage() for record in caplog.records if record.name == "gcpo.own_loss"]
    for name, way in (("fused_loss", FUSED), ("padding_free", PACKED)):
        assert sum(f"`{name}` is off: the adapter" in line for line in lines) == 1
        with pytest.raises(ValueError, match=f"`{name}` must be False or None: the adapter .* tokens of its own"):
            make_trainer(policies["tied"], tmp_path, **settings, **way)


# ---------------------------------------------------------------------------------------------------------------------
# Half precision
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["tied", "untied"])
def test_a_head_in_float32_on_a_model_in_bfloat16(policy: str, policies: dict[str, str], tmp_path: Path) -> None:
    """The hidden states are the same rounded ones: nothing that is made of them differs by a rounding to bfloat16."""
    settings = {"cast_lm_head_to_fp32": True, "model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = build(policies[policy], tmp_path, settings, TRL)
    output = off_policy(first_batch(trainer)[0])
    want, ours = (loss_of(build(policies[policy], tmp_path, settings, way), output) for way in (TRL, FUSED))
    assert ours[0] == pytest.approx(want[0], rel=1e-5)
    assert ours[1].keys() == want[1].keys()
    for name, grad in want[1].items():
        assert ours[1][name].dtype == grad.dtype and grad.any()
        assert (ours[1][name] - grad).norm() < 2e-2 * grad.norm(), name


MODELS = pytest.mark.parametrize(("policy", "adapter"), [("tied", False), ("bias", True)], ids=["whole", "adapter"])


def assert_errs_no_more(found: dict[str, torch.Tensor]) -> None:
    """At most twice the error of TRL's path, which is there."""
    truth, plain, ours = found["truth"], found["plain"], found["ours"]
    error, allowed = (ours - truth).norm(), (plain - truth).norm()
    assert 0 < allowed < 0.2 * truth.norm() and error <= 2 * allowed, (error, allowed, truth.norm())


@MODELS
def test_autocast_errs_no_more_than_trls_path(
    policy: str, adapter: bool, policies: dict[str, str], tmp_path: Path
) -> None:
    """Losses and gradients with `bf16=True`, of several rollouts: the error of one number is often small by luck."""
    settings = {"peft_config": lora()} if adapter else {}
    trainers = {
        name: build(policies[policy], tmp_path, settings | {"bf16": name != "truth"}, way)
        for name, way in {"truth": TRL, "plain": TRL, "ours": OWN}.items()
    }
    outputs = [off_policy(first_batch(trainers["truth"])[0], seed) for seed in range(8)]
    values: dict[str, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}
    for name, trainer in trainers.items():
        losses = [loss_of(trainer, output) for output in outputs]  # gradients add up
        values[name] = torch.tensor([loss for loss, _, _ in losses])
        gradients[name] = torch.cat([grad.flatten() for grad in losses[-1][1].values()])
    assert_errs_no_more(values)
    assert_errs_no_more(gradients)


@MODELS
def test_runs_under_autocast(policy: str, adapter: bool, policies: dict[str, str], tmp_path: Path) -> None:
    """What accelerate puts around the forward stays with ours through steps, evaluations and checkpoints."""
    moved = {}
    for name, way in {"truth": TRL, "plain": TRL, "ours": OWN}.items():
        torch.manual_seed(0)
        settings = {"bf16": name != "truth", "optim": "sgd", "learning_rate": 0.05, "max_steps": 3, **way}
        settings |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        trainer = make_trainer(
            policies[policy],
            tmp_path / name,
            FixedRollouts,
            **LONG,
            **settings,
            per_device_eval_batch_size=4,
            peft_config=lora(init_lora_weights=False) if adapter else None,
            eval_dataset=prompts(2, conversational=True),
        )
        before = parameters(trainer.model)
        trainer.train()
        moved[name] = torch.cat([(x - before[key]).flatten() for key, x in parameters(trainer.model).items()])
    assert_errs_no_more(moved)
    assert not torch.equal(moved["ours"], moved["plain"])
