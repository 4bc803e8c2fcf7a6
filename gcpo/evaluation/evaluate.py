"""pass@1 and pass@k of a model on prompts with a verifier."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from gcpo.run.progress import progress_bar

# The columns that a trainer keeps from reward functions, or passes something of its own instead of.
_UNSEEN_COLUMNS = ("prompt", "completion", "completion_ids", "trainer_state", "log_extra", "log_metric")


class EvaluationError(ValueError):
    """What is asked for cannot be measured, or the reward function does not score; the message says what to change."""


@dataclass(frozen=True)
class EvalResult:
    """
    What `evaluate_pass_at_k` measured. Names in `_se` are standard errors over prompts (`mean_and_standard_error`).

    Attributes:
        pass_at_1: share of samples whose score reached the threshold, averaged over prompts.
        mean_score: average score, which counts partly right answers where the verifier does.
        num_samples: completions sampled per prompt.
        mean_completion_length: tokens per completion, the end token included.
        pass_at_k: for each k asked for (as text, so that JSON keeps it), the unbiased estimate of the chance that at
            least one of k samples passes, averaged over prompts, and its standard error.
        num_passed: samples that passed, per prompt. Two models are compared prompt by prompt with it.
        prompt_scores: average score, per prompt.
    """

    pass_at_1: float
    pass_at_1_se: float
    mean_score: float
    mean_score_se: float
    num_prompts: int
    num_samples: int
    mean_completion_length: float
    pass_at_k: dict[str, list[float]] = field(default_factory=dict)
    num_passed: list[int] = field(default_factory=list)
    prompt_scores: list[float] = field(default_factory=list)


def evaluate_pass_at_k(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    reward_func: Callable[..., list[float]],
    *,
    num_samples: int = 1,
    ks: Sequence[int] = (1,),
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    threshold: float = 1.0,
    progress: bool = True,
) -> EvalResult:
    """
    Sample completions of every prompt of a dataset and score them.

    The whole distribution is sampled (no top-k or top-p), whatever the model's `generation_config` says: of it,
    only the end tokens count. The model's train/eval mode, its `generation_config` and the states of the random
    generators are those of before the call afterwards, also when it raises.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; needs an end token.
        dataset: N rows with a column `prompt` (text or messages); the other columns go to `reward_func`.
        reward_func: a reward function as TRL calls it; must return a number for every completion. `trainer_state` is
            that of a trainer before its first step; what is passed to `log_extra` and `log_metric` is dropped.
        num_samples: completions per prompt; 1 where `temperature` is 0.
        ks: values of k for pass@k, each at most `num_samples`.
        max_new_tokens: most tokens of a completion.
        temperature: of sampling; 0 takes the most likely token.
        batch_size: completions generated at a time.
        seed: of sampling. The result depends on it and on `batch_size`.
        threshold: score from which a completion counts as passed.
        progress: whether to show a progress bar.

    Raises:
        EvaluationError: an empty dataset, one without prompts or with a column whose name a reward function is passed
            something else under, a count below 1, a k that needs more samples, a temperature that is negative or not
            finite, several samples at temperature 0, no end token, or a reward function that returns something else
            than a number per completion. What the function raises passes through.
    """
    _check(dataset, num_samples, ks, max_new_tokens, temperature, batch_size)
    rows = [row for row in dataset for _ in range(num_samples)]
    scores: list[float] = []
    lengths: list[int] = []
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        bar = progress_bar(len(rows), "evaluating", "sample", disable=not progress, leave=False)
        with _seeded(seed, model.device), bar:
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                completion_ids = _generate(model, tokenizer, batch, max_new_tokens, temperature)
                scores += _score(tokenizer, reward_func, batch, completion_ids)
                lengths += [len(ids) for ids in completion_ids]
                bar.update(len(batch))
    finally:
        for module, training in modes:
            module.training = training
    # (N, num_samples)
    table = np.array(scores, dtype=float).reshape(len(dataset), num_samples)
    passed = table >= threshold - 1e-9
    pass_at_1, pass_at_1_se = mean_and_standard_error(passed)
    mean_score, mean_score_se = mean_and_standard_error(table)
    return EvalResult(
        pass_at_1,
        pass_at_1_se,
        mean_score,
        mean_score_se,
        len(dataset),
        num_samples,
        float(np.mean(lengths)),
        pass_at_k={str(k): list(mean_and_standard_error(pass_at_k(passed, k)[:, None])) for k in ks},
        num_passed=passed.sum(axis=1).tolist(),
        prompt_scores=table.mean(axis=1).tolist(),
    )


def _check(
    dataset: Dataset, num_samples: int, ks: Sequence[int], max_new_tokens: int, temperature: float, batch_size: int
) -> None:
    for name, value in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise EvaluationError(f"`{name}` must be at least 1, got {value}.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise EvaluationError(f"`temperature` must be finite and at least 0, got {temperature}.")
    if temperature == 0 and num_samples > 1:
        raise EvaluationError(
            f"`num_samples` must be 1 at `temperature` 0, where a prompt's samples are all the same, got {num_samples}."
        )
    for k in ks:
        if not 1 <= k <= num_samples:
            raise EvaluationError(f"`ks` must be between 1 and `num_samples` ({num_samples}), got {k}.")
    columns = dataset.column_names
    if "prompt" not in columns or len(dataset) == 0:
        got = f"{len(dataset)} rows of {', '.join(columns) or 'no column'}"
        raise EvaluationError(f"`dataset` must have rows and a column `prompt`, got {got}.")
    for name in {"prompts", "completions"} & set(columns):
        raise EvaluationError(
            f"`dataset` must not have a column {name!r}, under which reward functions are passed the {name} "
            "themselves: rename it."
        )


def pass_at_k(passed: np.ndarray, k: int) -> np.ndarray:
    """
    Unbiased estimate, per prompt, of the chance that at least one of k samples passes: one minus the share of the
    k-subsets of its samples in which none does (arXiv 2107.03374, eq. 1).

    Args:
        passed: (prompts, samples) of 0/1.
        k: at most the number of samples.

    Returns:
        (prompts,) float64.
    """
    samples = passed.shape[1]
    # C(failed, k) / C(samples, k), as integers: exact however many samples there are.
    return np.array([1.0 - math.comb(samples - int(c), k) / math.comb(samples, k) for c in passed.sum(axis=1)])


def mean_and_standard_error(table: np.ndarray) -> tuple[float, float]:
    """
    Mean of a (prompts, samples) table and its standard error over prompts: samples of one prompt are averaged first,
    because they are not independent. NaN for the error of a single prompt.
    """
    means = np.asarray(table, dtype=float).mean(axis=1)
    error = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return float(means.mean()), float(error)


def _generate(
    model: Any, tokenizer: Any, batch: list[dict[str, Any]], max_new_tokens: int, temperature: float
) -> list[list[int]]:
    """Completion ids of each row, up to and with the end token."""
    prompts = [row["prompt"] for row in batch]
    if isinstance(prompts[0], str):
        prompt_ids = tokenizer(text=prompts)["input_ids"]
    else:
        prompt_ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]
    end_ids = _end_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_ids[0]
    # Padded here, so that the tokenizer's own padding side stays as it is.
    rows = [torch.tensor(ids, dtype=torch.long) for ids in prompt_ids]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left").to(model.device)
    ones = [torch.ones_like(row) for row in rows]
    mask = pad_sequence(ones, batch_first=True, padding_side="left").to(model.device)
    config = GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=pad_id, eos_token_id=end_ids, do_sample=False)
    if temperature > 0:
        config.update(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    with torch.inference_mode(), _without_generation_config(model):
        output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
    completions = []
    for ids in output[:, input_ids.shape[1] :].tolist():
        length = next((position + 1 for position, token in enumerate(ids) if token in end_ids), len(ids))
        completions.append(ids[:length])
    return completions


@contextmanager
def _without_generation_config(model: Any) -> Iterator[None]:
    """Without the model's `generation_config`, from which `generate` fills whatever a call leaves unset."""
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of an adapter, what generates
    before = owner.generation_config
    owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        owner.generation_config = before


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    ids = [end for end in dict.fromkeys([tokenizer.eos_token_id, *ends]) if end is not None]
    if not ids:
        raise EvaluationError("`tokenizer` must have an end token (`eos_token`), or the model's generation config one.")
    return ids


def _score(
    tokenizer: PreTrainedTokenizerBase,
    reward_func: Callable[..., list[float]],
    batch: list[dict[str, Any]],
    completion_ids: list[list[int]],
) -> list[float]:
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    completions: list[Any] = texts
    if not isinstance(batch[0]["prompt"], str):
        completions = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {key: [row[key] for row in batch] for key in batch[0] if key not in _UNSEEN_COLUMNS}
    own = {"trainer_state": TrainerState(), "log_extra": _drop, "log_metric": _drop}
    prompts = [row["prompt"] for row in batch]
    returned = reward_func(prompts=prompts, completions=completions, completion_ids=completion_ids, **own, **columns)
    try:
        scores = [float(score) for score in returned]
    except (TypeError, ValueError):  # nothing to go through, or something in it is no number
        scores = []
    if len(scores) != len(batch):
        name = getattr(reward_func, "__name__", repr(reward_func))
        raise EvaluationError(
            f"`reward_func` must return a number for each of {len(batch)} completions, {name} returned "
            f"{returned!r:.200}."
        )
    return scores


def _drop(name: str, value: Any) -> None:
    """For `log_extra` and `log_metric`: there is no log."""


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed python, numpy and torch inside the block; put their states back after it."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
