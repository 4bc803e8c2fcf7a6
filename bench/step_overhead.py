"""
What a step of GCPO costs beside one of GRPO: TRL's own trainer and GCPOTrainer in one process, on the same weights,
with the learning rate at 0, so that every run of a seed rolls out the same candidates.

    python -m bench.step_overhead --model smollm2
    python -m bench.step_overhead --model 1.5b --dtype bfloat16 --completion_tokens 512     # random weights, a GPU

All runs are kept alive and take turns, a step each. Within as many rounds as there are rows (twice as many, where
their number is odd), each row takes every place, and comes after every other row, equally often: neither a machine that
slows down nor what a step leaves behind in memory always meets the same row.

"GRPO" is TRL's as it stands: rollout and loss read a prompt once per completion, and the loss reads padding. GCPO's
rollout reads a prompt once for all (`share_prefix`), and its loss is made from hidden states (`fused_loss`) of packed
rows (`padding_free`). None of it needs GCPO: "GRPO, same savings" has all three. Beside it, what is left is what GCPO
adds: scoring, colliders, contexts, and the second KL in the loss.

The files are written after each round. A ratio is the median over rounds of the ratio within a round, with its lowest
and highest; from three rounds on, what follows in brackets is the 95% interval of the mean ratio (Student's t, of
logarithms). "loss, ms per token" is the phase "loss" (the policy's forward and backward, the second KL's too) per
completion token in the loss: seconds over "generated", which is the same number of tokens for all rows. "read by the
loss" is what the forward with gradient reads for them: tokens, prompts included, and padding.

Lengths are forced: which tokens a model ends on is not what is measured. All candidates have the full length, or
(`--lengths lognormal`) lengths that are drawn anew in every round, the same for every row. Colliders have their full
length: in "GCPO, defaults" the one that GCPOConfig makes of --completion_tokens. With --collider_tokens, rows say in
their names that theirs have another. "predicted" is what `gcpo plan` says of these lengths, given the rates of GRPO's
own phases in this run.
"""

import argparse
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
import trl

from bench.clocks import Clocks
from bench.files import write_json, write_text
from bench.overhead_plan import PHASES, plan_configs, predict
from bench.overhead_runs import (
    MODELS,
    Run,
    Variant,
    Weights,
    candidate_lengths,
    cpu_memory,
    device,
    prepare_model,
    quiet,
)
from bench.revision import revision
from gcpo import CausalOptions, GCPOConfig
from gcpo.planning.candidate_lengths import CHOICES, MEAN, SIGMA, describe
from gcpo.reports.intervals import interval
from gcpo.run.table import markdown

# Savings switched off, each and all, and savings beyond the defaults. Rows that are the defaults are left out.
_CHANGES: list[dict[str, Any]] = [
    {"fused_loss": False},
    {"padding_free": False},
    {"fused_loss": False, "padding_free": False},
    {"share_prefix": False},
    {"reuse_rollout": False},
    {"pack_tokens": 1},
    {"collider_attention": "full"},
    {"context_attention": "full"},
    {"context_attention": "full", "num_kl_contexts": None, "kl_fraction": 1.0},
    {"num_kl_contexts": None},
    {"kl_fraction": 1.0},
    {"candidate_context_tokens": None},
    {"estimator": "scored"},  # which takes all contexts of all candidates
    {
        "fused_loss": False,
        "padding_free": False,
        "share_prefix": False,
        "reuse_rollout": False,
        "context_attention": "full",
        "candidate_context_tokens": None,
        "estimator": "scored",
    },
    {"kl_fraction": 0.125},
    {"kappa": 0.0},
]
_DEFAULTS = {item.name: item.default for item in fields(GCPOConfig)}


def named(options: dict[str, Any]) -> str:
    """A row's name, in tables and for `--only`: the options as one writes them."""
    texts = {key: f'"{value}"' if isinstance(value, str) else str(value) for key, value in options.items()}
    return ", ".join(f"{key}={text}" for key, text in texts.items())


_NAIVE = {"share_prefix": False, "reuse_rollout": False}
VARIANTS: dict[str, Variant] = {
    "GCPO, defaults": Variant({}),
    **{
        named(options): Variant(options)
        for options in _CHANGES
        if any(_DEFAULTS[key] != value for key, value in options.items())
    },
    "GCPOConfig.paper()": Variant({}, paper=True),
    f"GCPOConfig.paper({named(_NAIVE)})": Variant(_NAIVE, paper=True),
}
# GRPO with the savings that do not need GCPO. Its rollout reads prompts once, too (`GRPOReadingPromptsOnce`).
SAME_SAVINGS = "GRPO, same savings"
GRPO_WITH_SAVINGS = Variant({"kappa": 0.0, "estimator": "none", "fused_loss": True, "padding_free": True})
# All that a table shows. The first two, which ratios are to, are always measured.
ROWS: dict[str, Variant | None] = {"GRPO": None, SAME_SAVINGS: GRPO_WITH_SAVINGS, **VARIANTS}
SCORED = ("scored_query", "scored_colliders", "scored_contexts")
_ROUNDS_OF_INTERVALS = 3  # fewer say too little of the spread


