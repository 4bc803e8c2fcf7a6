"""
What passes through the model in a cycle of GRPO and of GCPO, counted before anything runs. The causal part is the real
causal step on a `CountingPolicy`; what TRL does around it follows TRL's conventions. Tokens are counted as a run logs
them, by `gcpo/tokens/KIND`.

Candidates are taken to end by themselves, colliders too. Contexts share what they must (the query, the text around it,
the same candidates in the same order), and packed rows of the policy the query; tokens that happen to agree come on top
in a run.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from gcpo.causal.contexts import NoFusionTurn, PromptBuilder
from gcpo.causal.port import Ids, Prompt, Rollout, RolloutStates
from gcpo.causal.step import CausalStep
from gcpo.config import GCPOConfig
from gcpo.forward.counting import Abilities, CountingPolicy, Decoding, Pass, Span, piece_of
from gcpo.forward.own_forward import MASKED_ATTENTION
from gcpo.forward.unpadded import LayerCost
from gcpo.own_loss import against_fused_loss, against_padding_free, holds
from gcpo.planning.architecture import Architecture
from gcpo.planning.rows import batch_width, micro_batches, packed, padded

_END = ("end",)  # what every completion ends in


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens."""

    prompt: int  # q, chat template included
    completion: int  # a candidate, end token included
    collider: int
    fusion_template: int = 0  # what a fusion prompt adds to q, beside the candidates and what frames them
    context_template: tuple[int, int, int] = (0, 0, 0)  # of a context: before, between and after its parts
    candidate_frame: int = 0  # what stands around one candidate, separator included
    sample: int | None = None  # an output sampled under a context (estimator="sampled"). None: as a candidate
    fusion_turn: int | None = 0  # what asks for a collider after the candidates' keys and values. None: nothing can

    @classmethod
    def measured(
        cls, builder: PromptBuilder, prompt: Any, prompt_ids: Ids, num_generations: int, **lengths: int
    ) -> "Lengths":
        """The lengths of one prompt and of the templates around it, beside those of `completion` and `collider`."""
        n, q = num_generations, len(prompt_ids)
        plain = (k for k in range(len(builder.tokenizer)) if k not in builder.special_ids)
        one, other = next(plain), next(plain)
        # With a token in each: texts that nothing stands between are tokenized together.
        fusion = len(builder.fusion(prompt, [[one]] * n)) - n
        try:
            turn = len(builder.fusion_turn(prompt)) if builder.options.prefers_parallel_colliders else 0
        except NoFusionTurn:
            turn = None
        frame = (fusion - len(builder.fusion(prompt, [[one]])) + 1) // max(n - 1, 1)

        def context(candidate: int, collider: int) -> Ids:
            return builder.context(prompt, [[candidate]] * (n - 1), [collider])

        whole = context(one, one)
        candidates_at = _first_difference(whole, context(other, one))
        collider_at = _first_difference(whole, context(one, other))
        before = candidates_at - q - frame
        between = collider_at - q - before - (n - 1) * (frame + 1)
        template = (before, between, len(whole) - collider_at - 1)
        return cls(
            q,
            fusion_template=fusion - q - n * frame,
            fusion_turn=turn,
            context_template=template,
            candidate_frame=frame,
            **lengths,
        )


class Script(Protocol):
    """The token ids of a run: given by lengths, or those of one that was made."""

    builder: Any  # of fusion prompts and contexts
    ending_ids: list[Any]  # of completions that are not cut off, the end token first

    def rollout(self, number: int) -> tuple[list[Prompt], list[Ids], list[Ids]]:
        """Prompts, their ids, and the candidates, of all processes."""

    def order(self, number: int) -> list[int] | None:
        """The rows of this rollout as TRL shuffles them, or None: any order will do."""

    def output(self, rollout: int, phase: str, number: int) -> Ids:
        """A collider (phase "colliders") or an output sampled under a context ("contexts"), in the order drawn."""


