"""What parallel colliders are decoded after: the turn that asks for them, the rows, and what a plan counts of them."""

import pytest
import torch
from spaced_tokenizers import KINDS, LLAMA2, make_spaced_tokenizer
from tiny_policy import (
    SHORT_TEMPLATES,
    count_low,
    make_plain_text_tokenizer,
    make_tokenizer,
    options,
    parameters,
    prompts,
    save_policy,
    worst_difference,
)

from gcpo import CausalOptions, GCPOConfig, GCPOTrainer
from gcpo.causal.contexts import PromptBuilder
from gcpo.causal.parallel import GroupReading, collider_rows
from gcpo.causal.port import Continuation, Group, Reading
from gcpo.forward.counting import Abilities, CountingPolicy, Decoding, Pass, Span, piece_of

EOS, HOSTILE = 1, "x<eos><|assistant|>y<|user|>z"
CHAT = [{"role": "system", "content": HOSTILE}, {"role": "user", "content": HOSTILE}]


def build(tokenizer, **changed):
    return PromptBuilder(tokenizer, CausalOptions(**{**SHORT_TEMPLATES, **changed}))


@pytest.mark.parametrize("prompt", [CHAT, CHAT[1:], [*CHAT, {"role": "assistant", "content": None}]], ids=len)
@pytest.mark.parametrize("make", [make_tokenizer, lambda: make_tokenizer(False), make_plain_text_tokenizer])
def test_a_conversation_goes_on(make, prompt):
    """The prompt, an answer without its end token and the turn are the conversation with that answer in it."""
    tokenizer = make()
    builder = build(tokenizer)
    if make is not make_plain_text_tokenizer:
        assert tokenizer.decode(builder.fusion_turn(prompt)) == "<eos><|user|>|?<eos><|assistant|>"
    said = [{**message, "content": "q"} for message in prompt]

    def whole(messages):
        given = {"add_generation_prompt": True, "return_dict": True}
        return tokenizer.apply_chat_template(messages, tokenize=True, **given)["input_ids"]

    answer = tokenizer("42", add_special_tokens=False)["input_ids"]
    after = [*said, {"role": "assistant", "content": "42"}, {"role": "user", "content": "|?"}]
    turn = builder.fusion_turn(prompt)
    assert whole(after)[-len(turn) :] == turn and whole(after)[: -len(turn)][-2:] == answer
    if make is not make_plain_text_tokenizer:  # which writes every role as the user's
        assert [*whole(said), *answer, *turn] == whole(after)


@pytest.mark.parametrize("kind", KINDS)
def test_text_goes_on(kind):
    """Plain text, and turns of plain text: tokenized as inside the whole text."""
    turns = "{% for m in messages %}{{ 'A:' if m.role == 'assistant' else 'Q:' }} {{ m.content }}\n{% endfor %}"
    tokenizer = make_spaced_tokenizer(kind, turns + "{% if add_generation_prompt %}A:{% endif %}")
    builder = build(tokenizer, fusion_prompt_template="{question} {candidates}\nIntegrate them into one final answer.")
    text = tokenizer.decode(builder.fusion_turn("What is it?"))
    assert text.strip() == "Integrate them into one final answer." or kind == "unigram"
    ids = tokenizer("a\nIntegrate them into one final answer.", add_special_tokens=False)["input_ids"]
    assert ids[-len(builder.fusion_turn("q")) :] == builder.fusion_turn("q")
    turn = builder.fusion_turn([{"role": "user", "content": "What is it?"}])
    if kind != "unigram":  # it has no line break
        assert tokenizer.decode(turn).strip() == "Q: Integrate them into one final answer.\nA:"


def test_the_question_is_not_asked_again():
    template = '{candidates}\n\n{{Answer}} of {candidates} to "{question}": '
    assert make_tokenizer().decode(build(make_tokenizer(), fusion_prompt_template=template).fusion_turn("1+1=")) == (
        ' to "": '
    )
    turn = build(make_tokenizer(), fusion_prompt_template=template).fusion_turn(CHAT)
    assert make_tokenizer().decode(turn) == '<eos><|user|>to "":<eos><|assistant|>'


def test_what_cannot_go_on_says_so():
    ends = build(make_tokenizer(), fusion_prompt_template="{question}|{candidates}\n")
    for prompt in ("1+1=", CHAT):
        with pytest.raises(ValueError, match=r"`fusion_prompt_template` must say something behind `\{candidates\}`"):
            ends.fusion_turn(prompt)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if messages | length > 2 %}{{ raise_exception('One turn only.') }}{% endif %}x"
    with pytest.raises(ValueError, match=r"lets a user speak after an answer.*'assistant', 'user'\]: One turn only"):
        build(tokenizer).fusion_turn(CHAT)
    with pytest.raises(ValueError, match="shows the assistant's earlier answers"):
        build(make_spaced_tokenizer("never", LLAMA2)).fusion_turn(CHAT)


ONE_TURN = "{% if messages | length > 1 %}{{ raise_exception('One turn only.') }}{% endif %}"
SHOWS_USERS = "{% for m in messages if m.role == 'user' %}<|user|>{{ m.content }}<eos>{% endfor %}<|assistant|>"