def choose(args: argparse.Namespace) -> dict[str, Variant | None]:
    """The rows to measure, TRL's GRPO (None) first; names say where colliders have a length of their own."""
    rows = {name: ROWS[name] for name in ("GRPO", SAME_SAVINGS, *(args.only or VARIANTS))}
    return dict(_with_colliders(name, row, args) for name, row in rows.items())


def _with_colliders(name: str, row: Variant | None, args: argparse.Namespace) -> tuple[str, Variant | None]:
    """A row and its name, with colliders of --collider_tokens where that is given and not their length anyway."""
    if row is None or row is GRPO_WITH_SAVINGS or args.collider_tokens is None:
        return name, row
    usual = args.completion_tokens if row.paper else CausalOptions().collider_limit(args.completion_tokens)
    if args.collider_tokens == usual:
        return name, row
    options = row.options | {"collider_max_completion_length": args.collider_tokens}
    return f"GCPOConfig.paper({named(options)})" if row.paper else named(options), Variant(options, row.paper)


Steps = dict[str, list[dict[str, Any]]]


def measure(args: argparse.Namespace, variants: dict[str, Variant | None]) -> Iterator[Steps]:
    """The steps of each variant so far, after each round."""
    weights = Weights(args)
    runs = {}
    for name, variant in variants.items():
        print(f"warming up {name}", flush=True)
        runs[name] = Run(weights, args, variant)
    steps: Steps = {name: [] for name in runs}
    names = list(runs)
    for number in range(args.steps):
        print(f"round {number + 1} of {args.steps}", flush=True)
        for k in turns(len(names), number):
            steps[names[k]].append(runs[names[k]].step(number + 1))
        yield steps


