"""Packed rows: every sequence is there, shared tokens stand once, and a model gives what separate forwards give."""

import random

import pytest
import torch
from test_trainer_causal import first_batch, make_trainer
from tiny_policy import save_policy
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config

from gcpo.forward.models import takes_tree_mask
from gcpo.forward.packing import pack


def sequences(seed=0):
    """Contexts with shared runs, and one that is another's beginning."""
    draw = random.Random(seed)
    question, y = [5, 6, 7], [[draw.randrange(10, 90) for _ in range(draw.randint(2, 6))] for _ in range(4)]
    contexts, completions = [], []
    for i in range(4):
        others = [token for k in range(4) if k != i for token in (1, *y[k])]
        for collider in ([30, 31], [30, 32, 33], [40]):
            contexts.append([*question, *others, 2, *collider, 3])
            completions.append(y[i])
    contexts += [question, question, [5]]
    completions += [y[0], y[1], y[2]]
    return contexts, completions


@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
def test_every_sequence_is_there_once(max_tokens):
    contexts, completions = sequences()
    rows = pack(contexts, completions, max_tokens)
    seen = sorted(branch.key for row in rows for branch in row.branches)
    assert seen == list(range(len(contexts)))
    for row in rows:
        for branch in row.branches:
            whole = contexts[branch.key] + completions[branch.key]
            assert torch.tensor(row.ids)[branch.path].tolist() == whole
            assert torch.tensor(row.positions)[branch.path].tolist() == list(range(len(whole)))
            assert row.labels()[branch.predictors].tolist() == completions[branch.key]
        allowed = row.allowed()
        assert allowed.diagonal().all() and not torch.triu(allowed, diagonal=1).any()
        longest = max(len(branch.path) for branch in row.branches)
        assert len(row.ids) <= max(max_tokens, 2 * longest)


def test_shared_tokens_stand_once():
    contexts, completions = sequences()
    (row,) = pack(contexts, completions, 10_000)
    naive = sum(map(len, contexts)) + sum(map(len, completions))
    distinct = set()
    for context in contexts:
        distinct |= {tuple(context[: k + 1]) for k in range(len(context) - 1)}
    unshared = len(contexts) + sum(map(len, completions))  # the last token of each context, and the completions
    assert len(row.ids) == len(distinct) + unshared < 0.7 * naive


def test_a_path_is_all_that_a_token_sees():
    contexts, completions = sequences(1)
    (row,) = pack(contexts, completions, 10_000)
    allowed = row.allowed()
    for branch in row.branches:
        for depth, place in enumerate(branch.path.tolist()):
            assert sorted(allowed[place].nonzero()[:, 0].tolist()) == sorted(branch.path[: depth + 1].tolist())


def tiny(config_class, attn_implementation="sdpa", **extra):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=0,
        **extra,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)


FULL = {"layer_types": ["full_attention"] * 2}


@pytest.mark.parametrize(
    ("config_class", "options"),
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"attn_implementation": "eager"}),
        (LlamaConfig, {"attn_implementation": "flex_attention"}),
        (Qwen2Config, {}),
        (Gemma2Config, {"attn_implementation": "eager", "attn_logit_softcapping": 2.0, **FULL}),
    ],
    ids=["llama-sdpa", "llama-eager", "llama-flex", "qwen2-sdpa", "gemma2-softcap"],
)
def test_model_gives_what_separate_forwards_give(config_class, options):
    """Values and gradients (FlexAttention has no backward on a CPU: values only)."""
    model = tiny(config_class, **options)
    blocks = options.get("attn_implementation") == "flex_attention"
    contexts, completions = sequences()
    assert takes_tree_mask(model)
    (row,) = pack(contexts, completions, 10_000)
    mask = torch.where(row.allowed(), 0.0, torch.finfo(torch.float32).min)[None, None]
    if blocks:
        mask = row.block_mask(torch.device("cpu"))
        model.requires_grad_(False)
    weights = list(model.parameters())
    hidden = model.model(
        input_ids=torch.tensor([row.ids]), attention_mask=mask, position_ids=torch.tensor([row.positions])
    ).last_hidden_state[0]
    if blocks:
        # Compiled for a CPU without AVX-512, FlexAttention itself gives NaN for eight tokens (torch 2.13).
        model.set_attn_implementation("sdpa")
    probe = torch.randn(32)  # not a norm: after the final norm that would be nearly constant
    packed_sum = separate_sum = 0.0
    for branch in row.branches:
        ids = torch.tensor([contexts[branch.key] + completions[branch.key]])
        alone = model.model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(hidden[branch.path], alone, atol=1e-5, rtol=1e-5)
        packed_sum = packed_sum + (hidden[branch.completion] @ probe).sin().sum()
        separate_sum = separate_sum + (alone[branch.context_length :] @ probe).sin().sum()
    if blocks:
        return
    ours = torch.autograd.grad(packed_sum, weights, allow_unused=True)
    theirs = torch.autograd.grad(separate_sum, weights, allow_unused=True)
    for left, right in zip(ours, theirs, strict=True):
        if right is not None:
            torch.testing.assert_close(left, right, atol=1e-5 * right.abs().max().item(), rtol=1e-4)


def test_models_that_cannot_share():
    assert not takes_tree_mask(tiny(Gemma2Config, attn_implementation="eager", sliding_window=16))
    assert not takes_tree_mask(tiny(MistralConfig, sliding_window=16))
    model = tiny(LlamaConfig)
    model.config._attn_implementation = "flash_attention_2"
    assert not takes_tree_mask(model)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.mark.parametrize("representation", ["last", "mean"])
@pytest.mark.parametrize("estimator", ["scored", "loo"])
def test_trainer_scores_the_same_either_way(estimator, representation, policy, tmp_path):
    found = {}
    settings = {"estimator": estimator, "representation": representation, "temperature": 0.7, "reuse_rollout": False}
    ways = {"one by one": {"share_prefix": False}, "packed": {}, "by level": {"pack_tokens": 1}}
    for way, changed in ways.items():
        trainer = make_trainer(policy, tmp_path, **settings, **changed)
        output, captured = first_batch(trainer)
        found[way] = output, captured["upsilon"], float(trainer._account.tokens["scored_contexts"])
    alone = found["one by one"]
    for way in ("packed", "by level"):
        for name in ("context_logps", "query_logps", "advantages", "context_weights"):
            torch.testing.assert_close(found[way][0].get(name), alone[0].get(name), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[way][1], alone[1], atol=1e-5, rtol=1e-5)
        assert found[way][2] < 0.7 * alone[2]
