"""What GCPOTrainer adds to a step, against the same computed plainly from the model."""

import math
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_policy import (
    SHORT_TEMPLATES,
    count_low,
    make_tokenizer,
    options,
    parameters,
    prompts,
    save_policy,
    worst_difference,
)
from transformers import GPT2Config, GPT2LMHeadModel

from gcpo import GCPOConfig, GCPOTrainer
from gcpo_kernels import gcpo_loss, reference


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


TRAINER_ARGUMENTS = ("reward_funcs", "eval_dataset", "peft_config", "quantization_config")


# Everything the paper scores, so that it can be compared; the defaults draw and approximate.
EVERYTHING = {"context_attention": "full", "num_kl_contexts": None, "kl_fraction": 1.0}


def make_trainer(policy, tmp_path, trainer_class=GCPOTrainer, conversational=False, **overrides):
    settings = {
        **EVERYTHING,
        "num_colliders": 3,
        "collider_max_completion_length": 6,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        **SHORT_TEMPLATES,
        **overrides,
    }
    trainer_kwargs = {k: settings.pop(k) for k in TRAINER_ARGUMENTS if k in settings}
    return trainer_class(
        model=policy,
        args=GCPOConfig(**options(tmp_path, **settings)),
        train_dataset=prompts(conversational=conversational),
        **{"reward_funcs": count_low, **trainer_kwargs},
    )


