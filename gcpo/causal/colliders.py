"""Colliders: the integrated answers that the policy writes after being shown all candidates of a prompt."""

import random
from typing import Any

import torch

from gcpo.causal.answers import checked_outputs
from gcpo.causal.contexts import PromptBuilder, check_length
from gcpo.causal.options import CausalOptions
from gcpo.causal.port import Group, Ids, Policy, Prompt, share


def generate_colliders(
    policy: Policy,
    options: CausalOptions,
    builder: PromptBuilder,
    prompts: list[Prompt],  # P
    prompt_ids: list[Ids],  # P
    candidates: list[list[Ids]],  # P x n
    seed: int,
) -> list[Group]:
    """
    Sample L colliders for each prompt, in one generation call per process; processes share the work evenly.

    A collider without content (special tokens only), or cut off where those are masked, is kept, marked, and put
    behind the others, so that c_0, which every estimate leans on, is one that says something wherever there is one.
    """
    limit, draw = options.collider_limit(policy.max_completion_length), random.Random(seed)
    tasks = []
    for prompt, group in zip(prompts, candidates, strict=True):
        for _ in range(options.num_colliders):
            shown = draw.sample(group, len(group)) if options.shuffle_candidates else group
            tasks.append(builder.fusion(prompt, shown))
    check_length(max(map(len, tasks)) + limit, policy.max_positions, "A fusion prompt")
    local = share(tasks, policy)
    outputs = policy.generate(local, seed + policy.rank, limit=limit, temperature=options.collider_temperature)
    outputs = policy.gather_lists(checked_outputs("generate", outputs, len(local)))[: len(tasks)]

    def counts(collider: Ids) -> bool:
        if not builder.content(collider):
            return False
        return not options.mask_truncated_colliders or collider[-1] in policy.eos_token_ids

    groups = []
    for p, prompt in enumerate(prompts):
        drawn = outputs[p * options.num_colliders : (p + 1) * options.num_colliders]
        drawn = sorted(drawn, key=lambda ids: not counts(ids))  # stable: order otherwise as drawn
        groups.append(Group(prompt, prompt_ids[p], candidates[p], drawn, list(map(counts, drawn))))
    return groups


def log_colliders(policy: Policy, groups: list[Group]) -> None:
    """Count their tokens, and log how long they are, how many ended by themselves and how many are left out."""
    colliders = [ids for group in groups for ids in group.colliders]
    content = [flag for group in groups for flag in group.has_content]
    lengths = torch.tensor([len(ids) for ids in colliders], dtype=torch.float32)
    ended = [ids[-1] in policy.eos_token_ids for ids in colliders if ids]
    if policy.rank == 0:  # token counts are summed over processes
        policy.count("generated_colliders", int(lengths.sum()))
    policy.log("colliders/mean_length", lengths.mean())
    policy.log("colliders/ended", sum(ended) / max(len(content), 1))
    policy.log("colliders/masked", 1.0 - sum(content) / max(len(content), 1))


def reward_colliders(policy: Policy, inputs: list[dict[str, Any]], groups: list[Group]) -> float:
    """
    Mean reward of all colliders that have one, those without content included: beside `reward`, what integrating the
    candidates gains. NaN where none has. Processes share the work.

    Args:
        inputs: the dataset rows of this process's candidates.
    """
    rows = policy.gather_lists(inputs)[:: policy.num_generations]
    tasks = [(row, group.prompt, ids) for row, group in zip(rows, groups, strict=True) for ids in group.colliders]
    local = share(tasks, policy)
    rewards = policy.reward([row for row, _, _ in local], [prompt for _, prompt, _ in local], [y for _, _, y in local])
    rewards = rewards[: len(tasks)]
    return float(rewards[rewards.isfinite()].mean())
