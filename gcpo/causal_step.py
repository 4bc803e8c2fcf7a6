"""
What GCPO adds to a rollout, between TRL's generation and its loss: colliders, representations, weights, context scores.

All that concerns a group is computed here, on rows gathered from all processes: TRL shuffles and splits afterwards.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from gcpo._trl import pad
from gcpo.colliders import Group, generate_colliders, own_random_stream
from gcpo.contexts import Prompt, PromptBuilder, check_length
from gcpo.estimators import BranchRecorder, HiddenRecorder, estimate_weights
from gcpo.packing import PackedRow, pack, pack_parallel
from gcpo.sampling import ContextDraw, draw_contexts

if TYPE_CHECKING:
    from gcpo.trainer import GCPOTrainer

Ids = list[int]


@dataclass
class Rollout:
    """What one generation produced on this process, before TRL pads and masks it."""

    prompts: list[Prompt]
    prompt_ids: list[Ids]
    completion_ids: list[Ids]


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
        self.builder = PromptBuilder(
            trainer._tokenizer, trainer.args, trainer.chat_template, trainer.chat_template_kwargs
        )
        if trainer.args.context_attention == "parallel" and not can_share_prefixes(trainer.model):
            raise ValueError(
                "`context_attention='parallel'` needs `attn_implementation` 'sdpa' or 'eager' and a model without "
                f"sliding windows, got {trainer.model.config.model_type} with "
                f"{trainer.model.config._attn_implementation!r}."
            )
        self.shares_prefixes = trainer.args.share_prefix and can_share_prefixes(trainer.model)
        if trainer.args.share_prefix and trainer.args.scores_contexts and not self.shares_prefixes:
            warnings.warn(
                "`share_prefix` needs `attn_implementation` 'sdpa' or 'eager' and a model without sliding windows; "
                f"{trainer.model.config.model_type} with {trainer.model.config._attn_implementation!r} is not such a "
                "model, so its contexts are scored one by one. `share_prefix=False` says so without this warning.",
                stacklevel=2,
            )

    def extend(self, output: dict[str, Any], rollout: Rollout, z: torch.Tensor | None) -> None:
        """
        Weigh `output["advantages"]` and add what the second KL term needs, as tensors of this process's rows.

        Args:
            output: what TRL made of the rollout.
            z: representations (B, H) of this process's candidates, where TRL's own scoring pass gave them.
        """
        length = output["completion_ids"].size(1)
        query_logp = output.get("old_per_token_logps")
        parallel = self.config.context_attention == "parallel" and self.config.scores_contexts
        if (query_logp is None or z is None) and not parallel:
            query_logp, z = self.score(rollout.prompt_ids, rollout.completion_ids, length)
        groups = self.make_groups(rollout)
        n, first = self.trainer.num_generations, self.accelerator.process_index * len(rollout.prompts)
        rows = [divmod(first + k, n) for k in range(len(rollout.prompts))]  # (group, candidate) of each local row
        has_content = torch.tensor([group.has_content for group in groups], device=self.accelerator.device)  # (P, L)
        context_z = None
        draw: ContextDraw | None = None
        if self.config.scores_contexts:
            draw = self._draw(groups, rows)
            if parallel:
                query_logp, z, context_logp, scored_z = self._score_parallel(rollout, groups, rows, draw, length)
            else:
                context_logp, scored_z = self._score_contexts(rollout, groups, rows, draw, length)
            if self.config.estimator == "scored":
                context_z = self._by_context(scored_z, draw)
        if self.config.estimator == "sampled":
            context_z = self._sample_contexts(groups, rows)
        assert z is not None
        if self.config.uses_weights:
            upsilon = self.weigh(output, groups, z, context_z, has_content)
            output["advantages"] = _scale_rows(output["advantages"], upsilon[first : first + len(rows)])
        if self.config.kappa > 0:
            assert draw is not None
            device = self.accelerator.device
            output["query_logps"] = query_logp
            output["context_logps"] = context_logp
            output["context_weights"] = draw.weights.to(device)
            output["has_collider"] = draw.counted.to(device)
            output["causal_scale"] = torch.tensor(draw.scale, device=device)
            if self.config.causal_policy_context == "context":
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
        return groups

    def _seed(self, purpose: int) -> int:
        """A seed of this step and purpose; from the step, so that a resumed run draws as an uninterrupted one."""
        trainer = self.trainer
        substep = trainer._step % self.config.gradient_accumulation_steps
        return self.config.seed + 1_000_003 * (trainer.state.global_step + 1) + 1_009 * substep + 101 * purpose

    def _draw(self, groups: list[Group], rows: list[tuple[int, int]]) -> ContextDraw:
        available = [sum(groups[p].has_content) for p, _ in rows]
        generator = torch.Generator().manual_seed(self._seed(1) + 7 * self.accelerator.process_index)
        return draw_contexts(available, self.config.num_kl_contexts, self.config.kl_fraction, generator)

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
        score = self.score_packed if self.shares_prefixes else self.score
        with self.trainer._counted_as("contexts", "scored_contexts"):
            scores, scored_z = score(contexts, completions, length)
        width = draw.weights.shape[1]
        logp = scores.new_zeros(len(rows), width, length)
        z = scored_z.new_zeros(len(rows), width, scored_z.shape[1])
        if places:
            at = torch.tensor(places, device=scores.device)
            logp[at[:, 0], at[:, 1]] = scores
            z[at[:, 0], at[:, 1]] = scored_z
        return logp.transpose(1, 2), z

    def _score_parallel(
        self, rollout: Rollout, groups: list[Group], rows: list[tuple[int, int]], draw: ContextDraw, length: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Scores and representations under q, (B, T) and (B, H), and under parallel contexts, (B, T, width) and
        (B, width, H), of local rows. A prompt's first packed row gives the former.
        """
        packed: list[PackedRow] = []
        for p in sorted({p for p, _ in rows}):
            group = groups[p]
            wanted = [(i, l) for k, (q, i) in enumerate(rows) if q == p for l in draw.contexts[k]]
            longest = len(group.prompt_ids) + max(map(len, group.candidates + group.colliders))
            longest += max(map(len, group.candidates))
            check_length(longest, self.trainer.max_positions, "A parallel context with its candidate")
            shown = self.config.candidate_context_tokens
            for row in pack_parallel(
                group.prompt_ids, group.candidates, group.colliders, wanted, shown, self.config.pack_tokens
            ):
                for branch in row.branches:
                    branch.key = (p, branch.key)
                packed.append(row)
        scores, states = {}, {}
        for key, logp, z in self._forward_packed(packed):
            scores[key], states[key] = logp, z
        width = draw.weights.shape[1]
        device, hidden = self.accelerator.device, next(iter(states.values())).shape[0]
        query_logp, z = torch.zeros(len(rows), length, device=device), torch.zeros(len(rows), hidden, device=device)
        context_logp = torch.zeros(len(rows), width, length, device=device)
        context_z = torch.zeros(len(rows), width, hidden, device=device)
        for k, (p, i) in enumerate(rows):
            count = len(rollout.completion_ids[k])
            query_logp[k, :count], z[k] = scores[p, ("query", i)], states[p, ("query", i)]
            for place, l in enumerate(draw.contexts[k]):
                context_logp[k, place, :count], context_z[k, place] = scores[p, (i, l)], states[p, (i, l)]
        return query_logp, z, context_logp.transpose(1, 2), context_z

    def _by_context(self, z: torch.Tensor, draw: ContextDraw) -> torch.Tensor:
        """(B, L, 1, H) from (B, width, H): every context was scored, but for colliders that say nothing."""
        assert all(drawn == list(range(len(drawn))) for drawn in draw.contexts)
        missing = self.config.num_colliders - z.shape[1]
        return torch.nn.functional.pad(z, (0, 0, 0, missing)).unsqueeze(2)

    def _sample_contexts(self, groups: list[Group], rows: list[tuple[int, int]]) -> torch.Tensor:
        """Representations of m fresh outputs under every context, (B, L, m, H): the paper's own estimator."""
        m, colliders = self.config.num_estimator_samples, self.config.num_colliders
        contexts = [self._context(groups, row, l) for row in rows for l in range(colliders) for _ in range(m)]
        longest = max(map(len, contexts)) + self.trainer.max_completion_length
        check_length(longest, self.trainer.max_positions, "A context with an output sampled under it")
        seed = self._seed(2) + 7 * self.accelerator.process_index
        with self.trainer._account.phase("contexts"), own_random_stream(seed):
            outputs, _ = self.trainer._generate_single_turn(contexts, None, {}, 1)
        outputs = [ids or [self.trainer._tokenizer.eos_token_id] for ids in outputs]
        self.trainer._account.add_tokens("generated_contexts", sum(map(len, outputs)))
        with self.trainer._counted_as("contexts", "scored_contexts"):
            _, z = self.score(contexts, outputs, max(map(len, outputs)))
        return z.view(len(rows), colliders, m, -1)

    def _first_contexts(
        self, rollout: Rollout, groups: list[Group], rows: list[tuple[int, int]], draw: ContextDraw
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x_{i,0} of each local row, for the policy's own forward under it; q where the row is left out."""
        ids = [
            self._context(groups, row, 0) if drawn else rollout.prompt_ids[k]
            for k, (row, drawn) in enumerate(zip(rows, draw.contexts, strict=True))
        ]
        return self._pad(ids, "left")

    def weigh(
        self,
        output: dict[str, Any],
        groups: list[Group],
        z: torch.Tensor,  # (B, H)
        context_z: torch.Tensor | None,  # (B, L, m, H)
        has_content: torch.Tensor,  # (P, L)
    ) -> torch.Tensor:
        """Upsilon of all rows of all processes, (P * n,); also logs it."""
        n = self.trainer.num_generations
        z = self.accelerator.gather(z).view(-1, n, z.shape[-1])
        collider_z = None
        if self.config.estimator == "loo":
            collider_z = self._represent_colliders(groups)
        else:
            assert context_z is not None
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
        self.trainer._logs["extra"]["upsilon"].extend(upsilon.tolist())
        return upsilon

    def _represent_colliders(self, groups: list[Group]) -> torch.Tensor:
        """z of every collider under its query, as candidates are represented: (P, L, H). Processes share the work."""
        eos = [self.trainer._tokenizer.eos_token_id]
        tasks = [(group.prompt_ids, collider or eos) for group in groups for collider in group.colliders]
        processes = self.accelerator.num_processes
        share = -(-len(tasks) // processes)
        padded = tasks + [tasks[-1]] * (share * processes - len(tasks))
        start = self.accelerator.process_index * share
        local = padded[start : start + share]
        longest = max(len(collider) for _, collider in local)
        with self.trainer._counted_as("scoring", "scored_colliders"):
            _, z = self.score([query for query, _ in local], [collider for _, collider in local], longest)
        z = self.accelerator.gather(z)[: len(tasks)]
        return z.view(len(groups), -1, z.shape[-1])

    # -----------------------------------------------------------------------------------------------------------------

    def score(self, prompts: list[Ids], completions: list[Ids], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Score each completion after its prompt with the policy, without gradient: log-probabilities (rows, length),
        0 behind a completion's end, and representations (rows, H) float32. Rows of similar length share a forward.

        Collective: every process runs as many forwards as the one with the most rows, as ZeRO-3 and FSDP need.
        """
        device, rows = self.accelerator.device, len(prompts)
        step = self.config.context_batch_size or self.config.per_device_train_batch_size
        order = sorted(range(rows), key=lambda k: len(prompts[k]) + len(completions[k]))
        parts = [order[start : start + step] for start in range(0, rows, step)]
        logp = torch.zeros(rows, length, device=device)
        z: torch.Tensor | None = None
        for number in range(self._most(len(parts))):
            part = parts[number] if number < len(parts) else parts[0][:1]
            x, x_mask = self._pad([prompts[k] for k in part], "left")
            y, y_mask = self._pad([completions[k] for k in part], "right")
            with self.trainer._recording(HiddenRecorder(self.config.representation)) as recorder:
                scores, _, _ = self.trainer._get_per_token_logps_and_entropies(
                    self.trainer.model, torch.cat([x, y], dim=1), torch.cat([x_mask, y_mask], dim=1), y.size(1)
                )
            reduced = recorder.result()
            z = reduced.new_zeros(rows, reduced.shape[1]) if z is None else z
            z[part] = reduced
            width = min(y.size(1), length)
            logp[part, :width] = torch.where(y_mask != 0, scores, 0.0)[:, :width].to(logp.dtype)
        assert z is not None
        return logp, z

    def score_packed(
        self, contexts: list[Ids], completions: list[Ids], length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`score`, with tokens that contexts share passed through the model once: the same values, fewer tokens."""
        logp = torch.zeros(len(contexts), length, device=self.accelerator.device)
        states: list[Any] = [None] * len(contexts)
        for key, scores, z in self._forward_packed(pack(contexts, completions, self.config.pack_tokens)):
            width = min(len(scores), length)
            logp[key, :width], states[key] = scores[:width].to(logp.dtype), z
        return logp, torch.stack(states)

    def _forward_packed(self, packed: list[PackedRow]) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor]]:
        """
        Key, log-probabilities (T,) and representation (H,) of every scored branch of packed rows, a forward each.

        Collective, as `score` is: a process with fewer rows repeats its last one.
        """
        trainer, device = self.trainer, self.accelerator.device
        for number in range(self._most(len(packed))):
            row = packed[min(number, len(packed) - 1)]
            scored = [branch for branch in row.branches if branch.context_length < len(branch.path)]
            if number < len(packed):
                trainer._account.add_tokens("scored_query", row.base)
                trainer._account.add_tokens("scored_contexts", len(row.ids) - row.base)
            places = [branch.completion.to(device) for branch in scored]
            recorder = BranchRecorder(self.config.representation, places)
            with (
                trainer._account.phase("contexts"),
                recorder.attached(trainer._backbone()),
                self.accelerator.autocast(),
            ):
                logp = trainer.model(
                    input_ids=row.ids[None].to(device),
                    attention_mask=self._tree_mask(row),
                    position_ids=row.positions[None].to(device),
                    shift_labels=row.labels()[None].to(device),
                    fused_lm_head=True,
                ).log_probs[0]
            if number < len(packed):
                for branch, z in zip(scored, recorder.result(), strict=True):
                    yield branch.key, logp[branch.predictors.to(device)], z

    def _tree_mask(self, row: PackedRow) -> torch.Tensor:
        """The row's attention mask, (1, 1, S, S), as the model's attention takes it: bool, or additive."""
        allowed = row.allowed().to(self.accelerator.device)[None, None]
        config = self.trainer.model.config.get_text_config()
        if config._attn_implementation == "sdpa":
            return allowed  # of no type that autocast could make differ from the queries'
        dtype = self.trainer.model.dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )

    def _most(self, count: int) -> int:
        """The largest `count` of any process."""
        if self.accelerator.num_processes == 1:
            return count
        return int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())

    def _pad(self, ids: list[Ids], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Padded ids and mask of one batch, on this process's device."""
        tensors = [torch.tensor(row, dtype=torch.long) for row in ids]
        multiple = self.trainer.pad_to_multiple_of
        padded = pad(tensors, self.trainer._tokenizer.pad_token_id, side, multiple)
        mask = pad([torch.ones_like(row) for row in tensors], 0, side, multiple)
        return padded.to(self.accelerator.device), mask.to(self.accelerator.device)


def can_share_prefixes(model: Any) -> bool:
    """
    Whether a model computes packed rows exactly: its attention must take a mask of our making, and every layer must
    look back without a window, which a row's order would distort.
    """
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        return False
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return kinds == {"full_attention"} and not (windowed and not getattr(config, "layer_types", None))


def _scale_rows(advantages: torch.Tensor, upsilon: torch.Tensor) -> torch.Tensor:
    """B = A * Upsilon for A of shape (B,) or (B, T)."""
    return advantages * upsilon.view(-1, *[1] * (advantages.dim() - 1)).to(advantages.dtype)
