"""
What a step of GCPO will cost beside one of GRPO, before anything runs. Tokens come from `gcpo.planning.counts`,
floating-point operations and memory from the model's config, seconds from a device's rates.

Padding counts in operations and seconds, and not as tokens: that of TRL's micro-batches and of packed rows, and rows
that have ended while others are still generated. Left out: padding of the causal step's own forwards and of prompts
that are generated from, the optimizer's own step, communication between devices, and launch overheads. Rewards cost
what they are said to cost.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gcpo.config import GCPOConfig
from gcpo.forward.counting import Pass
from gcpo.planning.architecture import Architecture
from gcpo.planning.counts import Counts

# A step's phases in order; as in `gcpo/seconds/PHASE`, but for the rewards of colliders, which a run counts as rewards.
_ORDER = ("rollout", "rewards", "colliders", "collider_rewards", "scoring", "contexts", "loss")
# What rewards that are computed while colliders are decoded do not add to a step.
HIDDEN = "hidden behind colliders"
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Multiples of a forward: the backward costs two, gradient checkpointing repeats the forward. The output layer computes
# its logits again in the backward whether or not the rest is checkpointed, unless the loss is made from hidden states.
_TRAINED, _CHECKPOINTED = 3.0, 4.0


@dataclass(frozen=True)
class Device:
    """
    What one device does in a second.

    Args:
        tflops: peak 10^12 floating-point operations, dense, in the type of the computation.
        bandwidth: peak 10^9 bytes read from its memory.
        mfu: share of `tflops` that forwards and backwards reach.
        mbu: share of `bandwidth` that decoding reaches.
    """

    tflops: float
    bandwidth: float
    mfu: float = 0.4
    mbu: float = 0.6


# The makers' peak figures for 16-bit types without sparsity: 10^12 operations and 10^9 bytes per second.
DEVICES = {
    "a100": Device(312, 2039),
    "h100": Device(989, 3352),
    "h200": Device(989, 4800),
    "b200": Device(2250, 8000),
    "l40s": Device(362, 864),
    "mi300x": Device(1307, 5300),
}


@dataclass(frozen=True)
class Cost:
    """Of the passes of one kind, per optimizer step: the mean over a cycle."""

    phase: str  # one of `_ORDER`
    what: str
    tokens: float  # of all devices
    flops: float  # of all devices
    seconds: float | None  # of the devices together; None where nothing is known of them; below 0 what is hidden


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, with a whole copy of the model on each: roughly, to see what dominates."""

    held: dict[str, float]  # throughout the step
    phases: dict[str, float]  # by each phase on top of that

    @property
    def peak(self) -> float:
        return sum(self.held.values()) + max(self.phases.values())


@dataclass(frozen=True)
class StepPlan:
    """What a step of one method costs."""

    costs: list[Cost]
    memory: Memory
    tokens: dict[str, float]  # as a run logs them, by kind: the mean over a cycle of `steps`
    steps: int
    rewarded: float  # completions per step that the reward functions run on, colliders included

    def total(self, name: str, phase: str | None = None) -> float:
        """Sum of `tokens`, `flops` or `seconds` over a phase, or the step."""
        return sum(getattr(cost, name) or 0.0 for cost in self.costs if phase in (None, cost.phase))

    @property
    def scored(self) -> float:
        """Tokens that pass through the model without gradient, those generated and their prompts left out."""
        return sum(count for kind, count in self.tokens.items() if kind.startswith("scored_"))


def plan_step(
    config: GCPOConfig,
    architecture: Architecture,
    counts: Counts,
    device: Device | None = None,
    dtype: str = "float32",
    num_processes: int = 1,
    compact_head: bool = True,
    reward_seconds: float = 0.0,
) -> StepPlan:
    """
    Plan the steps of a cycle.

    Args:
        config: of a run in which one process takes the turns of all `num_processes`, so that its batch is everyone's.
        architecture: the model's.
        counts: of `count_cycle`.
        device: rates of one device. None: no seconds.
        dtype: type of the weights, one of `BYTES`.
        num_processes: devices that share the rows evenly, each with a copy of the model.
        compact_head: whether the output layer skips what is not scored, as TRL's does except on a CPU.
        reward_seconds: what the reward functions take for one completion. Every device's process rewards its own.
    """
    passes = counts.passes if compact_head else _with_whole_head(counts.passes)
    costs: dict[tuple[str, str], Cost] = {}
    for item, rows in passes.items():
        flops = rows / counts.steps * pass_flops(item, architecture, config.gradient_checkpointing)
        before = costs.get((item.phase, item.what), Cost(item.phase, item.what, 0.0, 0.0, None))
        passed = before.tokens + rows * item.new / counts.steps
        costs[item.phase, item.what] = replace(before, tokens=passed, flops=before.flops + flops)
    if device is not None:
        for kind, cost in costs.items():
            seconds = cost.flops / num_processes / (device.tflops * 1e12 * device.mfu)
            if kind in counts.decoding:
                moved = decode_bytes(kind, counts, architecture, config, dtype, num_processes)
                seconds = max(seconds, moved / (device.bandwidth * 1e9 * device.mbu))
            costs[kind] = replace(cost, seconds=seconds)
        rewards = list(_rewards(config, counts, costs, reward_seconds / num_processes))
        costs |= {(cost.phase, cost.what): cost for cost in rewards}
    memory = estimate_memory(config, architecture, counts, dtype, num_processes, compact_head)
    tokens = {kind: number / counts.steps for kind, number in counts.tokens.items()}
    in_order = sorted(costs.values(), key=lambda cost: _ORDER.index(cost.phase))
    return StepPlan(in_order, memory, tokens, counts.steps, counts.rewarded.total() / counts.steps)


