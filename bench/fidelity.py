"""
How close the cheaper estimators and savings come to the paper's own estimate, on the same rollouts and colliders.

    python -m bench.fidelity --out bench/results/cpu/fidelity_smollm2.json
    python -m bench.fidelity --table colliders --collider_tokens 64 --out bench/results/cpu/fidelity_colliders.json

The truth for Upsilon is `estimator="sampled"` with many outputs under every full context of whole candidates, zbar over
the whole group; for log p' it is the scores under all those contexts. Colliders are the same for every row (generated
once, from whole candidates), but for the rows "other colliders": a second draw, which says how much of either is the
draw's doing. `kl_fraction` changes no value: it takes its share of the cost. Advantages are those of a stand-in reward
that varies within every group.

The second line makes another table instead: what the second KL term says by the length of its colliders, which of them
is c_0, and what it pulls to (`bench/fidelity_colliders.py`).
"""

import argparse
import copy
import math
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from bench import fidelity_colliders
from bench.agreement import compare_log_p, compare_upsilon, mean_and_error
from bench.fidelity_runs import REPRESENTATIONS, Estimate, Inputs, Lab, Sample, join
from bench.files import write_json
from bench.overhead_runs import prepare_model
from bench.step_overhead import environment
from gcpo import GCPOConfig
from gcpo.causal.estimators import estimate_weights
from gcpo.causal.options import FUSION_PROMPTS
from gcpo.causal.port import WeightInputs

FULL = "scored"
# Options of GCPOConfig. What is not said is as in the first: whole candidates, full attention, every context.
VARIANTS: dict[str, dict[str, Any]] = {
    FULL: {"estimator": "scored"},
    "scored, other colliders": {"estimator": "scored"},
    "scored, 64 tokens of each": {"estimator": "scored", "candidate_context_tokens": 64},
    "scored, 32 tokens of each": {"estimator": "scored", "candidate_context_tokens": 32},
    "scored, 16 tokens of each": {"estimator": "scored", "candidate_context_tokens": 16},
    "scored, parallel": {"estimator": "scored", "context_attention": "parallel"},
    "scored, 2 colliders": {"estimator": "scored", "num_colliders": 2},
    "1 context drawn": {"estimator": "loo", "num_kl_contexts": 1},
    "parallel, 1 context drawn": {"estimator": "loo", "num_kl_contexts": 1, "context_attention": "parallel"},
    "loo": {"estimator": "loo", "kappa": 0.0},
    "loo, other colliders": {"estimator": "loo", "kappa": 0.0},
    "loo, 2 colliders": {"estimator": "loo", "kappa": 0.0, "num_colliders": 2},
}
DEFAULT_TASKS = ["chain_sum", "spell_backward", "letter_counting", "basic_arithmetic", "word_sorting", "count_bits"]


@dataclass
class Row:
    """One line of a table of Upsilon: ours and its truth, (P, n), and each without a projection."""

    name: str
    variant: str | None  # whose cost it is
    ours: torch.Tensor
    truth: torch.Tensor
    bases: tuple[torch.Tensor, torch.Tensor]


def upsilon_rows(truth: WeightInputs, estimates: dict[str, WeightInputs], config: GCPOConfig, m: int) -> Iterator[Row]:
    """Of one representation."""

    def upsilon(inputs: WeightInputs, baseline: str, samples: slice = slice(None)) -> torch.Tensor:
        options = copy.copy(config)
        options.baseline, options.estimator = baseline, "loo" if inputs.context_z is None else "sampled"
        if inputs.context_z is not None:
            inputs = replace(inputs, context_z=inputs.context_z[:, :, :, samples])
        return estimate_weights(options, inputs)[0]

    # With one collider the two terms of the projection cancel.
    nothing = WeightInputs(truth.z, truth.z[:, :1], None, truth.collider_mask[:, :1])
    base = {baseline: upsilon(nothing, baseline) for baseline in ("mean", "loo")}
    both, paper, half = (base["mean"], base["mean"]), upsilon(truth, "mean"), m // 2
    second = upsilon(truth, "mean", slice(half, 2 * half))
    for count in sorted({1, min(4, half), half}):
        first = upsilon(truth, "mean", slice(count))
        yield Row(f"sampled, m = {count} (against {half} others)", None, first, second, both)
    yield Row("no projection (or 1 collider)", None, base["mean"], paper, both)
    yield Row("no projection, baseline loo", None, base["loo"], paper, (base["loo"], base["mean"]))
    yield Row(f"sampled, m = {m}, baseline loo", None, upsilon(truth, "loo"), paper, (base["loo"], base["mean"]))
    for name, inputs in estimates.items():
        own = "mean" if inputs.collider_z is None else "loo"  # the default of the estimator
        yield Row(name, name, upsilon(inputs, own), paper, (base[own], base["mean"]))
        if name in (FULL, "loo"):
            other = "loo" if own == "mean" else "mean"
            bases = (base[other], base["mean"])
            yield Row(f"{name}, baseline {other}", name, upsilon(inputs, other), paper, bases)