def first_batch(trainer):
    """One generation batch before TRL shuffles it, with the groups it was made of."""
    captured, take = {}, trainer._take

    def keep(terms, output):
        # The advantages TRL computes, seen before the weights reach them.
        captured.update(groups=terms.groups, advantages=output["advantages"].clone(), upsilon=terms.upsilon)
        take(terms, output)

    trainer._take = keep
    trainer.model.train()
    rows = [trainer.train_dataset[k // trainer.num_generations] for k in range(8)]
    output = trainer._generate_and_score_completions(rows)
    return output, captured


@torch.no_grad()
def plain_scores(trainer, prompt, completion):
    """log pi of a completion's tokens and the hidden states that its tokens end in, from one unpadded row."""
    ids = torch.tensor([[*prompt, *completion]])
    trainer.model.eval()
    hidden = trainer.model.model(input_ids=ids).last_hidden_state[0]
    trainer.model.train()
    logits = trainer.model.lm_head(hidden) / trainer.temperature
    start = len(prompt)
    logp = torch.log_softmax(logits[start - 1 : -1], dim=-1)
    return logp.gather(-1, ids[0, start:, None])[:, 0], hidden[start:]


def represent(hidden, representation):
    return hidden[-1] if representation == "last" else hidden.mean(dim=0)


# Where z comes from: the generation, a pass of its own, TRL's own pass over the rollout (which num_iterations 2 makes).
SOURCES = {
    "generation": {},
    "conversational": {"conversational": True},
    "own pass": {"reuse_rollout": False},
    "one by one": {"reuse_rollout": False, "share_prefix": False},
    "TRL's pass": {"reuse_rollout": False, "num_iterations": 2},
    "generation, off-policy": {"num_iterations": 2},
    "by level": {"pack_tokens": 1},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("representation", ["last", "mean"])
@pytest.mark.parametrize("estimator", ["loo", "scored"])
def test_weights_and_scores(estimator, representation, source, policy, tmp_path):
    trainer = make_trainer(
        policy,
        tmp_path,
        estimator=estimator,
        representation=representation,
        temperature=0.7,
        **SOURCES[source],
    )
    output, captured = first_batch(trainer)
    groups, n, colliders = captured["groups"], 4, 3
    scored = trainer._account.tokens["scored_query"]
    assert (float(scored) > 0) == (source not in ("generation", "conversational", "by level"))
    off_policy = trainer.args.num_iterations == 2
    assert ("old_per_token_logps" in output) == off_policy
    z, context_z, collider_z = [], [], []
    for row in range(8):
        p, i = divmod(row, n)
        group = groups[p]
        y = group.candidates[i]
        logp, hidden = plain_scores(trainer, group.prompt_ids, y)
        if "query_logps" in output:
            torch.testing.assert_close(output["query_logps"][row, : len(y)], logp, atol=1e-5, rtol=1e-5)
        else:  # the loss takes the policy's own
            assert not off_policy and not float(scored)
        z.append(represent(hidden, representation))
        others = [candidate for k, candidate in enumerate(group.candidates) if k != i]
        for l in range(colliders):
            context = trainer._causal.builder.context(group.prompt, others, group.colliders[l])
            logp, hidden = plain_scores(trainer, context, y)
            torch.testing.assert_close(output["context_logps"][row, : len(y), l], logp, atol=1e-5, rtol=1e-5)
            context_z.append(represent(hidden, representation))
    for group in groups:
        for collider in group.colliders:
            _, hidden = plain_scores(trainer, group.prompt_ids, collider)
            collider_z.append(represent(hidden, representation))
    z = torch.stack(z).view(2, n, -1)
    if estimator == "loo":
        collider_z = torch.stack(collider_z).view(2, colliders, -1)
        # The mean of what the context shows, with c_0 and with the colliders averaged: the closed form's meaning.
        others = z.sum(dim=1, keepdim=True) - z
        difference = (others + collider_z[:, :1]) / n - (others + collider_z.mean(dim=1, keepdim=True)) / n
        target = difference + others / (n - 1)
    else:
        context_z = torch.stack(context_z).view(2, n, colliders, -1)
        target = context_z[:, :, 0] - context_z.mean(dim=2) + z.mean(dim=1, keepdim=True)
    expected = 2.0 * torch.cosine_similarity(z, target, dim=-1).flatten()
    torch.testing.assert_close(captured["upsilon"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output["advantages"], captured["advantages"] * expected, atol=1e-5, rtol=1e-5)
    assert captured["advantages"].abs().max() > 0.1
    assert list(trainer._logs["advantages"]) == pytest.approx(output["advantages"].tolist(), abs=1e-5)


REDUCTIONS = {
    "grpo": {},
    "bnpo": {},
    "dr_grpo": {},
    "dapo": {},
    "sapo": {},
    "luspo": {},
    "cispo": {"epsilon_high": 5.0},
}


@pytest.mark.parametrize("loss_type", REDUCTIONS)
def test_second_kl_term_is_added_to_trls_loss(loss_type, policy, tmp_path):
    trainer = make_trainer(policy, tmp_path, loss_type=loss_type, kappa=0.5, **REDUCTIONS[loss_type])
    output, _ = first_batch(trainer)
    trainer.current_gradient_accumulation_steps = 1
    with_term = trainer._compute_loss(trainer.model, output)
    grads = torch.autograd.grad(with_term, list(trainer.model.parameters()))
    plain_inputs = {k: v for k, v in output.items() if k != "context_logps"}
    without = trainer._compute_loss(trainer.model, plain_inputs)
    grads_without = torch.autograd.grad(without, list(trainer.model.parameters()))
    mask = output["completion_mask"].bool()
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    logp, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, mask.size(1))
    log_p = reference.causal_reference_logprob(logp.detach(), output["context_logps"])
    per_token = torch.where(mask, 0.5 * reference.k3(log_p - logp), 0.0)
    lengths = mask.sum(dim=1).clamp(min=1)
    expected = {
        "grpo": (per_token.sum(dim=1) / lengths).mean(),
        "sapo": (per_token.sum(dim=1) / lengths).mean(),
        "bnpo": per_token.sum() / mask.sum(),
        "dapo": per_token.sum() / mask.sum(),
        "cispo": per_token.sum() / mask.sum(),
        "dr_grpo": per_token.sum() / (8 * 10),
        "luspo": per_token.sum(dim=1).mean(),
    }[loss_type]
    assert expected > 1e-6
    torch.testing.assert_close(with_term - without, expected, atol=1e-7, rtol=1e-4)
    expected_grads = torch.autograd.grad(expected, list(trainer.model.parameters()))
    for ours, base, term in zip(grads, grads_without, expected_grads, strict=True):
        torch.testing.assert_close(ours - base, term, atol=1e-6, rtol=1e-3)
    assert max(term.abs().max() for term in expected_grads) > 1e-5


def test_kl_clip_bounds_both_terms(policy, tmp_path):
    """Beyond it a term is a constant, k3(kl_clip) or k3(-kl_clip), in TRL's KL and in the second one alike."""
    clip, settings = 0.3, {"loss_type": "grpo", "beta": 0.2, "kappa": 0.5, "use_bias_correction_kl": False}
    trainer = make_trainer(policy, tmp_path, kl_clip=clip, **settings)
    output, _ = first_batch(trainer)
    trainer.current_gradient_accumulation_steps = 1
    torch.manual_seed(0)
    output["ref_per_token_logps"] = output["ref_per_token_logps"] + torch.randn(output["completion_ids"].shape)
    given = {name: value.clone() for name, value in output.items()}
    weights = list(trainer.model.parameters())
    loss = trainer._compute_loss(trainer.model, output)
    grads = torch.autograd.grad(loss, weights)
    assert all(torch.equal(output[name], value) for name, value in given.items())  # an input is not written over
    mask = output["completion_mask"].bool()
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    logp, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, mask.size(1))
    log_p = reference.causal_reference_logprob(logp.detach(), output["context_logps"])
    differences = [output["ref_per_token_logps"] - logp, log_p - logp]
    terms = [difference.clamp(-clip, clip) for difference in differences]
    per_token = sum(w * (d.exp() - d - 1) for w, d in zip((0.2, 0.5), terms, strict=True))
    per_token = per_token - (logp - logp.detach()).exp() * output["advantages"][:, None]
    expected = (torch.where(mask, per_token, 0.0).sum(dim=1) / mask.sum(dim=1)).mean()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    for ours, wanted in zip(grads, torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)
    trainer.log({})
    logged = trainer.state.log_history[-1]
    for name, difference in zip(("kl_clipped", "kl_causal_clipped"), differences, strict=True):
        share = ((difference.abs() > clip) & mask).sum() / mask.sum()
        assert logged[f"gcpo/{name}"] == pytest.approx(share.item(), abs=1e-4) and 0 < share < 1


def test_evaluation_has_the_same_objective(policy, tmp_path):
    """`kl_clip` bounds the reference KL there too."""
    trainer = make_trainer(policy, tmp_path, kl_clip=0.1, beta=0.5, use_bias_correction_kl=False, loss_type="grpo")
    output, _ = first_batch(trainer)
    inputs = {k: v for k, v in output.items() if not k.startswith(("context", "query", "causal", "has_collider"))}
    inputs["ref_per_token_logps"] = output["ref_per_token_logps"] + 3.0
    trainer.model.eval()
    with torch.no_grad():
        trainer._compute_loss(trainer.model, inputs)
    assert trainer._metrics["eval"]["kl"] == [pytest.approx(math.expm1(0.1) - 0.1, rel=1e-3)]
    assert "reference_sums" not in trainer._metrics["train"]


class OwnLoss(GCPOTrainer):
    """The pattern of TRL's GMPO: a loss written anew, on TRL's inputs and log-probabilities."""

    adds_the_term = False

    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        length = inputs["completion_ids"].size(1)
        logp, _, _ = self._get_per_token_logps_and_entropies(model, ids, attention, length)
        loss = -(logp * inputs["advantages"][:, None] * inputs["completion_mask"]).sum()
        if self.adds_the_term and "context_logps" in inputs:
            loss = loss + self.causal_kl_loss(model, inputs, logp)
        return loss


@pytest.mark.parametrize("kappa", [0.5, 0.0])
def test_a_loss_of_ones_own(kappa, policy, tmp_path):
    """It adds the second KL term in a line; where it does not, a warning says so, once."""
    trainer = make_trainer(policy, tmp_path, OwnLoss, kappa=kappa)
    output, _ = first_batch(trainer)
    trainer.current_gradient_accumulation_steps = 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        without = trainer.compute_loss(trainer.model, output)
        trainer.compute_loss(trainer.model, output)
    said = [str(one.message) for one in caught if "causal_kl_loss" in str(one.message)]
    assert not any("clipped_reference" in str(one.message) for one in caught)
    assert len(said) == (kappa > 0)
    if kappa == 0:
        return
    assert "OwnLoss._compute_loss" in said[0] and "kappa=0" in said[0]
    clipping = make_trainer(policy, tmp_path, OwnLoss, kl_clip=0.1, beta=0.1)
    clipping.current_gradient_accumulation_steps = 1
    inputs = {**output, "ref_per_token_logps": output["context_logps"][..., 0]}
    clipping.model.train()
    with pytest.warns(UserWarning, match=r"OwnLoss._compute_loss leaves out `kl_clip`.*clipped_reference\(inputs"):
        clipping.compute_loss(clipping.model, inputs)
    trainer = make_trainer(policy, tmp_path, OwnLoss, kappa=kappa)
    trainer.adds_the_term = True
    trainer.current_gradient_accumulation_steps = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with_term = trainer.compute_loss(trainer.model.train(), output)
    mask = output["completion_mask"].bool()
    plain = make_trainer(policy, tmp_path, kappa=kappa)
    plain.current_gradient_accumulation_steps = 1
    whole = plain._compute_loss(plain.model.train(), output)
    rest = plain._compute_loss(plain.model, {k: v for k, v in output.items() if k != "context_logps"})
    assert whole - rest > 1e-6 and mask.any()
    torch.testing.assert_close(with_term - without, whole - rest, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "changed",
    [
        {"context_attention": None, "num_kl_contexts": 1, "kl_fraction": 0.25},
        {"conversational": True},
        {"reward_funcs": [count_low, lambda completions, **kwargs: [0.5] * len(completions)]},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "num_iterations": 2},
        {"mask_truncated_completions": True},
        {"num_colliders": 1},
        {"estimator": "scored", "kappa": 0.0},
        {"estimator": "none", "kappa": 0.1},
        {"similarity": "gaussian", "baseline": "mean"},
        {"candidate_context_tokens": 2},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"context_attention": "parallel", "bf16": True},
        {"share_prefix": False},
        {"model_init_kwargs": {"attn_implementation": "eager"}},
        {"pad_to_multiple_of": 8},
        {"beta": 0.04, "num_iterations": 2},
        {"num_generations": 2},
        {"log_completions": True},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_trains_with(changed, policy, tmp_path):
    trainer = make_trainer(policy, tmp_path, **changed)
    before = parameters(trainer.model)
    trainer.train()
    after = parameters(trainer.model)
    assert worst_difference(before, after) > 0
    assert all(value.isfinite().all() for value in after.values())
    logged = trainer.state.log_history[0]
    for phase in ("rollout", "rewards", "scoring", "colliders", "contexts", "loss"):
        assert logged[f"gcpo/seconds/{phase}"] >= 0
    assert logged["gcpo/tokens/generated_colliders"] > 0
    causal = trainer.args
    if causal.uses_weights:
        assert logged["gcpo/upsilon/fallback"] == 0
        assert abs(logged["gcpo/upsilon/max"]) <= 2.0001
        assert {"gcpo/projection/cosine", "gcpo/projection/norm_ratio", "gcpo/upsilon/near_zero"} <= logged.keys()
    if causal.kappa > 0:
        assert logged["gcpo/tokens/scored_contexts"] > 0
        kl = [entry["gcpo/kl_causal"] for entry in trainer.state.log_history if "gcpo/kl_causal" in entry]
        assert kl and all(value >= 0 for value in kl)
        # With one collider p' is the old policy's probability, and on-policy the term is 0.
        assert max(kl) > 0 or causal.num_colliders == 1
    else:
        assert "gcpo/kl_causal" not in logged


def test_second_kl_is_logged_as_the_mean_of_the_scored_tokens(policy, tmp_path, monkeypatch):
    """A row at a time, of which one in four is scored, and two steps in a log entry."""
    seen = []

    def keep(*args, **kwargs):
        loss, metrics = gcpo_loss(*args, **kwargs)
        counted = args[2] * (kwargs["kappa_weights"] != 0).unsqueeze(1)
        seen.append((metrics["kl_causal"].item(), metrics["proj_clamped"].item(), counted.sum().item()))
        return loss, metrics

    monkeypatch.setattr("gcpo.causal.loss.gcpo_loss", keep)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "logging_steps": 2}
    trainer = make_trainer(policy, tmp_path, kl_fraction=0.25, **split)
    trainer.train()
    counts = [count for _, _, count in seen]
    assert len(seen) == 16 and counts.count(0) == 12
    logged = trainer.state.log_history[0]
    for place, name in enumerate(("gcpo/kl_causal", "gcpo/proj_clamped")):
        expected = sum(row[place] * row[2] for row in seen) / sum(counts)
        assert logged[name] == pytest.approx(expected) and expected > 0
        assert name not in trainer.state.log_history[-1]  # the end of training, where nothing is scored
    # What is NaN once does not hide the rest.
    trainer._metrics["train"]["causal_sums"] = [[float("nan"), 1.0, 0.0, 5.0], [6.0, 1.0, 0.0, 4.0]]
    trainer.log({})
    assert trainer.state.log_history[-1]["gcpo/kl_causal"] == 1.5


def test_arguments_may_be_given_as_to_grpo_trainer(policy, tmp_path):
    """By position, as far as TRL's own go; a second value or an unknown name is TRL's own TypeError."""
    config = GCPOConfig(**options(tmp_path, **SHORT_TEMPLATES, max_steps=1))
    trainer = GCPOTrainer(policy, count_low, config, prompts(), prompts(4))
    assert len(trainer.train_dataset) == 8 and len(trainer.eval_dataset) == 4
    with pytest.raises(TypeError, match="train_dataset"):
        GCPOTrainer(policy, count_low, config, prompts(), train_dataset=prompts())
    with pytest.raises(TypeError, match="dataset"):
        GCPOTrainer(policy, count_low, config, dataset=prompts())


def test_learned_positions_are_warned_of(tmp_path):
    tokenizer = make_tokenizer()
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 512, "vocab_size": len(tokenizer)}
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = GCPOConfig(**options(tmp_path, **SHORT_TEMPLATES))
    arguments = {"reward_funcs": count_low, "train_dataset": prompts(), "processing_class": tokenizer}
    with pytest.warns(UserWarning, match="gpt2 learns an embedding for each position"):
        GCPOTrainer(GPT2LMHeadModel(GPT2Config(**sizes, **special)), args=config, **arguments)


