"""
What passes through the model in an optimizer step, of GRPO and of GCPO, counted before anything runs: arithmetic on
options and lengths. Its counts are those that a run logs as `gcpo/tokens/KIND`.

All completions are taken to have their mean length, colliders too. Two contexts share what they must (the query, the
text around it, the same candidates in the same order); tokens that happen to agree come on top of that in a run.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from gcpo.causal.contexts import PromptBuilder
from gcpo.causal.sampling import ContextDraw, draw_contexts
from gcpo.config import GCPOConfig
from gcpo.planning.sharing import Run, packed_rows, tree_nodes


@dataclass(frozen=True)
class Lengths:
    """Mean numbers of tokens."""

    prompt: float  # q, chat template included
    completion: float  # a candidate, end token included
    collider: float
    fusion_template: float = 0.0  # what a fusion prompt adds to q, beside the candidates and what frames them
    context_template: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of a context: before, between and after its parts
    candidate_frame: float = 0.0  # what stands around one candidate, separator included
    sample: float | None = None  # an output sampled under a context (estimator="sampled"). None: as a candidate

    @classmethod
    def measured(cls, builder: PromptBuilder, prompt: Any, prompt_ids: list[int], **lengths: float) -> "Lengths":
        """The lengths of one prompt and of the templates around it, beside those of `completion` and `collider`."""
        one, other = _two_plain_tokens(builder)
        n, q = int(builder.config.num_generations or 1), len(prompt_ids)
        # With a token in each: texts that nothing stands between are tokenized together.
        fusion = len(builder.fusion(prompt, [[one]] * n)) - n
        frame = (fusion - len(builder.fusion(prompt, [[one]])) + 1) / max(n - 1, 1)

        def context(candidate: int, collider: int) -> list[int]:
            return builder.context(prompt, [[candidate]] * (n - 1), [collider])

        whole = context(one, one)
        candidates_at = _first_difference(whole, context(other, one))
        collider_at = _first_difference(whole, context(one, other))
        before = candidates_at - q - frame
        between = collider_at - q - before - (n - 1) * (frame + 1)
        return cls(
            prompt=q,
            fusion_template=fusion - q - n * frame,
            context_template=(before, between, len(whole) - collider_at - 1),
            candidate_frame=frame,
            **lengths,
        )


@dataclass(frozen=True)
class Savings:
    """What of the work is shared or left out: `of` says what a run with these options does."""

    parallel: bool  # contexts are parallel ones: copies of candidates behind keys and values that are read once
    contexts: str  # common beginnings of full contexts: "packed" rows, keys and values by "level", or "none" shared
    queries: bool  # candidates and colliders are read after one reading of q, instead of one each
    trained_prompts: bool  # the policy's forward and backward reads a prompt once per batch, instead of once per row
    prefills: bool  # prompts that stand several times in a generation call are read once
    rollout_states: bool  # representations, and q's and the candidates' keys and values, come from the generation
    compact_head: bool = True  # the output layer is applied where a token is scored, not everywhere in a row

    @classmethod
    def of(cls, config: GCPOConfig, longest: float, packs: bool = True, compact_head: bool = True) -> "Savings":
        """
        Args:
            config: the options of a run.
            longest: tokens of a context with its candidate: long ones are not packed.
            packs: whether the model's attention takes a mask over packed rows.
            compact_head: TRL's output layer skips what is not scored, except on a CPU.
        """
        in_house = not (config.use_vllm or config.use_transformers_continuous_batching)
        contexts = "packed" if packs and 2 * longest <= config.pack_tokens else "level"
        return cls(
            parallel=config.prefers_parallel,
            trained_prompts=config.share_prompt,
            contexts=contexts if config.share_prefix else "none",
            queries=config.share_prefix,
            prefills=not in_house or (config.share_prefix and config.is_causal),  # vLLM caches prefixes
            rollout_states=in_house and config.reuse_rollout and config.uses_rollout_states,
            compact_head=compact_head,
        )


@dataclass(frozen=True)
class Pass:
    """Rows that pass through the model alike. Per optimizer step, all processes together."""

    phase: str  # as in `gcpo/seconds/PHASE`
    what: str
    mode: str  # "prefill", "decode" (one token at a time), "score" (no gradient) or "train" (forward and backward)
    rows: float
    new: float  # tokens of each row that pass through the model
    predicted: float = 0.0  # of those, at how many the output layer is applied
    before: float = 0.0  # tokens that they attend to as keys and values
    kind: str | None = None  # what `gcpo/tokens/KIND` counts them as
    dense: bool = False  # attention is computed over the whole square, not its lower half
    keeps: bool = False  # keys and values stay until all contexts are scored

    @property
    def tokens(self) -> float:
        return self.rows * self.new


def tokens_by_kind(passes: Iterable[Pass]) -> dict[str, float]:
    """Tokens of a step as a run logs them."""
    totals: dict[str, float] = defaultdict(float)
    for item in passes:
        if item.kind is not None:
            totals[item.kind] += item.tokens
    return dict(totals)


def grpo_passes(config: GCPOConfig, lengths: Lengths, compact_head: bool = True) -> list[Pass]:
    """What passes through the model in a step of GRPO, with TRL's conventions of when it scores what."""
    nothing = Savings(False, "none", False, False, prefills=config.use_vllm, rollout_states=False)
    return _finish(_grpo_passes(config, lengths, _Counts(config), nothing), compact_head)