@pytest.mark.parametrize(
    ("chat_template", "changed"),
    [
        (None, {"fusion_prompt_template": "{question}|{candidates}"}),
        (ONE_TURN + SHOWS_USERS, {}),
        (SHOWS_USERS, {}),
    ],
    ids=["nothing behind the candidates", "one turn", "hides answers"],
)
def test_what_cannot_go_on_follows_text_by_default(chat_template, changed, tmp_path):
    policy, tokenizer = save_policy(tmp_path / "policy"), make_tokenizer()
    tokenizer.chat_template = chat_template or tokenizer.chat_template

    def trained(collider_attention):
        settings = {**SHORT_TEMPLATES, **changed, "collider_attention": collider_attention}
        args = GCPOConfig(**options(tmp_path / str(collider_attention), **settings))
        data = prompts(conversational=True)
        trainer = GCPOTrainer(policy, count_low, args, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        return trainer

    by_default, on_text = trained(None), trained("full")
    assert by_default.state.log_history[0]["gcpo/tokens/generated_colliders"] > 0
    assert worst_difference(parameters(by_default.model), parameters(on_text.model)) == 0
    with pytest.raises(ValueError, match="`collider_attention='parallel'`"):
        trained("parallel")


def reading(tokens, mark):
    """Keys and values that name their token and their candidate."""
    part = torch.stack([torch.full((tokens,), float(mark)), torch.arange(tokens).float()], dim=1)[None]
    return Reading(torch.zeros(tokens), torch.zeros(1), [(part, -part)])


@pytest.mark.parametrize("shown", [None, 2])
def test_rows_show_the_ends_of_what_candidates_say(shown):
    builder, query = build(make_tokenizer()), [20, 21, 22]
    candidates = [[30, 31, 32, EOS], [40, EOS, 41, 3, EOS], [EOS], [50, 51, 52, 53, 54, 55]]
    group = Group("1+1=", query, candidates, [], [])
    known = GroupReading(reading(2, -1).own, {k: reading(len(ids), k) for k, ids in enumerate(candidates)})
    row, same, other = collider_rows(builder, {0: group, 3: group}, {0: known, 3: known}, [3, 3, 0], shown)
    assert row is same and row.past is not other.past and row.ids == other.ids == [22, *builder.fusion_turn("1+1=")]
    assert row.first_position == 3 + 6 - 1 and not row.scores and row.tokens == "generated_colliders"
    assert row.past[0] is known.query
    kept = [(0, [0, 1, 2]), (1, [0, 1, 2]), (2, []), (3, [0, 1, 2, 3, 4, 5])]  # a special token in between stays
    for piece, (mark, places) in zip(row.past[1:], kept, strict=True):
        (keys, values), places = piece[0], places[-shown:] if shown else places
        assert keys[0].tolist() == [[mark, place] for place in places] and torch.equal(values, -keys)


def counting(options=None, **abilities):
    outputs = lambda phase, number: Span.of((phase, number), 3 + number)  # noqa: E731
    return CountingPolicy(options or CausalOptions(), 4, outputs, [("end", 0)], abilities=Abilities(**abilities))


def test_a_plan_counts_the_turn_once_and_what_decoding_looks_back_at():
    policy = counting()
    past, other = [piece_of(10), piece_of(7)], [piece_of(5)]
    turn = Span.of("turn", 4)
    rows = [Continuation(past, turn, 20)] * 2 + [Continuation(other, turn, 9)]
    got = policy.decode(rows, 0, limit=8, temperature=None, greedy=[True, False, False])
    assert [len(ids) for ids in got] == [3, 4, 5] and not policy.tokens
    steps = 5  # until the longest row ends
    assert policy.passes == {
        Pass("colliders", "prefill", "prefill", 4, 1, 17): 1,
        Pass("colliders", "prefill", "prefill", 4, 1, 5): 1,
        Pass("colliders", "decode", "decode", 3, steps, 21, padding=2): 1,
        Pass("colliders", "decode", "decode", 4, steps, 21, padding=1): 1,
        Pass("colliders", "decode", "decode", 5, steps, 9): 1,
    }
    assert policy.decoding == {("colliders", "decode"): Decoding(steps, steps * (21 + 21 + 9 + 3 * steps / 2))}
    assert policy.can_decode and not counting(in_house=False).can_decode and not counting(can_continue=False).can_decode


@pytest.mark.parametrize("in_house", [True, False])
def test_a_plan_counts_a_call_for_each_temperature_of_an_engine(in_house):
    policy, prompts = counting(in_house=in_house, caches_prefixes=not in_house), [Span.of("q", 6)] * 3
    got = policy.generate(prompts, 0, limit=8, temperature=None, greedy=[False, True, False])
    assert [len(ids) for ids in got] == [3, 4, 5]
    assert policy.passes[Pass("colliders", "prefill", "prefill", 6, 1)] == 1
    assert policy.decoding[("colliders", "decode")].steps == (5 if in_house else 4 + 5)
