"""Completions decoded after keys and values, and rows at temperature 0: the numbers that written-out rows give."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_model_policy import EOS, OTHERS, make_policy, tiny_model
from test_model_policy import options as causal_options
from test_peft import lora, shake
from test_trainer_causal import make_trainer
from tiny_policy import save_policy
from transformers import AutoModelForCausalLM

from gcpo.causal.parallel import collider_rows, read_groups
from gcpo.causal.port import Continuation, Group
from gcpo.causal.sampling import own_random_stream
from gcpo.forward.trl_policy import TrlPolicy

# Two groups whose parts differ in every length; a candidate that says nothing, and a query of one token.
QUERIES = [[5, 6, 7], [8]]
CANDIDATES = [[[10, 11, 12, 13, EOS], [20], [30, 31]], [[40, 41, EOS], [EOS], [50, 51, 52]]]
TURNS = [[60, 61], [62, 63, 64, 65]]
STEPS = 6


class Builder:
    """Of prompts that are the number of their group."""

    def content(self, ids):
        return [token for token in ids if token != EOS]

    def fusion_turn(self, prompt):
        return TURNS[prompt]


def groups_of(*numbers):
    return {p: Group(p, QUERIES[p], CANDIDATES[p], [], []) for p in numbers}


def rows_of(policy, wanted, shown):
    groups = groups_of(*sorted(set(wanted)))
    with torch.no_grad():
        found = read_groups(policy, groups, {}, [(p, k) for p in groups for k in range(3)], [])
    return collider_rows(Builder(), groups, found, wanted, shown)


def written_out(p, shown, own):
    """Ids of a collider's row alone, positions, and who sees whom: candidates side by side, all the rest in a line."""
    query, candidates = QUERIES[p], CANDIDATES[p]
    tokens = [(token, position, "query") for position, token in enumerate(query)]
    for k, candidate in enumerate(candidates):
        tokens += [(token, len(query) + t, k) for t, token in enumerate(candidate)]
    start = len(query) + max(map(len, candidates))
    line = [*query[-1:], *TURNS[p], *own]
    tokens += [(token, start - 1 + t, "line") for t, token in enumerate(line)]
    seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for row, (_, _, who) in enumerate(tokens):
        for column, (token, position, what) in enumerate(tokens[: row + 1]):
            if who != "line":
                seen[row, column] = what in ("query", who)
            elif what == "query":
                seen[row, column] = position < len(query) - 1  # its last token stands in the line
            elif what == "line":
                seen[row, column] = True
            else:
                content = len(candidates[what]) - (candidates[what][-1] == EOS)
                place = position - len(query)
                seen[row, column] = token != EOS and (shown is None or place >= content - shown)
    ids, positions, _ = zip(*tokens, strict=True)
    return torch.tensor([ids]), torch.tensor([positions]), seen[None, None]


@torch.no_grad()
def naive(model, wanted, shown, seed, temperature=1.0, greedy=None):
    """Completions sampled row by row and step by step from whole rows, and the logits of each step (rows, V)."""
    own, logits = [[] for _ in wanted], []
    with own_random_stream(seed):
        for _ in range(STEPS):
            rows = []
            for p, ids in zip(wanted, own, strict=True):
                ids, positions, seen = written_out(p, shown, ids)
                mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
                rows.append(model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, -1])
            logits.append(torch.stack(rows))
            drawn = torch.multinomial(torch.softmax(logits[-1] / temperature, dim=-1), 1)[:, 0].tolist()
            for k, ids in enumerate(own):
                ids.append(int(rows[k].argmax()) if greedy and greedy[k] else drawn[k])
    return [ids[: ids.index(EOS) + 1] if EOS in ids else ids for ids in own], logits


def watched(policy, call):
    """What `call` returns, the logits of each step, and how many tokens each forward of the backbone read."""
    logits, sizes = [], []

    def keep(module, args, output):
        if getattr(output, "logits", None) is not None:  # the trainer's own forwards give none
            logits.append(output.logits[:, -1].float())

    handles = [
        policy.unwrapped.register_forward_hook(keep),
        policy.backbone.register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
        ),
    ]
    try:
        return call(), logits, sizes
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


