"""Colliders: the integrated answers that the policy writes after being shown all candidates of a prompt."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from transformers import GenerationConfig
from trl import GRPOTrainer

from gcpo.causal.contexts import Prompt, PromptBuilder, check_length

if TYPE_CHECKING:
    from gcpo.trainer import GCPOTrainer


@dataclass
class Group:
    """One prompt with everything sampled for it. Token ids; every process holds all groups."""

    prompt: Prompt
    prompt_ids: list[int]
    candidates: list[list[int]]  # n
    colliders: list[list[int]]  # L, those that count first
    has_content: list[bool]  # L: whether it counts


@contextmanager
def own_random_stream(seed: int) -> Iterator[None]:
    """
    Draw from a stream of its own: sampling colliders then leaves the candidates' stream as GRPO would have it, so that
    runs of the two from one seed see the same first candidates.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def collider_sampling(trainer: "GCPOTrainer") -> Iterator[None]:
    """Let the trainer's generation path, whichever backend it is, sample as colliders are sampled."""
    limit, temperature = trainer.args.collider_max_completion_length, trainer.args.collider_temperature
    if trainer.use_vllm:
        vllm = trainer.vllm_generation
        before = vllm.max_completion_length, vllm.temperature, vllm.generation_kwargs
        vllm.max_completion_length = limit
        vllm.temperature = vllm.temperature if temperature is None else temperature
        # `generation_kwargs` win over both, and are meant for candidates: colliders may be shorter.
        own = {name: value for name, value in vllm.generation_kwargs.items() if name != "max_tokens"}
        if temperature is not None:
            own.pop("temperature", None)
        if own.get("min_tokens"):
            own["min_tokens"] = min(own["min_tokens"], limit)
        vllm.generation_kwargs = own
        try:
            yield
        finally:
            vllm.max_completion_length, vllm.temperature, vllm.generation_kwargs = before
        return
    config, kwargs = trainer.generation_config, trainer.generation_kwargs
    # Lengths of prompt and completion together say nothing about a collider, whose prompt is another.
    changed = {name: value for name, value in kwargs.items() if name not in ("max_length", "min_length")}
    changed["max_new_tokens"] = limit
    if temperature is not None:
        changed["temperature"] = temperature
    if changed.get("min_new_tokens"):  # asked for of candidates: colliders may be shorter
        changed["min_new_tokens"] = min(changed["min_new_tokens"], limit)
    trainer.generation_kwargs = changed
    trainer.generation_config = GenerationConfig(**changed, disable_compile=True)
    try:
        yield
    finally:
        trainer.generation_config, trainer.generation_kwargs = config, kwargs


def generate_colliders(
    trainer: "GCPOTrainer",
    builder: PromptBuilder,
    prompts: list[Prompt],  # P
    prompt_ids: list[list[int]],  # P
    candidates: list[list[list[int]]],  # P x n
    seed: int,
) -> list[Group]:
    """
    Sample L colliders for each prompt, in one generation call per process; processes share the work evenly.

    A collider without content (special tokens only), or cut off where those are masked, is kept, marked, and put
    behind the others, so that c_0, which every estimate leans on, is one that says something wherever there is one.
    """
    config = trainer.args
    draw = random.Random(seed)
    tasks = []
    for prompt, group in zip(prompts, candidates, strict=True):
        for _ in range(config.num_colliders):
            shown = draw.sample(group, len(group)) if config.shuffle_candidates else group
            tasks.append(builder.fusion(prompt, shown))
    longest = max(map(len, tasks)) + config.collider_max_completion_length
    check_length(longest, trainer.max_positions, "A fusion prompt")
    processes = trainer.accelerator.num_processes
    # Every process takes as many, repeating the last one: generation is collective under ZeRO-3 and FSDP.
    share = -(-len(tasks) // processes)
    padded = tasks + [tasks[-1]] * (share * processes - len(tasks))
    start = trainer.accelerator.process_index * share
    with own_random_stream(seed + trainer.accelerator.process_index), collider_sampling(trainer):
        local, _ = trainer._generate_single_turn(padded[start : start + share], None, {}, 1)
    outputs = gather_object(local)[: len(tasks)]

    def counts(collider: list[int]) -> bool:
        if not builder.content(collider):
            return False
        return not config.mask_truncated_colliders or collider[-1] in trainer.eos_token_ids

    groups = []
    for p, prompt in enumerate(prompts):
        drawn = outputs[p * config.num_colliders : (p + 1) * config.num_colliders]
        drawn = sorted(drawn, key=lambda ids: not counts(ids))  # stable: order otherwise as drawn
        groups.append(Group(prompt, prompt_ids[p], candidates[p], drawn, list(map(counts, drawn))))
    return groups


def reward_colliders(trainer: "GCPOTrainer", inputs: list[dict[str, Any]], groups: list[Group]) -> float:
    """
    Mean reward of all colliders that have one, those without content included, by the trainer's reward functions and
    their weights: beside `reward`, what integrating the candidates gains. NaN where none has. Processes share the work.

    Args:
        inputs: the dataset rows of this process's candidates.
    """
    rows = gather_object(inputs)[:: trainer.num_generations]
    tasks = [(row, group.prompt, ids) for row, group in zip(rows, groups, strict=True) for ids in group.colliders]
    processes = trainer.accelerator.num_processes
    share = -(-len(tasks) // processes)
    padded = tasks + [tasks[-1]] * (share * processes - len(tasks))
    local = padded[trainer.accelerator.process_index * share :][:share]
    ids = [ids for _, _, ids in local]
    texts: list[Any] = trainer._tokenizer.batch_decode(ids, skip_special_tokens=True)
    if not isinstance(local[0][1], str):
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    with _no_logs_of_reward_functions(trainer):
        per_function = GRPOTrainer._calculate_rewards(
            trainer, [row for row, _, _ in local], [prompt for _, prompt, _ in local], texts, ids
        )
    per_function = per_function[: len(tasks)]
    per_function = per_function[per_function.isfinite().any(dim=1)]  # as `reward`, of what has a finite one
    per_function = torch.where(per_function.isfinite(), per_function, torch.nan)
    return float((per_function * trainer.reward_weights.to(per_function.device)).nansum(dim=1).mean())


@contextmanager
def _no_logs_of_reward_functions(trainer: "GCPOTrainer") -> Iterator[None]:
    """Columns and metrics that reward functions log are of candidates: what they say of colliders is dropped."""
    names = ("_log_completion_extra", "_log_metric")
    for name in names:
        setattr(trainer, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for name in names:
            delattr(trainer, name)