def gcpo_passes(config: GCPOConfig, lengths: Lengths, savings: Savings | None = None) -> list[Pass]:
    """What passes through the model in a step of GCPO, GRPO's part included."""
    count, sizes = _Counts(config), _Sizes.of(config, lengths)
    savings = savings or Savings.of(config, longest_context(config, lengths))
    passes = _grpo_passes(config, lengths, count, savings)
    if config.is_causal:
        passes += _collider_passes(config, sizes, savings, count)
        passes += _query_passes(config, sizes, savings, count)
        passes += _context_passes(config, sizes, savings, count)
    if config.kappa > 0 and config.causal_policy_context == "context":
        # The second forward and backward: under x_i where candidates are drawn, under q for the rest of the batch.
        share, t = count.scored / count.generated, sizes.completion
        for what, rows, before in (
            ("policy under x_i", share * count.trained, sizes.context),
            ("policy under q, again", (1 - share) * count.trained, sizes.prompt),
        ):
            passes.append(Pass("loss", what, "train", rows, before + t, t, kind="trained"))
    return _finish(passes, savings.compact_head)


def longest_context(config: GCPOConfig, lengths: Lengths) -> float:
    """Tokens of a context with its candidate."""
    sizes = _Sizes.of(config, lengths)
    return sizes.context + sizes.completion


def _grpo_passes(config: GCPOConfig, lengths: Lengths, count: "_Counts", savings: Savings) -> list[Pass]:
    q, t = lengths.prompt, lengths.completion
    prefills, keeps = count.groups if savings.prefills else count.generated, savings.rollout_states
    passes = [
        Pass("rollout", "prefill", "prefill", prefills, q, 1),
        Pass("rollout", "decode", "decode", count.generated, t, t, q, "generated", keeps=keeps),
    ]
    if count.scores_old:
        passes.append(_score("scoring", "under q, for the ratio", count.generated, q, t, "scored_query"))
    if config.beta != 0:
        passes.append(_score("scoring", "reference model", count.generated, q, t, "scored_query"))
    if not savings.trained_prompts:
        return [*passes, Pass("loss", "policy under q", "train", count.trained, q + t, t, kind="trained")]
    prompts, rows = count.trained * count.distinct_prompts, count.trained
    return [
        *passes,
        Pass("loss", "policy, queries", "train", prompts, q - 1, kind="trained"),
        Pass("loss", "policy, completions", "train", rows, 1 + t, t, q - 1, "trained"),
    ]


@dataclass(frozen=True)
class _Sizes:
    """Tokens of the prompts and completions of a step."""

    prompt: float
    completion: float
    collider: float
    sample: float
    shown: float  # of a candidate in a prompt
    frame: float
    template: tuple[float, float, float]
    fusion: float
    context: float

    @classmethod
    def of(cls, config: GCPOConfig, lengths: Lengths) -> "_Sizes":
        n, limit = int(config.num_generations or 1), config.candidate_context_tokens
        shown = lengths.completion if limit is None else min(lengths.completion, limit)
        framed = lengths.candidate_frame + shown
        return cls(
            prompt=lengths.prompt,
            completion=lengths.completion,
            collider=lengths.collider,
            sample=lengths.completion if lengths.sample is None else lengths.sample,
            shown=shown,
            frame=lengths.candidate_frame,
            template=lengths.context_template,
            fusion=lengths.prompt + lengths.fusion_template + n * framed,
            context=lengths.prompt + sum(lengths.context_template) + (n - 1) * framed + lengths.collider,
        )