def policy_of(kind, folder, tmp_path, **changed):
    """A `ModelPolicy`, or a trainer's with what may differ there."""
    if kind == "model":
        model = AutoModelForCausalLM.from_pretrained(folder, **changed)
        return make_policy(model, causal_options(context_batch_size=3))
    attention = changed.pop("attn_implementation", None)
    if attention:
        changed["model_init_kwargs"] = {"attn_implementation": attention}
    return make_trainer(folder, tmp_path, context_batch_size=3, **changed)._policy


KINDS = {
    "model": ("model", {}),
    "model, eager": ("model", {"attn_implementation": "eager"}),
    "trainer": ("trainer", {}),
    "trainer, eager": ("trainer", {"attn_implementation": "eager"}),
    "trainer, padded": ("trainer", {"pad_to_multiple_of": 4}),
    "trainer, without sharing": ("trainer", {"share_prefix": False}),
    "trainer, without its own loss": ("trainer", {"fused_loss": False, "padding_free": False}),
}
WANTED = {"two groups": [0, 0, 1, 0, 1], "one group": [0, 0], "one row": [1]}


@pytest.mark.parametrize("shown", [None, 2])
@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("kind", KINDS)
def test_completions_are_those_of_rows_written_out(kind, wanted, shown, folder, tmp_path):
    policy, wanted = policy_of(KINDS[kind][0], folder, tmp_path, **KINDS[kind][1]), WANTED[wanted]
    rows, watching = rows_of(policy, wanted, shown), getattr(policy, "watching_generation", nullcontext)
    pieces = {
        id(piece): (piece, [[part.clone() for part in layer] for layer in piece]) for r in rows for piece in r.past
    }
    state = torch.get_rng_state()
    with watching() as states:
        got, logits, _ = watched(policy, lambda: policy.decode(rows, 17, limit=STEPS, temperature=None))
    assert not states
    assert torch.equal(torch.get_rng_state(), state)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected, expected_logits = naive(model, wanted, shown, 17)
    assert got == expected and len(set(map(tuple, got))) == len(wanted)
    steps = max(map(len, expected))
    for step, (one, other) in enumerate(zip(logits[-steps:], expected_logits[:steps], strict=True)):
        open_rows = [k for k, ids in enumerate(expected) if len(ids) > step]
        one, other = (values[open_rows].log_softmax(dim=-1) for values in (one, other))
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    for piece, before in pieces.values():
        assert all(torch.equal(a, b) for layer, was in zip(piece, before, strict=True) for a, b in zip(layer, was))  # noqa: B905


@pytest.mark.parametrize("kind", ["model", "trainer"])
def test_some_rows_at_temperature_0_and_the_others_at_one_of_their_own(kind, folder, tmp_path):
    policy, greedy = policy_of(kind, folder, tmp_path), [True, False, True, False, False]
    wanted = WANTED["two groups"]
    got = policy.decode(rows_of(policy, wanted, 2), 4, limit=STEPS, temperature=0.6, greedy=greedy)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert got == naive(model, wanted, 2, 4, 0.6, greedy)[0]
    sampled = policy.decode(rows_of(policy, wanted, 2), 4, limit=STEPS, temperature=0.6)
    assert all((one == other) != flag for one, other, flag in zip(got, sampled, greedy, strict=True))


@pytest.mark.parametrize("kind", ["model", "trainer"])
def test_what_rows_have_in_common_is_read_once(kind, folder, tmp_path):
    policy = policy_of(kind, folder, tmp_path)
    rows = rows_of(policy, [0, 1, 0, 0, 1], None)
    _, _, sizes = watched(policy, lambda: policy.decode(rows, 0, limit=1, temperature=None))
    assert sizes == [2 * 4, 5]  # both turns less their last token, padded, and the last token of every row
    apart = [Continuation([list(piece) for piece in row.past], row.ids, row.first_position) for row in rows[:2] * 2]
    _, _, sizes = watched(policy, lambda: policy.decode(apart, 0, limit=1, temperature=None))
    assert sizes == [3 * 4, 4, 4]  # equal pieces are not the same, and a forward has three rows
    before = {name: float(count) for name, count in policy.account.tokens.items()}
    policy.decode(rows, 0, limit=1, temperature=None)
    assert {name: float(count) for name, count in policy.account.tokens.items()} == before


