"""`gcpo plan`: tokens, operations, memory and time of a step of GCPO beside one of GRPO, before anything runs."""

import json
import sys
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig

from gcpo.causal.contexts import longest_prompt
from gcpo.commands.flags import TrainParser
from gcpo.commands.train import GCPOScriptArguments
from gcpo.config import GCPOConfig
from gcpo.planning.architecture import SIZES, Architecture, load_config
from gcpo.planning.candidate_lengths import CHOICES, DRAWN, MEAN, SIGMA, count_batches, planned_batches
from gcpo.planning.counts import Lengths, abilities_of
from gcpo.planning.plan import BYTES, DEVICES, Cost, Device, StepPlan, compute_bytes, plan_step
from gcpo.run.inputs import argument_errors, check_model, check_output
from gcpo_kernels.options import check_choice, check_number

_CHARACTERS_PER_TOKEN = 4  # of English templates, where no count is given


@dataclass
class PlanArguments:
    """What a plan is made from, beside the flags of `gcpo train`."""

    prompt_tokens: int = field(default=128, metadata={"help": "Tokens of a prompt, its chat template included."})
    completion_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of every candidate. Default: max_completion_length."}
    )
    lengths: str = field(
        default="full",
        metadata={
            "help": "Of candidates: 'full', all of completion_tokens; or 'lognormal', drawn with a mean of "
            f"{MEAN} x max_completion_length before they are clipped to it, and sigma {SIGMA}: the mean over as many "
            f"batches, of fixed seeds, as hold {DRAWN} candidates."
        },
    )
    collider_tokens: int | None = field(
        default=None, metadata={"help": "Mean tokens of a collider. Default: collider_max_completion_length."}
    )
    fusion_template_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens that a fusion prompt adds to the prompt, candidates left out. Default: estimated."},
    )
    context_template_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens that a context adds, candidates and collider left out. Default: estimated."},
    )
    candidate_template_tokens: int | None = field(
        default=None, metadata={"help": "Tokens around one candidate. Default: estimated."}
    )
    paper: bool = field(
        default=False,
        metadata={
            "help": "Start from GCPOConfig.paper(): L = n, colliders as long as candidates, unless flags say other."
        },
    )
    gpu: str | None = field(
        default=None, metadata={"help": f"Peak rates of a device, in 16 bits: {', '.join(DEVICES)}."}
    )
    tflops: float | None = field(default=None, metadata={"help": "Peak of a device, 10^12 operations per second."})
    bandwidth: float | None = field(default=None, metadata={"help": "Of its memory, 10^9 bytes per second."})
    mfu: float = field(default=0.4, metadata={"help": "Share of the peak that forwards and backwards reach."})
    mbu: float = field(default=0.6, metadata={"help": "Share of the bandwidth that decoding reaches."})
    reward_seconds: float = field(
        default=0.0, metadata={"help": "Seconds that the reward functions take for one completion."}
    )
    steps: int | None = field(default=None, metadata={"help": "Steps to give hours for. Default: max_steps."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write the plan to."})


@dataclass
class PlannedConfig(GCPOConfig):
    """The options of a run on several devices, as those of one process that takes all their turns."""

    num_processes: int = field(default=1, metadata={"help": "Devices, each with a copy of the model."})

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise ValueError(f"`num_processes` must be at least 1, got {self.num_processes}.")
        self.gradient_accumulation_steps *= self.num_processes
        if self.steps_per_generation is not None:
            self.steps_per_generation *= self.num_processes
        super().__post_init__()


def make_parser() -> TrainParser:
    """The flags of `gcpo train`, so that its command lines and YAML files can be planned, and those of a plan."""
    groups: Any = (PlanArguments, GCPOScriptArguments, PlannedConfig, ModelConfig, DatasetMixtureConfig)
    parser = TrainParser(groups, prog="gcpo plan")
    parser.set_defaults(use_cpu=True)  # nothing runs: no option needs a device to be there
    return parser


def run(flags: list[str]) -> int:
    """Print the plan; the exit code."""
    # TRL's own default trips it; nothing that the user could change.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
    parser = make_parser()
    with argument_errors():
        if "--paper" in flags:
            parser.set_defaults(**_paper_settings(), num_colliders=_NotGiven(1))
            parser.set_defaults(collider_max_completion_length=_NotGiven(1))
        args, _, config, model_args, _, _ = parser.parse_args_and_config(flags, return_remaining_strings=True)
        if isinstance(config.num_colliders, _NotGiven):
            config.num_colliders = int(config.num_generations or 1)
        if isinstance(config.collider_max_completion_length, _NotGiven):
            config.collider_max_completion_length = int(config.max_completion_length or 1)
        _check(args, model_args)
        name = model_args.model_name_or_path
        if str(name).lower() not in SIZES:
            check_model(name)
        hub = {"revision": model_args.model_revision, "trust_remote_code": config.trust_remote_code}
        architecture = Architecture.from_config(load_config(name, **hub))
        lengths = planned_lengths(args, config)
        device = _device(args, config, model_args.dtype)
        abilities = abilities_of(config, architecture, model_args.attn_implementation)
        batches = planned_batches(args.lengths, config, lengths.completion)
        dtype = model_args.dtype if model_args.dtype in BYTES else "bfloat16"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`share_prefix` needs")  # as the run itself will say
            grpo, gcpo = (
                plan_step(
                    config,
                    architecture,
                    count_batches(config, lengths, batches, abilities, is_grpo),
                    device,
                    dtype,
                    config.num_processes,
                    reward_seconds=args.reward_seconds,
                )
                for is_grpo in (True, False)
            )
    steps = args.steps or (config.max_steps if config.max_steps > 0 else None)
    print(_heading(args, name, config, architecture, lengths, batches))
    print(render(grpo, gcpo))
    print(_closing(grpo, gcpo, config, steps))
    limit, needed = (
        architecture.max_positions,
        lengths.prompt + longest_prompt(config, int(config.num_generations or 1), lengths.completion),
    )
    if config.is_causal and limit is not None and needed > limit:
        print(f"warning: prompts of up to {needed:,.0f} tokens, the model has {limit:,} positions", file=sys.stderr)
    if model_args.use_peft:
        print("warning: adapters are not planned for: all weights are taken to be trained", file=sys.stderr)
    if args.output is not None:
        content = {"grpo": asdict(grpo), "gcpo": asdict(gcpo), "lengths": asdict(lengths)}
        content["assumed"] = asdict(abilities)
        content["candidate_lengths"] = {"kind": args.lengths, "of_batches": batches}
        Path(args.output).write_text(json.dumps(content, indent=1) + "\n")
        print(f"written to {args.output}")
    return 0


def planned_lengths(args: PlanArguments, config: GCPOConfig) -> Lengths:
    """The lengths asked for; templates are estimated from their text where no count is given."""

    def tokens(given: int | None, text: str) -> int:
        return given if given is not None else round(len(text.strip()) / _CHARACTERS_PER_TOKEN)

    before, _, rest = _without_question(config.context_prompt_template).partition("{candidates}")
    between, _, after = rest.partition("{collider}")
    shown, _, asked = _without_question(config.fusion_prompt_template).partition("{candidates}")
    fusion = tokens(args.fusion_template_tokens, shown + asked)
    parts = [len(part.strip()) for part in (before, between, after)]
    whole = tokens(args.context_template_tokens, "x" * sum(parts))
    shares = [
        round(whole * sum(parts[:k]) / max(sum(parts), 1)) for k in range(4)
    ]  # where each begins, so that all add up
    candidate = config.candidate_template.replace("{candidate}", "").replace("{index}", "1") + " \n\n"
    return Lengths(
        prompt=args.prompt_tokens,
        completion=args.completion_tokens or config.max_completion_length or 1,
        collider=args.collider_tokens or config.collider_limit(config.max_completion_length),
        fusion_template=fusion,
        # A template that says nothing behind the candidates cannot be a turn: colliders then follow text.
        fusion_turn=round(fusion * len(asked.strip()) / len((shown + asked).strip())) if asked.strip() else None,
        context_template=(shares[1], shares[2] - shares[1], shares[3] - shares[2]),
        candidate_frame=tokens(args.candidate_template_tokens, candidate),
    )


def _without_question(template: str) -> str:
    return template.replace("{question}", "")


class _NotGiven(int):
    """The default of a count that follows another option where neither a flag nor a file gives it."""


def _paper_settings() -> dict[str, Any]:
    """What GCPOConfig.paper() changes, but for L, which follows n, and the colliders' length, which follows T."""
    paper, plain = (make(use_cpu=True, bf16=False) for make in (GCPOConfig.paper, GCPOConfig))
    own = {item.name for item in fields(GCPOConfig)} - {
        "num_colliders",
        "collider_max_completion_length",
        "logging_dir",
    }
    return {name: getattr(paper, name) for name in own if getattr(paper, name) != getattr(plain, name)}


def _check(args: PlanArguments, model_args: ModelConfig) -> None:
    for item in fields(PlanArguments):
        value = getattr(args, item.name)
        lowest = 0 if "template" in item.name else 1
        if item.name == "reward_seconds":
            check_number(f"--{item.name}", value, low=0.0)
            continue
        if item.type in (int, int | None) and value is not None and value < lowest:
            raise ValueError(f"`--{item.name}` must be at least {lowest}, got {value}.")
        if item.type in (float, float | None) and value is not None and not value > 0:
            raise ValueError(f"`--{item.name}` must be above 0, got {value}.")
    check_choice("--lengths", args.lengths, CHOICES)
    if args.lengths != "full" and args.completion_tokens is not None:
        raise ValueError(
            f"`--completion_tokens` is the length of every candidate: not with `--lengths {args.lengths}`, whose "
            "longest is `--max_completion_length`."
        )
    if args.reward_seconds and args.gpu is None and args.tflops is None:
        raise ValueError("`--reward_seconds` needs a device to compare with: give --gpu, or --tflops and --bandwidth.")
    if model_args.dtype not in ("auto", *BYTES):
        raise ValueError(f"`--dtype` must be one of auto, {', '.join(BYTES)}, got {model_args.dtype!r}.")
    if args.output is not None:
        check_output(args.output)


def _device(args: PlanArguments, config: GCPOConfig, dtype: str) -> Device | None:
    if args.gpu is None:
        if args.tflops is None and args.bandwidth is None:
            return None
        if args.tflops is None or args.bandwidth is None:
            missing = "tflops" if args.tflops is None else "bandwidth"
            raise ValueError(
                f"`--{missing}` is missing: a device has --tflops and --bandwidth, or is named with --gpu."
            )
        return Device(args.tflops, args.bandwidth, args.mfu, args.mbu)
    if args.gpu not in DEVICES:
        raise ValueError(f"`--gpu` must be one of {', '.join(DEVICES)}, got {args.gpu!r}; or give --tflops.")
    if args.tflops is None and compute_bytes(config, dtype if dtype in BYTES else "bfloat16") != 2:
        raise ValueError(f"`--gpu {args.gpu}` stands for its 16-bit peak; with `bf16` off, give `--tflops` as well.")
    known = DEVICES[args.gpu]
    return Device(args.tflops or known.tflops, args.bandwidth or known.bandwidth, args.mfu, args.mbu)


def render(grpo: StepPlan, gcpo: StepPlan) -> str:
    """The table: a line per kind of pass, a sum per phase."""
    with_seconds = any(cost.seconds is not None for cost in gcpo.costs)
    columns = ("tokens", "flops", "seconds") if with_seconds else ("tokens", "flops")
    lines = [f"{'':<38}" + "".join(f"{name + ' ' + kind:>15}" for kind in columns for name in ("GRPO", "GCPO"))]

    def line(label: str, values: list[list[float | None]]) -> str:
        cells = [_cell(kind, value) for kind, pair in zip(columns, values, strict=True) for value in pair]
        return f"{label:<38}" + "".join(f"{cell:>15}" for cell in cells)

    found: dict[tuple[str, str], list[Cost | None]] = {(cost.phase, cost.what): [None, cost] for cost in gcpo.costs}
    for cost in grpo.costs:
        found.setdefault((cost.phase, cost.what), [None, None])[0] = cost
    for phase in dict.fromkeys(phase for phase, _ in found):
        lines.append(line(phase, [[plan.total(kind, phase) for plan in (grpo, gcpo)] for kind in columns]))
        for (of, what), pair in found.items():
            if of == phase:
                lines.append(line(f"  {what}", [[getattr(cost, kind, None) for cost in pair] for kind in columns]))
    lines.append(line("step", [[plan.total(kind) for plan in (grpo, gcpo)] for kind in columns]))
    return "\n".join(lines)


def _cell(kind: str, value: float | None) -> str:
    if not value:
        return "-"
    return f"{value:,.0f}" if kind == "tokens" else f"{value:.3e}" if kind == "flops" else f"{value:,.2f}"


def _heading(
    args: PlanArguments,
    name: str,
    config: PlannedConfig,
    architecture: Architecture,
    lengths: Lengths,
    batches: list[list[int]],
) -> str:
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    own = f"of {lengths.completion} tokens"
    if args.lengths != "full":
        own = f"of {fmean(map(fmean, batches)):.0f} tokens on average and at most {lengths.completion}"
        own += f" ({args.lengths}, the mean over {len(batches)} drawn batch{'es' * (len(batches) > 1)})"
    return (
        f"{name}: {architecture.parameters / 1e9:.2f}B weights. A step: {rows} completions {own} "
        f"after prompts of {lengths.prompt}, n={config.num_generations} L={config.num_colliders} colliders of "
        f"{lengths.collider}, estimator={config.estimator} kappa={config.kappa:g}, on {config.num_processes} "
        f"device{'s' * (config.num_processes > 1)}"
    )


def _trained(plan: StepPlan) -> str:
    padding = plan.tokens.get("trained_padding", 0.0)
    return f"{plan.tokens['trained']:,.0f}" + (f" and {padding:,.0f} of padding" if padding else "")


def _closing(grpo: StepPlan, gcpo: StepPlan, config: PlannedConfig, steps: int | None) -> str:
    """Ratios, memory and hours."""
    q_and_t = grpo.tokens["trained"]
    lines = [
        f"GCPO to GRPO: {gcpo.total('flops') / grpo.total('flops'):.2f}x operations"
        + (f", {gcpo.total('seconds') / grpo.total('seconds'):.2f}x seconds" if grpo.total("seconds") else ""),
        f"tokens scored: GRPO {grpo.scored:,.0f}, GCPO {gcpo.scored:,.0f} "
        f"({gcpo.scored / q_and_t:.2f}x one pass over prompts and completions)",
        f"tokens trained: GRPO {_trained(grpo)}, GCPO {_trained(gcpo)}",
    ]
    if gcpo.rewarded != grpo.rewarded or any(cost.phase == "rewards" for cost in grpo.costs):
        lines.append(f"completions rewarded: GRPO {grpo.rewarded:,.0f}, GCPO {gcpo.rewarded:,.0f}")
    for label, plan in (("GRPO", grpo), ("GCPO", gcpo)):
        parts = {**plan.memory.held, **{f"{phase} phase": own for phase, own in plan.memory.phases.items()}}
        sizes = ", ".join(f"{part} {own / 2**30:.2f}" for part, own in parts.items())
        lines.append(f"memory of a device, {label}, roughly: {plan.memory.peak / 2**30:.1f} GiB ({sizes})")
    if grpo.total("seconds"):
        for count in sorted({1, steps or 1}):
            hours = [plan.total("seconds") * config.num_processes * count / 3600 for plan in (grpo, gcpo)]
            text = f"{count:,} step{'s' * (count > 1)}"
            lines.append(f"device-hours for {text}: GRPO {hours[0]:,.3g}, GCPO {hours[1]:,.3g}")
    return "\n".join(lines)
