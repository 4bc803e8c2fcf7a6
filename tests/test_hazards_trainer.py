"""Bug classes of docs/hazards.md at the trainer's level: heads, adapters, temperature, accumulation, tools, experts."""

import re
from pathlib import Path

import pytest
import torch
from fixed_rollouts import FixedRollouts, KeepGradients
from test_trainer_causal import first_batch, make_trainer
from tiny_policy import count_low, make_tokenizer, options, parameters, prompts, save_policy, worst_difference
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, Qwen2MoeConfig
from trl import GRPOConfig, GRPOTrainer

from gcpo import GCPOConfig, GCPOTrainer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


def save_other(folder, config_class, **extra):
    """A policy of another family, with the tokenizer of `save_policy`."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        initializer_range=0.4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **extra,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def scores_of(trainer, prompt, completion):
    """log pi of a completion's tokens, from the logits of the model's own forward on one unpadded row."""
    ids = torch.tensor([[*prompt, *completion]])
    trainer.model.eval()
    logits = trainer.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / trainer.temperature
    trainer.model.train()
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]


def policy_scores(trainer, output):
    """(B, T) of the pass that the loss is computed from."""
    mask = output["completion_mask"]
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    attended = torch.cat([output["prompt_mask"], mask], dim=1)
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, attended, mask.size(1))[0].detach()


def check_scores(trainer):
    """Scores under the query and under every context are those of the model's logits."""
    output, captured = first_batch(trainer)
    n = trainer.num_generations
    scored = 0
    query = output.get("query_logps", policy_scores(trainer, output))
    for row in range(len(query)):
        group = captured["groups"][row // n]
        completion = group.candidates[row % n]
        want = scores_of(trainer, group.prompt_ids, completion)
        torch.testing.assert_close(query[row, : len(completion)], want, atol=5e-5, rtol=1e-5)
        others = [candidate for k, candidate in enumerate(group.candidates) if k != row % n]
        for l in range(sum(group.has_content)):
            context = trainer._causal.builder.context(group.prompt, others, group.colliders[l])
            want = scores_of(trainer, context, completion)
            got = output["context_logps"][row, : len(completion), l]
            torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-5)
            scored += 1
    assert scored >= 8
    return output


@pytest.mark.hazard(3, 4, 6)
def test_the_output_layer_is_reached_through_the_model_alone():
    """No source of the trainer reads or calls the output layer: whatever shards it (trl#5891 under ZeRO-3,
    torchtune#2507 under FSDP2) or wraps it (trl#4612) stays in charge of it."""
    touches = re.compile(r"\.lm_head\b|get_output_embeddings\(\)[.(]|full_tensor|GatheredParameters")
    sources = {path: path.read_text() for path in (ROOT / "gcpo").rglob("*.py")}
    assert "fused_lm_head=True" in "".join(sources.values())
    assert [path for path, text in sources.items() if touches.search(text)] == []


@pytest.mark.hazard(5)
def test_tied_embeddings_stay_tied(policy, tmp_path):
    """After training, in memory and in the checkpoint (verl#7835)."""
    trainer = make_trainer(policy, tmp_path)
    before = parameters(trainer.model)
    trainer.train()
    assert worst_difference(before, parameters(trainer.model)) > 0
    assert trainer.model.lm_head.weight is trainer.model.model.embed_tokens.weight
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert worst_difference(parameters(trainer.model), parameters(again)) == 0


@pytest.mark.hazard(6)
def test_an_adapter_on_the_output_layer_is_refused(tmp_path):
    """It would be left out of the fused head's log-probabilities (trl#4612)."""
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    untied = save_policy(tmp_path / "untied", tie_word_embeddings=False)
    with pytest.raises(ValueError, match="lm_head"):
        make_trainer(untied, tmp_path, peft_config=lora)


@pytest.mark.hazard(6)
def test_an_output_layer_trained_beside_an_adapter_is_the_one_that_scores(tmp_path):
    """PEFT's copy of it gets the gradient and gives the log-probabilities (trl#4612: the original would do both)."""
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    untied = save_policy(tmp_path / "untied", tie_word_embeddings=False)
    trainer = make_trainer(untied, tmp_path, peft_config=lora, learning_rate=1e-2)
    trainer.train()
    head = trainer.model.get_output_embeddings()
    assert (head.modules_to_save["default"].weight - head.original_module.weight).abs().max() > 1e-3
    output, captured = first_batch(trainer)
    completion = captured["groups"][0].candidates[0]
    want = scores_of(trainer, captured["groups"][0].prompt_ids, completion)
    query = output.get("query_logps", policy_scores(trainer, output))
    torch.testing.assert_close(query[0, : len(completion)], want, atol=5e-5, rtol=1e-5)


FAMILIES = {
    "gemma2": (Gemma2Config, {"final_logit_softcapping": 2.0, "layer_types": ["full_attention"] * 2}),
    "cohere": (CohereConfig, {"logit_scale": 0.25}),
    "granite": (GraniteConfig, {"logits_scaling": 4.0}),
}


@pytest.mark.hazard(7)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_models_with_softcap_or_scale(family, tmp_path):
    """Under the query and under contexts, shared prefixes included, they are those of `model(...).logits`
    (unsloth#11277)."""
    config_class, extra = FAMILIES[family]
    trainer = make_trainer(save_other(tmp_path / family, config_class, **extra), tmp_path)
    check_scores(trainer)