def test_no_past_and_a_single_token(folder, tmp_path):
    """A row without a past is a prompt."""
    policy = policy_of("model", folder, tmp_path)
    prompts = [[5], [6, 7, 8], [5], [9, 10]]
    rows = [Continuation([], ids, 0) for ids in prompts]
    got = policy.decode(rows, 2, limit=STEPS, temperature=None)
    assert got == policy.generate(prompts, 2, limit=STEPS, temperature=None)


@pytest.mark.parametrize("family", OTHERS)
def test_decoding_is_generating_for_every_family(family):
    """After the keys and values of a prompt's beginning: what its whole text gives, from the same random numbers."""
    policy = make_policy(tiny_model(family), max_completion_length=STEPS)
    prompts = [[20, 21, 22, 23, 24], [20, 21, 22, 23, 24], [30, 31, 32], [40, 41, 42, 43]]
    rows = []
    if not policy.can_decode:
        assert family in ("mistral", "gemma2", "gemma3", "lfm2", "falcon_mamba")
        with pytest.raises(ValueError, match="cannot decode after keys and values"):
            policy.decode([Continuation([], [5], 0)], 0, limit=1, temperature=None)
        return
    with torch.no_grad():
        for ids in prompts:
            (first,) = policy.read([Continuation([], ids[:2], 0)], keep=True)
            rows.append(Continuation([first.own], ids[2:], 2))
    got = policy.decode(rows, 8, limit=STEPS, temperature=None)
    assert got == policy.generate(prompts, 8, limit=STEPS, temperature=None)
    greedy = [True, False, True, False]
    got = policy.decode(rows, 8, limit=STEPS, temperature=None, greedy=greedy)
    assert got == policy.generate(prompts, 8, limit=STEPS, temperature=None, greedy=greedy)


# What may change scores beside a temperature: with it and without, the likeliest token is found as `generate` finds it.
SETTINGS = [
    {},
    {"top_k": 5, "top_p": 0.9},
    {"min_p": 0.3},
    {"typical_p": 0.2},
    {"repetition_penalty": 1.5},
    {"sequence_bias": [[[EOS], 2.5]]},
    {"no_repeat_ngram_size": 1},
    {"min_new_tokens": 5},
    {"renormalize_logits": True},
]
NOT_WITHOUT_SAMPLING = ("top_k", "top_p", "min_p", "typical_p")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["model", "trainer", "trainer with an adapter"])
@torch.no_grad()
def test_greedy_rows_are_those_of_generate(kind, settings, folder, tmp_path):
    prompts, flags = [[20, 21, 22], [20, 21, 22], [30], [31, 32], [31, 32]], [True, False, False, False, True]
    if kind == "model":
        policy = make_policy(AutoModelForCausalLM.from_pretrained(folder), generation_kwargs=settings)
    else:
        adapter = {"peft_config": lora()} if "adapter" in kind else {}
        policy = make_trainer(folder, tmp_path, generation_kwargs=settings, **adapter)._policy
        shake(policy.model) if adapter else None
    sampled = policy.generate(prompts, 3, limit=STEPS, temperature=0.8)
    got = policy.generate(prompts, 3, limit=STEPS, temperature=0.8, greedy=flags)
    plain = {name: value for name, value in settings.items() if name not in NOT_WITHOUT_SAMPLING}
    model = policy.unwrapped.eval()
    for ids, one, other, flag in zip(prompts, got, sampled, flags, strict=True):
        if flag:
            alone = model.generate(
                input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=STEPS, eos_token_id=EOS, **plain
            )
            assert one == alone[0, len(ids) :].tolist()
        else:
            assert one == other
    assert "generate" not in vars(policy.unwrapped)
    if kind == "trainer":  # where a model object has a `generate` of its own, it is used, and stays
        model.generate = own = partial(model.generate)
        assert policy.generate(prompts, 3, limit=STEPS, temperature=0.8, greedy=flags) == got
        assert model.generate is own


