"""Packed rows: every sequence is there, shared tokens stand once, and a model gives what separate forwards give."""

import random

import pytest
import torch
from test_trainer_causal import first_batch, make_trainer
from tiny_policy import save_policy
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config

from gcpo.causal_step import can_share_prefixes
from gcpo.packing import pack, pack_parallel


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
            assert row.ids[branch.path].tolist() == whole
            assert row.positions[branch.path].tolist() == list(range(len(whole)))
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
        (Qwen2Config, {}),
        (Gemma2Config, {"attn_implementation": "eager", "attn_logit_softcapping": 2.0, **FULL}),
    ],
    ids=["llama-sdpa", "llama-eager", "qwen2-sdpa", "gemma2-softcap"],
)
def test_model_gives_what_separate_forwards_give(config_class, options):
    model = tiny(config_class, **options)
    contexts, completions = sequences()
    assert can_share_prefixes(model)
    (row,) = pack(contexts, completions, 10_000)
    mask = torch.where(row.allowed(), 0.0, torch.finfo(torch.float32).min)[None, None]
    weights = list(model.parameters())
    hidden = model.model(
        input_ids=row.ids[None], attention_mask=mask, position_ids=row.positions[None]
    ).last_hidden_state[0]
    probe = torch.randn(32)  # not a norm: after the final norm that would be nearly constant
    packed_sum = separate_sum = 0.0
    for branch in row.branches:
        ids = torch.tensor([contexts[branch.key] + completions[branch.key]])
        alone = model.model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(hidden[branch.path], alone, atol=1e-5, rtol=1e-5)
        packed_sum = packed_sum + (hidden[branch.completion] @ probe).sin().sum()
        separate_sum = separate_sum + (alone[branch.context_length :] @ probe).sin().sum()
    ours = torch.autograd.grad(packed_sum, weights, allow_unused=True)
    theirs = torch.autograd.grad(separate_sum, weights, allow_unused=True)
    for left, right in zip(ours, theirs, strict=True):
        if right is not None:
            torch.testing.assert_close(left, right, atol=1e-5 * right.abs().max().item(), rtol=1e-4)


def test_models_that_cannot_share():
    assert not can_share_prefixes(tiny(Gemma2Config, attn_implementation="eager", sliding_window=16))
    assert not can_share_prefixes(tiny(MistralConfig, sliding_window=16))
    model = tiny(LlamaConfig)
    model.config._attn_implementation = "flash_attention_2"
    assert not can_share_prefixes(model)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.mark.parametrize("representation", ["last", "mean"])