class PlannedScript:
    """
    A `Script` of given lengths, in which no two texts have a token in common; it is its own prompt builder.

    Args:
        config: of the run.
        lengths: of a prompt and what is made of it.
        completions: tokens of each row's candidate, end token included. None: all have `lengths.completion`.
        queries: tokens of each prompt, chat template included. None: all have `lengths.prompt`.
    """

    ending_ids = [(_END, 0)]

    def __init__(
        self,
        config: GCPOConfig,
        lengths: Lengths,
        completions: Sequence[int] | None = None,
        queries: Sequence[int] | None = None,
    ):
        self.config, self.lengths, self.builder = config, lengths, self
        self._tail = lru_cache(maxsize=None)(self._tail_of)  # every context of a group shows the same candidates
        self.n, self.rows = int(config.num_generations or 1), int(config.generation_batch_size or 1)
        self.completions = [lengths.completion] * self.rows if completions is None else list(completions)
        self.queries = [lengths.prompt] * -(-self.rows // self.n) if queries is None else list(queries)

    def order(self, number: int) -> None:
        return None

    def rollout(self, number: int) -> tuple[list[Any], list[Any], list[Any]]:
        prompts = [Span.of(("query", row // self.n), self.queries[row // self.n]) for row in range(self.rows)]
        return prompts, prompts, [_ended(("candidate", row), self.completions[row]) for row in range(self.rows)]

    def output(self, rollout: int, phase: str, number: int) -> Any:
        own = self.lengths.completion if self.lengths.sample is None else self.lengths.sample
        return _ended((phase, number), self.lengths.collider if phase == "colliders" else own)

    def content(self, ids: Any) -> Any:
        return ids[:-1] if ids and ids[-1] in self.ending_ids else ids

    def fusion(self, prompt: Any, candidates: list[Any]) -> Any:
        return Span((*prompt.runs, *Span.of(("fusion",), self.lengths.fusion_template).runs, *self._show(candidates)))

    def fusion_turn(self, prompt: Any) -> Any:
        if self.lengths.fusion_turn is None:
            raise NoFusionTurn("`collider_attention='parallel'` needs a turn that asks for an answer after candidates.")
        return Span.of(("fusion turn",), self.lengths.fusion_turn)

    def context(self, prompt: Any, candidates: list[Any], collider: Any) -> Any:
        before, between, after = (
            Span.of((f"context {part}",), size).runs for part, size in enumerate(self.lengths.context_template)
        )
        shown = self._show(candidates)
        return Span((*prompt.runs, *before, *shown, *between, *self.content(collider).runs, *after))

    def _show(self, candidates: list[Any]) -> Iterator[Any]:
        frame = self.lengths.candidate_frame
        for number, candidate in enumerate(candidates):
            if frame:
                yield ("frame", number), 0, frame
            yield from self._tail(candidate)

    def _tail_of(self, candidate: Any) -> Any:
        content, limit = self.content(candidate), self.config.candidate_context_tokens
        return (content if limit is None else content[max(len(content) - limit, 0) :]).runs


@dataclass(frozen=True)
class Batch:
    """The largest micro-batch of a forward with gradient."""

    positions: int = 0  # padding included
    predicted: int = 0  # of those, at how many the output layer is applied, unless it is TRL's on a CPU
    mask: int = 0  # entries of the mask of packed or padded rows
    head: str = "trl"  # as `Pass.head`

    @classmethod
    def of(cls, passes: Counter[Pass]) -> "Batch":
        positions, predicted, mask, head = 0, 0, 0, "trl"
        for item, count in passes.items():
            positions += (item.new + item.padding) * count
            predicted += item.predicted * count
            head = item.head
            if item.dense:
                mask += (item.new + item.padding) ** 2 * count
        return cls(positions, predicted, mask, head)


@dataclass
class Counts:
    """Of a cycle: the optimizer steps after which rollouts and steps begin together again."""

    steps: int
    rollouts: int
    passes: Counter[Pass] = field(default_factory=Counter)  # rows of each kind, of all processes
    tokens: Counter[str] = field(default_factory=Counter)  # by kind, as a run logs them
    decoding: dict[tuple[str, str], Decoding] = field(default_factory=dict)  # by phase and kind of pass
    batches: dict[str, Batch] = field(default_factory=dict)  # by kind of pass with gradient
    rewarded: Counter[str] = field(default_factory=Counter)  # completions that rewards are computed of, by phase

    def __add__(self, other: "Counts") -> "Counts":
        """Of both cycles, one after the other."""
        decoding, batches = dict(self.decoding), dict(self.batches)
        for key, item in other.decoding.items():
            decoding[key] = decoding.get(key, Decoding()) + item
        for what, batch in other.batches.items():
            batches[what] = max(batches.get(what, Batch()), batch, key=lambda one: one.positions)
        return Counts(
            self.steps + other.steps,
            self.rollouts + other.rollouts,
            self.passes + other.passes,
            self.tokens + other.tokens,
            decoding,
            batches,
            self.rewarded + other.rewarded,
        )


def abilities_of(config: GCPOConfig, architecture: Architecture, attention: str | None = None) -> Abilities:
    """What a model of this architecture and attention, and the engine of these options, can do."""
    whole = all(window is None for window in architecture.windows)  # otherwise nothing is shared
    in_house = not (config.use_vllm or config.use_transformers_continuous_batching)
    packs = whole and attention in (None, *MASKED_ATTENTION)
    found = Abilities(can_continue=whole, can_pack=packs, in_house=in_house, caches_prefixes=not in_house)
    if architecture.model is None:
        return found
    model = architecture.model
    text = model.config.get_text_config()
    before = text._attn_implementation
    text._attn_implementation = attention or before
    # What the trainer asks of itself, as far as it is known before there is one.
    trainer = SimpleNamespace(
        args=config,
        model=model,
        ref_model=None,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        aux_loss_enabled=hasattr(text, "output_router_logits") and config.router_aux_loss_coef != 0.0,
        _is_vlm=False,
    )
    try:
        return replace(
            found,
            against_fused_loss=against_fused_loss(trainer),
            against_padding_free=against_padding_free(trainer),
            layer_cost=LayerCost.of(text, attention or before),
            masks_squares=(attention or before) in ("sdpa", "eager"),  # the others leave out what is masked
        )
    finally:
        text._attn_implementation = before


def count_cycle(config: GCPOConfig, script: Script, abilities: Abilities, is_grpo: bool = False) -> Counts:
    """
    Count a cycle of GCPO, or with `is_grpo` of GRPO with the same options.

    Args:
        config: of a run in which one process takes the turns of all.
        script: the token ids.
        abilities: of the model and its engine.
    """
    every = int(config.steps_per_generation or 1) * config.num_iterations  # micro-batches that a rollout serves
    accumulation = config.gradient_accumulation_steps
    cycle = math.lcm(every, accumulation)
    counts = Counts(steps=cycle // accumulation, rollouts=cycle // every)
    for number in range(counts.rollouts):
        step, substep = divmod(number * every, accumulation)
        seed = config.seed + 1_000_003 * (step + 1) + 1_009 * substep  # as TrlPolicy has it
        one = _Rollout(config, script, abilities, is_grpo, number, seed)
        rewarded = Counter(rewards=len(one.completions), collider_rewards=one.policy.rewarded)
        counts += Counts(0, 0, one.policy.passes, one.policy.tokens, one.policy.decoding, one.batches, rewarded)
    return counts


class _Rollout:
    """One rollout: its making, its scores, the causal step, and the forwards with gradient that it serves."""

    def __init__(self, config: GCPOConfig, script: Script, abilities: Abilities, is_grpo: bool, number: int, seed: int):
        self.config, self.abilities, self.is_causal = config, abilities, config.is_causal and not is_grpo
        prompts, self.prompt_ids, self.completions = script.rollout(number)

        def output(phase: str, k: int) -> Ids:
            return self.completions[k] if phase == "rollout" else script.output(number, phase, k)

        reasons = {"fused_loss": abilities.against_fused_loss, "padding_free": abilities.against_padding_free}
        self.fuses, self.packs = (not is_grpo and holds(config, *found) for found in reasons.items())
        self.policy = CountingPolicy(
            config,
            int(config.num_generations or 1),
            output,
            script.ending_ids,
            step_seed=seed,
            masks_truncated=config.mask_truncated_completions,
            abilities=abilities,
            head="compact" if self.fuses or self.packs else "trl",
        )
        # Tokens of each completion that TRL's own passes see: it masks truncated ones before them.
        hides = config.mask_truncated_completions
        self.seen = [y[:0] if hides and y[-1] not in self.policy.ending_ids else y for y in self.completions]
        self.batches: dict[str, Batch] = {}
        keeps = self.is_causal and self.policy.keeps_states
        once = self.policy.reads_once if self.is_causal else abilities.caches_prefixes
        self.policy.count_generation("rollout", "", self.prompt_ids, once=once, keeps=keeps)
        self.policy.count("generated", sum(map(len, self.completions)))
        # TRL scores a rollout under the policy where steps are taken before it is used up, or an engine made it.
        every = int(config.steps_per_generation or 1) * config.num_iterations
        scores_old = config.gradient_accumulation_steps % every != 0 or (
            config.use_vllm and config.vllm_importance_sampling_correction
        )
        size = config.per_device_train_batch_size
        chunks = [range(start, start + size) for start in range(0, len(self.prompt_ids), size)]
        for needed, what in ((scores_old, "under q, for the ratio"), (config.beta != 0, "reference model")):
            for chunk in chunks if needed else ():
                self._read(Pass("scoring", what, "score", 0), self.prompt_ids, chunk)
        contexts = None
        if self.is_causal:
            rollout = Rollout(prompts, self.prompt_ids, self.completions, inputs=[{} for _ in prompts])
            zeros = torch.zeros(len(prompts), 1)
            if keeps:
                rollout.states = RolloutStates(zeros)
                if self.policy.can_continue:
                    rollout.states.queries = [piece_of(len(ids) - 1) for ids in self.prompt_ids]
                    rollout.states.completions = [piece_of(len(ids)) for ids in self.completions]
            given = zeros if scores_old and not config.mask_truncated_completions else None
            contexts = CausalStep(self.policy, config, script.builder).terms(rollout, 1, given, given).first_contexts
        order = script.order(number)
        if order is None:
            order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
        for rows in micro_batches(config, self.prompt_ids, self.seen, order, self.packs):
            head = "fused" if self.fuses else "trl"
            self._read(Pass("loss", "policy under q", "train", 0, head=head), self.prompt_ids, rows)
            if contexts is not None:
                self._read(Pass("loss", "policy under x_i", "train", 0), contexts, rows)

    def _read(self, item: Pass, prompts: list[Ids], rows: Sequence[int]) -> None:
        """Count a forward over these rows of TRL's batch, as often as it is made."""
        if self.packs:
            item = item._replace(head="compact") if item.head == "trl" else item
            some = [prompts[k] for k in rows], [self.seen[k] for k in rows]
            passes = packed(item, *some, self.abilities)
        else:  # TRL pads a rollout, of which a micro-batch is a part
            width = batch_width(self.config, prompts, self.completions)
            passes = padded(item, prompts, self.seen, rows, width, self.abilities.masks_squares)
        tokens = sum(one.new * count for one, count in passes.items())
        if item.mode == "score":
            self.policy.count("scored_query", tokens)
            self.policy.passes += passes
            return
        batch = Batch.of(passes)
        self.batches[item.what] = max(self.batches.get(item.what, Batch()), batch, key=lambda one: one.positions)
        for _ in range(self.config.num_iterations):
            self.policy.passes += passes
            self.policy.count("trained", tokens)
            self.policy.count("trained_padding", batch.positions - tokens)


def _ended(what: Any, count: int) -> Span:
    """So many tokens, of which the last is the end token."""
    return Span.of(what, count - 1) + Span.of(_END, 1)


def _first_difference(left: Ids, right: Ids) -> int:
    return next(k for k, (a, b) in enumerate(zip(left, right, strict=True)) if a != b)