class OneTemperature(TrlPolicy):
    """Of one process beside another, with an engine that takes one temperature for a call."""

    def __init__(self, engine, theirs):
        self.calls, self.theirs = [], list(theirs)
        settings = {"temperature": 0.5, "seed": 1}
        vllm = SimpleNamespace(max_completion_length=10, temperature=0.9, generation_kwargs=settings)
        self.trainer = SimpleNamespace(
            use_vllm=engine == "vllm",
            use_transformers_continuous_batching=engine == "continuous batching",
            vllm_generation=vllm,
            generation_kwargs={"temperature": 0.9, "top_k": 7, "do_sample": True},
            generation_config=None,
            rollout_func=None,
            _generate_single_turn=self._answer,
        )

    def most(self, count):
        return max(count, self.theirs.pop(0))

    def _answer(self, prompts, images, fields, num_generations):
        assert num_generations == 1
        vllm, config = self.trainer.vllm_generation, self.trainer.generation_config
        if self.trainer.use_vllm:
            sampling = {"temperature": vllm.temperature, **vllm.generation_kwargs}
            degrees = sampling["temperature"]
        else:
            degrees = config.temperature if config.do_sample else 0.0
        self.calls.append((degrees, prompts))
        return [[*ids, int(10 * degrees)] for ids in prompts], None


@pytest.mark.parametrize("engine", ["vllm", "continuous batching"])
def test_an_engine_is_called_for_each_temperature(engine):
    """As often by every process, and with as many prompts; the completions come back in order."""
    prompts = [[1], [2], [3], [4]]
    policy = OneTemperature(engine, theirs=[3, 2])
    got = policy.generate(prompts, 0, limit=5, temperature=0.3, greedy=[False, True, False, False])
    assert policy.calls == [(0.0, [[2], [1], [1]]), (0.3, [[1], [3], [4]])]
    assert got == [[1, 3], [2, 0], [3, 3], [4, 3]]
    # This process has nothing to decode at temperature 0, and no one has at another: one call, thrown away here.
    policy = OneTemperature(engine, theirs=[4, 0])
    assert policy.generate(prompts, 0, limit=5, temperature=None, greedy=[True] * 4) == [[k, 0] for k in range(1, 5)]
    policy = OneTemperature(engine, theirs=[1, 4])
    policy.generate(prompts, 0, limit=5, temperature=None, greedy=[False] * 4)
    assert policy.calls == [(0.0, [[1]]), (0.5 if engine == "vllm" else 0.9, prompts)]
    policy = OneTemperature(engine, theirs=[])
    policy.generate(prompts, 0, limit=5, temperature=0.3)
    assert policy.calls == [(0.3, prompts)]
    assert policy.can_decode is False


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 2}, {"use_cache": False}, {"prefill_chunk_size": 2}, {"cache_implementation": "static"}],
    ids=str,
)
def test_other_ways_of_generating_cannot_decode(settings, folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, generation_kwargs=settings)
    assert not trainer._policy.can_decode
    prompts, flags = [[20, 21], [20, 21]], [True, False]
    if "num_beams" in settings:  # its likeliest rows are those of a search
        got = trainer._policy.generate(prompts, 0, limit=4, temperature=None, greedy=flags)
        alone = trainer.model.eval().generate(
            torch.tensor(prompts[:1]), do_sample=False, num_beams=2, max_new_tokens=4, eos_token_id=EOS
        )
        assert got[0] == alone[0, 2:].tolist()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_autocast(checkpointing, folder, tmp_path):
    """A trainer whose forwards compute in bfloat16: within its rounding of the same in float32."""
    policy = policy_of("trainer", folder, tmp_path, bf16=True, gradient_checkpointing=checkpointing)
    policy.model.train()
    wanted, greedy = [0, 1, 0, 1], [False, False, True, True]
    rows = rows_of(policy, wanted, None)
    got, logits, _ = watched(policy, lambda: policy.decode(rows, 1, limit=1, temperature=None, greedy=greedy))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    _, expected = naive(model, wanted, None, 1)
    error = (logits[-1].softmax(dim=-1) - expected[0].softmax(dim=-1)).abs().sum(dim=-1) / 2
    assert 0 < error.max() < 0.05
    assert [ids[0] for ids in got[2:]] == logits[-1][2:].argmax(dim=-1).tolist()
