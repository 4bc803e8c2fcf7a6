"""
What passes through the model in a cycle of GRPO and of GCPO, counted before anything runs. The causal part is the real
causal step on a `CountingPolicy`; what TRL does around it follows TRL's conventions. Tokens are counted as a run logs
them, by `gcpo/tokens/KIND`.

All candidates are taken to have one length and to end by themselves, colliders too. Contexts share what they must (the
query, the text around it, the same candidates in the same order); tokens that happen to agree come on top in a run.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch

from gcpo.causal.contexts import PromptBuilder
from gcpo.causal.port import Ids, Prompt, Rollout, RolloutStates
from gcpo.causal.step import CausalStep
from gcpo.config import GCPOConfig
from gcpo.forward.counting import Abilities, CountingPolicy, Pass, Span, hashable, piece_of
from gcpo.planning.architecture import Architecture

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
            q, fusion_template=fusion - q - n * frame, context_template=template, candidate_frame=frame, **lengths
        )


class Script(Protocol):
    """The token ids of a run: given by lengths, or those of one that was made."""

    builder: Any  # of fusion prompts and contexts
    ending_ids: list[Any]  # of completions that are not cut off, the end token first

    def rollout(self, number: int) -> tuple[list[Prompt], list[Ids], list[Ids]]:
        """Prompts, their ids, and the candidates, of all processes."""

    def output(self, rollout: int, phase: str, number: int) -> Ids:
        """A collider (phase "colliders") or an output sampled under a context ("contexts"), in the order drawn."""


class PlannedScript:
    """A `Script` of given lengths, in which no two texts have a token in common; it is its own prompt builder."""

    ending_ids = [(_END, 0)]

    def __init__(self, config: GCPOConfig, lengths: Lengths):
        self.config, self.lengths, self.builder = config, lengths, self
        self._tail = lru_cache(maxsize=None)(self._tail_of)  # every context of a group shows the same candidates
        self.n, self.rows = int(config.num_generations or 1), int(config.generation_batch_size or 1)

    def rollout(self, number: int) -> tuple[list[Any], list[Any], list[Any]]:
        prompts = [Span.of(("query", row // self.n), self.lengths.prompt) for row in range(self.rows)]
        return prompts, prompts, [_ended(("candidate", row), self.lengths.completion) for row in range(self.rows)]

    def output(self, rollout: int, phase: str, number: int) -> Any:
        own = self.lengths.completion if self.lengths.sample is None else self.lengths.sample
        return _ended((phase, number), self.lengths.collider if phase == "colliders" else own)

    def content(self, ids: Any) -> Any:
        return ids[:-1] if ids and ids[-1] in self.ending_ids else ids

    def fusion(self, prompt: Any, candidates: list[Any]) -> Any:
        return Span((*prompt.runs, *Span.of(("fusion",), self.lengths.fusion_template).runs, *self._show(candidates)))

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


@dataclass
class Counts:
    """Of a cycle: the optimizer steps after which rollouts and steps begin together again."""

    steps: int
    rollouts: int
    passes: Counter[Pass] = field(default_factory=Counter)  # rows of each kind, of all processes
    tokens: Counter[str] = field(default_factory=Counter)  # by kind, as a run logs them


def abilities_of(config: GCPOConfig, architecture: Architecture, attention: str | None = None) -> Abilities:
    """What a model of this architecture and attention, and the engine of these options, can do."""
    whole = all(window is None for window in architecture.windows)  # otherwise nothing is shared
    in_house = not (config.use_vllm or config.use_transformers_continuous_batching)
    packs = whole and attention in (None, "sdpa", "eager", "flex_attention")
    return Abilities(can_continue=whole, can_pack=packs, in_house=in_house, caches_prefixes=not in_house)


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
        counts.passes += one.policy.passes
        counts.tokens += one.policy.tokens
    return counts


class _Rollout:
    """One rollout: its making, its scores, the causal step, and the forwards with gradient that it serves."""

    def __init__(self, config: GCPOConfig, script: Script, abilities: Abilities, is_grpo: bool, number: int, seed: int):
        self.config, self.is_causal = config, config.is_causal and not is_grpo
        prompts, self.prompt_ids, self.completions = script.rollout(number)

        def output(phase: str, k: int) -> Ids:
            return self.completions[k] if phase == "rollout" else script.output(number, phase, k)

        self.policy = CountingPolicy(
            config,
            int(config.num_generations or 1),
            output,
            script.ending_ids,
            step_seed=seed,
            masks_truncated=config.mask_truncated_completions,
            abilities=abilities,
        )
        self.shuffle = torch.Generator().manual_seed(seed)
        # Tokens of each completion that TRL's own passes see: it masks truncated ones before them.
        hides = config.mask_truncated_completions
        self.seen = [0 if hides and ids[-1] not in self.policy.ending_ids else len(ids) for ids in self.completions]
        keeps = self.is_causal and self.policy.keeps_states
        once = self.policy.reads_once if self.is_causal else abilities.caches_prefixes
        self.policy.count_generation("rollout", "", self.prompt_ids, once=once, keeps=keeps)
        self.policy.count("generated", sum(map(len, self.completions)))
        # TRL scores a rollout under the policy where steps are taken before it is used up, or an engine made it.
        every = int(config.steps_per_generation or 1) * config.num_iterations
        scores_old = config.gradient_accumulation_steps % every != 0 or (
            config.use_vllm and config.vllm_importance_sampling_correction
        )
        for needed, what in ((scores_old, "under q, for the ratio"), (config.beta != 0, "reference model")):
            for x, t in zip(self.prompt_ids, self.seen, strict=True) if needed else ():
                self.policy.count("scored_query", len(x) + t)
                self.policy.passes[Pass("scoring", what, "score", len(x) + t, t)] += 1
        contexts = None
        if self.is_causal:
            rollout = Rollout(prompts, self.prompt_ids, self.completions)
            zeros = torch.zeros(len(prompts), 1)
            if keeps:
                rollout.states = RolloutStates(zeros)
                if self.policy.can_continue:
                    rollout.states.queries = [piece_of(len(ids) - 1) for ids in self.prompt_ids]
                    rollout.states.completions = [piece_of(len(ids)) for ids in self.completions]
            given = zeros if scores_old and not config.mask_truncated_completions else None
            contexts = CausalStep(self.policy, config, script.builder).terms(rollout, 1, given, given).first_contexts
        self._train("policy under q", self.prompt_ids)
        if contexts is not None:
            self._train("policy under x_i", contexts)

    def _train(self, what: str, prompts: list[Ids]) -> None:
        """Every row once per iteration, in micro-batches that are drawn from the rollout's rows."""
        order = torch.randperm(len(prompts), generator=self.shuffle).tolist()
        size = self.config.per_device_train_batch_size
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            distinct = {hashable(prompts[k]): prompts[k] for k in rows}
            shares = self.config.share_prompt and len(distinct) < len(rows) and max(map(len, distinct.values())) > 1
            if shares:
                for x in distinct.values():
                    self._count_trained(Pass("loss", f"{what}, queries", "train", len(x) - 1))
            for k in rows:
                q, t = len(prompts[k]), self.seen[k]
                read = (1 + t, t, q - 1) if shares else (q + t, t)
                self._count_trained(Pass("loss", f"{what}, completions" if shares else what, "train", *read))

    def _count_trained(self, item: Pass) -> None:
        self.policy.passes[item] += self.config.num_iterations
        self.policy.count("trained", item.new * self.config.num_iterations)


def _ended(what: Any, count: int) -> Span:
    """So many tokens, of which the last is the end token."""
    return Span.of(what, count - 1) + Span.of(_END, 1)


def _first_difference(left: Ids, right: Ids) -> int:
    return next(k for k, (a, b) in enumerate(zip(left, right, strict=True)) if a != b)