@pytest.mark.parametrize("estimator", ["scored", "loo"])
def test_trainer_scores_the_same_either_way(estimator, representation, policy, tmp_path):
    found = {}
    for share in (False, True):
        trainer = make_trainer(
            policy, tmp_path, estimator=estimator, representation=representation, share_prefix=share, temperature=0.7
        )
        output, captured = first_batch(trainer)
        found[share] = output, captured["upsilon"], float(trainer._account.tokens["scored_contexts"])
    for name in ("context_logps", "query_logps", "advantages", "context_weights"):
        torch.testing.assert_close(found[True][0][name], found[False][0][name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[True][1], found[False][1], atol=1e-5, rtol=1e-5)
    assert found[True][2] < 0.7 * found[False][2]


GROUP = {
    "query": [5, 6, 7],
    "candidates": [[10, 11, 12], [20], [30, 31]],
    "colliders": [[40, 41], [50]],
}


def naive_parallel(i, l, shown=None):
    """One copy alone, written out: ids, positions, and who sees whom."""
    query, candidates, collider = GROUP["query"], GROUP["candidates"], GROUP["colliders"][l]
    tokens = [(token, position, "q") for position, token in enumerate(query)]
    for k, candidate in enumerate(candidates):
        if k != i:
            tokens += [(token, 3 + t, f"y{k}") for t, token in enumerate(candidate)]
    tokens += [(token, 3 + t, "c") for t, token in enumerate(collider)]
    after = 3 + 3  # the longest block has three tokens
    tokens += [(query[-1], after - 1, "copy")]
    tokens += [(token, after + t, "copy") for t, token in enumerate(candidates[i])]
    size = len(tokens)
    seen = torch.zeros(size, size, dtype=torch.bool)
    for row, (_, _, who) in enumerate(tokens):
        for column, (_, position, what) in enumerate(tokens[: row + 1]):
            mine = what == who or what == "q" if who != "copy" else True
            if who == "copy" and what == "q" and column == len(query) - 1:
                mine = False  # its own copy of that token stands in for it
            if who == "copy" and what.startswith("y") and shown is not None:
                mine = position >= 3 + len(candidates[int(what[1])]) - shown
            seen[row, column] = mine
    ids, positions, _ = zip(*tokens, strict=True)
    return torch.tensor(ids), torch.tensor(positions), seen, len(candidates[i])


@pytest.mark.parametrize("shown", [None, 1])
@pytest.mark.parametrize("max_tokens", [1, 1000])
def test_parallel_contexts_are_what_each_copy_sees(max_tokens, shown):
    model = tiny(LlamaConfig)
    lowest = torch.finfo(torch.float32).min
    wanted = [(i, l) for i in range(3) for l in range(2)]
    rows = pack_parallel(**GROUP, wanted=wanted, shown=shown, max_tokens=max_tokens)
    assert (len(rows) > 1) == (max_tokens == 1)
    found = set()
    for row in rows:
        mask = torch.where(row.allowed(), 0.0, lowest)[None, None]
        hidden = model.model(
            input_ids=row.ids[None], attention_mask=mask, position_ids=row.positions[None]
        ).last_hidden_state[0]
        for branch in row.branches:
            if branch.context_length == len(branch.path):
                continue
            found.add(branch.key)
            if branch.key[0] == "query":
                ids = torch.tensor([GROUP["query"] + GROUP["candidates"][branch.key[1]]])
                alone = model.model(input_ids=ids).last_hidden_state[0]
                count = len(GROUP["candidates"][branch.key[1]])
            else:
                ids, positions, seen, count = naive_parallel(*branch.key, shown)
                alone = model.model(
                    input_ids=ids[None],
                    attention_mask=torch.where(seen, 0.0, lowest)[None, None],
                    position_ids=positions[None],
                ).last_hidden_state[0]
            torch.testing.assert_close(hidden[branch.completion], alone[-count:], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(hidden[branch.predictors[0]], alone[-count - 1], atol=1e-5, rtol=1e-5)
            assert row.ids[branch.completion].tolist() == ids.flatten()[-count:].tolist()
    assert found == {*wanted, *(("query", k) for k in range(3))}


@pytest.mark.parametrize("estimator", ["loo", "scored"])
def test_parallel_contexts_in_the_trainer(estimator, policy, tmp_path):
    settings = {"estimator": estimator, "temperature": 0.7}
    expected, _ = first_batch(make_trainer(policy, tmp_path, **settings))
    parallel = make_trainer(policy, tmp_path, context_attention="parallel", **settings)
    output, captured = first_batch(parallel)
    torch.testing.assert_close(output["query_logps"], expected["query_logps"], atol=1e-5, rtol=1e-5)
    assert output["context_logps"].shape == expected["context_logps"].shape
    assert not torch.allclose(output["context_logps"], expected["context_logps"], atol=1e-3)
    assert (output["context_logps"] <= 0).all() and captured["upsilon"].isfinite().all()
    tokens = sum(float(parallel._account.tokens[kind]) for kind in ("scored_query", "scored_contexts"))
    by_hand = 0
    for group in captured["groups"]:
        y, c = sum(map(len, group.candidates)), sum(map(len, group.colliders))
        by_hand += len(group.prompt_ids) + (y + 4) + (c + 3) + 3 * (y + 4)
    assert tokens == by_hand
    parallel.train()
    assert parallel.state.log_history[0]["gcpo/upsilon/fallback"] == 0
