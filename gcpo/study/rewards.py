"""The reward of the study `transfer`: a task without one right answer."""

from itertools import pairwise
from typing import Any

from gcpo.run.records import text_of


def open_ended_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """
    A task without one right answer: any one word, of six different letters or more, in which vowels and consonants
    take turns. The share of neighbours that do, times the share of six letters that there are; 0 for anything else.
    """
    scores = []
    for completion in completions:
        word = text_of(completion).strip().lower()
        if len(word) < 2 or not (word.isascii() and word.isalpha()):
            scores.append(0.0)
            continue
        vowels = [letter in "aeiou" for letter in word]
        turns = sum(a != b for a, b in pairwise(vowels)) / (len(word) - 1)
        scores.append(turns * min(len(set(word)), 6) / 6)
    return scores