def _rewards(config: GCPOConfig, counts: Counts, costs: dict[tuple[str, str], Cost], each: float) -> Iterator[Cost]:
    """
    What rewards cost that take `each` so many seconds. With `overlap_rewards` those of candidates are computed while
    colliders are decoded, so that of the two only the longer one is waited for.
    """
    seconds = {phase: each * number / counts.steps for phase, number in counts.rewarded.items() if each * number}
    for phase, own in seconds.items():
        yield Cost(phase, "colliders" if phase == "collider_rewards" else "candidates", 0.0, 0.0, own)
    beside = sum(cost.seconds or 0.0 for cost in costs.values() if cost.phase == "colliders")
    hidden = min(seconds.get("rewards", 0.0), beside) if config.overlap_rewards else 0.0
    if hidden:
        yield Cost("rewards", HIDDEN, 0.0, 0.0, -hidden)


def _with_whole_head(passes: Counter[Pass]) -> Counter[Pass]:
    whole: Counter[Pass] = Counter()
    for item, rows in passes.items():
        is_whole = item.mode in ("score", "train") and item.head == "trl"
        whole[item._replace(predicted=item.new + item.padding) if is_whole else item] += rows
    return whole


def pass_flops(item: Pass, architecture: Architecture, checkpointing: bool) -> float:
    """Floating-point operations of a row."""
    read = item.new + item.padding
    body = read * architecture.matrix_flops() + architecture.attention_flops(read, item.before, item.dense)
    head = item.predicted * architecture.head_flops()
    if item.mode == "train":
        body *= _CHECKPOINTED if checkpointing else _TRAINED
        head *= _TRAINED if item.head == "fused" else _CHECKPOINTED
    return body + head


def decode_bytes(
    kind: tuple[str, str],
    counts: Counts,
    architecture: Architecture,
    config: GCPOConfig,
    dtype: str,
    num_processes: int = 1,
) -> float:
    """
    Bytes that one device reads in a step while it decodes, for the passes of a kind (phase, what): for each token all
    weights once, and every row's keys and values.
    """
    decoding = counts.decoding[kind]
    weights = BYTES[dtype] * (architecture.layer_weights + architecture.hidden * architecture.vocab)
    pairs = decoding.keys / num_processes * architecture.key_value_bytes(compute_bytes(config, dtype))
    return (decoding.steps * weights + pairs) / counts.steps


def estimate_memory(
    config: GCPOConfig,
    architecture: Architecture,
    counts: Counts,
    dtype: str,
    num_processes: int,
    compact_head: bool = True,
) -> Memory:
    """
    Weights, gradients and optimizer state by type; per phase what dominates: keys and values that it makes, or that are
    kept from phases before, a packed row's mask, and what a backward needs.
    """
    size, compute, weights = BYTES[dtype], compute_bytes(config, dtype), architecture.parameters
    held = {"weights": size * weights, "optimizer": _optimizer_bytes(config, size) * weights}
    if config.beta != 0:
        held["reference"] = size * weights
    pair = architecture.key_value_bytes(compute)
    working = compute * (6 * architecture.hidden + 4 * architecture.intermediate)  # of one layer's forward, per token
    scored_at_once = config.context_batch_size or config.per_device_train_batch_size
    phases: dict[str, float] = {}
    kept: dict[str, float] = defaultdict(float)
    generated: dict[tuple[str, str], float] = defaultdict(float)  # by call, of all its rows
    for item, rows in counts.passes.items():
        per_device, kind = rows / counts.rollouts / num_processes, (item.phase, item.what)
        if item.mode == "train":
            continue
        read = item.new + item.padding
        if item.mode == "score":
            at_once = 1 if item.dense else min(scored_at_once, per_device)
            own = at_once * (read * working + (read**2 if item.dense else item.before * pair))
        elif item.mode == "decode":
            generated[kind] += per_device * (item.before + read) * pair
            own = generated[kind]
        else:
            generated[kind] += per_device * item.new * max(pair, working)
            own = generated[kind]
        phases[item.phase] = max(phases.get(item.phase, 0.0), own)
        if item.keeps:
            kept[item.phase] += per_device * (item.new + (item.before if item.mode == "decode" else 0.0)) * pair
    until_now = 0.0
    for phase in ("rollout", "colliders", "scoring", "contexts"):
        if phase in phases:  # while it generates, a rollout holds what is kept of it anyway
            phases[phase] += until_now + (kept[phase] if phase != "rollout" else 0.0)
        until_now += kept[phase]
    # The output layer's gradient is added up in float32.
    loss = size * weights + 4.0 * architecture.hidden * architecture.vocab
    for batch in counts.batches.values():
        whole_head = batch.head == "trl" and not compact_head
        predicted = batch.positions if whole_head else batch.predicted
        loss += batch.positions * architecture.activation_bytes(compute, config.gradient_checkpointing)
        loss += predicted * architecture.hidden * (compute + 4) + batch.mask
    if compute < size:  # autocast keeps the weights it has cast until the forward ends
        loss += compute * weights
    return Memory(held, phases | {"loss": loss})


def compute_bytes(config: GCPOConfig, dtype: str) -> int:
    """Of one number of the type that forwards compute in."""
    return 2 if config.bf16 or config.fp16 else BYTES[dtype]


def _optimizer_bytes(config: GCPOConfig, size: int) -> float:
    """Of its state, per weight. Adam's two moments have the weight's type, unless it is one of the 8-bit kinds."""
    name = str(getattr(config.optim, "value", config.optim)).lower()
    if "8bit" in name:
        return 2.0
    if name.startswith(("sgd", "adafactor")):
        return 0.0
    return float(size if "lion" in name or "rmsprop" in name else 2 * size)
