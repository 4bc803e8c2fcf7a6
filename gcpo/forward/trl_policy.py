"""
The policy that a trainer of TRL's holds, and the one file that reads a trainer's insides: whose model scores, whose
generation path writes colliders, whose reward functions and counters are used.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList
from trl import GRPOTrainer

from gcpo._trl import disable_gradient_checkpointing, is_async_callable
from gcpo.causal.account import StepAccount
from gcpo.causal.port import Ids, Piece, Prompt, RolloutStates
from gcpo.causal.sampling import own_random_stream
from gcpo.forward.generation import (
    GenerationRecorder,
    GreedyRows,
    continued_from,
    decodes_after_keys,
    read_repeated_prompts_once,
)
from gcpo.forward.models import ModelForwards, learns_positions, no_auxiliary_loss, padded_width, without_dropout
from gcpo.forward.representations import HiddenRecorder


class TrlPolicy(ModelForwards):
    """
    Args:
        trainer: a GCPOTrainer whose `__init__` is done but for what needs this policy.
    """

    allows_nan = True  # a step whose gradients are not finite is left out (gcpo.run.guard)
    _states: list[RolloutStates] | None = None  # where generation is watched: what each call left
    _continues = False  # while a generation begins after keys and values
    _recorder: HiddenRecorder | None = None  # where scoring passes are watched

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.options, self.accelerator = trainer.args, trainer.accelerator
        self.eos_token_ids = self.trainer.eos_token_ids
        self.pad_token_id = self.trainer._tokenizer.pad_token_id
        self.pad_to_multiple_of = self.trainer.pad_to_multiple_of
        self.num_generations = self.trainer.num_generations
        self.look_at(self.trainer.model)
        if self.options.is_causal and learns_positions(self.trainer.model):
            warnings.warn(
                f"{self.name} learns an embedding for each position, and TRL's forwards do not tell it where a prompt "
                "that is padded on the left begins: its scores depend on the padding, and those that GCPO makes without"
                " any do not fit them. Use a model with rotary positions.",
                stacklevel=2,
            )

    # -----------------------------------------------------------------------------------------------------------------
    # The trainer's properties
    # -----------------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        return self.trainer.model

    @property
    def unwrapped(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.trainer.accelerator.device

    @property
    def rows_per_forward(self) -> int:
        return self.options.context_batch_size or self.trainer.args.per_device_train_batch_size

    @property
    def max_positions(self) -> int | None:
        return self.trainer.max_positions

    @property
    def max_completion_length(self) -> int | None:
        """Most tokens of a candidate: TRL's option, unless `generation_kwargs` says otherwise."""
        if self.trainer.use_vllm:
            engine = self.trainer.vllm_generation
            return engine.generation_kwargs.get("max_tokens", engine.max_completion_length)
        return self.trainer.generation_config.max_new_tokens

    @property
    def masks_truncated(self) -> bool:
        return self.trainer.mask_truncated_completions

    @property
    def ending_ids(self) -> list[int]:
        return [*self.eos_token_ids, self.pad_token_id]

    @property
    def step_seed(self) -> int:
        substep = self.trainer._step % self.trainer.args.gradient_accumulation_steps
        return self.trainer.args.seed + 1_000_003 * (self.trainer.state.global_step + 1) + 1_009 * substep

    @property
    def account(self) -> StepAccount:  # type: ignore[override]
        return self.trainer._account  # of training, or of evaluation

    def log(self, name: str, value: torch.Tensor | float) -> None:
        self.trainer._log(name, value)

    # -----------------------------------------------------------------------------------------------------------------
    # Generation
    # -----------------------------------------------------------------------------------------------------------------

    @property
    def generates_in_house(self) -> bool:
        """Whether transformers' `generate` makes what the causal step asks for."""
        return not (self.trainer.use_vllm or self.trainer.use_transformers_continuous_batching)

    @property
    def can_decode(self) -> bool:
        plain = self.generates_in_house and decodes_after_keys(self.trainer.generation_kwargs)
        return plain and self.can_continue and not self.trainer.rollout_func

    def generate(
        self,
        prompts: list[Ids],
        seed: int,
        *,
        limit: int,
        temperature: float | None,
        greedy: Sequence[bool] | None = None,
    ) -> list[Ids]:
        with own_random_stream(seed):
            if greedy is None or (self.generates_in_house and self.trainer.generation_kwargs.get("num_beams", 1) == 1):
                return self._generate(prompts, limit, temperature, greedy)
            # One temperature for a call. Engines that serve several processes take as many prompts from each.
            outputs: list[Ids] = [[] for _ in prompts]
            for flag, degrees in ((True, 0.0), (False, temperature)):
                part = [k for k, is_greedy in enumerate(greedy) if is_greedy == flag]
                count = self.most(len(part))
                if count:
                    offered = [*part, *[0] * (count - len(part))]
                    completions = self._generate([prompts[k] for k in offered], limit, degrees)
                    outputs = [completions[part.index(k)] if k in part else ids for k, ids in enumerate(outputs)]
            return outputs

    def _generate(
        self, prompts: list[Ids], limit: int, temperature: float | None, greedy: Sequence[bool] | None = None
    ) -> list[Ids]:
        watched, self._states = self._states, None  # what colliders leave is of no use
        try:
            with self._sampling(limit, temperature), self._decoding_greedily(greedy):
                return self.trainer._generate_single_turn(prompts, None, {}, 1)[0]
        finally:
            self._states = watched

    def _decode_after(
        self,
        past: list[list[Piece]],
        ids: list[Ids],
        positions: list[int],
        limit: int,
        temperature: float | None,
        greedy: Sequence[bool] | None,
    ) -> list[Ids]:
        self._continues = True
        try:
            with continued_from(self.backbone, past, positions, self.device):
                return self._generate(ids, limit, temperature, greedy)
        finally:
            self._continues = False

    @contextmanager
    def _decoding_greedily(self, greedy: Sequence[bool] | None) -> Iterator[None]:
        """The model's `generate` decodes these rows at temperature 0: TRL passes it settings of all rows alone."""
        if greedy is None:
            yield
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)  # as TRL does
        own, generate = "generate" in vars(model), model.generate
        model.generate = partial(generate, logits_processor=LogitsProcessorList([GreedyRows(greedy)]))
        try:
            yield
        finally:
            if own:  # of the model object, not of its class: someone else's
                model.generate = generate
            else:
                del model.generate

    def sample_states(self, prompts: list[Ids], seed: int, rows: int) -> tuple[list[Ids], torch.Tensor]:
        # An engine makes batches of its own.
        return super().sample_states(prompts, seed, len(prompts) if self.trainer.use_vllm else rows)

    def _sample_outputs(self, prompts: list[Ids]) -> tuple[list[Ids], RolloutStates | None]:
        with self.watching_generation() as states:
            outputs = self.trainer._generate_single_turn(prompts, None, {}, 1)[0]
        return outputs, states.pop() if states else None

    @contextmanager
    def staying_awake(self) -> Iterator[None]:
        """
        Inside, a colocated engine with sleep mode does not go to sleep between calls. It loses its weights when it
        does, so that they would be pushed to it again for colliders.
        """
        trainer = self.trainer
        engine = trainer.vllm_generation if trainer.use_vllm else None
        if engine is None or engine.mode != "colocate" or not engine.enable_sleep_mode:
            yield
            return
        engine.sync_weights()  # which wakes it up
        trainer._last_loaded_step = trainer.state.global_step
        engine.llm.wake_up(tags=["kv_cache"])
        engine.enable_sleep_mode = False
        try:
            yield
        finally:
            engine.enable_sleep_mode = True
            engine.llm.sleep(level=2)
            engine._llm_weights_sleeping = True

    @contextmanager
    def watching_generation(self) -> Iterator[list[RolloutStates]]:
        """What the model's generation inside computed anyway, a call each; nothing where it is of no use."""
        before, self._states = self._states, []
        try:
            yield self._states
        finally:
            self._states = before

    def generate_watched(self, call: Any, prompt_ids: list[Ids], *args: Any, **kwargs: Any) -> tuple:
        """TRL's generation (`call`), with prompts that repeat read once, and its states kept where they are wanted."""
        trainer = self.trainer
        if not self.generates_in_house or trainer.rollout_func:
            return call(prompt_ids, *args, **kwargs)
        repeated = len(prompt_ids) - len(set(map(tuple, prompt_ids)))
        if self.gathers_weights:  # then every process must take the same path, whatever its prompts
            repeated = self.most(repeated)
        # After keys and values, prompts of one token may be equal, but rows are not.
        repeats = self.shares and not self._continues and repeated > 0
        with ExitStack() as stack:
            # Candidates and their states are the policy's, as their scores are (TRL leaves dropout on here).
            stack.enter_context(without_dropout(self.model))
            if repeats:
                stack.enter_context(read_repeated_prompts_once(self.backbone))
            if self._states is None or not (self.options.reuse_rollout and self.options.uses_rollout_states):
                return call(prompt_ids, *args, **kwargs)
            width = padded_width(prompt_ids, self.pad_to_multiple_of)
            recorder = GenerationRecorder(
                self.options.representation, self.eos_token_ids, self.max_completion_length, width
            )
            stack.enter_context(recorder.attached(self.backbone))
            result = call(prompt_ids, *args, **kwargs)
            with disable_gradient_checkpointing(self.model, trainer.args.gradient_checkpointing_kwargs):
                states = recorder.finish(self, prompt_ids, result[0])
        if states is not None:
            self._states.append(states)
        return result

    @contextmanager
    def _sampling(self, limit: int, temperature: float | None) -> Iterator[None]:
        """Let the trainer's generation path, whichever backend it is, sample as colliders are sampled."""
        trainer = self.trainer
        if trainer.use_vllm:
            vllm = trainer.vllm_generation
            before = vllm.max_completion_length, vllm.temperature, vllm.generation_kwargs
            vllm.max_completion_length = limit
            vllm.temperature = vllm.temperature if temperature is None else temperature
            # `generation_kwargs` win over both, and are meant for candidates: colliders may be shorter.
            own = {name: value for name, value in vllm.generation_kwargs.items() if name != "max_tokens"}
            if temperature is not None:
                own.pop("temperature", None)
            if own.get("min_tokens"):
                own["min_tokens"] = min(own["min_tokens"], limit)
            vllm.generation_kwargs = own
            try:
                yield
            finally:
                vllm.max_completion_length, vllm.temperature, vllm.generation_kwargs = before
            return
        config, kwargs = trainer.generation_config, trainer.generation_kwargs
        # Lengths of prompt and completion together say nothing about a collider, whose prompt is another.
        changed = {name: value for name, value in kwargs.items() if name not in ("max_length", "min_length")}
        changed["max_new_tokens"] = limit
        if temperature == 0:
            changed |= {"do_sample": False, "temperature": None}
        elif temperature is not None:
            changed["temperature"] = temperature
        if changed.get("min_new_tokens"):  # asked for of candidates: colliders may be shorter
            changed["min_new_tokens"] = min(changed["min_new_tokens"], limit)
        trainer.generation_kwargs = changed
        trainer.generation_config = GenerationConfig(**changed, disable_compile=True)
        try:
            yield
        finally:
            trainer.generation_config, trainer.generation_kwargs = config, kwargs

    @property
    def gathers_weights(self) -> str | None:
        """What gathers weights from all processes for every forward; None: nothing does."""
        trainer = self.trainer
        if trainer.is_fsdp_enabled:
            return "FSDP"
        stage_3 = trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
        return "DeepSpeed ZeRO-3" if stage_3 else None

    # -----------------------------------------------------------------------------------------------------------------
    # Scores
    # -----------------------------------------------------------------------------------------------------------------

    @contextmanager
    def watching_scores(self) -> Iterator[HiddenRecorder]:
        """TRL's own scoring passes of the policy inside also give the representations of what they score."""
        self._recorder = HiddenRecorder(self.options.representation)
        try:
            yield self._recorder
        finally:
            self._recorder = None

    def recorder_of(self, model: Any) -> HiddenRecorder | None:
        """What watches scoring passes of this model, if anything does."""
        return self._recorder if model is self.model else None

    def watched(self, model: Any, logits_to_keep: int) -> AbstractContextManager[Any]:
        """For a scoring pass of TRL's: adds to the recorder that watches, where there is one."""
        recorder = self.recorder_of(model)
        return ExitStack() if recorder is None else recorder.attached(self.backbone, logits_to_keep)

    def _score_padded(
        self, ids: torch.Tensor, mask: torch.Tensor, completion_length: int, recorder: HiddenRecorder
    ) -> torch.Tensor:
        own, score = self.trainer.own_forward, GRPOTrainer._get_per_token_logps_and_entropies
        with recorder.attached(self.backbone, completion_length):
            if own is None:  # TRL's, not one that counts and watches
                return score(self.trainer, self.model, ids, mask, completion_length)[0]
            rows, part = own.rows(ids, mask, completion_length, without_padding=False), slice(-completion_length, None)
            return own.score(self.model, rows, ids[:, part], mask[:, part])[0].logp

    def _log_probs(self, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        if self.trainer.own_forward is not None:
            return self.trainer.own_forward.log_probs(self.model, labels, **inputs, **no_auxiliary_loss(self.model))
        with self.autocast():
            output = self.model(shift_labels=labels, fused_lm_head=True, **inputs, **no_auxiliary_loss(self.model))
        return output.log_probs

    # -----------------------------------------------------------------------------------------------------------------
    # Rewards
    # -----------------------------------------------------------------------------------------------------------------

    def reward(self, inputs: list[dict[str, Any]], prompts: list[Prompt], ids: list[Ids]) -> torch.Tensor:
        trainer = self.trainer
        texts: list[Any] = trainer._tokenizer.batch_decode(ids, skip_special_tokens=True)
        if not isinstance(prompts[0], str):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        with self._no_logs_of_reward_functions(), self._named_failures():
            per_function = GRPOTrainer._calculate_rewards(trainer, inputs, prompts, texts, ids)
        # As `reward`: the weighted sum of what is finite; none where nothing is.
        finite = torch.where(per_function.isfinite(), per_function, torch.nan)
        total = (finite * trainer.reward_weights.to(finite.device)).nansum(dim=1)
        return torch.where(per_function.isfinite().any(dim=1), total, torch.nan)

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        """What a reward function raises inside names it."""
        trainer, functions = self.trainer, self.trainer.reward_funcs
        named = zip(functions, trainer.reward_func_names, strict=True)
        trainer.reward_funcs = [f if isinstance(f, nn.Module) else _naming(f, name) for f, name in named]
        try:
            yield
        finally:
            trainer.reward_funcs = functions

    @contextmanager
    def _no_logs_of_reward_functions(self) -> Iterator[None]:
        """Columns and metrics that reward functions log are of candidates: what they say of colliders is dropped."""
        names = ("_log_completion_extra", "_log_metric")
        for name in names:
            setattr(self.trainer, name, lambda *args, **kwargs: None)
        try:
            yield
        finally:
            for name in names:
                delattr(self.trainer, name)


def _naming(function: Any, name: str) -> Any:
    """This reward function, whose name is in whatever it raises."""

    def failure(error: Exception) -> RuntimeError:
        return RuntimeError(f"Reward function {name!r} raised {type(error).__name__}: {error}.")

    async def call_async(*args: Any, **kwargs: Any) -> Any:
        try:
            return await function(*args, **kwargs)
        except Exception as error:
            raise failure(error) from error

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise failure(error) from error

    return call_async if is_async_callable(function) else call
