"""
The causal step: colliders, representations, weights and context scores of a rollout, between its generation and the
loss. All that concerns a group is computed on rows gathered from all processes, before anyone shuffles or splits them.
"""

import warnings
from dataclasses import replace

import torch

from gcpo.causal.answers import checked_outputs, checked_pair, checked_scores
from gcpo.causal.colliders import Drawing, warn_of_length
from gcpo.causal.contexts import PromptBuilder
from gcpo.causal.estimators import estimate_weights
from gcpo.causal.loss import pulling_to
from gcpo.causal.options import CausalOptions
from gcpo.causal.parallel import GroupReading, copy_start, known_readings, read_groups, score_copies
from gcpo.causal.port import CausalTerms, Group, Ids, KLTerms, Policy, Rollout, WeightInputs, share
from gcpo.causal.sampling import ContextDraw, draw_contexts

Row = tuple[int, int]  # (group, candidate)
# What a draw is for: each is seeded apart.
_COLLIDERS, _CONTEXTS, _SAMPLES = 0, 101, 202


class CausalStep:
    """
    What GCPO adds to a rollout (arXiv 2508.05428, eqs. 9 to 13).

    Args:
        policy: generates colliders, scores and represents completions.
        options: of the method.
        builder: makes the prompts for colliders and the contexts.

    Raises:
        ValueError: `context_attention="parallel"`, and the policy cannot read after keys and values that rows share.
    """

    def __init__(self, policy: Policy, options: CausalOptions, builder: PromptBuilder):
        self.policy, self.options, self.builder = policy, options, builder
        self.parallel = options.prefers_parallel and policy.can_continue
        if options.context_attention == "parallel" and options.scores_contexts and not self.parallel:
            raise ValueError(
                "`context_attention='parallel'` needs a model whose every layer keeps the keys and values of all "
                f"tokens, without sliding windows, got {policy.name}. Use `context_attention='full'`."
            )
        if options.collider_attention == "parallel" and not policy.can_decode:
            raise ValueError(
                "`collider_attention='parallel'` needs generation by transformers in this process and a model whose "
                f"every layer keeps the keys and values of all tokens, got {policy.name}. Use "
                "`collider_attention='full'`."
            )
        if options.share_prefix and options.is_causal and not policy.shares:
            warnings.warn(
                "`share_prefix` needs a model whose every layer keeps the keys and values of all tokens, without "
                f"sliding windows; {policy.name} is not such a model, so its contexts are scored one by one. "
                "`share_prefix=False` says so without this warning.",
                stacklevel=2,
            )

    @torch.no_grad()
    def terms(
        self,
        rollout: Rollout,
        length: int,
        query_logp: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        *,
        groups: list[Group] | None = None,
        seed: int | None = None,
    ) -> CausalTerms:
        """
        What multiplies the advantages, and what the second KL term needs.

        Args:
            rollout: this process's rows; every process has as many.
            length: T, tokens of a padded completion.
            query_logp: (B, T) log pi_old(y | q), where a pass that was made anyway gave them.
            z: (B, H) float32 representations of the candidates, where a pass gave them. None: those that generation
                left, or a pass of their own.
            groups: prompts with candidates and colliders, where they are given. None: colliders are drawn.
            seed: of all draws. None: the policy's own for this step.

        Raises:
            ValueError, TypeError: a prompt does not fit into the model's positions, or the policy answered with wrong
                shapes, too few outputs or NaN.
        """
        policy, options = self.policy, self.options
        first = policy.rank * len(rollout.prompts)
        if not options.is_causal:  # GRPO, at GRPO's cost
            return CausalTerms([], slice(first, first + len(rollout.prompts)))
        seed = policy.step_seed if seed is None else seed
        if z is None and rollout.states is not None:
            z = rollout.states.z
        if z is None and options.uses_weights:
            query_logp, z = self._score(rollout.prompt_ids, rollout.completion_ids, length, "scored_query")
        if groups is None:
            groups = self.make_groups(rollout, seed)
        groups, parallel = self._fit_contexts(groups)
        policy.log("groups_without_colliders", sum(not any(g.has_content) for g in groups) / len(groups))
        n = policy.num_generations
        rows = [divmod(first + k, n) for k in range(len(rollout.prompts))]
        terms = CausalTerms(groups, slice(first, first + len(rows)))
        draw = self._draw(groups, terms.rows, seed) if options.scores_contexts else None
        found = self._read_groups(rollout, groups, rows, draw if parallel else None)
        context_z = None
        if draw is not None:
            if parallel:
                context_logp, scored_z = self._score_parallel(groups, rows, draw, found, length)
            else:
                context_logp, scored_z = self._score_contexts(rollout, groups, rows, draw, length)
            if options.estimator == "scored":
                context_z = self._by_context(scored_z, draw)
        if options.estimator == "sampled":
            context_z = self._sample_contexts(groups, rows, seed)
        if options.uses_weights:
            assert z is not None
            collider_z = self._represent_colliders(groups, found) if options.estimator == "loo" else None
            terms.weight_inputs = self._gather_weight_inputs(groups, z, collider_z, context_z)
            terms.upsilon = self._weigh(groups, terms.weight_inputs)
        if options.kappa > 0:
            assert draw is not None
            weights, counted = draw.weights.to(policy.device), draw.counted.to(policy.device)
            terms.kl = pulling_to(options.kl_target, KLTerms(context_logp, weights, counted, draw.scale, query_logp))
            if options.causal_policy_context == "context":
                terms.first_contexts = [
                    self.context(groups, row, 0) if drawn else rollout.prompt_ids[k]
                    for k, (row, drawn) in enumerate(zip(rows, draw.contexts, strict=True))
                ]
        return terms

    # -----------------------------------------------------------------------------------------------------------------
    # Groups
    # -----------------------------------------------------------------------------------------------------------------

    def draw_colliders(self, rollout: Rollout, seed: int | None = None) -> Drawing:
        """
        Begin to draw the colliders of a rollout: to be decoded by `Drawing.decode`, and put into `rollout.drawing` for
        `terms` to finish. Without, `terms` does all of it.
        """
        seed = self.policy.step_seed if seed is None else seed
        with self.policy.phase("colliders"):
            return Drawing.start(self.policy, self.options, self.builder, rollout, seed + _COLLIDERS)

    def make_groups(self, rollout: Rollout, seed: int) -> list[Group]:
        """All groups of all processes, with their colliders."""
        drawing = rollout.drawing
        if drawing is None or drawing.seed != seed + _COLLIDERS:
            drawing = rollout.drawing = self.draw_colliders(rollout, seed)
        with self.policy.phase("colliders"):
            if drawing.outputs is None:
                drawing.decode()
            return drawing.finish(rollout.inputs)

    def context(self, groups: list[Group], row: Row, l: int) -> Ids:
        """Ids of x_{i,l}."""
        group, i = groups[row[0]], row[1]
        others = group.candidates[:i] + group.candidates[i + 1 :]
        return self.builder.context(group.prompt, others, group.colliders[l])

    def _draw(self, groups: list[Group], local: slice, seed: int) -> ContextDraw:
        """Of local rows, out of a draw over those of all processes, which is the same however many there are."""
        available = [
            0 if self._is_masked(candidate) else sum(group.has_content)
            for group in groups
            for candidate in group.candidates
        ]
        generator = torch.Generator().manual_seed(seed + _CONTEXTS)
        draw = draw_contexts(available, self.options.drawn_contexts, self.options.drawn_fraction, generator)
        return draw.part(local)

    def _is_masked(self, candidate: Ids) -> bool:
        """Whether every token of a candidate is masked, so that it adds nothing to the second KL term."""
        if self.options.estimator == "scored":  # needs all scored
            return False
        return self.policy.masks_truncated and candidate[-1] not in self.policy.ending_ids

    # -----------------------------------------------------------------------------------------------------------------
    # Scores
    # -----------------------------------------------------------------------------------------------------------------

    def _score(
        self, prompts: list[Ids], completions: list[Ids], length: int, tokens: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logp, z = checked_pair("score", self.policy.score(prompts, completions, length, tokens))
        lengths = [len(ids) for ids in completions]
        checked_scores(self.policy, "score", logp, z, (len(prompts), length), lengths)
        return logp, z

    def _score_contexts(
        self, rollout: Rollout, groups: list[Group], rows: list[Row], draw: ContextDraw, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        log pi_old(y_i | x_{i,l}) (B, T, width) and y_i's representation under x_{i,l} (B, width, H) of local rows, in
        the order of the draw; 0 where nothing was drawn.
        """
        places = [(k, place) for k, drawn in enumerate(draw.contexts) for place in range(len(drawn))]
        contexts = [self.context(groups, rows[k], draw.contexts[k][place]) for k, place in places]
        completions = [rollout.completion_ids[k] for k, _ in places]
        if not contexts:  # scoring is collective: take part with a row that is thrown away
            contexts, completions = [rollout.prompt_ids[0]], [rollout.completion_ids[0]]
        logp, z = self._score(contexts, completions, length, "scored_contexts")
        return _placed(logp, z, places, len(rows), draw.weights.shape[1])

    def _fit_contexts(self, groups: list[Group]) -> tuple[list[Group], bool]:
        """
        Whether the contexts of this step are parallel ones, and the groups. One whose contexts need more positions than
        the model has goes on without colliders. A copy in a parallel context begins behind the longest candidate that
        it sees, which can take more positions than a full context that shows the ends of candidates.

        All processes hold all groups, and agree.
        """
        limit, options = self.policy.max_positions, self.options
        if limit is None or not options.uses_contexts:
            return groups, self.parallel
        if self.parallel:
            needed = [_longest_parallel(group) for group in groups]
            if max(needed) <= limit:
                return groups, True
            if options.context_attention == "parallel":
                return _without(groups, needed, limit, "A parallel context (a full one may need fewer)"), True
            warnings.warn(
                f"A parallel context with its candidate needs {max(needed)} tokens, more than the model's {limit} "
                "positions: the contexts of this step are full ones. `context_attention='full'` says so without this "
                "warning.",
                stacklevel=2,
            )
        return _without(groups, [self._longest_context(group) for group in groups], limit, "A context"), False

    def _longest_context(self, group: Group) -> int:
        """Tokens of a context of this group, with what is scored or sampled behind it."""
        if not any(group.has_content):
            return 0
        options, shown = self.options, [len(self.builder.content(ids)) for ids in group.candidates]
        if options.candidate_context_tokens is not None:
            shown = [min(size, options.candidate_context_tokens) for size in shown]
        sampled = (self.policy.max_completion_length or 0) if options.estimator == "sampled" else 0
        behind = [max(len(ids) if options.scores_contexts else 0, sampled) for ids in group.candidates]
        # Candidates are shown as ids, so that contexts of one group differ by them alone.
        i = max(range(len(shown)), key=lambda k: behind[k] - shown[k])
        others = group.candidates[:i] + group.candidates[i + 1 :]
        # Outputs are sampled under all contexts, those of colliders that are left out too.
        colliders = group.colliders if sampled else group.colliders[: sum(group.has_content)]
        return len(self.builder.context(group.prompt, others, max(colliders, key=len))) + behind[i]

    def _read_groups(
        self, rollout: Rollout, groups: list[Group], rows: list[Row], draw: ContextDraw | None
    ) -> dict[int, GroupReading]:
        """
        Keys, values and representations of what this process must know of its groups: what parallel contexts look
        back at (`draw` is theirs, None without them), and the colliders of groups that begin here, for the closed-form
        estimate.
        """
        local = {p: groups[p] for p, _ in rows}
        candidates: set[tuple[int, int]] = set()
        colliders: set[tuple[int, int]] = set()
        if draw is not None:
            for (p, i), drawn in zip(rows, draw.contexts, strict=True):
                if drawn:
                    candidates |= {(p, k) for k in range(len(groups[p].candidates)) if k != i}
                    colliders |= {(p, l) for l in drawn}
        if self.options.estimator == "loo" and self.policy.shares:
            colliders |= {(p, l) for p, i in rows if i == 0 for l in range(self.options.num_colliders)}
        known = known_readings(self.policy, rollout)
        if rollout.drawing is not None:
            read = rollout.drawing.found.items()  # less their colliders, which need not be those of these groups
            known |= {p: GroupReading(group.query, dict(group.candidates)) for p, group in read}
        return read_groups(self.policy, local, known, sorted(candidates), sorted(colliders))

    def _score_parallel(
        self, groups: list[Group], rows: list[Row], draw: ContextDraw, found: dict[int, GroupReading], length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`_score_contexts`, under parallel contexts."""
        local = {p: groups[p] for p, _ in rows}
        places = [(k, place) for k, drawn in enumerate(draw.contexts) for place in range(len(drawn))]
        wanted = [(*rows[k], draw.contexts[k][place]) for k, place in places]
        copies = score_copies(self.policy, local, found, wanted, self.options.candidate_context_tokens)
        logp = torch.zeros(len(copies), length, device=self.policy.device)
        for row, copy in zip(logp, copies, strict=True):
            scored = copy.logp[:length]
            row[: len(scored)] = scored
        z = [copy.z for copy in copies] or [torch.zeros(self.policy.hidden_size, device=self.policy.device)]
        return _placed(logp, torch.stack(z), places, len(rows), draw.weights.shape[1])

    # -----------------------------------------------------------------------------------------------------------------
    # Weights
    # -----------------------------------------------------------------------------------------------------------------

    def _by_context(self, z: torch.Tensor, draw: ContextDraw) -> torch.Tensor:
        """(B, L, 1, H) from (B, width, H): every context was scored, but for colliders that say nothing."""
        assert all(drawn == list(range(len(drawn))) for drawn in draw.contexts)
        missing = self.options.num_colliders - z.shape[1]
        return torch.nn.functional.pad(z, (0, 0, 0, missing)).unsqueeze(2)

    def _sample_contexts(self, groups: list[Group], rows: list[Row], seed: int) -> torch.Tensor:
        """Representations of m fresh outputs under every context, (B, L, m, H): the paper's own estimator."""
        policy, m, colliders = self.policy, self.options.num_estimator_samples, self.options.num_colliders
        contexts = [
            # Without colliders nothing is made of the output: it is sampled because all rows are.
            self.context(groups, row, l) if any(groups[row[0]].has_content) else groups[row[0]].prompt_ids
            for row in rows
            for l in range(colliders)
            for _ in range(m)
        ]
        # L * m times the rollout's rows: no more of them at once than there.
        sampled = policy.sample_states(contexts, seed + _SAMPLES + 7 * policy.rank, len(rows))
        outputs, z = checked_pair("sample_states", sampled)
        outputs = checked_outputs("sample_states", outputs, len(contexts))
        checked_scores(policy, "sample_states", None, z, None, [len(ids) for ids in outputs])
        policy.count("generated_contexts", sum(map(len, outputs)))
        return z.view(len(rows), colliders, m, -1)

    def _represent_colliders(self, groups: list[Group], found: dict[int, GroupReading]) -> torch.Tensor:
        """z of every collider under its query, as candidates are represented: (P, L, H). Processes share the work."""
        policy, colliders = self.policy, self.options.num_colliders
        if policy.shares:
            n = policy.num_generations
            first = policy.rank * (len(groups) * n // policy.size)
            z = torch.zeros(len(groups), colliders, policy.hidden_size, device=policy.device)
            for p, group in found.items():
                if p * n >= first:  # the group begins on this process
                    z[p] = torch.stack([group.colliders[l].z for l in range(colliders)])
            return policy.reduce(z)
        tasks = [(g.prompt_ids, ids or policy.eos_token_ids[:1]) for g in groups for ids in g.colliders]
        local = share(tasks, policy)
        longest = max(len(collider) for _, collider in local)
        _, z = self._score([q for q, _ in local], [collider for _, collider in local], longest, "scored_colliders")
        return policy.gather(z)[: len(tasks)].view(len(groups), colliders, -1)

    def _gather_weight_inputs(
        self, groups: list[Group], z: torch.Tensor, collider_z: torch.Tensor | None, context_z: torch.Tensor | None
    ) -> WeightInputs:
        """Local z (B, H) and context_z (B, L, m, H), those of all processes by group."""
        policy, n = self.policy, self.policy.num_generations
        z = policy.gather(z).view(-1, n, z.shape[-1])
        if context_z is not None:
            context_z = policy.gather(context_z.contiguous()).view(z.shape[0], n, *context_z.shape[1:])
        mask = torch.tensor([group.has_content for group in groups], device=policy.device)
        return WeightInputs(z, collider_z, context_z, mask)

    def _weigh(self, groups: list[Group], inputs: WeightInputs) -> torch.Tensor:
        """Upsilon of all rows of all processes, (P * n,); also logs it."""
        weights, metrics = estimate_weights(self.options, inputs)
        upsilon = weights.flatten()
        ends = set(self.policy.eos_token_ids)
        ended = torch.tensor([ids[-1] in ends for g in groups for ids in g.candidates], device=upsilon.device)
        for name, those in (("ended", ended), ("truncated", ~ended)):
            metrics[f"upsilon/{name}_mean"] = upsilon[those].mean()
        for name, value in metrics.items():
            self.policy.log(name, value)
        return upsilon


def _longest_parallel(group: Group) -> int:
    """Positions that the copies of this group's candidates need; colliders that are left out do not count."""
    return max(
        (
            copy_start(group, i, l) + len(candidate)
            for i, candidate in enumerate(group.candidates)
            for l in range(sum(group.has_content))
        ),
        default=0,
    )


def _without(groups: list[Group], needed: list[int], limit: int, what: str) -> list[Group]:
    """The groups, of which those that need more tokens than the limit have colliders that do not count."""
    if max(needed) <= limit:
        return groups
    warn_of_length(max(needed), limit, f"{what} with its candidate")
    return [
        group if tokens <= limit else replace(group, has_content=[False] * len(group.has_content))
        for group, tokens in zip(groups, needed, strict=True)
    ]


def _placed(
    logp: torch.Tensor, z: torch.Tensor, places: list[tuple[int, int]], rows: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (len(places), T) and representations of (row, place) as (rows, T, width) and (rows, width, H)."""
    all_logp = logp.new_zeros(rows, width, logp.shape[1])
    all_z = z.new_zeros(rows, width, z.shape[1])
    if places:
        at = torch.tensor(places, device=logp.device)
        all_logp[at[:, 0], at[:, 1]] = logp
        all_z[at[:, 0], at[:, 1]] = z
    return all_logp.transpose(1, 2), all_z