class _Counts:
    """How many of everything there are in an optimizer step."""

    def __init__(self, config: GCPOConfig):
        self.n = int(config.num_generations or 1)
        self.batch = int(config.generation_batch_size or self.n)  # rows of one rollout
        every = int(config.steps_per_generation or 1) * config.num_iterations
        self.rollouts = config.gradient_accumulation_steps / every  # per optimizer step
        self.generated = self.batch * self.rollouts
        self.groups = self.generated / self.n
        self.colliders = self.groups * config.num_colliders
        self.trained = config.per_device_train_batch_size * config.gradient_accumulation_steps
        self.scores_old = config.gradient_accumulation_steps % every != 0 or (
            config.use_vllm and config.vllm_importance_sampling_correction
        )
        # Of a batch that is drawn from the rollout's rows: distinct prompts in it, per row.
        rows, others = config.per_device_train_batch_size, self.batch - self.n
        absent = math.comb(others, rows) / math.comb(self.batch, rows)
        self.distinct_prompts = self.batch / self.n * (1 - absent) / rows
        self.scored = max(1, round(config.drawn_fraction * self.batch)) * self.rollouts  # candidates, under contexts
        others = config.num_colliders - 1
        self.contexts_each = 1 + (others if config.drawn_contexts is None else min(config.drawn_contexts, others))

        # Which are drawn decides what is shared and read: the mean over some draws, of one where all are taken.
        chance = config.drawn_fraction < 1 or self.contexts_each < config.num_colliders
        self.draws = [
            draw_contexts(
                [config.num_colliders] * self.batch,
                config.drawn_contexts,
                config.drawn_fraction,
                torch.Generator().manual_seed(seed),
            )
            for seed in range(max(2, min(32, 4096 // self.batch)) if chance else 1)
        ]

    def read_by_copies(self, draw: ContextDraw) -> float:
        """Candidates that parallel contexts look back at: all of a group, but for one that is drawn alone."""
        drawn = [sum(map(bool, group)) for group in self._by_group(draw)]
        return self.rollouts * sum(self.n if count > 1 else self.n - 1 for count in drawn if count)

    def colliders_drawn(self, draw: ContextDraw) -> float:
        """Colliders that they look back at."""
        return self.rollouts * sum(len({l for row in group for l in row}) for group in self._by_group(draw))

    def _by_group(self, draw: ContextDraw) -> list[list[list[int]]]:
        return [draw.contexts[start : start + self.n] for start in range(0, self.batch, self.n)]


def _collider_passes(config: GCPOConfig, sizes: _Sizes, savings: Savings, count: _Counts) -> list[Pass]:
    c = sizes.collider
    prefills = count.groups if savings.prefills and not config.shuffle_candidates else count.colliders
    return [
        Pass("colliders", "prefill", "prefill", prefills, sizes.fusion, 1),
        Pass("colliders", "decode", "decode", count.colliders, c, c, sizes.fusion, "generated_colliders"),
    ]


def _query_passes(config: GCPOConfig, sizes: _Sizes, savings: Savings, count: _Counts) -> list[Pass]:
    """Candidates and colliders under q: representations, and keys and values for parallel contexts."""
    q, t, c = sizes.prompt, sizes.completion, sizes.collider
    parallel = savings.parallel
    passes: list[Pass] = []

    def queries(what: str) -> Pass:
        return Pass("scoring", what, "score", count.groups, q - 1, kind="scored_query")

    # TRL's own pass over the rollout, where there is one, also gives representations, unless it hides completions.
    represented = savings.rollout_states or (count.scores_old and not config.mask_truncated_completions)
    if config.uses_weights and not represented:
        if savings.queries:
            passes.append(queries("queries"))
            passes.append(_continue("scoring", "candidates", count.generated, q - 1, t, "scored_query"))
        else:
            passes.append(_score("scoring", "candidates", count.generated, q, t, "scored_query"))
    if parallel and not savings.rollout_states:
        read = sum(count.read_by_copies(draw) for draw in count.draws) / len(count.draws)
        passes.append(_continue("scoring", "candidates, kept", read, q - 1, t, "scored_query", True))
    closed_form = config.estimator == "loo" and savings.queries
    if closed_form or parallel:
        if not savings.rollout_states:
            passes.append(queries("queries, kept"))
        colliders = count.colliders
        if not closed_form:
            colliders = sum(count.colliders_drawn(draw) for draw in count.draws) / len(count.draws)
        passes.append(_continue("scoring", "colliders", colliders, q - 1, c, "scored_colliders", True))
    if config.estimator == "loo" and not savings.queries:
        passes.append(_score("scoring", "colliders", count.colliders, q, c, "scored_colliders"))
    return passes


def _context_passes(config: GCPOConfig, sizes: _Sizes, savings: Savings, count: _Counts) -> list[Pass]:
    """Candidates under contexts, and outputs sampled under them."""
    passes: list[Pass] = []
    t, copies = sizes.completion, count.scored * count.contexts_each
    if savings.parallel:
        seen = sizes.prompt - 1 + (count.n - 1) * sizes.shown + sizes.collider
        passes.append(_continue("contexts", "copies", copies, seen, t, "scored_contexts"))
    elif config.scores_contexts and savings.contexts == "none":
        passes.append(_score("contexts", "one by one", copies, sizes.context, t, "scored_contexts"))
    elif config.scores_contexts:
        for draw in count.draws:
            share = count.rollouts / len(count.draws)
            passes += _shared_passes(config, sizes, savings, count.n, draw, share)
    if config.estimator == "sampled":
        x, s = sizes.context, sizes.sample
        contexts = count.generated * config.num_colliders
        outputs = contexts * config.num_estimator_samples
        passes += [
            Pass("contexts", "samples, prefill", "prefill", contexts if savings.prefills else outputs, x, 1),
            Pass("contexts", "samples, decode", "decode", outputs, s, s, x, "generated_contexts"),
        ]
        if not savings.rollout_states:
            passes.append(_score("contexts", "samples, represented", outputs, x, s, "scored_contexts"))
    return passes


def _shared_passes(
    config: GCPOConfig, sizes: _Sizes, savings: Savings, n: int, draw: ContextDraw, share: float
) -> list[Pass]:
    """Full contexts of one rollout, whose common beginnings pass through the model once; counted `share` times."""
    t = sizes.completion
    contexts = [_context_runs(*divmod(row, n), l, n, sizes) for row, drawn in enumerate(draw.contexts) for l in drawn]
    if savings.contexts == "packed":
        rows = packed_rows(contexts, t, config.pack_tokens)
        scored = len(contexts) * t / len(rows)
        return [
            Pass("contexts", "packed", "score", share, size, scored, 0, "scored_contexts", dense=True) for size in rows
        ]
    beginnings = [
        Pass("contexts", "beginnings", "score", share, size, 0, start, "scored_contexts", keeps=True)
        for start, size in tree_nodes(contexts)
    ]
    # The last token of a context predicts its completion's first, and is read with it.
    copies = _continue("contexts", "candidates", share * len(contexts), sizes.context - 1, t, "scored_contexts")
    return [*beginnings, copies]


def _context_runs(p: int, i: int, l: int, n: int, sizes: _Sizes) -> list[Run]:
    """x_{i,l} of prompt p: what stands in it, in order."""
    before, between, after = sizes.template
    runs: list[Run] = [(("query", p), sizes.prompt + before)]
    for number, k in enumerate(k for k in range(n) if k != i):
        runs += [(("frame", number), sizes.frame), (("candidate", k), sizes.shown)]
    return [*runs, (("between",), between), (("collider", l), sizes.collider), (("after",), after)]


def _score(phase: str, what: str, rows: float, before: float, completion: float, kind: str) -> Pass:
    """Whole sequences, of which the completion is scored."""
    return Pass(phase, what, "score", rows, before + completion, completion, kind=kind)


def _continue(
    phase: str, what: str, rows: float, before: float, completion: float, kind: str, keeps: bool = False
) -> Pass:
    """Completions, and the token that predicts their first, after `before` tokens that the model has read already."""
    return Pass(phase, what, "score", rows, 1 + completion, completion, before, kind, keeps=keeps)


def _finish(passes: list[Pass], compact_head: bool) -> list[Pass]:
    """Without those of nothing, and with the output layer where it is applied."""
    kept = [item for item in passes if item.rows > 0 and item.new > 0]
    if compact_head:
        return kept
    return [replace(item, predicted=item.new) if item.mode in ("score", "train") else item for item in kept]


def _two_plain_tokens(builder: PromptBuilder) -> tuple[int, int]:
    ids = [k for k in range(len(builder.tokenizer)) if k not in builder.special_ids]
    return ids[0], ids[1]


def _first_difference(left: list[int], right: list[int]) -> int:
    return next(k for k, (a, b) in enumerate(zip(left, right, strict=True)) if a != b)