@pytest.mark.hazard(23)
@pytest.mark.parametrize("attention", ["full", "parallel"])
def test_temperature_reaches_every_score_once(attention, policy, tmp_path):
    """At T = 0.6: policy, old policy, reference and contexts (trl#4159); on policy the ratio is 1."""
    extra = {"context_attention": attention} if attention == "parallel" else {"num_iterations": 2, "beta": 0.1}
    trainer = make_trainer(policy, tmp_path, temperature=0.6, **extra)
    assert trainer.temperature == 0.6
    output = check_scores(trainer) if attention == "full" else first_batch(trainer)[0]
    mask, logp = output["completion_mask"].bool(), policy_scores(trainer, output)
    named = [name for name in ("query_logps", "old_per_token_logps", "ref_per_token_logps") if name in output]
    for name in named:
        assert ((logp - output[name]).exp() - 1)[mask].abs().max() < 2e-5, name
    if attention == "full":
        assert {"old_per_token_logps", "ref_per_token_logps"} <= set(named)


@pytest.mark.hazard(25)
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_accumulation_does_not_change_gradients(loss_type, policy, tmp_path):
    """The same 8 rows in 1, 2 and 4 micro-batches (ms-swift#10117), and with more than one optimizer step for each
    generation (trl#5619: steps_per_generation is not the number of micro-batches)."""
    results = {}
    for micro, steps in ((1, 1), (2, 2), (4, 4), (1, 2), (2, 4)):
        rows = 8 // micro * (steps // micro)
        settings = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "shuffle_dataset": False}
        settings |= {"kappa": 0.5, "beta": 0.1, "learning_rate": 0.5, "max_steps": 1, "loss_type": loss_type}
        trainer = make_trainer(
            policy,
            tmp_path,
            FixedRollouts,
            per_device_train_batch_size=8 // micro,
            gradient_accumulation_steps=micro,
            steps_per_generation=steps,
            **settings,
        )
        keep = KeepGradients()
        trainer.add_callback(keep)
        trainer.train()
        results[micro, steps] = keep.gradients
        assert all(torch.isfinite(x).all() for x in keep.gradients.values()), rows
    want = results[1, 1]
    assert max(x.abs().max() for x in want.values()) > 1e-3
    if loss_type == "bnpo":  # TRL's own: a mean over each micro-batch's tokens, so the split shows
        return
    for layout in ((2, 2), (4, 4)):
        assert worst_difference(want, results[layout]) < 1e-5, layout
    # Half of 16 rows each: another gradient, of the same size whatever the split.
    assert worst_difference(results[1, 2], results[2, 4]) < 2.0
    ratio = sum(x.norm() for x in results[1, 2].values()) / sum(x.norm() for x in want.values())
    assert 0.2 < ratio < 5


@pytest.mark.hazard(29)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo", "luspo"])
def test_tool_tokens_take_no_part_in_the_second_kl_term(loss_type, policy, tmp_path):
    """Whatever they score, under any context (trl#4975); leaving them out changes what is left."""
    trainer = make_trainer(policy, tmp_path, loss_type=loss_type, kappa=0.5)
    output, _ = first_batch(trainer)
    trainer.current_gradient_accumulation_steps = 1
    tools = torch.zeros_like(output["completion_mask"])
    tools[:, 1:3] = 1
    output["tool_mask"] = 1 - tools
    assert ((tools * output["completion_mask"]).sum(dim=1) > 0).any()

    def loss_and_gradient(inputs):
        loss = trainer._compute_loss(trainer.model, inputs)
        return loss.detach(), torch.autograd.grad(loss, list(trainer.model.parameters()))

    clean = loss_and_gradient(output)
    changed = dict(output)
    for name in {"query_logps", "context_logps"} & set(output):
        changed[name] = output[name].clone()
        changed[name][tools.bool()] = torch.nan
    dirty = loss_and_gradient(changed)
    assert torch.isfinite(clean[0])
    assert torch.equal(clean[0], dirty[0])
    assert all(torch.equal(x, y) for x, y in zip(clean[1], dirty[1], strict=True))
    whole = loss_and_gradient({k: v for k, v in output.items() if k != "tool_mask"})
    assert whole[0] != clean[0]


@pytest.mark.hazard(31)
@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_the_load_balancing_loss_is_included(kappa, tmp_path):
    """A mixture of experts: GCPO with its parts off is GRPO, that loss included (trl#7009); the second KL term is
    added to it."""
    moe = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": 0.5,
    }
    folder = save_other(tmp_path / "moe", Qwen2MoeConfig, **moe)
    shared = options(tmp_path, learning_rate=1e-2)

    def trained(trainer_class, config):
        trainer = trainer_class(model=folder, reward_funcs=count_low, args=config, train_dataset=prompts())
        assert trainer.aux_loss_enabled == (config.router_aux_loss_coef != 0.0)
        trainer.train()
        return parameters(trainer.model)

    grpo = trained(GRPOTrainer, GRPOConfig(**shared))
    without = trained(GRPOTrainer, GRPOConfig(**shared, router_aux_loss_coef=0.0))
    routers = [name for name in grpo if name.endswith("mlp.gate.weight")]
    assert routers
    assert max((grpo[k] - without[k]).abs().max() for k in routers) > 1e-3
    if kappa == 0.0:
        gcpo = trained(GCPOTrainer, GCPOConfig(**shared, kappa=0.0, estimator="none"))
        assert worst_difference(grpo, gcpo) <= 1e-5
        return
    gcpo = trained(GCPOTrainer, GCPOConfig(**shared, kappa=kappa, estimator="none"))
    gcpo_without = trained(GCPOTrainer, GCPOConfig(**shared, kappa=kappa, estimator="none", router_aux_loss_coef=0.0))
    assert max((gcpo[k] - gcpo_without[k]).abs().max() for k in routers) > 1e-3