@pytest.mark.hazard(6)
def test_peft_reference_is_the_disabled_adapter(policy, tmp_path):
    """Seen in trl#4612."""
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(policy, tmp_path, peft_config=lora, beta=0.1, learning_rate=1e-2, num_iterations=2)
    before = parameters(trainer.model)
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert max(entry.get("kl", 0.0) for entry in trainer.state.log_history) > 0
    assert trainer.state.log_history[0]["gcpo/upsilon/fallback"] == 0


def test_evaluation_is_grpos(policy, tmp_path):
    """Evaluation costs what GRPO's does: no colliders, no contexts, and nothing added to training's counters."""
    evaluated = {"eval_dataset": prompts(1), "per_device_eval_batch_size": 4, "eval_strategy": "steps", "eval_steps": 1}
    shown = {"log_completions": True, "num_completions_to_print": 0}
    trainer = make_trainer(policy, tmp_path, **evaluated, **shown)
    trainer.train()
    evaluation = next(entry for entry in trainer.state.log_history if "eval_reward" in entry)
    assert [name for name in evaluation if "gcpo" in name] == ["eval_gcpo/groups_without_reward"]
    # Of 8 rows, those of the evaluation are the last 4; they have no weights.
    table = pd.read_parquet(Path(trainer.args.output_dir) / "completions" / "completions_00001.parquet")
    for column in ("upsilon", "plain_advantage"):
        assert list(table[column].isna()) == [False] * 4 + [True] * 4
    trained = table[:4]
    assert list(trained["advantage"]) == pytest.approx(list(trained["plain_advantage"] * trained["upsilon"]))
    tokens = [e["gcpo/tokens/generated"] for e in trainer.state.log_history if "gcpo/tokens/generated" in e]
    assert len(tokens) == 2 and max(tokens) <= 8 * 10


