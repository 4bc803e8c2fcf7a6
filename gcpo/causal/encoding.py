"""
Text as token ids, of which parts are given as ids already: what stands before, between and behind them is tokenized as
it would be within the whole text.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

QUESTION = "\ue000question\ue001"  # stands for the question in a text; private-use characters, as all markers

Piece = str | Sequence[int]  # text, or token ids that enter as they are

# Texts that another text can follow. Some tokenizers begin a text as they begin a word, with a space of their own: the
# tokens of a text within another are those behind one of these that no token reaches across from.
_LEADS = ("a", "1", ".", ")")


class TextEncoder:
    """
    Tokenizes texts and pieces of texts, so that a special token spelled out in a question never becomes that token.

    Args:
        tokenizer: any tokenizer of transformers, those of mistral-common included.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        # The named ones, and those that are only added as special: Llama's and DeepSeek's turn markers have no name.
        self.special_ids = set(tokenizer.all_special_ids) | _added_as_special(tokenizer)
        # What a question must not spell: a token for unknown characters says nothing, and stands for one of its own.
        self.forbidden = self.special_ids - {tokenizer.unk_token_id}
        # Tokenizers of mistral-common take every text as plain text. Others read a special token that is spelled out.
        name, token = tokenizer.eos_token, tokenizer.eos_token_id
        self.reads_special = name is None or token in self._encode(name)
        # Prompts of one group repeat most of their text.
        self.read = lru_cache(maxsize=1024)(self._read)
        self.inside = lru_cache(maxsize=1024)(self._inside)
        self.spells_special = lru_cache(maxsize=1024)(self._spells_special)
        self.bos = self._leading_ids()

    def content(self, ids: Sequence[int]) -> list[int]:
        """`ids` without special tokens."""
        return [token for token in ids if token not in self.special_ids]

    def _encode(self, text: str, split: bool = False) -> tuple[int, ...]:
        """Ids of a text that stands alone. `split`: special tokens that it spells out are plain text."""
        options = {"split_special_tokens": True} if split and self.reads_special else {}
        return tuple(self.tokenizer(text, add_special_tokens=False, **options)["input_ids"])

    def _inside(self, text: str, split: bool = False) -> tuple[int, ...]:
        """Ids of a text that follows other text: as `text` alone has them, without a space that is not in it."""
        if not text:
            return ()
        alone = self._encode(text, split)
        found = None
        for lead in _LEADS:
            before, both = self._encode(lead, split), self._encode(lead + text, split)
            if both[: len(before)] == before:
                ids = both[len(before) :]
                if ids == alone:
                    return alone
                found = ids if found is None else found
        return alone if found is None else found

    def _read(self, text: str, question: str, opens: bool) -> tuple[int, ...]:
        """
        Ids of `text`, in which `QUESTION` stands for the question.

        Args:
            opens: whether the text is the beginning, rather than behind other text.
        """
        encode = self._encode if opens else self.inside
        first, *others = text.split(QUESTION)
        whole = encode(text.replace(QUESTION, question))
        if not (others and self.reads_special):
            return whole
        special = [token for part in (first, *others) for token in self._encode(part) if token in self.forbidden]
        if [token for token in whole if token in self.forbidden] == special:
            return whole
        # The question spells some, alone or together with what is around it: it is read apart, with those split.
        ids = [*encode(first)]
        for part in others:
            asked = [token for token in self.inside(question, True) if token not in self.forbidden]
            ids += [*asked, *self.inside(part)]
        return tuple(ids)

    def _spells_special(self, text: str) -> bool:
        """Whether a text holds special tokens."""
        return bool(self.forbidden.intersection(self._encode(text)))

    def _leading_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before plain text of its own accord: a beginning-of-sequence token, or nothing."""
        with_special, without = self.tokenizer("a")["input_ids"], list(self._encode("a"))
        for start in range(len(with_special) - len(without) + 1):
            if with_special[start : start + len(without)] == without:
                return tuple(with_special[:start])
        return ()


def join_pieces(pieces: Sequence[Piece]) -> tuple[list[str], list[Sequence[int]]]:
    """
    Neighbouring texts as one text, so that none is tokenized apart: k + 1 texts, some of them empty, and the k pieces
    of ids between them, none of them empty.
    """
    texts, ids = [""], []
    for piece in pieces:
        if isinstance(piece, str):
            texts[-1] += piece
        elif piece:
            ids.append(piece)
            texts.append("")
    return texts, ids


def _added_as_special(tokenizer: Any) -> set[int]:
    try:
        return {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    except (AttributeError, NotImplementedError):  # mistral-common's has no such table, and names all of them
        return set()
