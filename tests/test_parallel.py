"""Parallel contexts: every copy is what a row written out by hand gives, wherever keys and values come from."""

import pytest
import torch
from test_packing import FULL, tiny
from test_trainer_causal import first_batch, make_trainer, plain_scores
from tiny_policy import save_policy
from transformers import Gemma2Config, LlamaConfig

from gcpo.causal.parallel import read_groups, score_copies
from gcpo.causal.port import Group
from gcpo.forward.key_values import keeps_every_token

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
    after = 3 + max(len(collider), *(len(y) for k, y in enumerate(candidates) if k != i))  # the longest block it sees
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


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def scorer(policy, tmp_path):
    return make_trainer(policy, tmp_path, estimator="loo", context_batch_size=2)._policy


@pytest.mark.parametrize("shown", [None, 1])
@torch.no_grad()
def test_copies_are_what_each_sees(shown, scorer):
    model, lowest = scorer.trainer.model.train(), torch.finfo(torch.float32).min  # steps count tokens in training
    group = Group("", GROUP["query"], GROUP["candidates"], GROUP["colliders"], [True, True])
    pairs = [(i, l) for i in range(3) for l in range(2)]
    found = read_groups(scorer, {7: group}, {}, [(7, k) for k in range(3)], [(7, l) for l in range(2)])
    copies = score_copies(scorer, {7: group}, found, [(7, i, l) for i, l in pairs], shown)

    def plainly(ids, positions, seen, count):
        hidden = model.model(
            input_ids=ids[None],
            attention_mask=torch.where(seen, 0.0, lowest)[None, None],
            position_ids=positions[None],
        ).last_hidden_state[0, -count - 1 :]
        logp = torch.log_softmax(model.lm_head(hidden[:-1]), dim=-1)
        return logp.gather(-1, ids[-count:, None])[:, 0], hidden[-1]

    for (i, l), copy in zip(pairs, copies, strict=True):
        ids, positions, seen, count = naive_parallel(i, l, shown)
        logp, z = plainly(ids, positions, seen, count)
        assert ids[-count:].tolist() == group.candidates[i]
        torch.testing.assert_close(copy.logp, logp, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(copy.z, z, atol=1e-5, rtol=1e-5)
    for kind in ("candidates", "colliders"):
        for k, reading in getattr(found[7], kind).items():
            logp, hidden = plain_scores(scorer.trainer, group.prompt_ids, getattr(group, kind)[k])
            torch.testing.assert_close(reading.logp, logp, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(reading.z, hidden[-1], atol=1e-5, rtol=1e-5)
    counted = scorer.trainer._account.tokens
    assert float(counted["scored_contexts"]) == sum(1 + len(group.candidates[i]) for i, _ in pairs)


@pytest.mark.parametrize("changed", ["the other collider", "the copy's own length", "a shorter block that it sees"])
@torch.no_grad()
def test_a_score_depends_on_its_context_alone(changed, scorer):
    """What is not part of x_{i,l} has no say in where the copy of y_i begins."""

    def score(candidates, colliders):
        group = Group("", GROUP["query"], candidates, colliders, [True, True])
        found = read_groups(scorer, {0: group}, {}, [(0, 1), (0, 2)], [(0, 0)])
        return score_copies(scorer, {0: group}, found, [(0, 0, 0)], None)[0].logp

    candidates, colliders = GROUP["candidates"], GROUP["colliders"]
    before = score(candidates, colliders)
    if changed == "the other collider":
        torch.testing.assert_close(score(candidates, [colliders[0], [50] * 9]), before, atol=0, rtol=0)
    elif changed == "the copy's own length":
        longer = score([[*candidates[0], *[60] * 9], *candidates[1:]], colliders)
        torch.testing.assert_close(longer[: len(before)], before, atol=1e-5, rtol=1e-5)
    else:
        assert (score([candidates[0], [20, 21, 22, 23], candidates[2]], colliders) - before).abs().max() > 1e-3


def test_a_collider_that_is_left_out_changes_no_score(policy, tmp_path):
    """Neither by its length nor by the positions it would take."""
    outputs = []
    for length in (1, 40):
        trainer = make_trainer(policy, tmp_path, context_attention=None, max_completion_length=4)
        generate, end = trainer._generate_single_turn, trainer._tokenizer.eos_token_id

        def with_empty_last(prompts, *args, generate=generate, length=length, end=end):
            ids, logps = generate(prompts, *args)
            if len(ids) == 6:  # the colliders: two groups of three
                ids[2] = ids[5] = [end] * length
            return ids, logps

        trainer._generate_single_turn = with_empty_last
        outputs.append(first_batch(trainer))
    for name in ("context_logps", "context_weights", "advantages"):
        assert torch.equal(outputs[0][0][name], outputs[1][0][name])
    assert outputs[0][0]["context_logps"].shape[2] == 2 and outputs[0][0]["context_logps"].abs().max() > 0


@pytest.mark.parametrize("estimator", ["loo", "scored"])
def test_in_the_trainer(estimator, policy, tmp_path):
    """With the generation's keys and values and without: the same numbers from fewer tokens."""
    settings = {"estimator": estimator, "temperature": 0.7, "num_iterations": 2, "padding_free": False}
    full, _ = first_batch(make_trainer(policy, tmp_path, **settings))
    settings["context_attention"] = "parallel"
    read, kept = [
        (trainer := make_trainer(policy, tmp_path, reuse_rollout=reuse, **settings), *first_batch(trainer))
        for reuse in (False, True)
    ]
    assert read[1]["context_logps"].shape == full["context_logps"].shape
    assert not torch.allclose(read[1]["context_logps"], full["context_logps"], atol=1e-3)
    for name in ("context_logps", "query_logps", "advantages"):
        torch.testing.assert_close(kept[1][name], read[1][name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kept[2]["upsilon"], read[2]["upsilon"], atol=1e-5, rtol=1e-5)
    for reuse, (trainer, _, captured) in enumerate((read, kept)):
        tokens = {kind: float(trainer._account.tokens[kind]) for kind in trainer._account.tokens}
        y = sum(1 + len(ids) for group in captured["groups"] for ids in group.candidates)
        c = sum(1 + len(ids) for group in captured["groups"] for ids in group.colliders)
        queries = sum(len(group.prompt_ids) - 1 for group in captured["groups"])
        trls = sum(
            4 * len(g.prompt_ids) + sum(map(len, g.candidates)) for g in captured["groups"]
        )  # off-policy: its own
        assert tokens["scored_contexts"] == 3 * y and tokens["scored_colliders"] == c
        assert tokens["scored_query"] == trls + (0 if reuse else queries + y)


@pytest.mark.parametrize(
    "changed", [{"bf16": True}, {"num_kl_contexts": 1, "kl_fraction": 0.25}, {"estimator": "none"}]
)
def test_trains_with(changed, policy, tmp_path):
    trainer = make_trainer(policy, tmp_path, context_attention="parallel", **changed)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged.get("gcpo/upsilon/fallback", 0) == 0 and logged["gcpo/tokens/scored_contexts"] > 0


@pytest.mark.parametrize(
    ("config_class", "options", "can"),
    [
        (LlamaConfig, {}, True),
        (Gemma2Config, {"attn_implementation": "eager", **FULL}, True),
        (Gemma2Config, {"attn_implementation": "eager", "sliding_window": 16}, False),
    ],
    ids=["llama", "gemma2-full", "gemma2-windows"],
)
def test_models_that_keep_every_token(config_class, options, can):
    assert keeps_every_token(tiny(config_class, **options)) is can


def test_more_positions_than_the_model_has(tmp_path):
    """By default such contexts are full ones, with a warning; asked for by name, they are refused. 10 + 10 + q > 22."""
    short = save_policy(tmp_path / "short", max_positions=22)
    settings = {"num_generations": 2, "num_colliders": 1, "candidate_context_tokens": 1, "estimator": "none"}
    settings |= {"collider_max_completion_length": 1, "context_prompt_template": "{question}{candidates}{collider}"}
    settings |= {"fusion_prompt_template": "{question}{candidates}", "candidate_template": "{candidate}"}
    full, _ = first_batch(make_trainer(short, tmp_path, **settings))
    with pytest.warns(UserWarning, match="contexts of this step are full ones"):
        output, _ = first_batch(make_trainer(short, tmp_path, **{**settings, "context_attention": None}))
    torch.testing.assert_close(output["context_logps"], full["context_logps"])
    with pytest.raises(ValueError, match="parallel context with its candidate"):
        first_batch(make_trainer(short, tmp_path, **settings, context_attention="parallel"))
