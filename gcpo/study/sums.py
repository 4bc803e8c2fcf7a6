"""
The bed `integrating`: a small model that solves chained sums step by step, slips, and integrates what it is shown.

A question is a digit and eight digits to add or to subtract, all modulo 10: `7+5-6...:`. Its answer writes every step
out, `7+5=2-6=6...`, and is right if the last digit is. The model is taught three things, by examples alone:

- to answer as a solver does that knows most of the facts x + y and x - y, is shaky at some, where it slips to any digit
  with a frequency below one half, and has a few wrong, where it says one wrong digit most of the time. About a third of
  its answers are right, a vote over them is right more often, and training can find out what no vote tells;
- to integrate: after a fusion prompt it writes, at each step, the digit that most of the candidates have there. Nobody
  tells it what is right: it knows no more than the candidates say;
- to answer under a context, half of the time with the integrated answer that it is shown, and half of the time with the
  candidate that the context leaves out.

Everything comes from the recipe in this file: data, weights, and the order of both.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gcpo.run.inputs import one_line
from gcpo.run.progress import progress_bar
from gcpo.run.records import text_of, write_whole

OPERANDS = 8
COMPLETION_TOKENS = 2 * OPERANDS + 2  # the first digit, two tokens per step, the end token
# GCPO's prompts, which the model has been taught.
OPTIONS = {
    "fusion_prompt_template": "{question}[{candidates}]",
    "context_prompt_template": "{question}({candidates}){collider}>",
    "candidate_template": "{candidate}",
    "candidate_context_tokens": None,
}

_SIGNS, _DIGITS = "+-", "0123456789"
_SEPARATOR = "\n\n"  # what GCPO's prompts put between candidates
# A token is a sign with its digit, in an answer also with the sign of equality, or a character.
_TOKEN = r"[+-]\d=?|\n\n|."
_ANSWER = re.compile(rf"\d(?:[+-]\d=\d){{{OPERANDS}}}")


@dataclass(frozen=True)
class Recipe:
    """What the starting model is made from; two that differ in anything have different models."""

    steps: int = 1500
    seed: int = 0
    hidden_size: int = 128
    num_layers: int = 2
    intermediate_size: int = 512
    learning_rate: float = 4e-3
    plain_first: float = 0.1  # share of the steps that show plain questions alone
    plain_rows: int = 32
    shown_rows: int = 12
    num_candidates: int = 8
    candidate_weight: float = 0.25  # of candidates that a prompt shows, in the loss
    known_slips: float = 0.02  # how often a known fact comes out wrong
    shaky_facts: float = 0.3
    shaky_slips: tuple[float, float] = (0.1, 0.5)  # lowest and highest
    wrong_facts: float = 0.04
    wrong_slips: float = 0.7
    operands: int = OPERANDS
    layout: int = 1  # of the examples


RECIPE = Recipe()


# ---------------------------------------------------------------------------------------------------------------------
# The task
# ---------------------------------------------------------------------------------------------------------------------

Operation = tuple[str, int]
Problem = tuple[int, list[Operation]]
_OPERATIONS: list[Operation] = [(sign, y) for sign in _SIGNS for y in range(10)]


def draw_problem(rng: random.Random) -> Problem:
    """A first digit, and what is done to it; nothing twice, so that a step can be told from the others."""
    return rng.randrange(10), rng.sample(_OPERATIONS, OPERANDS)


def question_of(problem: Problem) -> str:
    """The prompt."""
    first, operations = problem
    return str(first) + "".join(f"{sign}{y}" for sign, y in operations) + ":"


def result(x: int, operation: Operation) -> int:
    """The right digit after a step."""
    sign, y = operation
    return (x + y if sign == "+" else x - y) % 10


def solution(problem: Problem) -> str:
    """The right answer, with its steps."""
    x, operations = problem
    text = str(x)
    for operation in operations:
        x = result(x, operation)
        text += f"{operation[0]}{operation[1]}={x}"
    return text


def dataset(count: int, seed: int) -> Dataset:
    """`count` different questions: columns `prompt` and `answer`, the last digit, both text."""
    rng = random.Random(f"questions {seed}")
    rows: dict[str, str] = {}
    while len(rows) < count:
        problem = draw_problem(rng)
        rows[question_of(problem)] = solution(problem)[-1]
    return Dataset.from_list([{"prompt": prompt, "answer": answer} for prompt, answer in rows.items()])


def reward(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """1 for a chain of as many steps as there are operands that ends in the answer, 0 for anything else."""
    texts = map(text_of, completions)
    return [float(bool(_ANSWER.fullmatch(text)) and text[-1] == a) for text, a in zip(texts, answer, strict=True)]


def rising_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """A task without one right answer: the share of steps whose result is above the one before; 0 without a chain."""
    scores = []
    for text in map(text_of, completions):
        digits = text[::4] if _ANSWER.fullmatch(text) else ""
        scores.append(sum(a < b for a, b in pairwise(digits)) / OPERANDS)
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# The model, and what it is taught
# ---------------------------------------------------------------------------------------------------------------------


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token is a digit, an operation, an operation with its sign of equality, or a bracket; none is added."""
    operations = [sign + digit for sign in _SIGNS for digit in _DIGITS]
    words = ["<pad>", "<eos>", "<unk>", _SEPARATOR, *_DIGITS, *":[]()>", *operations, *(f"{o}=" for o in operations)]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_TOKEN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(tokenizer: PreTrainedTokenizerBase, recipe: Recipe = RECIPE) -> LlamaForCausalLM:
    """An untrained Llama with tied embeddings, the same for the same seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(config)


class Solver:
    """
    Solves problems, and slips.

    Attributes:
        habits: of each fact, how often it comes out wrong, and by how much; 0: by anything.
    """

    def __init__(self, recipe: Recipe):
        rng = random.Random(f"habits {recipe.seed}")
        self.habits: dict[tuple[int, Operation], tuple[float, int]] = {}
        for x in range(10):
            for sign in _SIGNS:
                for y in range(10):
                    kind, frequency, error = rng.random(), rng.uniform(*recipe.shaky_slips), rng.randrange(1, 10)
                    if kind < recipe.wrong_facts:
                        habit = recipe.wrong_slips, error
                    elif kind < recipe.wrong_facts + recipe.shaky_facts:
                        habit = frequency, 0
                    else:
                        habit = recipe.known_slips, 0
                    self.habits[x, (sign, y)] = habit

    def answer(self, problem: Problem, rng: random.Random) -> str:
        """An answer with its steps; after a slip it goes on from the wrong digit."""
        x, operations = problem
        text = str(x)
        for operation in operations:
            frequency, error = self.habits[x, operation]
            x = result(x, operation)
            if rng.random() < frequency:
                x = (x + (error or rng.randrange(1, 10))) % 10
            text += f"{operation[0]}{operation[1]}={x}"
        return text


def integrate(candidates: list[str]) -> str:
    """At each step the digit that most candidates have there; of several, that of the first candidate to have one."""
    text = list(candidates[0])
    for place in range(4, len(text), 4):
        text[place] = Counter(candidate[place] for candidate in candidates).most_common(1)[0][0]
    return "".join(text)


def example(kind: str, solver: Solver, rng: random.Random, recipe: Recipe) -> list[tuple[str, float]]:
    """Parts of a text with their weights in the loss, the answer last. Shown candidates are learnt too, if less."""
    problem = draw_problem(rng)
    question = question_of(problem)
    if kind == "plain":
        return [(question, 0.0), (solver.answer(problem, rng), 1.0)]
    shown = [solver.answer(problem, rng) for _ in range(recipe.num_candidates)]
    integrated = integrate(shown)
    left_out = shown.pop() if kind == "context" else ""
    opening, closing = ("(", ")") if kind == "context" else ("[", "]")
    parts = [(question + opening, 0.0)]
    for number, candidate in enumerate(shown):
        parts += [(_SEPARATOR, 0.0)] if number else []
        parts.append((candidate, recipe.candidate_weight))
    if kind == "fusion":
        return [*parts, (closing, 0.0), (integrated, 1.0)]
    target = integrated if rng.random() < 0.5 else left_out
    return [*parts, (closing + integrated + ">", 0.0), (target, 1.0)]


def batch_of(
    step: int, solver: Solver, tokenizer: PreTrainedTokenizerBase, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (rows, T) of a step's examples, and their weights in the loss, (rows, T) float32, 0 for padding."""
    rng = random.Random(f"step {recipe.seed} {step}")  # of nothing but the step: a run goes on where it was stopped
    is_first = step < recipe.plain_first * recipe.steps
    kind = "plain" if is_first else ("fusion", "plain", "fusion", "context", "fusion")[step % 5]
    vocabulary, ids, weights = tokenizer.get_vocab(), [], []
    for _ in range(recipe.plain_rows if kind == "plain" else recipe.shown_rows):
        texts = example(kind, solver, rng, recipe)
        parts = [(re.findall(_TOKEN, text), weight) for text, weight in texts]
        words = [word for part, _ in parts for word in part] + ["<eos>"]
        ids.append(torch.tensor([vocabulary[word] for word in words]))
        weights.append(torch.tensor([weight for part, weight in parts for _ in part] + [1.0]))
    return pad_sequence(ids, batch_first=True), pad_sequence(weights, batch_first=True)


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """A short warmup, a plateau, and a fall to a thirtieth over the last two fifths."""
    left = (recipe.steps - step) / (0.4 * recipe.steps)
    return recipe.learning_rate * min(1.0, (step + 1) / 50) * min(1.0, max(1 / 30, left))


