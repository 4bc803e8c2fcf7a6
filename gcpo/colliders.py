"""Colliders: the integrated answers that the policy writes after being shown all candidates of a prompt."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from transformers import GenerationConfig

from gcpo.contexts import Prompt, PromptBuilder, check_length

if TYPE_CHECKING:
    from gcpo.trainer import GCPOTrainer


@dataclass
class Group:
    """One prompt with everything sampled for it. Token ids; every process holds all groups."""

    prompt: Prompt
    prompt_ids: list[int]
    candidates: list[list[int]]  # n
    colliders: list[list[int]]  # L, those with content first
    has_content: list[bool]  # L


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
def completion_limit(trainer: "GCPOTrainer", max_new_tokens: int) -> Iterator[None]:
    """Let the trainer's generation path, whichever backend it is, stop at `max_new_tokens`."""
    if trainer.use_vllm:
        vllm = trainer.vllm_generation
        before = vllm.max_completion_length
        vllm.max_completion_length = max_new_tokens
        try:
            yield
        finally:
            vllm.max_completion_length = before
        return
    config, kwargs = trainer.generation_config, trainer.generation_kwargs
    trainer.generation_kwargs = {**kwargs, "max_new_tokens": max_new_tokens}
    trainer.generation_config = GenerationConfig(**trainer.generation_kwargs, disable_compile=True)
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

    A collider without content (special tokens only) is kept, marked, and put behind the others, so that c_0, which
    every estimate leans on, is one that says something wherever there is one.
    """
    config = trainer.args
    fusion = [builder.fusion(prompt, group) for prompt, group in zip(prompts, candidates, strict=True)]
    limit = trainer.max_positions
    check_length(max(map(len, fusion)) + config.collider_max_completion_length, limit, "A fusion prompt")
    tasks = [ids for ids in fusion for _ in range(config.num_colliders)]
    processes = trainer.accelerator.num_processes
    # Every process takes as many, repeating the last one: generation is collective under ZeRO-3 and FSDP.
    share = -(-len(tasks) // processes)
    padded = tasks + [tasks[-1]] * (share * processes - len(tasks))
    start = trainer.accelerator.process_index * share
    with (
        own_random_stream(seed + trainer.accelerator.process_index),
        completion_limit(trainer, config.collider_max_completion_length),
    ):
        local, _ = trainer._generate_single_turn(padded[start : start + share], None, {}, 1)
    outputs = gather_object(local)[: len(tasks)]
    groups = []
    for p, prompt in enumerate(prompts):
        drawn = outputs[p * config.num_colliders : (p + 1) * config.num_colliders]
        drawn = sorted(drawn, key=lambda ids: not builder.content(ids))  # stable: order otherwise as drawn
        groups.append(Group(prompt, prompt_ids[p], candidates[p], drawn, [bool(builder.content(c)) for c in drawn]))
    return groups
