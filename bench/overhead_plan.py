"""What `gcpo plan` says of the runs that `bench.step_overhead` compares, given the rates of GRPO's own phases."""

import argparse
from dataclasses import replace
from typing import Any

import torch
import transformers

from bench.overhead_runs import Variant, make_config
from gcpo import GCPOConfig
from gcpo.causal.contexts import PromptBuilder
from gcpo.evaluation.tasks import reasoning_gym_dataset
from gcpo.planning.architecture import Architecture
from gcpo.planning.counts import Lengths, PlannedScript, abilities_of, count_cycle
from gcpo.planning.plan import Device, StepPlan, decode_bytes, plan_step

PHASES = ("rollout", "scoring", "colliders", "contexts", "loss")


Configs = dict[str, GCPOConfig]


def plan_configs(args: argparse.Namespace, variants: dict[str, Variant | None]) -> Configs:
    """
    The options that are planned with, by variant. To be made before any trainer: options set accelerate's state back,
    and with it that of trainers that still run.
    """
    planned = {name: variant or Variant({"kappa": 0.0, "estimator": "none"}) for name, variant in variants.items()}
    return {name: make_config(args, variant) for name, variant in planned.items()}


def predict(args: argparse.Namespace, configs: Configs, results: dict[str, dict[str, Any]]) -> None:
    """Add to each result what `gcpo plan` says of it, from the model's config and the rates of GRPO's own phases."""
    on_gpu = torch.cuda.is_available()
    config = transformers.AutoConfig.from_pretrained(args.folder)
    architecture = Architecture.from_config(config)
    base = results["GRPO"]
    rows = args.prompts * args.num_generations
    plain = configs["GRPO"]
    measured = Lengths(
        round((base["tokens"]["trained"] - base["tokens"]["generated"]) / rows), args.completion_tokens, 0
    )
    counts = count_cycle(plain, PlannedScript(plain, measured), abilities_of(plain, architecture), is_grpo=True)
    # Operations per second of the forward and backward; then bytes per second of what is left of the rollout.
    unit = Device(1e-12, 1e30, 1.0, 1.0)
    counted = plan_step(plain, architecture, counts, unit, args.dtype, compact_head=on_gpu)
    rate = counted.total("flops", "loss") / base["seconds"]["loss"]["median"]
    prefill = sum(cost.flops for cost in counted.costs if cost.what == "prefill") / rate
    read = sum(
        decode_bytes(item, number, counts, architecture, plain, args.dtype, 1)
        for item, number in counts.passes.items()
        if item.mode == "decode"
    )
    left = max(base["seconds"]["rollout"]["median"] - prefill, 0.1 * base["seconds"]["rollout"]["median"])
    device = Device(rate / 1e12, read / left / 1e9, 1.0, 1.0)
    grpo = plan_step(plain, architecture, counts, device, args.dtype, compact_head=on_gpu)
    for name, result in results.items():
        plan = grpo if name == "GRPO" else plan_variant(args, configs[name], architecture, measured, device)
        result["predicted"] = {
            "ratio": plan.total("seconds") / grpo.total("seconds"),
            "seconds": {phase: plan.total("seconds", phase) for phase in PHASES},
            "tokens": plan.tokens,
            "scored": plan.scored,
        }


def plan_variant(
    args: argparse.Namespace, config: GCPOConfig, architecture: Architecture, measured: Lengths, device: Device
) -> StepPlan:
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
    prompt = reasoning_gym_dataset("chain_sum", 1)["prompt"][0]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    lengths = Lengths.measured(
        PromptBuilder(tokenizer, config),
        prompt,
        ids,
        args.num_generations,
        completion=args.completion_tokens,
        collider=args.collider_tokens,
    )
    lengths = replace(lengths, prompt=measured.prompt)
    abilities = abilities_of(config, architecture)
    if not config.is_causal:  # GRPOReadingPromptsOnce
        abilities = replace(abilities, caches_prefixes=True)
    counts = count_cycle(config, PlannedScript(config, lengths), abilities)
    return plan_step(config, architecture, counts, device, args.dtype, compact_head=torch.cuda.is_available())
