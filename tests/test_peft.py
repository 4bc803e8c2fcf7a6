"""Adapters: what trains, what the reference is, what the adapted model scores, what is refused, and a frozen head."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from test_trainer_causal import first_batch, make_trainer
from tiny_policy import parameters, save_policy
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM
from trl import get_peft_config, get_quantization_config

from gcpo.cli import main
from gcpo.commands.train import parse
from gcpo_kernels import linear_gcpo_loss


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)


def lora(**changed: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changed})


def shake(model: torch.nn.Module) -> None:
    """Give every trainable parameter a value that shows: an adapter starts as a product with zero."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def plain_scores(model: torch.nn.Module, output: dict[str, Any]) -> torch.Tensor:
    """Log-probabilities of the completions from the model's own logits."""
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    length = output["completion_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, output["completion_ids"].unsqueeze(-1)).squeeze(-1)


def trainer_scores(trainer: Any, output: dict[str, Any]) -> torch.Tensor:
    """The same as the trainer takes them for its loss."""
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    scores = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, output["completion_ids"].shape[1])[0]
    assert scores.requires_grad
    return scores.detach()


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"estimator": "scored"},
        {"estimator": "sampled"},
        {"context_attention": "parallel"},
        {"causal_policy_context": "context", "gradient_checkpointing": True},
        {"loss_type": "dapo", "num_iterations": 2, "share_prefix": False},
    ],
    ids=["loo", "scored", "sampled", "parallel", "context", "dapo"],
)
def test_only_the_adapter_trains(changed: dict[str, Any], policy: str, tmp_path: Path) -> None:
    trainer = make_trainer(policy, tmp_path, peft_config=lora(), kappa=0.5, learning_rate=1e-2, **changed)
    before = parameters(trainer.model)
    trainer.train()
    after = parameters(trainer.model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if "lora_" in name}
    assert all(value.isfinite().all() for value in after.values())
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and all(entry["gcpo/kl_causal"] > 0 for entry in logged)
    assert logged[0]["gcpo/upsilon/fallback"] == 0


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_read_with_every_row(kind: Any, policy: str, tmp_path: Path) -> None:
    """Prompt and prefix tuning put tokens of their own before a forward: nothing is shared between rows then."""
    peft_config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.warns(UserWarning, match="share_prefix"):
        trainer = make_trainer(policy, tmp_path, peft_config=peft_config, kappa=0.5, max_steps=1)
    output, _ = first_batch(trainer)
    mask = output["completion_mask"].bool()
    torch.testing.assert_close(output["query_logps"][mask], plain_scores(trainer.model, output)[mask])
    trainer.train()
    assert trainer.state.log_history[0]["gcpo/kl_causal"] > 0


