"""
The two prompts that GCPO adds to a step, as token ids: the fusion prompt, which asks for an integrated answer (a
collider), and the context x_{i,l}, which a candidate is scored after.

Prompts, candidates and colliders are data. A template is rendered once with a marker in place of each of them;
candidates and colliders then enter as the token ids that the model generated, less special tokens, and all text around
them is tokenized as the whole text would be, with special tokens that the question spells out as plain text. So nothing
inside them can open a turn, end one, or be cut in the middle of a special token.
"""

import json
import re
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from gcpo.causal.encoding import QUESTION, Piece, TextEncoder, join_pieces
from gcpo.causal.options import CausalOptions
from gcpo.causal.port import Ids, Prompt, common_prefix

# Private-use characters: no chat template writes them, and they are taken out of questions.
_MARKERS = {"question": QUESTION, **{name: f"\ue000{name}\ue001" for name in ("candidates", "collider")}}
_MARKER_PATTERN = re.compile("(" + "|".join(_MARKERS.values()) + ")")


class NoFusionTurn(ValueError):
    """No turn can ask for an integrated answer behind candidates that stand side by side: they need a text."""


class PromptBuilder:
    """
    Builds fusion and context prompts for one tokenizer.

    A conversation keeps its messages; the question that is shown again, with the candidates, is its last user message.
    Without any, what the last message says is the question, in a user message that is added at the end.

    Args:
        tokenizer: the policy's, any of transformers.
        options: templates and `candidate_context_tokens`.
        chat_template: template for conversational prompts; None: the tokenizer's own.
        chat_template_kwargs: passed on to `apply_chat_template`.
    """

    def __init__(
        self,
        tokenizer: Any,
        options: CausalOptions,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        self.tokenizer = tokenizer
        self.options = options
        self.encoder = TextEncoder(tokenizer)
        self.special_ids, self.content = self.encoder.special_ids, self.encoder.content
        self._chat_options: dict[str, Any] = {"add_generation_prompt": True, **(chat_template_kwargs or {})}
        if chat_template is not None:
            self._chat_options["chat_template"] = chat_template
        self._chat_ids = lru_cache(maxsize=64)(self._tokenize_chat)
        self._warned = False

    def fusion(self, prompt: Prompt, candidates: list[Ids]) -> Ids:
        """Ids of the prompt that shows all candidates and asks for one integrated answer."""
        return self._build(prompt, self.options.fusion_prompt_template, {"candidates": self._show(candidates)})

    def context(self, prompt: Prompt, candidates: list[Ids], collider: Ids) -> Ids:
        """Ids of x_{i,l} = {q, `candidates` (all but y_i), c_l = `collider`}, ready for y_i to follow."""
        pieces: dict[str, list[Piece]] = {"candidates": self._show(candidates), "collider": [self.content(collider)]}
        return self._build(prompt, self.options.context_prompt_template, pieces)

    def fusion_turn(self, prompt: Prompt) -> Ids:
        """
        Ids that follow an answer to `prompt` and ask for an integrated one: what the fusion prompt says behind
        `{candidates}`, less the question. In a conversation they end the assistant's turn (an answer stands without its
        end token), give these words to the user, and begin the next answer. For candidates that are read as keys and
        values, side by side, in place of a text that shows them (`collider_attention="parallel"`).

        Raises:
            NoFusionTurn: a `ValueError`; the template says nothing behind `{candidates}`, or the chat template does
                not let a user speak after an answer.
        """
        shown = self.options.fusion_prompt_template.format(question="", candidates=_MARKERS["candidates"])
        words = shown.rpartition(_MARKERS["candidates"])[2]
        if not words.strip():
            raise NoFusionTurn(
                "`fusion_prompt_template` must say something behind `{candidates}` with "
                "`collider_attention='parallel'`, which asks for an integrated answer after the candidates, got "
                f"{self.options.fusion_prompt_template!r}. Change it, or use `collider_attention='full'`."
            )
        if isinstance(prompt, str):
            return list(self.encoder.inside(words))
        # Ids of what follows do not depend on what was said before, so that one conversation stands for all.
        messages = [{**message, "content": "a"} for message in prompt]
        messages += [{"role": "assistant", "content": None}, {"role": "user", "content": words.strip()}]
        key = json.dumps(messages, default=str)
        try:
            some, other = (self._chat_ids(key, len(prompt), answer) for answer in ("a", "b"))
        except Exception as error:  # templates and tokenizers refuse a conversation with errors of their own
            raise NoFusionTurn(
                "`collider_attention='parallel'` needs a chat template that lets a user speak after an answer; this "
                f"one says of roles {[message['role'] for message in messages]}: {error} Use "
                "`collider_attention='full'`."
            ) from error
        if some == other:
            raise NoFusionTurn(
                "`collider_attention='parallel'` needs a chat template that shows the assistant's earlier answers, "
                "and this one leaves them out. Use `collider_attention='full'`."
            )
        return list(some[len(some) - common_prefix(some[::-1], other[::-1]) :])

    def _show(self, candidates: list[Ids]) -> list[Piece]:
        """All candidates, each as `candidate_template` has it, cut to its last `candidate_context_tokens` tokens."""
        limit = self.options.candidate_context_tokens
        shown: list[Piece] = []
        for number, candidate in enumerate(candidates, start=1):
            content = self.content(candidate)
            if limit is not None:
                content = content[-limit:]
            # `{candidate}` marks a place; a template may show it only once, so the first split is the whole story.
            before, _, after = self.options.candidate_template.partition("{candidate}")
            separator = "\n\n" if number > 1 else ""
            shown += [separator + before.format(index=number), content, after.format(index=number)]
        return shown

    def _build(self, prompt: Prompt, template: str, pieces: dict[str, list[Piece]]) -> list[int]:
        if isinstance(prompt, str):
            question = _MARKER_PATTERN.sub("", prompt)
            self._warn_of_template(question)
            texts, given = _fill(template.format(**_MARKERS), pieces)
            return [*self.encoder.bos, *self._encode(texts, given, question)]
        messages, last, content = _place_question(prompt)
        question = _MARKER_PATTERN.sub("", _text_of(content))
        if not self.encoder.reads_special:  # nor would it read those of a rendered conversation
            return self._build_as_ids(messages, last, *_fill(template.format(**_MARKERS), pieces), question)
        # White space around a question, or beside an empty one, is the chat template's to keep or to take away.
        stripped = question.strip()
        around = question.replace(stripped, QUESTION, 1) if stripped else question
        content = template.format(**{**_MARKERS, "question": around})
        messages[last]["content"] = content
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, **self._chat_options)
        if sorted(_MARKER_PATTERN.findall(text)) != sorted(_MARKER_PATTERN.findall(content)):
            raise ValueError(
                "The chat template must show the message with the question, and once: candidates are shown there. Got "
                f"roles {[message['role'] for message in messages]}."
            )
        return self._encode(*_fill(text, pieces), stripped)

    def _encode(self, texts: list[str], given: list[Sequence[int]], question: str) -> list[int]:
        """Ids of a prompt: its texts, and what is given as ids between them."""
        ids = [*self.encoder.read(texts[0], question, True)]
        for piece, text in zip(given, texts[1:], strict=True):
            ids += [*piece, *self.encoder.read(text, question, False)]
        return ids

    def _build_as_ids(
        self, messages: list[dict[str, Any]], last: int, texts: list[str], given: list[Sequence[int]], question: str
    ) -> list[int]:
        """
        Ids of a conversation whose tokenizer makes them without a text in between: those of its last user message up to
        the first piece of ids, all that follows in that message, and the end of the conversation.
        """
        key = json.dumps([*messages[:last], {**messages[last], "content": None}, *messages[last + 1 :]], default=str)
        opening = texts[0].replace(QUESTION, question)
        whole = self._chat_ids(key, last, opening)
        if not given:
            return list(whole)
        some, other = self._chat_ids(key, last, "a"), self._chat_ids(key, last, "b")
        end = some[len(some) - common_prefix(some[::-1], other[::-1]) :]
        ids = [*whole[: len(whole) - len(end)]]
        if not opening or whole[len(ids) :] != end:  # its last tokens are one with those of the end
            ids = [*some[: common_prefix(some, other)], *self.encoder.inside(opening)]
        for piece, text in zip(given, texts[1:], strict=True):
            ids += [*piece, *self.encoder.read(text, question, False)]
        return [*ids, *end]

    def _tokenize_chat(self, key: str, last: int, content: str) -> tuple[int, ...]:
        messages = json.loads(key)
        messages[last]["content"] = content
        encoded: Any = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, **self._chat_options
        )
        return tuple(encoded["input_ids"])

    def _warn_of_template(self, question: str) -> None:
        """Plain text is data: a chat template that it already went through would be shown as text, its turns gone."""
        if not self._warned and self.encoder.spells_special(question):
            self._warned = True
            warnings.warn(
                "A prompt of plain text holds special tokens, as if a chat template had been applied to it. GCPO's own "
                "prompts show it without them, and so without its turns: pass messages (a list of role and content) as "
                "`prompt` instead, and the template is applied for you.",
                stacklevel=2,
            )