def turns(count: int, number: int) -> list[int]:
    """The order of `count` rows in a round, from 0: a Williams design (Williams, 1949)."""
    # 0, 1, count - 1, 2, count - 2, ...: the steps from one to the next are all different.
    zigzag = [(k + 1) // 2 if k % 2 else (count - k // 2) % count for k in range(count)]
    order = [(k + number) % count for k in zigzag]
    return order[::-1] if count % 2 and number // count % 2 else order


def summarize(steps: Steps, memory: dict[str, dict[str, int]]) -> dict[str, dict[str, Any]]:
    """Medians over the rounds with their spread, and ratios to GRPO's steps of the same round."""
    base = steps["GRPO"]
    # What one pass over prompts and completions scores; GRPO itself makes none, unless it has a reference model.
    one_pass = statistics.median(step["tokens"]["trained"] for step in base)
    results = {}
    for name, taken in steps.items():
        tokens = {kind: statistics.median(step["tokens"][kind] for step in taken) for kind in base[0]["tokens"]}
        scored = sum(tokens[kind] for kind in SCORED)
        peaks = memory.get(name) or {
            phase: max(step["peak_memory_bytes"].get(phase, 0) for step in taken)
            for phase in taken[0]["peak_memory_bytes"]
        }
        results[name] = {
            "step_seconds": spread([step["step_seconds"] for step in taken]),
            "ratio": ratios(taken, base),
            "ratio_same_savings": ratios(taken, steps[SAME_SAVINGS]),
            "seconds": {phase: spread([step["seconds"][phase] for step in taken]) for phase in base[0]["seconds"]},
            "loss_ms_per_token": spread(
                [1e3 * step["seconds"]["loss"] / step["tokens"]["generated"] for step in taken]
            ),
            "tokens": tokens,
            "prompt_tokens": [step["prompt_tokens"] for step in taken],
            "scored": scored,
            "scored_to_one_pass": scored / one_pass,
            "peak_memory_bytes": peaks,
        }
    lowest = max(results["GRPO"]["peak_memory_bytes"].values(), default=None)
    for result in results.values():
        peak = max(result["peak_memory_bytes"].values(), default=None)
        result["memory_ratio"] = peak / lowest if peak and lowest else None
    return results


def ratios(steps: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the step's seconds to those of another row in the same round; `interval`: of the mean, by their logarithms."""
    found = [a["step_seconds"] / b["step_seconds"] for a, b in zip(steps, base, strict=True)]
    result = spread(found)
    if len(found) >= _ROUNDS_OF_INTERVALS:
        of_logs = interval([math.log(ratio) for ratio in found])
        result["mean"] = math.exp(of_logs.mean)
        result["interval"] = [math.exp(of_logs.mean + sign * of_logs.half) for sign in (-1, 1)]
    return result


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}


def show(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown: time and tokens, then memory."""
    heads = ["s per step", "to GRPO", f"to {SAME_SAVINGS}", "predicted", *PHASES, "loss, ms per token"]
    heads += ["read by the loss", "tokens scored", "to one pass"]
    table = [["", *heads]]
    for name, result in results.items():
        tokens = result["tokens"]
        cells = [_range(result["step_seconds"], ".2f")]
        cells += [_range(result[kind], ".2f", "x") for kind in ("ratio", "ratio_same_savings")]
        cells += [f"{result['predicted']['ratio']:.2f}x"]
        cells += [f"{result['seconds'][phase]['median']:.2f}" for phase in PHASES]
        cells += [f"{result['loss_ms_per_token']['median']:.3g}"]
        cells += [f"{tokens['trained']:,.0f} + {tokens['trained_padding']:,.0f}"]
        cells += [f"{result['scored']:,.0f}", f"{result['scored_to_one_pass']:.2f}x"]
        table.append([name, *cells])
    lines = markdown(table)
    if all(result["memory_ratio"] for result in results.values()):
        columns = (*PHASES, "optimizer")
        table = [["peak memory, MiB", "step", "to GRPO", *columns]]
        for name, result in results.items():
            peaks = result["peak_memory_bytes"]
            cells = [f"{max(peaks.values()) / 2**20:,.0f}", f"{result['memory_ratio']:.3f}x"]
            cells += [f"{peaks[phase] / 2**20:,.0f}" if phase in peaks else "-" for phase in columns]
            table.append([name, *cells])
        lines += ["", *markdown(table)]
    return "\n".join(lines)


def _range(values: dict[str, Any], form: str, unit: str = "") -> str:
    text = f"{values['median']:{form}}{unit} ({values['min']:{form}}–{values['max']:{form}})"  # noqa: RUF001
    if "interval" in values:
        low, high = values["interval"]
        text += f" [{low:{form}}, {high:{form}}]"
    return text


def environment() -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        **revision(),
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=MODELS, default="tiny", help="sizes are random weights")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--steps", type=int, default=5, help="rounds, a step of every run each; one more warms up")
    add("--prompts", type=int, default=2, help="prompts per step")
    add("--num_generations", type=int, default=8, help="n")
    add("--batch_size", type=int, default=8, help="rows per forward and backward")
    add("--num_colliders", type=int, default=4, help="L; of the paper's settings, n")
    add("--completion_tokens", type=int, default=64)
    add(
        "--collider_tokens",
        type=int,
        help="of GCPO's rows, whose names then say so; without, what GCPOConfig makes of --completion_tokens, and in "
        "GCPOConfig.paper() as many as candidates have",
    )
    add(
        "--lengths",
        choices=CHOICES,
        default="full",
        help="of candidates: all of --completion_tokens, or drawn in every round from a lognormal distribution of mean "
        f"{MEAN} x --completion_tokens and sigma {SIGMA}, clipped to [1, --completion_tokens]",
    )
    add("--beta", type=float, default=0.0, help="above 0, GRPO scores its reference model too")
    add("--gradient_checkpointing", action="store_true")
    add(
        "--no_memory", dest="memory", action="store_false", help="leave out peak memory, which on a CPU takes runs anew"
    )
    add(
        "--only",
        nargs="+",
        choices=list(ROWS),
        metavar="ROW",
        help="these rows of the table, beside the two of GRPO: %(choices)s",
    )
    add("--out", type=Path, help="JSON file to write; the table goes beside it as Markdown")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.prompts * args.num_generations % args.batch_size:
        parser.error("--batch_size must divide --prompts times --num_generations")
    quiet()
    args.threads = torch.get_num_threads()
    variants = choose(args)
    with tempfile.TemporaryDirectory() as args.folder:
        prepare_model(args.model, Path(args.folder))
        memory = {}
        if args.memory and not torch.cuda.is_available():
            print("measuring memory", flush=True)
            memory = cpu_memory(args, variants)
        configs = plan_configs(args, variants)
        results: dict[str, dict[str, Any]] = {}
        rounds: list[tuple[float, float]] = []
        began = time.time()
        with Clocks(device()) as clocks:
            for steps in measure(args, variants):
                rounds.append((began, began := time.time()))
                results = summarize(steps, memory)
                predict(args, configs, results)
                if args.out is not None:  # after each round: a run that is stopped leaves what it had
                    write(args, results, [clocks.during(*taken) for taken in rounds])
    print(show(results))


def write(args: argparse.Namespace, results: dict[str, dict[str, Any]], clocks: list[dict[str, Any]]) -> None:
    """`args.out`, and the table beside it; `clocks` are of each round, the first with its warming up."""
    left_out = ("folder", "out")
    settings = {key: value for key, value in vars(args).items() if key not in left_out}
    drawn = [candidate_lengths(args, number + 1) for number in range(len(clocks))]
    content = {
        "environment": environment(),
        "settings": settings,
        "candidate_lengths": describe(args.lengths) | {"of_rounds": drawn},
        "results": results,
        "clocks": clocks,
    }
    write_json(content, args.out)
    write_text(show(results) + "\n", args.out.with_suffix(".md"))


if __name__ == "__main__":
    main()
