"""The fidelity benchmark: its sampler is the model's, its variants are the trainer's, its measures are right."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from tiny_policy import save_policy
from transformers import AutoModelForCausalLM

from bench import fidelity
from bench.agreement import compare_log_p, compare_upsilon, pearson, spearman
from bench.context_samples import sample_under
from bench.fidelity_runs import Lab
from bench.overhead_runs import prepare_model
from gcpo.causal.estimators import estimate_weights

EOS = 1


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(save_policy(tmp_path_factory.mktemp("policy"))).eval()


CONTEXTS = [[7, 8, 9, 10, 20, 21, 22], [7, 8, 9, 30], [7, 8, 9, 10, 40]]


def test_samples_have_the_states_of_plain_forwards(policy):
    generator = torch.Generator().manual_seed(0)
    drawn = sample_under(policy, CONTEXTS, 5, 30, 1.0, [EOS], generator)
    lengths = {len(ids) for row in drawn.outputs for ids in row}
    assert len(lengths) >= 3 and max(lengths) <= 30  # some ended before others
    for c, context in enumerate(CONTEXTS):
        for s, ids in enumerate(drawn.outputs[c]):
            assert EOS not in ids[:-1] and (ids[-1] == EOS or len(ids) == 30)
            with torch.no_grad():
                hidden = policy.base_model(torch.tensor([context + ids])).last_hidden_state[0, -len(ids) :]
            torch.testing.assert_close(drawn.last[c, s], hidden[-1], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(drawn.mean[c, s], hidden.mean(dim=0), atol=1e-5, rtol=1e-5)
    assert drawn.tokens_read == 3 + sum(len(context) - 3 for context in CONTEXTS)
    assert drawn.tokens_sampled == sum(len(ids) for row in drawn.outputs for ids in row)


@pytest.mark.parametrize("contexts", [CONTEXTS, CONTEXTS[:1], [[7], [7, 8]]], ids=["three", "one", "prefix"])
def test_nearly_cold_samples_are_greedy(policy, contexts):
    drawn = sample_under(policy, contexts, 2, 8, 1e-4, [EOS], torch.Generator().manual_seed(0))
    for context, outputs in zip(contexts, drawn.outputs, strict=True):
        greedy = policy.generate(torch.tensor([context]), do_sample=False, max_new_tokens=8, eos_token_id=EOS)
        assert outputs == [greedy[0, len(context) :].tolist()] * 2


def test_samples_follow_the_policy(policy):
    m, temperature = 1500, 0.7
    drawn = sample_under(policy, CONTEXTS[:1], m, 1, temperature, [EOS], torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.softmax(policy(torch.tensor(CONTEXTS[:1])).logits[0, -1] / temperature, dim=-1)
    counts = torch.bincount(torch.tensor(drawn.outputs[0]).flatten(), minlength=len(expected)) / m
    assert ((counts - expected).abs() <= 5 * (expected * (1 - expected) / m).sqrt() + 2 / m).all()
    assert expected.max() > 0.05


def test_correlations():
    x = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert pearson(x, 5 - 2 * x) == pytest.approx(-1)
    assert pearson(x, torch.tensor([1.0, 0.0, 0.0, 1.0])) == pytest.approx(6 / (50 * 4) ** 0.5)
    assert math.isnan(pearson(x, torch.full((4,), 0.1)))
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])) == pytest.approx(0.75**0.5)


def test_agreement_of_upsilon():
    truth = torch.tensor([[1.0, 1.5, 2.0], [0.5, 0.6, 0.7]])
    advantages = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    base = torch.zeros(2, 3)
    shifted = truth + torch.tensor([[0.1], [-0.3]])
    same = compare_upsilon(shifted, truth, advantages, (base, base))
    assert same["pearson_within"] == pytest.approx(1) and same["pearson"] < 1
    assert same["mad"] == pytest.approx(0.2) and same["mad_within"] == pytest.approx(0, abs=1e-6)
    assert same["spearman_within"] == pytest.approx(1) and same["sign_b"] == same["order_b"] == 1
    turned = compare_upsilon(truth * torch.tensor([[-1.0, 1.0, 1.0], [1, 1, 1]]), truth, advantages, (base, truth))
    assert turned["sign_b"] == 0.5  # of two candidates with an advantage, one changed its sign
    # True B is 1, -1.5, 0; ours is -1, -1.5, 0: of three pairs (each seen twice), first against third is turned.
    assert turned["order_b"] == pytest.approx(2 / 3)
    assert math.isnan(turned["pearson_projection"])


def test_agreement_of_log_p():
    query = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    truth = query + torch.tensor([1.0, -1.0, 0.001, 0.5])
    ours = query + torch.tensor([0.5, 1.0, -0.001, 0.5])
    row = compare_log_p(ours, truth, query, torch.tensor([True, False, False, False]))
    assert row["sign_d"] == pytest.approx(2 / 3) and row["large"] == 0.75  # the third is too small to have a sign
    weights = [1.0, 1 - math.exp(-1.0), math.exp(0.001) - 1, math.exp(0.5) - 1]
    assert row["sign_d_weighted"] == pytest.approx((weights[0] + weights[3]) / sum(weights), rel=1e-4)
    assert row["mad"] == pytest.approx(2.502 / 4, rel=1e-4) and row["clamped"] == 0.25
    sizes = [math.exp(d) - d - 1 for d in (0.5, 1.0, -0.001, 0.5)]
    assert row["k3_mean"] == pytest.approx(sum(sizes) / 4, rel=1e-4)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    prepare_model("tiny", folder)
    options = {
        "num_generations": 3,
        "num_colliders": 3,
        "max_completion_length": 6,
        "collider_max_completion_length": 4,
    }
    return Lab(folder, ["chain_sum"], 1, options, seed=0)


@pytest.mark.parametrize("name", ["scored", "scored, parallel", "scored, 2 colliders", "loo"])
def test_a_variants_upsilon_is_the_trainers(name, lab):
    sample, options = lab.roll_out(0), {"candidate_context_tokens": 2, **fidelity.VARIANTS[name]}
    inputs, advantages = lab.estimate(sample, options).inputs, sample.output["advantages"]
    for representation in ("last", "mean"):
        trainer = lab.trainer(representation=representation, **options)
        colliders = trainer.args.num_colliders
        group = replace(sample.group, colliders=sample.group.colliders[:colliders])
        group.has_content = group.has_content[:colliders]
        terms = trainer._causal.terms(sample.rollout, sample.mask.shape[1], groups=[group])
        upsilon = estimate_weights(trainer.args, inputs[representation])[0].flatten()
        torch.testing.assert_close(terms.weigh(advantages), advantages * upsilon, atol=1e-5, rtol=1e-5)
        assert upsilon.std() > 1e-4 and advantages.abs().max() > 0.1
        for i, ids in enumerate(sample.group.candidates):
            with torch.no_grad():
                whole = torch.tensor([[*sample.group.prompt_ids, *ids]])
                hidden = lab.model.base_model(whole).last_hidden_state[0, -len(ids) :]
            expected = hidden[-1] if representation == "last" else hidden.mean(dim=0)
            torch.testing.assert_close(inputs[representation].z[0, i], expected, atol=1e-5, rtol=1e-5)


def test_fidelity(monkeypatch, tmp_path, capsys):
    out = tmp_path / "results" / "fidelity.json"
    flags = "--model tiny --num_generations 3 --num_colliders 2 --completion_tokens 6 --collider_tokens 4 --samples 4"
    variants = ["scored, 2 colliders", "scored, 16 tokens of each", "scored, parallel", "1 context drawn", "loo"]
    arguments = [*flags.split(), "--tasks", "chain_sum", "spell_backward", "--only", *variants, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["fidelity", *arguments])
    fidelity.main()
    content = json.loads(out.read_text())
    for rows in content["upsilon"].values():
        for same in variants[:2]:  # there are 2 colliders, and candidates are shorter than 16 tokens
            ours, expected = (torch.tensor(rows[name]["values"]) for name in (same, "scored"))
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
        assert rows["no projection (or 1 collider)"]["pearson_projection"] is None
        assert rows["loo"]["variant"] == "loo" and rows["loo"]["pearson"] < 1
        assert len(rows["scored"]["values"]) == 2 and len(rows["scored"]["values"][0]) == 3
    log_p = content["log_p"]
    assert list(log_p) == ["scored", *variants[:4]]  # loo scores nothing under contexts
    assert log_p["scored"]["mad"] == 0 and log_p["1 context drawn"]["mad"] < 1e-6  # the one other that there is
    assert log_p["scored, parallel"]["mad"] > 1e-6
    costs = content["costs"]
    assert costs["scored, parallel"]["tokens_contexts"] < costs["scored"]["tokens_contexts"]
    assert costs["loo"]["tokens_contexts"] == 0 < costs["loo"]["tokens_query"]
    assert content["rollouts"]["groups_with_advantages"] == 2 and content["rollouts"]["tokens_truth_sampled"] > 0
    table = capsys.readouterr().out
    assert "| scored, parallel |" in table and "At most" in table
    assert fidelity.show(content) in table  # as well from what was written


def test_ceiling():
    """Two noisy readings that correlate 0.5 have as much noise as signal; their mean correlates sqrt(2/3) with it."""
    generator = torch.Generator().manual_seed(0)
    signal, first, second = torch.randn(3, 200_000, generator=generator)
    halves = pearson(signal + first, signal + second)
    row = dict.fromkeys(("pearson", "pearson_within", "pearson_projection"), halves)
    ceiling = fidelity.ceilings({"sampled, m = 1 (against 2 others)": {}, "sampled, m = 2 (against 2 others)": row})
    assert ceiling["pearson"] == pytest.approx(pearson(2 * signal + first + second, signal), abs=0.01)
    assert ceiling["pearson"] == pytest.approx((2 / 3) ** 0.5, abs=0.01)