def _fill(text: str, pieces: dict[str, list[Piece]]) -> tuple[list[str], list[Sequence[int]]]:
    """`join_pieces` of a text with what its markers stand for; that of the question stays."""
    names = {_MARKERS[name]: piece for name, piece in pieces.items()}
    return join_pieces([part for segment in _MARKER_PATTERN.split(text) for part in names.get(segment, [segment])])


def _place_question(prompt: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int, Any]:
    """A copy of the messages, which of them is to show the question with the candidates, and the question's content."""
    messages = [dict(message) for message in prompt]
    if not messages:
        raise ValueError("`prompt` must hold a message, got an empty list.")
    users = [k for k, message in enumerate(messages) if message["role"] == "user"]
    if users:
        return messages, users[-1], messages[users[-1]].get("content")
    # What the template accepts as the end of a conversation that an answer follows, a user can follow.
    return [*messages, {"role": "user"}], len(messages), messages[-1].get("content")


def _text_of(content: Any) -> str:
    """The text of a message's content, which may be None (no text) or a list of text parts."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise TypeError(f"`content` of a message in `prompt` must be text, got {type(content).__name__}.")
    texts = []
    for part in content:
        kind = "text" if isinstance(part, str) else part.get("type")
        if kind != "text":
            raise TypeError(
                "`prompt` must be text: GCPO shows the question a second time, with the candidates, and cannot show a "
                f"part of type {kind!r}."
            )
        texts.append(part if isinstance(part, str) else part.get("text") or "")
    return "".join(texts)


def longest_prompt(options: CausalOptions, num_generations: int, max_completion_length: int) -> int:
    """Tokens that the candidates and the collider can add to a prompt: an upper bound, without question or template."""
    shown = max_completion_length
    if options.candidate_context_tokens is not None:
        shown = min(shown, options.candidate_context_tokens)
    collider = options.collider_limit(max_completion_length)
    fusion = num_generations * shown + collider
    context = (num_generations - 1) * shown + collider + max_completion_length
    return max(fusion, context if options.uses_contexts else 0)


def check_length(tokens: int, limit: int | None, what: str) -> None:
    """Raise where `what` would hold more tokens than the model has positions for."""
    if limit is not None and tokens > limit:
        raise ValueError(
            f"{what} needs {tokens} tokens, more than the model's {limit} positions. Lower `candidate_context_tokens` "
            "(how much of each candidate is shown), `collider_max_completion_length`, `num_generations` or "
            "`max_completion_length`."
        )
