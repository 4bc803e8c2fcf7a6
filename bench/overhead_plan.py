"""What `gcpo plan` says of the runs that `bench.step_overhead` compares, given the rates of GRPO's own phases."""

import argparse
import operator
from dataclasses import replace
from functools import reduce
from statistics import fmean
from typing import Any

import torch
import transformers

from bench.overhead_runs import Variant, candidate_lengths, make_config
from gcpo import GCPOConfig
from gcpo.causal.contexts import PromptBuilder
from gcpo.evaluation.tasks import reasoning_gym_dataset
from gcpo.planning.architecture import Architecture
from gcpo.planning.counts import Counts, Lengths, PlannedScript, abilities_of, count_cycle
from gcpo.planning.plan import Device, decode_bytes, plan_step

PHASES = ("rollout", "scoring", "colliders", "contexts", "loss")


Configs = dict[str, GCPOConfig]
Round = tuple[list[int], list[int]]  # tokens of each prompt, and of each candidate


def plan_configs(args: argparse.Namespace, variants: dict[str, Variant | None]) -> Configs:
    """
    The options that are planned with, by variant. To be made before any trainer: options set accelerate's state back,
    and with it that of trainers that still run.
    """
    planned = {name: variant or Variant({"kappa": 0.0, "estimator": "none"}) for name, variant in variants.items()}
    return {name: make_config(args, variant) for name, variant in planned.items()}


def predict(args: argparse.Namespace, configs: Configs, results: dict[str, dict[str, Any]]) -> None:
    """
    Add to each result what `gcpo plan` says of it, from the model's config, the lengths of the rounds so far, and the
    rates of GRPO's own phases.
    """
    on_gpu = torch.cuda.is_available()
    config = transformers.AutoConfig.from_pretrained(args.folder)
    architecture = Architecture.from_config(config)
    base, plain = results["GRPO"], configs["GRPO"]
    rounds = [(queries, candidate_lengths(args, k)) for k, queries in enumerate(base["prompt_tokens"], 1)]
    planned = {name: _count(args, configs[name], architecture, rounds, name == "GRPO") for name in results}
    counts = planned["GRPO"]
    # Operations per second of the forward and backward; then bytes per second of what is left of the rollout.
    unit = Device(1e-12, 1e30, 1.0, 1.0)
    counted = plan_step(plain, architecture, counts, unit, args.dtype, compact_head=on_gpu)
    rate = counted.total("flops", "loss") / base["seconds"]["loss"]["median"]
    prefill = sum(cost.flops for cost in counted.costs if cost.what == "prefill") / rate
    read = sum(decode_bytes(kind, counts, architecture, plain, args.dtype) for kind in counts.decoding)
    left = max(base["seconds"]["rollout"]["median"] - prefill, 0.1 * base["seconds"]["rollout"]["median"])
    device = Device(rate / 1e12, read / left / 1e9, 1.0, 1.0)
    plans = {
        name: plan_step(configs[name], architecture, counted, device, args.dtype, compact_head=on_gpu)
        for name, counted in planned.items()
    }
    for name, plan in plans.items():
        results[name]["predicted"] = {
            "ratio": plan.total("seconds") / plans["GRPO"].total("seconds"),
            "seconds": {phase: plan.total("seconds", phase) for phase in PHASES},
            "tokens": plan.tokens,
            "scored": plan.scored,
        }


def _count(
    args: argparse.Namespace, config: GCPOConfig, architecture: Architecture, rounds: list[Round], is_grpo: bool
) -> Counts:
    """What these rounds read."""
    mean = fmean(fmean(completions) for _, completions in rounds)
    lengths = replace(_lengths(args, config), sample=round(mean))
    abilities = abilities_of(config, architecture)
    if not config.is_causal and not is_grpo:  # GRPOReadingPromptsOnce
        abilities = replace(abilities, caches_prefixes=True)
    scripts = (PlannedScript(config, lengths, completions, queries) for queries, completions in rounds)
    return reduce(operator.add, (count_cycle(config, script, abilities, is_grpo) for script in scripts))


def _lengths(args: argparse.Namespace, config: GCPOConfig) -> Lengths:
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
    prompt = reasoning_gym_dataset("chain_sum", 1)["prompt"][0]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    return Lengths.measured(
        PromptBuilder(tokenizer, config),
        prompt,
        ids,
        args.num_generations,
        completion=args.completion_tokens,
        collider=config.collider_limit(args.completion_tokens),
    )
