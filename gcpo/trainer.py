"""GCPOTrainer: TRL's GRPOTrainer with causal weights on the advantages and a second KL term."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from torch import nn
from transformers import ProcessorMixin

from gcpo._trl import check_version, disable_gradient_checkpointing, get_config_model_id, pad
from gcpo.accounting import AccountedGRPOTrainer
from gcpo.colliders import Group, generate_colliders
from gcpo.config import GCPOConfig
from gcpo.contexts import Prompt, PromptBuilder, check_length, longest_prompt
from gcpo.estimators import HiddenRecorder, estimate_weights
from gcpo_kernels import gcpo_loss

# How each of TRL's loss types reduces its tokens, in terms of the four that gcpo_loss knows.
_REDUCTION = {
    "grpo": "grpo",
    "sapo": "grpo",
    "bnpo": "bnpo",
    "dr_grpo": "dr_grpo",
    "luspo": "luspo",
    "dapo": "dapo",
    "cispo": "dapo",
    "vespo": "dapo",
}


@dataclass
class _Rollout:
    """What one generation produced on this process, before TRL pads and masks it."""

    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]


class GCPOTrainer(AccountedGRPOTrainer):
    """
    Trainer for Group Causal Policy Optimization (GCPO, https://huggingface.co/papers/2508.05428).

    Takes exactly [`~trl.GRPOTrainer`]'s arguments, with `args` a [`GCPOConfig`]. Every training step adds to GRPO's:

    1. integrated answers (colliders), which the policy writes after seeing all candidates of a prompt;
    2. representations of candidates and colliders, from forwards that also score them;
    3. advantages multiplied by the causal weight Upsilon (eq. 11), a constant;
    4. scores of the candidates under the contexts x_{i,l}, from which `gcpo_kernels.gcpo_loss` forms the causal
       reference and a second KL term, kappa * k3 (eqs. 10, 12, 13), added to TRL's own loss.

    With `kappa=0` and `estimator="none"` it is GRPOTrainer. All that concerns a group is computed on gathered rows,
    before TRL shuffles and splits them. Evaluation reports GRPO's metrics; the causal parts run in training only.
    """

    _tag_names = ["trl", "gcpo"]
    _name = "GCPO"
    _paper = {
        "title": "Group Causal Policy Optimization for Post-Training Large Language Models",
        "id": "2508.05428",
        "citation": textwrap.dedent("""\
            @article{gcpo2025,
                title  = {{Group Causal Policy Optimization for Post-Training Large Language Models}},
                year   = 2025,
                eprint = {arXiv:2508.05428},
            }"""),
    }

    def __init__(self, model: Any, reward_funcs: Any = None, args: GCPOConfig | None = None, **kwargs: Any):
        check_version()
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GCPOConfig(f"{name.split('/')[-1]}-GCPO")
        if not isinstance(args, GCPOConfig):
            raise TypeError(
                f"`args` must be a GCPOConfig, which takes every option of GRPOConfig, got {type(args).__name__}."
            )
        if args.is_causal:
            _refuse_unsupported(kwargs)
        super().__init__(model, reward_funcs, args=args, **kwargs)
        if args.is_causal and self._is_vlm:
            raise ValueError("`processing_class` must be a tokenizer: GCPO shows candidates as text, without images.")
        config = self.model.config.get_text_config()
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        if args.is_causal:
            longest = longest_prompt(args, self.max_completion_length)
            check_length(longest, self.max_positions, "Showing the candidates and colliders of one prompt")
        self._builder = PromptBuilder(self._tokenizer, args, self.chat_template, self.chat_template_kwargs)
        self._recorder: HiddenRecorder | None = None
        self._rollout: _Rollout | None = None
        self._scoring = super()._scored()  # phase and kind of tokens of the scoring passes that follow
        self._policy_logps: torch.Tensor | None = None  # of the forward that the loss is being computed from

    # -----------------------------------------------------------------------------------------------------------------
    # What TRL does, watched
    # -----------------------------------------------------------------------------------------------------------------

    def _generate(self, prompts: list[Prompt]) -> tuple:
        result = super()._generate(prompts)
        self._rollout = _Rollout(prompts, result[0], result[1])
        return result

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        # An infinite reward would make its group's mean, and then its advantages, infinite: no reward, as NaN is.
        rewards = torch.where(torch.isfinite(rewards), rewards, torch.nan)
        mode = "train" if self.model.training else "eval"
        n = self.num_generations if mode == "train" else self.num_generations_eval
        lost = rewards.isnan().all(dim=1).view(-1, n).all(dim=1)
        self._metrics[mode]["gcpo/groups_without_reward"].append(lost.float().mean().item())
        return rewards

    def _scored(self) -> tuple[str, str]:
        return self._scoring

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple:
        call = super()._get_per_token_logps_and_entropies
        if torch.is_grad_enabled():
            result = call(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
            self._policy_logps = result[0]
            return result
        if self._recorder is None or model is not self.model:
            return call(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        # A scoring pass of the policy's also gives the representations.
        with self._recorder.attached(self._backbone(), logits_to_keep):
            return call(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    # -----------------------------------------------------------------------------------------------------------------
    # What GCPO adds to a rollout
    # -----------------------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not (self.args.is_causal and self.model.training):
            return super()._generate_and_score_completions(inputs)
        # Where TRL scores the rollout under the policy itself, its first such pass is ours too. It hides truncated
        # completions when they are masked, so then it is of no use.
        recorder = None if self.mask_truncated_completions else HiddenRecorder(self.args.representation)
        self._recorder = recorder
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._recorder = None
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            self._add_causal_inputs(output, recorder)
        return output

    def _add_causal_inputs(self, output: dict[str, Any], recorder: HiddenRecorder | None) -> None:
        """Weigh `output["advantages"]` and add what the second KL term needs, as tensors of this process's rows."""
        rollout = self._rollout
        assert rollout is not None
        length = output["completion_ids"].size(1)
        query_logp = output.get("old_per_token_logps")
        if query_logp is not None and recorder is not None:
            z = recorder.result()[: len(rollout.prompts)]  # a PEFT reference pass over the same model comes after
        else:
            query_logp, z = self._score(rollout.prompt_ids, rollout.completion_ids, length)
        groups = self._make_groups(rollout)
        n, first = self.num_generations, self.accelerator.process_index * len(rollout.prompts)
        rows = [divmod(first + k, n) for k in range(len(rollout.prompts))]  # (group, candidate) of each local row
        context_logp = context_z = None
        if self.args.uses_contexts:
            context_logp, context_z = self._score_contexts(rollout, groups, rows, length)
        device = self.accelerator.device
        has_content = torch.tensor([group.has_content for group in groups], device=device)  # (P, L)
        if self.args.uses_weights:
            upsilon = self._weigh(output, groups, z, context_z, has_content)
            output["advantages"] = _scale_rows(output["advantages"], upsilon[first : first + len(rows)])
        if self.args.kappa > 0:
            assert context_logp is not None
            valid = has_content[[p for p, _ in rows]].float()  # (B, L)
            output["query_logps"] = query_logp
            output["context_logps"] = context_logp
            output["context_weights"] = valid / valid.sum(dim=1, keepdim=True).clamp(min=1.0)
            output["has_collider"] = valid.any(dim=1)

    def _make_groups(self, rollout: _Rollout) -> list[Group]:
        """All groups of all processes, with their colliders."""
        n = self.num_generations
        prompts = gather_object(rollout.prompts)[::n]
        prompt_ids = gather_object(rollout.prompt_ids)[::n]
        completions = gather_object(rollout.completion_ids)
        candidates = [completions[start : start + n] for start in range(0, len(completions), n)]
        with self._account.phase("colliders"):
            # From the step, so that a resumed run draws as an uninterrupted one.
            substep = self._step % self.args.gradient_accumulation_steps
            seed = self.args.seed + 1_000_003 * (self.state.global_step + 1) + 1_009 * substep
            groups = generate_colliders(self, self._builder, prompts, prompt_ids, candidates, seed)
        lengths = torch.tensor([len(ids) for group in groups for ids in group.colliders], dtype=torch.float32)
        ended = [ids[-1] in self.eos_token_ids for group in groups for ids in group.colliders if ids]
        content = [flag for group in groups for flag in group.has_content]
        # Counted once, on the main process: token counts are summed over processes.
        if self.accelerator.is_main_process:
            self._account.add_tokens("generated_colliders", int(lengths.sum()))
        self._log("colliders/mean_length", lengths.mean())
        self._log("colliders/ended", sum(ended) / max(len(content), 1))
        self._log("colliders/empty", 1.0 - sum(content) / max(len(content), 1))
        return groups

    def _score_contexts(
        self, rollout: _Rollout, groups: list[Group], rows: list[tuple[int, int]], length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log pi_old(y_i | x_{i,l}) (B, T, L) and y_i's representation under x_{i,l} (B, L, H), of local rows."""
        contexts, completions = [], []
        for (p, i), completion in zip(rows, rollout.completion_ids, strict=True):
            group = groups[p]
            others = group.candidates[:i] + group.candidates[i + 1 :]
            for collider in group.colliders:
                contexts.append(self._builder.context(group.prompt, others, collider))
                completions.append(completion)
        longest = max(len(x) + len(y) for x, y in zip(contexts, completions, strict=True))
        check_length(longest, self.max_positions, "A context with its candidate")
        with self._counted_as("contexts", "scored_contexts"):
            logp, z = self._score(contexts, completions, length)
        count = len(groups[0].colliders)
        return logp.view(len(rows), count, length).transpose(1, 2), z.view(len(rows), count, -1)

    def _weigh(
        self,
        output: dict[str, Any],
        groups: list[Group],
        z: torch.Tensor,
        context_z: torch.Tensor | None,
        has_content: torch.Tensor,
    ) -> torch.Tensor:
        """Upsilon of all rows of all processes, (P * n,); also logs it."""
        n = self.num_generations
        z = self.accelerator.gather(z).view(-1, n, z.shape[-1])
        collider_z = None
        if self.args.estimator == "loo":
            collider_z = self._represent_colliders(groups)
        else:
            assert context_z is not None
            context_z = self.accelerator.gather(context_z.contiguous()).view(z.shape[0], n, *context_z.shape[1:])
        upsilon, metrics = estimate_weights(self.args, z, collider_z, context_z, has_content)
        upsilon = upsilon.flatten()
        for name, value in metrics.items():
            self._log(name, value)
        eos = set(self.eos_token_ids)
        ended = torch.tensor([ids[-1] in eos for g in groups for ids in g.candidates], device=upsilon.device)
        for name, those in (("ended", ended), ("truncated", ~ended)):
            self._log(f"upsilon/{name}_mean", upsilon[those].mean())
        # TRL has logged A already; the completions table shows B = A * Upsilon, and Upsilon in a column of its own.
        logged = self._logs["advantages"]
        tail = [logged.pop() for _ in range(min(len(upsilon), len(logged)))][::-1]
        logged.extend(a * u for a, u in zip(tail, upsilon[-len(tail) :].tolist(), strict=True))
        self._logs["extra"]["upsilon"].extend(upsilon.tolist())
        return upsilon

    def _represent_colliders(self, groups: list[Group]) -> torch.Tensor:
        """z of every collider under its query, as candidates are represented: (P, L, H). Processes share the work."""
        eos = [self._tokenizer.eos_token_id]
        tasks = [(group.prompt_ids, collider or eos) for group in groups for collider in group.colliders]
        processes = self.accelerator.num_processes
        share = -(-len(tasks) // processes)
        padded = tasks + [tasks[-1]] * (share * processes - len(tasks))
        start = self.accelerator.process_index * share
        local = padded[start : start + share]
        longest = max(len(collider) for _, collider in local)
        with self._counted_as("scoring", "scored_colliders"):
            _, z = self._score([query for query, _ in local], [collider for _, collider in local], longest)
        z = self.accelerator.gather(z)[: len(tasks)]
        return z.view(len(groups), -1, z.shape[-1])

    def _score(
        self, prompts: list[list[int]], completions: list[list[int]], length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Score each completion after its prompt with the policy, without gradient: log-probabilities (rows, length),
        0 behind a completion's end, and representations (rows, H) float32. Rows of similar length share a forward.
        """
        device, rows = self.accelerator.device, len(prompts)
        step = self.args.context_batch_size or self.args.per_device_train_batch_size
        order = sorted(range(rows), key=lambda k: len(prompts[k]) + len(completions[k]))
        logp = torch.zeros(rows, length, device=device)
        z = None
        for start in range(0, rows, step):
            part = order[start : start + step]
            x, x_mask = self._pad([prompts[k] for k in part], "left")
            y, y_mask = self._pad([completions[k] for k in part], "right")
            keep = y.size(1)
            self._recorder = HiddenRecorder(self.args.representation)
            try:
                scores, _, _ = self._get_per_token_logps_and_entropies(
                    self.model, torch.cat([x, y], dim=1), torch.cat([x_mask, y_mask], dim=1), keep
                )
                reduced = self._recorder.result()
            finally:
                self._recorder = None
            z = reduced.new_zeros(rows, reduced.shape[1]) if z is None else z
            z[part] = reduced
            width = min(keep, length)
            logp[part, :width] = torch.where(y_mask != 0, scores, 0.0)[:, :width].to(logp.dtype)
        assert z is not None
        return logp, z

    @contextmanager
    def _counted_as(self, phase: str, tokens: str) -> Iterator[None]:
        before, self._scoring = self._scoring, (phase, tokens)
        try:
            yield
        finally:
            self._scoring = before

    def _pad(self, ids: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Padded ids and mask of one batch, on this process's device."""
        tensors = [torch.tensor(row, dtype=torch.long) for row in ids]
        multiple = self.pad_to_multiple_of
        padded = pad(tensors, self._tokenizer.pad_token_id, side, multiple)
        mask = pad([torch.ones_like(row) for row in tensors], 0, side, multiple)
        return padded.to(self.accelerator.device), mask.to(self.accelerator.device)

    def _backbone(self) -> nn.Module:
        """The module whose output is what lm_head reads."""
        model = self.accelerator.unwrap_model(self.model)
        return (model.get_base_model() if is_peft_model(model) else model).base_model

    # -----------------------------------------------------------------------------------------------------------------
    # The loss
    # -----------------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        try:
            loss = super()._compute_loss(model, inputs)
            if "context_logps" not in inputs:
                return loss
            return loss + self._causal_loss(inputs)
        finally:
            self._policy_logps = None

    def _causal_loss(self, inputs: dict[str, Any]) -> torch.Tensor:
        """kappa * k3 towards the causal reference, reduced and scaled for gradient accumulation as TRL's own loss."""
        logp = self._policy_logps
        assert logp is not None
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        reduction = _REDUCTION[self.loss_type]
        accumulation = self.current_gradient_accumulation_steps
        scale: float = 1.0 / accumulation
        items = mask.sum()
        if reduction == "dapo":
            # The count spans the generation batch: bring it to one accumulation window of one process.
            items = inputs["num_items_in_batch"] / self.accelerator.num_processes
            items = items * accumulation / self.args.steps_per_generation
            scale = 1.0
        elif reduction == "bnpo":
            reduction = "dapo"  # over all unmasked tokens, those without a collider included
        counted = mask * inputs["has_collider"].unsqueeze(1)
        loss, metrics = gcpo_loss(
            logp,
            torch.zeros_like(inputs["query_logps"][:, 0]),
            counted,
            old_logp=logp.detach(),
            query_logp=inputs["query_logps"],
            context_logp=inputs["context_logps"],
            context_weights=inputs["context_weights"],
            kappa=self.args.kappa,
            proj_floor=self.args.proj_floor,
            loss_type="dr_grpo" if reduction == "luspo" else reduction,
            max_completion_length=1 if reduction == "luspo" else self.max_completion_length,
            num_items_in_batch=items,
        )
        # Means over the tokens of all processes, as TRL's own "kl".
        count = counted.sum().float()
        sums = torch.stack([metrics["kl_causal"] * count, metrics["proj_clamped"] * count, count])
        kl_causal, clamped, count = self.accelerator.reduce(sums, reduction="sum")
        self._log("kl_causal", kl_causal / count.clamp(min=1.0))
        self._log("proj_clamped", clamped / count.clamp(min=1.0))
        return loss * scale

    def _log(self, name: str, value: torch.Tensor | float) -> None:
        self._metrics["train"][f"gcpo/{name}"].append(float(value))


def _refuse_unsupported(arguments: dict[str, Any]) -> None:
    for name in ("tools", "environment_factory"):
        if arguments.get(name):
            raise ValueError(
                f"`{name}` must be None: GCPO shows candidates to the policy as plain text, which a conversation with "
                "tool calls is not. Use GRPOTrainer, or `kappa=0` with `estimator='none'`."
            )
    if isinstance(arguments.get("processing_class"), ProcessorMixin):
        raise ValueError("`processing_class` must be a tokenizer: GCPO shows candidates as text, without images.")


def _scale_rows(advantages: torch.Tensor, upsilon: torch.Tensor) -> torch.Tensor:
    """B = A * Upsilon for A of shape (B,) or (B, T)."""
    return advantages * upsilon.view(-1, *[1] * (advantages.dim() - 1)).to(advantages.dtype)
