"""
One-line mistakes, each of which the suite must catch: `make mutations` plants them one at a time in a copy of the
packages, runs the tests that should fail, and writes the table of docs/mutations.md. It exits with 1 if one survives.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "mutations.md"
BEGIN, END = "<!-- begin: make mutations -->", "<!-- end -->"
MATHS, GROUP, TORCH = "gcpo_kernels/maths.py", "gcpo_kernels/group.py", "gcpo_kernels/torch_backend.py"
TRITON, TOKENS = "gcpo_kernels/triton_backend/", "token_kernels.py"


@dataclass(frozen=True)
class Mutation:
    """A mistake: what it is, where, and which tests are to find it."""

    what: str
    path: str
    old: str  # stands in one line of the file
    new: str
    tests: str
    nth: int = 1  # which of the lines that hold `old`, and how many there are, as 1 of 1
    of: int = 1


EQUATION = "tests/test_reference.py"
FLOOR = "tests/test_projection_floor.py"
TRL = "tests/test_trl_loss.py"
FAULTS = "tests/test_trainer_faults.py"
TARGETS, SCALES = "tests/test_kl_targets.py", "tests/test_weight_scale.py"
BUDGET = "tests/triton/test_triton_budget.py"
PATHS = "tests/triton/test_triton_linear_paths.py"
MUTATIONS = (
    Mutation("sign of the objective", MATHS, "loss = -torch.minimum(", "loss = torch.minimum(", EQUATION),
    Mutation("maximum in place of the minimum", MATHS, "-torch.minimum(capped", "-torch.maximum(capped", EQUATION),
    Mutation(
        "clip sides exchanged",
        MATHS,
        "ratio.clamp(1.0 - options.epsilon_low, 1.0 + options.epsilon_high)",
        "ratio.clamp(1.0 - options.epsilon_high, 1.0 + options.epsilon_low)",
        EQUATION,
        1,
        2,
    ),
    Mutation(
        "delta dropped",
        MATHS,
        "ratio if options.delta is None else ratio.clamp(max=options.delta)",
        "ratio",
        EQUATION,
    ),
    Mutation(
        "the sampler's correction dropped", MATHS, "loss = loss * inputs.importance", "inputs.importance", EQUATION
    ),
    Mutation("sign inside k3", MATHS, "torch.expm1(d) - d", "torch.expm1(d) + d", EQUATION),
    Mutation(
        "the reference's KL the other way round",
        MATHS,
        "options.beta * reference_kl(inputs.ref_logp - logp, log_ratio, options)",
        "options.beta * reference_kl(logp - inputs.ref_logp, log_ratio, options)",
        EQUATION,
    ),
    Mutation(
        "causal_logp ignored",
        MATHS,
        "logp if inputs.causal_logp is None else inputs.causal_logp",
        "logp",
        EQUATION,
    ),
    Mutation(
        "the gradient does not stop at kl_clip",
        MATHS,
        "d.detach().sign() * options.kl_clip, d)",
        "d - d.detach() + d.detach().sign() * options.kl_clip, d)",
        EQUATION,
    ),
    Mutation(
        "the gradient made in the forward does not stop at kl_clip",
        MATHS,
        "torch.where(beyond_kl_clip(d, options.kl_clip), 0.0, slope)",
        "slope",
        "tests/test_torch_backend.py -k test_linear_loss",
    ),
    Mutation(
        "phi of vespo is no constant",
        MATHS,
        "logp, given, keep = logp.detach()",
        "logp, given, keep = logp",
        TRL,
    ),
    Mutation(
        "phi of a sequence's mean ratio",
        MATHS,
        "torch.where(keep, logs, 0.0).sum(dim=1)",
        "torch.where(keep, logs, 0.0).mean(dim=1)",
        TRL,
    ),
    Mutation(
        "a sampler's correction per sequence counted for every token",
        MATHS,
        "/ (given.mask != 0).sum(dim=1, keepdim=True).clamp(min=1)",
        "/ 1.0",
        TRL,
    ),
    Mutation(
        "temperatures of sapo exchanged",
        MATHS,
        "(options.sapo_temperature_pos, options.sapo_temperature_neg)",
        "(options.sapo_temperature_neg, options.sapo_temperature_pos)",
        TRL,
    ),
    Mutation("the factor of cispo is no constant", MATHS, "-capped.detach() *", "-capped *", TRL),
    Mutation("luspo divided by tokens", MATHS, "ones / max(mask.shape[0], 1)", "ones / mask.numel()", TRL),
    Mutation(
        "the corrected KL's ratio without its gradient",
        MATHS,
        "d_ratio = d_ratio + options.beta * reference_kl",
        "d_ratio = d_ratio + 0.0 * reference_kl",
        "tests/test_torch_backend.py -k test_linear_loss",
    ),
    Mutation(
        "whole sequences forgotten in vespo",
        "gcpo_kernels/options.py",
        'self.importance_sampling_level == "sequence" or self.kind == "vespo"',
        'self.importance_sampling_level == "sequence"',
        "tests/test_torch_backend.py -k test_linear_loss",
    ),
    Mutation(
        "tokens without a causal term counted in its metrics",
        MATHS,
        "inputs.mask & (inputs.kappa_weights != 0)",
        "inputs.mask",
        EQUATION,
    ),
    Mutation(
        "policy weights dropped where the sampler has a correction",
        MATHS,
        "weights = (weights if weights.dim() == 2 else weights[:, None]) * (",
        "weights = (",
        EQUATION,
    ),
    Mutation("missing detach of the old policy", MATHS, "(logp.detach() if inputs", "(logp if inputs", EQUATION),
    Mutation(
        "missing detach of the target's query",
        MATHS,
        "query = logp.detach() if query is None else query",
        "query = logp if query is None else query",
        EQUATION,
    ),
    Mutation(
        "sum in place of the mean over a sequence",
        MATHS,
        "ones / (ones.sum(dim=1, keepdim=True).clamp(min=1.0) * max(mask.shape[0], 1))",
        "ones / max(mask.shape[0], 1)",
        EQUATION,
    ),
    Mutation("masked tokens counted", MATHS, "ones / ones.sum().clamp(min=1.0)", "ones / mask.numel()", EQUATION),
    Mutation(
        "mask multiplied, not selected",
        MATHS,
        "logp = torch.where(inputs.mask, logp, 0.0)",
        "logp = logp * inputs.mask",
        "tests/test_inert.py",
    ),
    Mutation("wrong context as x_i", MATHS, "first = context_logp[..., 0]", "first = context_logp[..., -1]", EQUATION),
    Mutation(
        "sum in place of the mean over contexts",
        MATHS,
        "new_full((), 1.0 / context_logp",
        "new_full((), 1.0 * context_logp",
        EQUATION,
    ),
    Mutation(
        "floor of p' not at the query", MATHS, "at_query = options.kl_clip is not", "at_query = options is", EQUATION
    ),
    Mutation(
        "a rounding below the query is clamped", MATHS, "difference < 0.0, log", "log_proj < query_logp, log", FLOOR
    ),
    Mutation("contexts that agree leave a rounding", MATHS, "<= AGREEMENT * a,", "< 0.0 * a,", FLOOR),
    Mutation("p' not kept below 1", MATHS, "log_proj.clamp(min=low, max=0.0)", "log_proj.clamp(min=low)", EQUATION),
    Mutation("sequence ratio over padding too", MATHS, "/ count).expand_as", "/ ratio.shape[1]).expand_as", EQUATION),
    Mutation(
        "biased std",
        GROUP,
        "(centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1))",
        "(centred.square().sum(dim=1, keepdim=True) / count.clamp(min=1))",
        EQUATION,
    ),
    Mutation("off by one in leave-one-out", GROUP, "/ (z.shape[1] - 1)", "/ z.shape[1]", EQUATION),
    Mutation(
        "wrong collider in Zbar",
        GROUP,
        "per_context[:, :, 0] - per_context",
        "per_context[:, :, -1] - per_context",
        EQUATION,
    ),
    Mutation(
        "an overflowing ratio not bounded",
        MATHS,
        "bounded = log_ratio.clamp(max=LARGEST_LOG[log_ratio.dtype])",
        "bounded = log_ratio",
        "tests/test_hazards_kernels.py",
    ),
    Mutation(
        "ties of the minimum not split",
        MATHS,
        "torch.where(left == right, tie, passes)",
        "passes",
        "tests/test_torch_backend.py",
    ),
    Mutation(
        "the reduction left out of the KL's gradient",
        "gcpo_kernels/linear.py",
        "return (d_ratio + d_logp) * weights",
        "return d_ratio * weights + d_logp",
        "tests/test_torch_backend.py",
    ),
    Mutation(
        "slope of the softcap", TORCH, "slope = 1.0 - z.square()", "slope = 1.0 - z", "tests/test_torch_backend.py"
    ),
    Mutation(
        "temperature left out of the gradient",
        TORCH,
        "TileGradient(scores.tile, -self.chain * g_logp / scores.state[0])",
        "TileGradient(scores.tile, -g_logp / scores.state[0])",
        "tests/test_torch_backend.py",
    ),
    Mutation(
        "upstream gradient ignored",
        "gcpo_kernels/ops.py",
        "torch.mul(d, grad.expand_as(d)",
        "torch.mul(d, torch.ones_like(d)",
        "tests/test_torch_backend.py",
    ),
    Mutation("Triton: clip side", TRITON + "common.py", "-tl.where((left < right)", "-tl.where((left > right)", BUDGET),
    Mutation(
        "Triton: the gradient does not stop at kl_clip",
        TRITON + "common.py",
        "tl.where(kl_beyond, 0.0, slope)",
        "slope",
        BUDGET + " -k test_loss",
    ),
    Mutation(
        "Triton: wrong context as x_i",
        TRITON + "token_kernels.py",
        "is_a = (l == 0)",
        "is_a = (l == L - 1)",
        BUDGET,
    ),
    Mutation("Triton: floor not at the query", TRITON + TOKENS, "at_least(query, LOWEST_LOG)", "log_floor", BUDGET),
    Mutation(
        "Triton: sum in place of the mean log-ratio",
        TRITON + "token_kernels.py",
        "tl.sum(ratio_sum) / count",
        "tl.sum(ratio_sum)",
        BUDGET,
    ),
    Mutation(
        "Triton: slope of sapo",
        TRITON + "common.py",
        "-4.0 * e * r * r * ratio",
        "-4.0 * e * r * ratio",
        BUDGET + " -k sapo",
    ),
    Mutation(
        "Triton: tokens without a causal term counted in its metrics",
        TRITON + "token_kernels.py",
        "tl.sum(kl_causal) / count_causal",
        "tl.sum(kl_causal) / count",
        BUDGET + " -k sapo",
    ),
    Mutation(
        "Triton: the corrected KL's ratio without its gradient",
        TRITON + "common.py",
        "d_ratio += tl.where(beta != 0.0, beta * kl, 0.0)",
        "d_ratio += 0.0",
        BUDGET + " -k luspo",
    ),
    Mutation(
        "Triton: off by one in the vocabulary",
        TRITON + "logprob_kernels.py",
        "_fold(tl.where(WHOLE + v < V, z",
        "_fold(tl.where(WHOLE + v < V - 1, z",
        BUDGET + " -k logprob",
    ),
    Mutation(
        "Triton: the target's exponential kept",
        TRITON + "logprob_kernels.py",
        "hit = s * expm1(logp) * target_slope",
        "hit = s * tl.exp(logp) * target_slope",
        PATHS + " -k test_loss",
    ),
    Mutation(
        "Triton: rows with a wrong estimate left as they are",
        TRITON + "logprob_kernels.py",
        "tl.abs(tl.log2(s)) <= OFFSET_LIMIT",
        "(s == s) | (s != s)",
        PATHS + " -k no_offset_matters",
    ),
    Mutation(
        "Triton: rows that were right are done again",
        TRITON + "product_kernels.py",
        "(total != total)",
        "(total == total)",
        PATHS + " -k rows_are_done_again",
    ),
    Mutation(
        "Triton: tiles put together as if their largest logits were one",
        TRITON + "product_kernels.py",
        "total * tl.exp2(down) + other_total * tl.exp2(other_down)",
        "total + other_total",
        PATHS + " -k scoring",
    ),
    Mutation(
        "Triton: large logits rounded twice",
        TRITON + "product_kernels.py",
        "y = tl.fma(z, k, shift[:, None])",
        "y = z * k + shift[:, None]",
        PATHS + " -k large_logits",
    ),
    Mutation(
        "Triton: temperature left out of the rows' factors",
        TRITON + "linear.py",
        "-head_numbers(self.head).signed_chain",
        "-1.0",
        PATHS + " -k test_loss",
    ),
    Mutation(
        "Triton: scaled where the upstream gradient is 1",
        TRITON + "scale.py",
        "if factor != 1.0",
        "if factor == 1.0",
        PATHS + " -k scaling_in_place",
    ),
    Mutation(
        "Triton: wrong collider in Zbar",
        TRITON + "causal_kernels.py",
        "tl.where(s < m, 1.0, 0.0)",
        "tl.where(s >= samples - m, 1.0, 0.0)",
        BUDGET + " -k causal",
    ),
    Mutation(
        "undefined weights reach the loss",
        "gcpo/causal/estimators.py",
        "torch.where(torch.isfinite(weights), weights, 1.0)",
        "weights",
        FAULTS,
    ),
    Mutation(
        "groups without a collider keep the second KL term",
        "gcpo/causal/loss.py",
        "kappa_weights=terms.counted.to(logp.dtype)",
        "kappa_weights=None",
        "tests/test_causal_step.py",
    ),
    Mutation("weights of mean 1 turn round", "gcpo/causal/estimators.py", "/ alpha > _LEAST_MEAN", "!= 0", SCALES),
    Mutation("an ensemble of all alike", "gcpo/causal/loss.py", "weights.log()", "0.0", f"{TARGETS} -k in_expectation"),
    Mutation("B beside the pull", "gcpo/trainer.py", "counted, advantages", 'counted, output["advantages"]', TARGETS),
    Mutation(
        "accumulation not divided out",
        "gcpo/kl_terms.py",
        "return None, 1.0 / accumulation",
        "return None, 1.0",
        "tests/test_hazards_trainer.py -k accumulation",
    ),
    Mutation(
        "a packed row's completions see each other",
        "gcpo/forward/unpadded.py",
        "(key <= query) & (query < ends[row, key])",
        "(key <= query)",
        "tests/test_unpadded.py -k own_sequence",
    ),
    Mutation(
        "windows forgotten in packed rows",
        "gcpo/forward/own_forward.py",
        'window if kind == "sliding_attention" else None for kind in kinds',
        "None for kind in kinds",
        "tests/test_own_loss.py -k mistral",
    ),
    Mutation(
        "rows dealt out over optimizer steps",
        "gcpo/forward/microbatches.py",
        "window = math.gcd(len(batches), accumulation)",
        "window = len(batches)",
        "tests/test_unpadded.py -k leaves_its_optimizer_step",
    ),
    Mutation(
        "rows dealt out anew where their loss is divided by their tokens",
        "gcpo/own_loss.py",
        'args.loss_type == "bnpo" or ',
        "",
        "tests/test_own_loss.py -k three_steps",
    ),
    Mutation(
        "the second KL of the fused loss not scaled up",
        "gcpo/own_loss.py",
        'inputs["has_collider"] * inputs["causal_scale"]',
        'inputs["has_collider"].float()',
        "tests/test_own_loss.py -k some",
    ),
    Mutation(
        "special tokens of a candidate kept",
        "gcpo/causal/encoding.py",
        "[token for token in ids if token not in self.special_ids]",
        "list(ids)",
        "tests/test_contexts.py",
    ),
    Mutation(
        "broken gradients let through",
        "gcpo/run/guard.py",
        "parameter.grad = None",
        "pass",
        "tests/test_training_faults.py -k broken_logits",
    ),
)


def mutated(mutation: Mutation, text: str) -> str:
    """`text` with the mistake in it."""
    lines = text.splitlines(keepends=True)
    places = [k for k, line in enumerate(lines) if mutation.old in line]
    if len(places) != mutation.of:
        raise ValueError(f"{mutation.what}: {mutation.old!r} stands {len(places)} times in {mutation.path}")
    at = places[mutation.nth - 1]
    lines[at] = lines[at].replace(mutation.old, mutation.new, 1)
    return "".join(lines)


def copy_of_the_packages(folder: Path) -> None:
    for name in ("gcpo", "gcpo_kernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def killer(mutation: Mutation, folder: Path) -> str | None:
    """The first test that fails with the mistake in the copy at `folder`; None if it survives."""
    path = folder / mutation.path
    clean = path.read_text()
    path.write_text(mutated(mutation, clean))
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if mutation.tests.startswith("tests/triton"):
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", *mutation.tests.split()]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    finally:
        path.write_text(clean)
    failed = re.search(r"^FAILED ([^\s\[]+)", done.stdout, re.MULTILINE)
    if failed is None and done.returncode != 0:
        raise RuntimeError(f"{mutation.what}: the tests did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed.group(1) if failed else None


def table(killers: dict[str, str | None]) -> str:
    lines = ["| mistake | in | the line's | becomes | killed by |", "|---|---|---|---|---|"]
    for mutation in MUTATIONS:
        found = killers.get(mutation.what)
        cells = (f"`{text}`".replace("|", "\\|") for text in (mutation.path, mutation.old, mutation.new))
        lines.append(f"| {mutation.what} | {' | '.join(cells)} | {f'`{found}`' if found else '**nothing**'} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutations whose name holds this; the table is not written")
    args = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if args.only in mutation.what]
    killers: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_the_packages(folder)
        for mutation in chosen:
            killers[mutation.what] = killer(mutation, folder)
            print(f"{mutation.what}: {killers[mutation.what] or 'SURVIVES'}", flush=True)
    if not args.only:
        head, rest = DOCUMENT.read_text().split(BEGIN)
        DOCUMENT.write_text(f"{head}{BEGIN}\n{table(killers)}\n{END}{rest.split(END)[1]}")
    survivors = [name for name, found in killers.items() if found is None]
    print(f"{len(chosen)} planted, {len(survivors)} survived" + (f": {', '.join(survivors)}" if survivors else ""))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
