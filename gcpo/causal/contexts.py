"""
The two prompts that GCPO adds to a step, as token ids: the fusion prompt, which asks for an integrated answer (a
collider), and the context x_{i,l}, which a candidate is scored after.

Prompts, candidates and colliders are data. A template is rendered once with a marker in place of each of them and
tokenized piece by piece; candidates and colliders then enter as the token ids that the model generated, less special
tokens, and the question's text with special tokens split into plain ones. So nothing inside them can open a turn, end
one, or be cut in the middle of a special token.
"""

import re
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from gcpo.config import GCPOConfig

Prompt = str | list[dict[str, Any]]  # plain text, or the messages of a conversation

# Private-use characters: no chat template writes them, and they are taken out of questions.
_MARKERS = {name: f"\ue000{name}\ue001" for name in ("question", "candidates", "collider")}
_MARKER_PATTERN = re.compile("(" + "|".join(_MARKERS.values()) + ")")


class PromptBuilder:
    """
    Builds fusion and context prompts for one tokenizer.

    Args:
        tokenizer: the policy's tokenizer.
        config: templates and `candidate_context_tokens`.
        chat_template: template for conversational prompts; None: the tokenizer's own.
        chat_template_kwargs: passed on to `apply_chat_template`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: GCPOConfig,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        self.tokenizer = tokenizer
        self.config = config
        self.chat_template = chat_template
        self.chat_template_kwargs = chat_template_kwargs or {}
        # The named ones, and those that are only added as special: Llama's and DeepSeek's turn markers have no name.
        added = tokenizer.added_tokens_decoder.items()
        self.special_ids = set(tokenizer.all_special_ids) | {token for token, content in added if content.special}
        self._warned = False
        self._encode = lru_cache(maxsize=4096)(self._encode_text)
        self._bos = self._leading_ids()

    def fusion(self, prompt: Prompt, candidates: list[list[int]]) -> list[int]:
        """Ids of the prompt that shows all candidates and asks for one integrated answer."""
        return self._build(prompt, self.config.fusion_prompt_template, {"candidates": self._show(candidates)})

    def context(self, prompt: Prompt, candidates: list[list[int]], collider: list[int]) -> list[int]:
        """Ids of x_{i,l} = {q, `candidates` (all but y_i), c_l = `collider`}, ready for y_i to follow."""
        pieces = {"candidates": self._show(candidates), "collider": self.content(collider)}
        return self._build(prompt, self.config.context_prompt_template, pieces)

    def content(self, ids: Sequence[int]) -> list[int]:
        """`ids` without special tokens."""
        return [token for token in ids if token not in self.special_ids]

    def _show(self, candidates: list[list[int]]) -> list[int]:
        """All candidates, each as `candidate_template` has it, cut to its last `candidate_context_tokens` tokens."""
        limit = self.config.candidate_context_tokens
        shown: list[int] = []
        for number, candidate in enumerate(candidates, start=1):
            if number > 1:
                shown += self._encode("\n\n", False)
            content = self.content(candidate)
            if limit is not None:
                content = content[-limit:]
            # `{candidate}` marks a place; a template may show it only once, so the first split is the whole story.
            before, _, after = self.config.candidate_template.partition("{candidate}")
            shown += [*self._static(before, number), *content, *self._static(after, number)]
        return shown

    def _static(self, text: str, number: int) -> tuple[int, ...]:
        return self._encode(text.format(index=number), False)

    def _build(self, prompt: Prompt, template: str, pieces: dict[str, list[int]]) -> list[int]:
        if isinstance(prompt, str):
            question, text = prompt, template.format(**_MARKERS)
        else:
            question, text = self._render_with_template(prompt, template)
        question = _MARKER_PATTERN.sub("", question)
        if isinstance(prompt, str):
            self._warn_of_template(question)
        ids = list(self._bos) if isinstance(prompt, str) else []
        for segment in _MARKER_PATTERN.split(text):
            name = segment[1:-1]
            if segment == _MARKERS["question"]:
                ids += self._encode(question, True)
            elif name in pieces and segment == _MARKERS[name]:
                ids += pieces[name]
            elif segment:
                ids += self._encode(segment, False)
        return ids

    def _warn_of_template(self, question: str) -> None:
        """Plain text is data: a chat template that it already went through would be shown as text, its turns gone."""
        ids = self._encode(question, False)
        if not self._warned and len(self.content(ids)) < len(ids):
            self._warned = True
            warnings.warn(
                "A prompt of plain text holds special tokens, as if a chat template had been applied to it. GCPO's own "
                "prompts show it without them, and so without its turns: pass messages (a list of role and content) as "
                "`prompt` instead, and the template is applied for you.",
                stacklevel=2,
            )

    def _render_with_template(self, messages: list[dict[str, Any]], template: str) -> tuple[str, str]:
        """The question (the last user message) and the conversation's text with the template in its place."""
        last = max((k for k, message in enumerate(messages) if message["role"] == "user"), default=None)
        if last is None:
            roles = [message["role"] for message in messages]
            raise ValueError(f"`prompt` must hold a user message to put the candidates beside, got roles {roles}.")
        question = _text_of(messages[last]["content"])
        replaced = [dict(message) for message in messages]
        replaced[last]["content"] = template.format(**_MARKERS)
        return question, self._render(replaced)

    def _render(self, messages: list[dict[str, Any]]) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=False,
            **self.chat_template_kwargs,
        )

    def _encode_text(self, text: str, is_data: bool) -> tuple[int, ...]:
        """Ids of `text`; special tokens spelled out in data are split into plain ones."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=is_data)["input_ids"]
        return tuple(self.content(ids)) if is_data else tuple(ids)

    def _leading_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before plain text of its own accord: a beginning-of-sequence token, or nothing."""
        with_special = self.tokenizer("a")["input_ids"]
        without = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        for start in range(len(with_special) - len(without) + 1):
            if with_special[start : start + len(without)] == without:
                return tuple(with_special[:start])
        return ()


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(part["text"] for part in content)
    raise TypeError("`prompt` must be text: GCPO builds prompts out of messages and cannot show images or tool calls.")


def longest_prompt(config: GCPOConfig, max_completion_length: int) -> int:
    """Tokens that the candidates and the collider can add to a prompt: an upper bound, without question or template."""
    shown = max_completion_length
    if config.candidate_context_tokens is not None:
        shown = min(shown, config.candidate_context_tokens)
    fusion = config.num_generations * shown + config.collider_max_completion_length
    context = (config.num_generations - 1) * shown + config.collider_max_completion_length + max_completion_length
    return max(fusion, context if config.uses_contexts else 0)


def check_length(tokens: int, limit: int | None, what: str) -> None:
    """Raise where `what` would hold more tokens than the model has positions for."""
    if limit is not None and tokens > limit:
        raise ValueError(
            f"{what} needs {tokens} tokens, more than the model's {limit} positions. Lower `candidate_context_tokens` "
            "(how much of each candidate is shown), `collider_max_completion_length`, `num_generations` or "
            "`max_completion_length`."
        )
