"""
What GCPO adds to a rollout, between TRL's generation and its loss: colliders, representations, weights, context scores.

All that concerns a group is computed here, on rows gathered from all processes: TRL shuffles and splits afterwards.
"""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from gcpo.causal.colliders import Group, generate_colliders, own_random_stream, reward_colliders
from gcpo.causal.contexts import PromptBuilder, check_length
from gcpo.causal.estimators import estimate_weights
from gcpo.causal.parallel import GroupReading, copy_start, read_groups, score_copies
from gcpo.causal.sampling import ContextDraw, draw_contexts
from gcpo.forward.generation import Rollout
from gcpo.forward.representations import HiddenRecorder
from gcpo.forward.scoring import Reading, Scorer, learns_positions, pad_ids

if TYPE_CHECKING:
    from gcpo.trainer import GCPOTrainer

Ids = list[int]
WEIGHT_COLUMNS = ("plain_advantage", "upsilon")  # of TRL's completions table, whose `advantage` is B


class CausalStep:
    """
    The causal part of a generation batch.

    Args:
        trainer: whose model scores, whose generation path writes colliders, whose counters are added to.
    """

    def __init__(self, trainer: "GCPOTrainer"):
        self.trainer = trainer
        self.config = trainer.args
        self.accelerator = trainer.accelerator
        self.groups: list[Group] = []  # of the last rollout, for whoever logs it
        if trainer.args.is_causal:  # without, it builds no prompts, and asks no more of the tokenizer than GRPOTrainer
            self.builder = PromptBuilder(
                trainer._tokenizer, trainer.args, trainer.chat_template, trainer.chat_template_kwargs
            )
        self.scorer = Scorer(trainer)
        self.z_size: int = trainer.model.config.get_text_config().hidden_size
        config, kind = trainer.args, trainer.model.config.model_type
        if config.is_causal and learns_positions(trainer.model):
            warnings.warn(
                f"{kind} learns an embedding for each position, and TRL's forwards do not tell it where a prompt that "
                "is padded on the left begins: its scores depend on the padding, and those that GCPO makes without any "
                "do not fit them. Use a model with rotary positions.",
                stacklevel=2,
            )
        self.parallel = config.prefers_parallel and self.scorer.can_continue
        if config.context_attention == "parallel" and config.scores_contexts and not self.parallel:
            raise ValueError(
                "`context_attention='parallel'` needs a model whose every layer keeps the keys and values of all "
                f"tokens, without sliding windows, got {kind}. Use `context_attention='full'`."
            )
        if config.share_prefix and config.is_causal and not self.scorer.shares:
            warnings.warn(
                "`share_prefix` needs a model whose every layer keeps the keys and values of all tokens, without "
                f"sliding windows; {kind} is not such a model, so its contexts are scored one by one. "
                "`share_prefix=False` says so without this warning.",
                stacklevel=2,
            )

    def extend(self, output: dict[str, Any], rollout: Rollout, z: torch.Tensor | None) -> None:
        """
        Weigh `output["advantages"]` and add what the second KL term needs, as tensors of this process's rows.

        Args:
            output: what TRL made of the rollout.
            z: representations (B, H) of this process's candidates, where a pass that was made anyway gave them.
        """
        config, length = self.config, output["completion_ids"].size(1)
        query_logp = output.get("old_per_token_logps")  # without: the policy is what generated, and its own logps serve
        if z is None and config.uses_weights:
            query_logp, z = self._score_candidates(rollout, length)
        groups = self.groups = self.make_groups(rollout)
        n, first = self.trainer.num_generations, self.accelerator.process_index * len(rollout.prompts)
        rows = [divmod(first + k, n) for k in range(len(rollout.prompts))]  # (group, candidate) of each local row
        has_content = torch.tensor([group.has_content for group in groups], device=self.accelerator.device)  # (P, L)
        draw = self._draw(groups, rows) if config.scores_contexts else None
        parallel = draw is not None and self._is_parallel(groups)
        found = self._read_groups(rollout, groups, rows, draw if parallel else None)
        context_z = None
        if draw is not None:
            if parallel:
                context_logp, scored_z = self._score_parallel(groups, rows, draw, found, length)
            else:
                context_logp, scored_z = self._score_contexts(rollout, groups, rows, draw, length)
            if config.estimator == "scored":
                context_z = self._by_context(scored_z, draw)
        if config.estimator == "sampled":
            context_z = self._sample_contexts(groups, rows)
        if config.uses_weights:
            assert z is not None
            collider_z = self._represent_colliders(groups, found) if config.estimator == "loo" else None
            upsilon = self.weigh(output, groups, z, collider_z, context_z, has_content)
            output["advantages"] = _scale_rows(output["advantages"], upsilon[first : first + len(rows)])
        if config.kappa > 0:
            assert draw is not None
            device = self.accelerator.device
            if query_logp is not None:
                output["query_logps"] = query_logp
            output["context_logps"] = context_logp
            output["context_weights"] = draw.weights.to(device)
            output["has_collider"] = draw.counted.to(device)
            output["causal_scale"] = torch.tensor(draw.scale, device=device)
            if config.causal_policy_context == "context":
                output["context_ids"], output["context_mask"] = self._first_contexts(rollout, groups, rows, draw)

    # -----------------------------------------------------------------------------------------------------------------

    def make_groups(self, rollout: Rollout) -> list[Group]:
        """All groups of all processes, with their colliders."""
        n = self.trainer.num_generations
        prompts = gather_object(rollout.prompts)[::n]
        prompt_ids = gather_object(rollout.prompt_ids)[::n]
        completions = gather_object(rollout.completion_ids)
        candidates = [completions[start : start + n] for start in range(0, len(completions), n)]
        with self.trainer._account.phase("colliders"):
            groups = generate_colliders(self.trainer, self.builder, prompts, prompt_ids, candidates, self._seed(0))
        lengths = torch.tensor([len(ids) for group in groups for ids in group.colliders], dtype=torch.float32)
        ended = [ids[-1] in self.trainer.eos_token_ids for group in groups for ids in group.colliders if ids]
        content = [flag for group in groups for flag in group.has_content]
        # Counted once, on the main process: token counts are summed over processes.
        if self.accelerator.is_main_process:
            self.trainer._account.add_tokens("generated_colliders", int(lengths.sum()))
        self.trainer._log("colliders/mean_length", lengths.mean())
        self.trainer._log("colliders/ended", sum(ended) / max(len(content), 1))
        self.trainer._log("colliders/masked", 1.0 - sum(content) / max(len(content), 1))
        if self.config.log_collider_reward:
            with self.trainer._account.phase("rewards"):
                self.trainer._log("colliders/reward", reward_colliders(self.trainer, rollout.inputs, groups))
        return groups

    def _seed(self, purpose: int) -> int:
        """A seed of this step and purpose; from the step, so that a resumed run draws as an uninterrupted one."""
        trainer = self.trainer
        substep = trainer._step % self.config.gradient_accumulation_steps
        return self.config.seed + 1_000_003 * (trainer.state.global_step + 1) + 1_009 * substep + 101 * purpose

    def _draw(self, groups: list[Group], rows: list[tuple[int, int]]) -> ContextDraw:
        """Of local rows, out of a draw over those of all processes, which is the same however many there are."""
        n = self.trainer.num_generations
        available = [
            0 if self._is_masked(candidate) else sum(group.has_content)
            for group in groups
            for candidate in group.candidates
        ]
        generator = torch.Generator().manual_seed(self._seed(1))
        draw = draw_contexts(available, self.config.drawn_contexts, self.config.drawn_fraction, generator)
        return draw.part(rows[0][0] * n + rows[0][1], len(rows))

    def _is_masked(self, candidate: Ids) -> bool:
        """Whether TRL masks every token of a candidate, so that it adds nothing to the second KL term."""
        if not self.trainer.mask_truncated_completions or self.config.estimator == "scored":  # needs all scored
            return False
        return candidate[-1] not in (*self.trainer.eos_token_ids, self.trainer._tokenizer.pad_token_id)

    def _context(self, groups: list[Group], row: tuple[int, int], l: int) -> Ids:
        """Ids of x_{i,l}."""
        group, i = groups[row[0]], row[1]
        others = group.candidates[:i] + group.candidates[i + 1 :]
        return self.builder.context(group.prompt, others, group.colliders[l])

    def _score_contexts(
        self, rollout: Rollout, groups: list[Group], rows: list[tuple[int, int]], draw: ContextDraw, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        log pi_old(y_i | x_{i,l}) (B, T, width) and y_i's representation under x_{i,l} (B, width, H) of local rows, in
        the order of the draw; 0 where nothing was drawn.
        """
        contexts, completions, places = [], [], []
        for k, drawn in enumerate(draw.contexts):
            for place, l in enumerate(drawn):
                contexts.append(self._context(groups, rows[k], l))
                completions.append(rollout.completion_ids[k])
                places.append((k, place))
        if not contexts:  # scoring is collective: take part with a row that is thrown away
            contexts, completions = [rollout.prompt_ids[0]], [rollout.completion_ids[0]]
        longest = max(len(x) + len(y) for x, y in zip(contexts, completions, strict=True))
        check_length(longest, self.trainer.max_positions, "A context with its candidate")
        scorer = self.scorer
        # Attention over a packed row costs its square: where rows would be long, shared keys and values cost less.
        packs = scorer.shares and scorer.can_pack and scorer.most(2 * longest) <= self.config.pack_tokens
        if packs:
            scores, scored_z = scorer.score_packed(contexts, completions, length)
        elif scorer.shares:
            scores, scored_z = scorer.score_by_level(contexts, completions, length, "scored_contexts")
        else:
            with self.trainer._counted_as("contexts", "scored_contexts"):
                scores, scored_z = scorer.score(contexts, completions, length)
        width = draw.weights.shape[1]
        logp = scores.new_zeros(len(rows), width, length)
        z = scored_z.new_zeros(len(rows), width, scored_z.shape[1])
        if places:
            at = torch.tensor(places, device=scores.device)
            logp[at[:, 0], at[:, 1]] = scores
            z[at[:, 0], at[:, 1]] = scored_z
        return logp.transpose(1, 2), z

    def _score_candidates(self, rollout: Rollout, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """log pi_old(y_i | q) (B, T) and z_i (B, H) of local rows, from a pass of their own."""
        if self.scorer.shares:
            return self.scorer.score_by_level(rollout.prompt_ids, rollout.completion_ids, length, "scored_query")
        return self.scorer.score(rollout.prompt_ids, rollout.completion_ids, length)

    def _is_parallel(self, groups: list[Group]) -> bool:
        """
        Whether the contexts of this step are parallel ones. A copy begins behind the longest candidate that it sees,
        which can take more positions than a full context that shows the ends of candidates. All processes hold all
        groups, and agree; colliders that are left out do not count.
        """
        if not self.parallel:
            return False
        longest = max(
            (
                copy_start(group, i, l) + len(candidate)
                for group in groups
                for i, candidate in enumerate(group.candidates)
                for l in range(sum(group.has_content))
            ),
            default=0,
        )
        limit = self.trainer.max_positions
        if self.config.context_attention is None and limit is not None and longest > limit:
            warnings.warn(
                f"A parallel context with its candidate needs {longest} tokens, more than the model's {limit} "
                "positions: the contexts of this step are full ones. `context_attention='full'` says so without this "
                "warning.",
                stacklevel=2,
            )
            return False
        check_length(longest, limit, "A parallel context with its candidate (a full one may need fewer)")
        return True

    def _read_groups(
        self, rollout: Rollout, groups: list[Group], rows: list[tuple[int, int]], draw: ContextDraw | None
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
        if self.config.estimator == "loo" and self.scorer.shares:
            colliders |= {(p, l) for p, i in rows if i == 0 for l in range(self.config.num_colliders)}
        known: dict[int, GroupReading] = {}
        states = rollout.states
        if states is not None and states.cache is not None:
            nothing = torch.zeros(0, device=self.accelerator.device)
            for k, (p, i) in enumerate(rows):
                group = known.setdefault(p, GroupReading(query=states.query(k, len(rollout.prompt_ids[k]))))
                own = states.completion(k, len(rollout.completion_ids[k]))
                group.candidates[i] = Reading(nothing, states.z[k], own)
        return read_groups(self.scorer, local, known, sorted(candidates), sorted(colliders))

    def _score_parallel(
        self,
        groups: list[Group],
        rows: list[tuple[int, int]],
        draw: ContextDraw,
        found: dict[int, GroupReading],
        length: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`_score_contexts`, under parallel contexts."""
        local = {p: groups[p] for p, _ in rows}
        places = [(k, place) for k, drawn in enumerate(draw.contexts) for place in range(len(drawn))]
        wanted = [(*rows[k], draw.contexts[k][place]) for k, place in places]
        copies = score_copies(self.scorer, local, found, wanted, self.config.candidate_context_tokens)
        width, device = draw.weights.shape[1], self.accelerator.device
        logp = torch.zeros(len(rows), width, length, device=device)
        z = torch.zeros(len(rows), width, self.z_size, device=device)
        for (k, place), copy in zip(places, copies, strict=True):
            logp[k, place, : len(copy.logp)], z[k, place] = copy.logp, copy.z
        return logp.transpose(1, 2), z

    def _by_context(self, z: torch.Tensor, draw: ContextDraw) -> torch.Tensor:
        """(B, L, 1, H) from (B, width, H): every context was scored, but for colliders that say nothing."""
        assert all(drawn == list(range(len(drawn))) for drawn in draw.contexts)
        missing = self.config.num_colliders - z.shape[1]
        return torch.nn.functional.pad(z, (0, 0, 0, missing)).unsqueeze(2)

    def _sample_contexts(self, groups: list[Group], rows: list[tuple[int, int]]) -> torch.Tensor:
        """Representations of m fresh outputs under every context, (B, L, m, H): the paper's own estimator."""
        m, colliders = self.config.num_estimator_samples, self.config.num_colliders
        contexts = [self._context(groups, row, l) for row in rows for l in range(colliders) for _ in range(m)]
        longest = max(map(len, contexts)) + (self.trainer.generation_limit or 0)
        check_length(longest, self.trainer.max_positions, "A context with an output sampled under it")
        seed = self._seed(2) + 7 * self.accelerator.process_index
        trainer, recorder = self.trainer, HiddenRecorder(self.config.representation)
        # L * m times the rollout's rows: no more of them at once than there. An engine makes batches of its own.
        size = len(contexts) if trainer.use_vllm else len(rows)
        outputs: list[Ids] = []
        states: list[torch.Tensor] = []
        with trainer._account.phase("contexts"), own_random_stream(seed), trainer._recording(recorder):
            for start in range(0, len(contexts), size):
                outputs += trainer._generate_single_turn(contexts[start : start + size], None, {}, 1)[0]
                if trainer._generated is not None:
                    states.append(trainer._generated.z)
                    trainer._generated = None
        trainer._account.add_tokens("generated_contexts", sum(map(len, outputs)))
        if sum(map(len, states)) == len(contexts):
            return torch.cat(states).view(len(rows), colliders, m, -1)
        outputs = [ids or [trainer._tokenizer.eos_token_id] for ids in outputs]
        with trainer._counted_as("contexts", "scored_contexts"):
            _, z = self.scorer.score(contexts, outputs, max(map(len, outputs)))
        return z.view(len(rows), colliders, m, -1)

    def _first_contexts(
        self, rollout: Rollout, groups: list[Group], rows: list[tuple[int, int]], draw: ContextDraw
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x_{i,0} of each local row, for the policy's own forward under it; q where the row is left out."""
        ids = [
            self._context(groups, row, 0) if drawn else rollout.prompt_ids[k]
            for k, (row, drawn) in enumerate(zip(rows, draw.contexts, strict=True))
        ]
        return pad_ids(self.trainer, ids, "left")

    def weigh(
        self,
        output: dict[str, Any],
        groups: list[Group],
        z: torch.Tensor,  # (B, H)
        collider_z: torch.Tensor | None,  # (P, L, H)
        context_z: torch.Tensor | None,  # (B, L, m, H)
        has_content: torch.Tensor,  # (P, L)
    ) -> torch.Tensor:
        """Upsilon of all rows of all processes, (P * n,); also logs it."""
        n = self.trainer.num_generations
        z = self.accelerator.gather(z).view(-1, n, z.shape[-1])
        if context_z is not None:
            context_z = self.accelerator.gather(context_z.contiguous()).view(z.shape[0], n, *context_z.shape[1:])
        weights, metrics = estimate_weights(self.config, z, collider_z, context_z, has_content)
        upsilon = weights.flatten()
        for name, value in metrics.items():
            self.trainer._log(name, value)
        eos = set(self.trainer.eos_token_ids)
        ended = torch.tensor([ids[-1] in eos for g in groups for ids in g.candidates], device=upsilon.device)
        for name, those in (("ended", ended), ("truncated", ~ended)):
            self.trainer._log(f"upsilon/{name}_mean", upsilon[those].mean())
        # TRL has logged A already; the completions table shows B = A * Upsilon, and Upsilon in a column of its own.
        logged = self.trainer._logs["advantages"]
        tail = [logged.pop() for _ in range(min(len(upsilon), len(logged)))][::-1]
        logged.extend(a * u for a, u in zip(tail, upsilon[-len(tail) :].tolist(), strict=True))
        for column, values in zip(WEIGHT_COLUMNS, (tail, upsilon.tolist()), strict=True):
            self.trainer._logs["extra"][column].extend(values)
        return upsilon

    def _represent_colliders(self, groups: list[Group], found: dict[int, GroupReading]) -> torch.Tensor:
        """z of every collider under its query, as candidates are represented: (P, L, H). Processes share the work."""
        config, accelerator = self.config, self.accelerator
        if self.scorer.shares:
            n = self.trainer.num_generations
            first = accelerator.process_index * (len(groups) * n // accelerator.num_processes)
            z = torch.zeros(len(groups), config.num_colliders, self.z_size, device=accelerator.device)
            for p, group in found.items():
                if p * n >= first:  # the group begins on this process
                    z[p] = torch.stack([group.colliders[l].z for l in range(config.num_colliders)])
            return accelerator.reduce(z, reduction="sum")
        eos = [self.trainer._tokenizer.eos_token_id]
        tasks = [(group.prompt_ids, collider or eos) for group in groups for collider in group.colliders]
        share = -(-len(tasks) // accelerator.num_processes)
        padded = tasks + [tasks[-1]] * (share * accelerator.num_processes - len(tasks))
        local = padded[accelerator.process_index * share :][:share]
        longest = max(len(collider) for _, collider in local)
        with self.trainer._counted_as("scoring", "scored_colliders"):
            _, z = self.scorer.score([query for query, _ in local], [collider for _, collider in local], longest)
        z = accelerator.gather(z)[: len(tasks)]
        return z.view(len(groups), -1, z.shape[-1])


def _scale_rows(advantages: torch.Tensor, upsilon: torch.Tensor) -> torch.Tensor:
    """B = A * Upsilon for A of shape (B,) or (B, T)."""
    return advantages * upsilon.view(-1, *[1] * (advantages.dim() - 1)).to(advantages.dtype)