def test_the_reference_is_the_base_model(policy: str, tmp_path: Path) -> None:
    trainer = make_trainer(policy, tmp_path, peft_config=lora(), beta=0.1)
    assert trainer.ref_model is None
    shake(trainer.model)
    output, _ = first_batch(trainer)
    mask = output["completion_mask"].bool()
    base = plain_scores(AutoModelForCausalLM.from_pretrained(policy), output)
    torch.testing.assert_close(output["ref_per_token_logps"][mask], base[mask], atol=1e-4, rtol=1e-4)
    adapted = plain_scores(trainer.model, output)
    assert (adapted - base)[mask].abs().max() > 0.1
    torch.testing.assert_close(trainer_scores(trainer, output)[mask], adapted[mask], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("context_attention", ["full", "parallel"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_contexts_are_scored_by_the_adapted_model(
    dropout: float, context_attention: str, policy: str, tmp_path: Path
) -> None:
    """The same rollout, weights and scores as from a model that the adapter was merged into, without its dropout."""
    settings = {"estimator": "scored", "context_attention": context_attention}
    adapted = make_trainer(policy, tmp_path, peft_config=lora(), **settings)
    shake(adapted.model)
    merged = adapted.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    adapted.processing_class.save_pretrained(tmp_path / "merged")
    again = make_trainer(policy, tmp_path, peft_config=lora(lora_dropout=dropout), **settings)
    shake(again.model)
    outputs = []
    for trainer in (again, make_trainer(str(tmp_path / "merged"), tmp_path, **settings)):
        torch.manual_seed(11)
        outputs.append(first_batch(trainer))
    (left, left_seen), (right, right_seen) = outputs
    assert torch.equal(left["completion_ids"], right["completion_ids"])
    torch.testing.assert_close(left_seen["upsilon"], right_seen["upsilon"], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(left["context_logps"], right["context_logps"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "changed",
    [
        {"target_modules": "all-linear"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=["all-linear", "whole head", "embeddings"],
)
def test_what_is_scored_is_what_the_adapted_model_says(
    changed: dict[str, Any], tied: bool, policy: str, untied: str, tmp_path: Path
) -> None:
    """Log-probabilities come from `lm_head.weight`, past its forward: whatever wraps it must be in that weight."""
    trainer = make_trainer(policy if tied else untied, tmp_path, peft_config=lora(**changed))
    shake(trainer.model)
    output, _ = first_batch(trainer)
    mask = output["completion_mask"].bool()
    expected = plain_scores(trainer.model, output)
    torch.testing.assert_close(trainer_scores(trainer, output)[mask], expected[mask], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changed", [{"target_modules": ["q_proj", "lm_head"]}, {"target_parameters": ["lm_head.weight"]}]
)
def test_an_adapter_on_the_head_is_refused(changed: dict[str, Any], untied: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"PEFT adapter to `lm_head` is not supported.*Remove `'lm_head'` from your"):
        make_trainer(untied, tmp_path, peft_config=lora(**changed))


def test_some_tokens_train_unless_they_are_the_heads_too(policy: str, untied: str, tmp_path: Path) -> None:
    trainer = make_trainer(untied, tmp_path, peft_config=lora(trainable_token_indices=[20, 21, 22]))
    shake(trainer.model)
    output, _ = first_batch(trainer)
    mask, expected = output["completion_mask"].bool(), plain_scores(trainer.model, output)
    torch.testing.assert_close(trainer_scores(trainer, output)[mask], expected[mask], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"`trainable_token_indices`.*`lm_head`.*tied"):
        make_trainer(policy, tmp_path, peft_config=lora(trainable_token_indices=[20, 21, 22]))


def test_an_adapter_on_the_head_is_refused_on_the_command_line(
    untied: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model_name_or_path", untied, "--dataset_name", "reasoning_gym:chain_sum", "--task_size", "4"]
    flags += ["--no_task_conversational", "--use_peft", "--lora_target_modules", "q_proj", "lm_head"]
    flags += ["--output_dir", str(tmp_path), "--num_generations", "2", "--per_device_train_batch_size", "2"]
    flags += ["--collider_max_completion_length", "4", "--max_completion_length", "4", "--num_colliders", "2"]
    assert main(["train", *flags]) == 2
    error = capsys.readouterr().err
    assert "PEFT adapter to `lm_head` is not supported" in error and "Traceback" not in error


@pytest.mark.parametrize("kappa", [0.0, 0.06])
def test_a_frozen_head_costs_one_product_less(kappa: float) -> None:
    """Logits, their gradient in the hidden states and in the weight: three products of one tile, and two."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows, length, hidden_size, vocabulary = 4, 6, 16, 50
    hidden, weight, advantages = randn(rows, length, hidden_size), randn(vocabulary, hidden_size), randn(rows)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    old, contexts = -randn(rows, length).abs() - 3, -randn(rows, length, 2).abs() - 3
    products, gradients = {}, {}
    for frozen in (False, True):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        with profile(
            activities=[ProfilerActivity.CPU], with_flops=True
        ) as profiler:  # sees inside registered operators
            loss, _ = linear_gcpo_loss(
                x, w, ids, advantages, torch.ones(rows, length), old_logp=old, context_logp=contexts, kappa=kappa
            )
            loss.backward()
        names = ("aten::mm", "aten::addmm", "aten::addmm_")
        products[frozen] = sum(event.name in names for event in profiler.events())
        gradients[frozen] = x.grad
        assert (w.grad is None) == frozen
    assert products == {False: 3, True: 2}
    assert torch.equal(gradients[True], gradients[False]) and gradients[True].abs().max() > 0


def test_qlora_flags_are_read() -> None:
    """The quantisation and the adapter that `gcpo train` hands to TRL, from the flags of `trl grpo`."""
    _, _, model_args, _, _ = parse(
        "--model_name_or_path m --load_in_4bit --use_bnb_nested_quant --bnb_4bit_quant_type nf4 --dtype bfloat16 "
        "--use_peft --lora_r 8 --lora_alpha 16 --output_dir out".split()
    )
    adapter = get_peft_config(model_args)
    assert (adapter.r, adapter.lora_alpha) == (8, 16)
    if importlib.util.find_spec("bitsandbytes") is None:
        return  # the next one checks for the package
    quantization = get_quantization_config(model_args)
    assert quantization.load_in_4bit and quantization.bnb_4bit_quant_type == "nf4"
    assert quantization.bnb_4bit_use_double_quant and quantization.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_qlora_trains(untied: str, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    trainer = make_trainer(
        untied, tmp_path, peft_config=lora(), quantization_config=quantization, beta=0.1, learning_rate=1e-2
    )
    before = parameters(trainer.model)
    trainer.train()
    after = parameters(trainer.model)
    assert any(value.dtype == torch.uint8 for value in after.values())
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if "lora_" in name}
    assert trainer.state.log_history[0]["gcpo/upsilon/fallback"] == 0
