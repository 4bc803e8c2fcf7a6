"""The size of a rollout, the settings that it and its cycle of updates depend on, and where a checkpoint differs."""

import math
from dataclasses import fields
from typing import Any

from trl import GRPOConfig

# How long a cycle is, and how a rollout is split over processes and micro-batches.
LAYOUT = (
    "per_device_train_batch_size gradient_accumulation_steps steps_per_generation num_iterations num_generations"
).split()
# TRL's options that decide what a rollout holds: how it is sampled, rewarded and scored.
ROLLOUT = (
    "max_completion_length temperature top_p top_k min_p repetition_penalty generation_kwargs "
    "chat_template_kwargs max_tool_calling_iterations pad_to_multiple_of use_vllm "
    "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_cap "
    "vllm_importance_sampling_clip_min vllm_importance_sampling_clip_max beta loss_type reward_weights "
    "scale_rewards multi_objective_aggregation mask_truncated_completions off_policy_mask_threshold"
).split()
# Options of GCPO that change how a rollout is computed, or its loss, and not what it holds.
OTHERS = (
    "proj_floor kl_clip context_batch_size share_prefix share_prompt fused_loss padding_free pack_tokens reuse_rollout "
    "log_collider_reward overlap_rewards"
).split()


def cycle_settings(args: GRPOConfig, num_processes: int, rewards: list[str]) -> dict[str, str]:
    """
    The settings that must be equal for a run to go on within a cycle, each as its `repr`; `rewards` are the names of
    its reward functions.
    """
    trl = {item.name for item in fields(GRPOConfig)}
    own = [item.name for item in fields(args) if item.name not in trl and item.name not in OTHERS]
    settings = {"num_processes": repr(num_processes), "reward_funcs": repr(rewards)}
    return settings | {name: _spelled(getattr(args, name)) for name in (*LAYOUT, *ROLLOUT, *own)}


def _spelled(value: Any) -> str:
    """One spelling of a value that a file and a flag may give as 1 and 1.0, or as nothing and an empty mapping."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return repr(None if value == {} else value)


def changed_settings(saved: dict[str, str], current: dict[str, str], keeps_rollout: bool) -> list[str]:
    """What differs between two `cycle_settings`, in words. Without a rollout to go on with, the layout alone counts."""
    names = dict.fromkeys([*current, *saved]) if keeps_rollout else ("num_processes", *LAYOUT)
    return [
        f"`{name}` was {saved.get(name, 'no option')} and is {current.get(name, 'no option')}"
        for name in names
        if saved.get(name) != current.get(name)
    ]


def prompts_per_rollout(config: GRPOConfig) -> int:
    """Prompts of one rollout, over all processes."""
    return int(config.generation_batch_size or 1) // int(config.num_generations or 1)


def check_size(config: GRPOConfig, num_prompts: int | None) -> None:
    """Refuse a dataset smaller than one rollout: only whole ones are trained on, so nothing would be."""
    wanted = prompts_per_rollout(config)
    if num_prompts is not None and num_prompts < wanted:
        raise ValueError(
            f"The dataset has {num_prompts} prompts, one rollout takes {wanted}: lower `per_device_train_batch_size`, "
            "`gradient_accumulation_steps` or `steps_per_generation`."
        )


def count_steps(config: GRPOConfig, num_prompts: int | None) -> int | None:
    """Optimizer steps of a run; None where the dataset's length is unknown."""
    if config.max_steps > 0:
        return config.max_steps
    if num_prompts is None:
        return None
    rollouts = num_prompts // prompts_per_rollout(config)
    batches = rollouts * int(config.steps_per_generation or 1) * config.num_iterations
    return math.ceil(config.num_train_epochs * math.ceil(batches / config.gradient_accumulation_steps))