def test_account_adds_up(policy, tmp_path):
    trainer = make_trainer(policy, tmp_path, max_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    phases = [value for name, value in logged.items() if name.startswith("gcpo/seconds/")]
    assert sum(phases) == pytest.approx(logged["step_time"], rel=0.1, abs=0.03)
    assert min(phases) >= 0
    # 8 candidates, 4 at a time per prompt; each is scored 3 times under contexts, and represented by the generation.
    assert logged["gcpo/tokens/scored_query"] == 0
    assert logged["gcpo/tokens/scored_contexts"] > 3 * (logged["gcpo/tokens/generated"] + 8)


@pytest.mark.parametrize("conversational", [False, True])
def test_reward_of_the_colliders(conversational, policy, tmp_path):
    """Their mean reward is logged, by the same functions; columns those log stay the candidates'."""

    def with_columns(completions, log_extra, log_metric, **kwargs):
        log_extra("length", [len(c) for c in completions])
        log_metric("seen", len(completions))
        return count_low(completions)

    trainer = make_trainer(
        policy,
        tmp_path,
        conversational=conversational,
        log_collider_reward=True,
        reward_funcs=[with_columns, count_low],
        reward_weights=[1.0, 0.5],
    )
    _, captured = first_batch(trainer)
    texts = [trainer._tokenizer.decode(c, skip_special_tokens=True) for g in captured["groups"] for c in g.colliders]
    (logged,) = trainer._metrics["train"]["gcpo/colliders/reward"]
    assert logged == pytest.approx(1.5 * sum(count_low(texts)) / len(texts))
    assert len(trainer._logs["extra"]["length"]) == 8
    assert trainer._metrics["train"]["seen"] == [8]


def test_colliders_without_a_reward_are_left_out_of_its_mean(policy, tmp_path):
    """As `reward` leaves out candidates; and without any there is no mean."""

    def one(completions, **kwargs):
        return [None if k % 3 == 0 else 1.0 for k in range(len(completions))]

    def other(completions, **kwargs):
        return [(float("-inf"), None, 2.0)[k % 3] for k in range(len(completions))]

    def none(completions, **kwargs):
        return [None] * len(completions)

    for rewards, weights, expected in (([one, other], [1.0, 0.5], [1.5]), (none, None, [])):
        options = {"reward_funcs": rewards, "reward_weights": weights, "log_collider_reward": True}
        trainer = make_trainer(policy, tmp_path, **options)
        first_batch(trainer)
        assert trainer._metrics["train"]["gcpo/colliders/reward"] == expected