def compare_all(
    samples: list[Sample], truth: Inputs, estimates: dict[str, list[Estimate]], config: GCPOConfig, m: int
) -> dict[str, Any]:
    """Both tables and what each variant cost, as JSON takes them."""
    weighing = {  # the others' Upsilon is that of loo
        name: join([one.inputs for one in parts])
        for name, parts in estimates.items()
        if VARIANTS[name].get("estimator") == "scored" or VARIANTS[name].get("kappa") == 0.0
    }
    advantages = torch.stack([sample.output["advantages"] for sample in samples])
    upsilon: dict[str, Any] = {}
    for representation in REPRESENTATIONS:
        rows = upsilon[representation] = {}
        own = {name: inputs[representation] for name, inputs in weighing.items()}
        for row in upsilon_rows(truth[representation], own, config, m):
            compared = compare_upsilon(row.ours, row.truth, advantages, row.bases)
            rows[row.name] = {"variant": row.variant, **compared, "values": row.ours.tolist()}

    def tokens(name: str, field: str) -> torch.Tensor:
        parts = zip(estimates[name], samples, strict=True)
        return torch.cat([getattr(one, field)[sample.mask] for one, sample in parts])

    log_p = {
        name: compare_log_p(
            tokens(name, "log_p"), tokens(FULL, "log_p"), tokens(FULL, "query_logp"), tokens(name, "clamped")
        )
        for name, parts in estimates.items()
        if parts[0].log_p is not None
    }
    return {"upsilon": upsilon, "log_p": log_p, "costs": {name: cost(parts) for name, parts in estimates.items()}}


def cost(parts: list[Estimate]) -> dict[str, float]:
    """
    Tokens and seconds per prompt: of scores under q (candidates and colliders), and of those under contexts. CPU
    seconds are of both, and do not count what other processes take. In a training step, candidates are not scored under
    q again.
    """

    def mean(values: list[float]) -> float:
        return mean_and_error(values)[0]

    return {
        "tokens_query": mean([one.tokens["scored_query"] + one.tokens["scored_colliders"] for one in parts]),
        "tokens_contexts": mean([one.tokens["scored_contexts"] for one in parts]),
        "seconds_query": mean([one.seconds["scoring"] for one in parts]),
        "seconds_contexts": mean([one.seconds["contexts"] for one in parts]),
        "cpu_seconds": mean([one.cpu_seconds for one in parts]),
    }