# ---------------------------------------------------------------------------------------------------------------------
# The starting model
# ---------------------------------------------------------------------------------------------------------------------


def start(folder: Path, recipe: Recipe = RECIPE) -> str:
    """
    The starting model's folder. It is made where it is not there yet, in minutes; what was interrupted goes on.

    Raises:
        ValueError: the folder holds a model, or a part of one, of another recipe.
    """
    finished, part = folder / "recipe.json", folder / "part.pt"
    if finished.exists():
        _check_recipe(folder, _read(finished, lambda: json.loads(finished.read_text())), recipe)
        return str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01, betas=(0.9, 0.95))
    done = 0
    if part.exists():
        saved = _read(part, lambda: torch.load(part, weights_only=True))
        _check_recipe(folder, saved["recipe"], recipe)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    solver = Solver(recipe)
    with progress_bar(recipe.steps - done, "starting model", "step", leave=False) as bar:
        for step in range(done, recipe.steps):
            _teach(model, optimizer, learning_rate_at(step, recipe), *batch_of(step, solver, tokenizer, recipe))
            bar.update()
            if (step + 1) % 100 == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save({**state, "recipe": _as_json(recipe)}, part.with_suffix(".new"))
                part.with_suffix(".new").replace(part)  # whole, or the one before
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_whole(finished, _as_json(recipe))
    part.unlink(missing_ok=True)
    return str(folder)


def _teach(model: Any, optimizer: Any, learning_rate: float, ids: torch.Tensor, weights: torch.Tensor) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    logits, weights = model(input_ids=ids).logits[:, :-1], weights[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    ((losses * weights).sum() / weights.sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _read(file: Path, read: Callable[[], Any]) -> dict[str, Any]:
    """What a file of a starting model holds; a ValueError that names it where it is damaged."""
    try:
        found = read()
    except Exception as error:  # of many kinds, by what is wrong with the file
        raise ValueError(f"{file} is damaged ({one_line(str(error))[:100]}): remove its folder.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged (it holds a {type(found).__name__}): remove its folder.")
    return found


def _as_json(recipe: Recipe) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(recipe)))


def _check_recipe(folder: Path, found: dict[str, Any], recipe: Recipe) -> None:
    wanted = _as_json(recipe)
    if found == wanted:
        return
    names = [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]
    differing = "; ".join(f"{name} is {found.get(name)}, not {wanted.get(name)}" for name in names)
    raise ValueError(
        f"`--work_dir` must hold a starting model of this version's recipe or none, and {folder} is of another one "
        f"({differing}). Name another folder, or remove that one."
    )