def ceilings(rows: dict[str, Any]) -> dict[str, float]:
    """
    The correlation with the truth that an estimate without noise of its own would reach, from that of the truth's two
    halves, r: sqrt(2r / (1 + r)), as Spearman and Brown have it. NaN where the halves do not correlate.
    """
    halves = [row for name, row in rows.items() if "(against" in name][-1]
    found = {field: halves[field] for field in ("pearson", "pearson_within", "pearson_projection")}
    return {field: math.sqrt(2 * r / (1 + r)) if r is not None and r > 0 else math.nan for field, r in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Showing
# ---------------------------------------------------------------------------------------------------------------------


def show(results: dict[str, Any]) -> str:
    """The results, or what was read back from their JSON, as Markdown tables."""
    if "colliders" in results:
        return fidelity_colliders.show(results)
    lines: list[str] = []
    costs = results["costs"]

    def cost_cells(name: str | None) -> list[str]:
        if name is None:
            return ["-"] * 3
        own = costs[name]
        seconds = own["seconds_query"] + own["seconds_contexts"]
        return [f"{own['tokens_query'] + own['tokens_contexts']:,.0f}", f"{seconds:.1f}", f"{own['cpu_seconds']:.1f}"]

    def table(title: str, columns: dict[str, str], rows: dict[str, Any], variant: Any) -> None:
        lines.extend(["", title, "", "| | " + " | ".join([*columns, "tokens", "s", "CPU s"]) + " |"])
        lines.append("|" + "---|" * (len(columns) + 4))
        for name, row in rows.items():
            values = [row[field] for field in columns.values()]
            cells = ["-" if value is None or math.isnan(value) else f"{value:.3f}" for value in values]
            lines.append(f"| {name} | " + " | ".join(cells + cost_cells(variant(name, row))) + " |")

    for representation, rows in results["upsilon"].items():
        columns = {
            "Pearson": "pearson",
            "Spearman": "spearman",
            "Pearson within": "pearson_within",
            "Spearman within": "spearman_within",
            "±": "spearman_within_error",
            "MAD": "mad",
            "MAD within": "mad_within",
            "Pearson of projection": "pearson_projection",
            "sign of B": "sign_b",
            "order of B": "order_b",
        }
        table(f"Upsilon, representation {representation!r}", columns, rows, lambda name, row: row["variant"])
        names = {"pearson": "Pearson", "pearson_within": "within", "pearson_projection": "of the projection"}
        most = ", ".join(f"{names[field]} {value:.3f}" for field, value in ceilings(rows).items())
        lines.extend(["", f"At most, for an estimate without noise: {most}."])
    columns = {
        "Pearson": "pearson",
        "MAD": "mad",
        "Pearson of d": "pearson_d",
        "Spearman of d": "spearman_d",
        "sign of d": "sign_d",
        "by gradient": "sign_d_weighted",
        "clamped": "clamped",
        "mean k3": "k3_mean",
        "median k3": "k3_median",
    }
    table("log p', and d = log p' - log p", columns, results["log_p"], lambda name, row: name)
    return "\n".join(lines)


def describe(samples: list[Sample], lab: Lab, clock: dict[str, float]) -> dict[str, Any]:
    """What the rollouts were like."""
    tasks, eos = list(lab.prompts["task"])[: len(samples)], lab.trainer().eos_token_ids
    candidates = [ids for sample in samples for ids in sample.group.candidates]
    colliders = [ids for sample in samples for ids in sample.group.colliders]

    def ended(rows: list[list[int]]) -> float:
        return sum(ids[-1] in eos for ids in rows) / len(rows)

    return {
        "tasks": tasks,
        "candidate_tokens": sum(map(len, candidates)) / len(candidates),
        "candidates_ended": ended(candidates),
        "collider_tokens": sum(map(len, colliders)) / len(colliders),
        "colliders_ended": ended(colliders),
        "groups_with_advantages": sum(bool(sample.output["advantages"].any()) for sample in samples),
        **clock,
    }


def plain(value: Any) -> Any:
    """NaN as None: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def measure(lab: Lab, names: list[str], m: int) -> Iterator[dict[str, Any]]:
    """The results so far, after each prompt."""
    samples: list[Sample] = []
    truths: list[Inputs] = []
    estimates: dict[str, list[Estimate]] = {name: [] for name in names}
    clock = {"seconds_rollouts": 0.0, "seconds_truth": 0.0, "tokens_truth_read": 0.0, "tokens_truth_sampled": 0.0}
    began = time.perf_counter()
    trainer = lab.trainer(**VARIANTS[FULL])
    for number in range(len(lab.prompts)):
        start = time.perf_counter()
        sample = lab.roll_out(number)
        samples.append(sample)
        clock["seconds_rollouts"] += time.perf_counter() - start
        for name in names:
            estimates[name].append(lab.estimate(sample, VARIANTS[name], other_colliders="other colliders" in name))
            used = estimates[name][-1]
            print(f"  {name}: {sum(used.tokens.values()):,.0f} tokens, {used.cpu_seconds:.1f} CPU s", flush=True)
        start = time.perf_counter()
        z = {kind: inputs.z for kind, inputs in estimates[FULL][-1].inputs.items()}
        inputs, read, sampled = lab.sample_truth(sample, z, m)
        truths.append(inputs)
        clock["seconds_truth"] += time.perf_counter() - start
        clock["tokens_truth_read"] += read
        clock["tokens_truth_sampled"] += sampled
        task, elapsed = lab.prompts[number]["task"], time.perf_counter() - began
        print(f"prompt {number + 1} of {len(lab.prompts)} ({task}): {sampled:,} sampled, {elapsed:.0f} s", flush=True)
        results = compare_all(samples, join(truths), estimates, trainer.args, m)
        yield {"rollouts": describe(samples, lab, clock), **results}


def measure_colliders(lab: Lab, lengths: list[int]) -> Iterator[dict[str, Any]]:
    """The results of the other table so far, after each prompt."""
    began = time.perf_counter()
    for samples, results in fidelity_colliders.measure(lab, lengths):
        elapsed = time.perf_counter() - began
        print(f"prompt {len(samples)} of {len(lab.prompts)}: {elapsed:.0f} s", flush=True)
        yield {"rollouts": describe(samples, lab, {"seconds": elapsed}), **results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2", help="tiny: random weights")
    parser.add_argument("--table", choices=("estimates", "colliders"), default="estimates")
    parser.add_argument("--tasks", nargs="+", default=DEFAULT_TASKS, help="of reasoning-gym")
    parser.add_argument("--prompts", type=int, default=1, help="prompts of each task")
    parser.add_argument("--num_generations", type=int, default=8, help="n")
    parser.add_argument("--num_colliders", type=int, default=4, help="L")
    parser.add_argument("--completion_tokens", type=int, default=48, help="most tokens of a candidate")
    parser.add_argument("--collider_tokens", type=int, default=32, help="most tokens of a collider")
    parser.add_argument(
        "--collider_lengths",
        type=int,
        nargs="+",
        default=fidelity_colliders.LENGTHS,
        help="of the table of colliders; those above --collider_tokens are left out",
    )
    parser.add_argument(
        "--fusion", choices=list(FUSION_PROMPTS), default="integrate", help="what asks for an integrated answer"
    )
    parser.add_argument("--samples", type=int, default=16, help="m of the truth, two halves of which are compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help=f"these variants beside {FULL!r}")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.samples < 2 or args.num_colliders < 2:
        parser.error(f"--samples and --num_colliders must be at least 2, got {args.samples}, {args.num_colliders}")
    lengths = sorted({length for length in args.collider_lengths if 1 <= length <= args.collider_tokens})
    if args.table == "colliders" and not lengths:
        parser.error(f"--collider_lengths must have one from 1 to {args.collider_tokens}, got {args.collider_lengths}")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {
        "num_generations": args.num_generations,
        "num_colliders": args.num_colliders,
        "max_completion_length": args.completion_tokens,
        "collider_max_completion_length": args.collider_tokens,
        "fusion_prompt_template": args.fusion,
    }
    names = [FULL, *(name for name in args.only or VARIANTS if name != FULL)]
    with tempfile.TemporaryDirectory() as temporary:
        prepare_model(args.model, Path(temporary))
        lab = Lab(Path(temporary), args.tasks, args.prompts, options, args.seed)
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        where = {
            "environment": environment(),
            "command": shlex.join(["python", *sys.orig_argv[1:]]),
            "settings": settings,
        }
        results: dict[str, Any] = {}
        colliders = args.table == "colliders"
        for results in measure_colliders(lab, lengths) if colliders else measure(lab, names, args.samples):
            if args.out is not None:  # after each prompt: a run that is stopped leaves what it had
                write_json(plain({**where, **results}), args.out)
    print(show(results))


if __name__ == "__main__":
    main()
