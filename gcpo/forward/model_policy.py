"""The policy of a loop of one's own: a transformers model and its tokenizer, without TRL."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from gcpo.causal.account import StepAccount
from gcpo.causal.contexts import PromptBuilder, check_length, longest_prompt
from gcpo.causal.options import CausalOptions
from gcpo.causal.port import Ids, Piece, Prompt, Rollout, RolloutStates
from gcpo.causal.sampling import own_random_stream
from gcpo.forward.generation import (
    GenerationRecorder,
    GreedyRows,
    continued_from,
    decodes_after_keys,
    read_repeated_prompts_once,
)
from gcpo.forward.models import ModelForwards, no_auxiliary_loss, without_dropout
from gcpo.forward.output_layer import logit_options
from gcpo.forward.representations import HiddenRecorder
from gcpo_kernels import linear_logprob
from gcpo_kernels.options import check_count, check_number

# What of GenerationConfig the policy sets itself, or cannot follow.
_RESERVED = set(
    "max_new_tokens max_length do_sample temperature pad_token_id eos_token_id disable_compile num_return_sequences "
    "num_beams stop_strings return_dict_in_generate".split()
)
# What is scored is the softmax of logits / temperature: nothing that a model's own generation config says besides may
# change what is sampled.
_PLAIN_SAMPLING = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


class ModelPolicy(ModelForwards):
    """
    A causal language model of transformers, as the causal step sees it ([`~gcpo.CausalStep`]), and what a training loop
    needs beside: `rollout`, `reward` and `logps`.

    Args:
        model: the model, or what wraps it for data parallelism (DDP); its parameters must be whole on every process.
        tokenizer: its tokenizer. Without a padding token, its end token pads.
        options: of the method.
        num_generations: n, candidates of a prompt.
        max_completion_length: most tokens of a candidate.
        temperature: of candidates, and by it all logits are divided.
        reward_func: called as TRL's are, with `prompts`, `completions` (texts, or lists of one message where prompts
            are messages) and a list for every other column of the dataset's rows; returns a number or None for each.
        accelerator: `accelerate.Accelerator` of a run on several processes, each with as many prompts of its own.
        context_batch_size: rows of a scoring forward, where the options do not say.
        generation_kwargs: further arguments of `transformers.GenerationConfig`, for candidates and colliders.
        seed: of colliders and draws; candidates come from torch's own stream.

    Attributes:
        builder: makes the prompts that show candidates: `CausalStep(policy, options, policy.builder)`.
        metrics: what the causal step logged of the last rollout.
        account: seconds by phase and tokens by kind since its last `flush`.

    Raises:
        ValueError: the tokenizer has no end token, an adapter sits on the output layer, or what is shown of candidates
            cannot fit into the model's positions.
    """

    allows_nan = False
    masks_truncated = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        options: CausalOptions,
        *,
        num_generations: int,
        max_completion_length: int,
        temperature: float = 1.0,
        reward_func: Callable[..., list[float | None]] | None = None,
        accelerator: Any = None,
        context_batch_size: int = 8,
        generation_kwargs: dict[str, Any] | None = None,
        seed: int = 0,
    ):
        check_count("num_generations", num_generations)
        check_count("max_completion_length", max_completion_length)
        check_count("context_batch_size", context_batch_size)
        if num_generations < 2:
            raise ValueError(f"`num_generations` must be at least 2, got {num_generations}: a group has others in it.")
        check_number("temperature", temperature, above=0.0)
        if options.rewards_colliders and reward_func is None:
            raise ValueError(
                "`reward_func` must be given to reward colliders (`collider_choice`, `log_collider_reward`)."
            )
        if tokenizer.eos_token_id is None:
            raise ValueError("`tokenizer` must have an `eos_token`: without one, no completion ever ends.")
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.accelerator = accelerator
        self.num_generations, self.max_completion_length = num_generations, max_completion_length
        self.temperature, self.reward_func, self.seed = temperature, reward_func, seed
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        known = getattr(self.unwrapped, "generation_config", None)
        known = [] if known is None or known.eos_token_id is None else known.eos_token_id
        ends = [tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])]
        self.eos_token_ids = list(dict.fromkeys(ends))
        self.context_batch_size = context_batch_size
        self.generation_kwargs = generation_kwargs or {}
        taken = sorted(_RESERVED & self.generation_kwargs.keys())
        if taken:
            raise ValueError(f"`generation_kwargs` must leave out what the policy sets itself, got {', '.join(taken)}.")
        self.look_at(self.unwrapped)
        self._head_options = _head_options(self.unwrapped)
        longest = longest_prompt(options, num_generations, max_completion_length)
        check_length(longest, self.max_positions, "Showing the candidates and colliders of one prompt")
        self.builder = PromptBuilder(tokenizer, options)
        self.account = StepAccount()
        self.metrics: dict[str, float] = {}
        self._steps = 0

    # -----------------------------------------------------------------------------------------------------------------
    # For a training loop
    # -----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rollout(self, inputs: list[dict[str, Any]]) -> Rollout:
        """
        Sample n candidates for each of these rows of a dataset, by their column `prompt`: text, or messages of a
        conversation, to which the tokenizer's chat template is applied.
        """
        if not inputs or any("prompt" not in row for row in inputs):
            raise ValueError(f"`inputs` must be rows with a column `prompt`, got {inputs or 'an empty list'}.")
        self._steps += 1
        self.metrics = {}
        rows = [row for row in inputs for _ in range(self.num_generations)]
        prompts: list[Prompt] = [row["prompt"] for row in rows]
        prompt_ids = [ids for row in inputs for ids in [self._tokenize(row["prompt"])] * self.num_generations]
        longest = max(map(len, prompt_ids)) + self.max_completion_length
        check_length(longest, self.max_positions, "A prompt with its completion")
        with self.phase("rollout"):
            completions, states = self._sample(prompt_ids, self.max_completion_length, None)
        self.count("generated", sum(map(len, completions)))
        return Rollout(prompts, prompt_ids, completions, states, rows)

    def logps(self, rollout: Rollout, prompts: list[Ids] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        log pi(y | q) of a rollout's completions, (B, T) float32 with gradient where that is enabled, and the mask of
        their tokens, (B, T) int64. `prompts`: what they are conditioned on instead of q, as `terms.first_contexts`.
        """
        prompts = rollout.prompt_ids if prompts is None else prompts
        x, x_mask = self.pad(prompts, "left")
        y, y_mask = self.pad(rollout.completion_ids, "right")
        self.count("trained", sum(map(len, prompts)) + sum(map(len, rollout.completion_ids)))
        recorder = HiddenRecorder(self.options.representation)
        ids, mask = torch.cat([x, y], dim=1), torch.cat([x_mask, y_mask], dim=1)
        return self._score_padded(ids, mask, y.shape[1], recorder), y_mask

    def reward(self, inputs: list[dict[str, Any]], prompts: list[Prompt], ids: list[Ids]) -> torch.Tensor:
        """Rewards (rows of all processes,) float32; NaN where there is none, or one that is not finite."""
        if self.reward_func is None:
            raise ValueError("`reward_func` must be given to reward completions, got None.")
        texts: list[Any] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        if not isinstance(prompts[0], str):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        columns = {name: [row[name] for row in inputs] for name in inputs[0] if name != "prompt"}
        try:
            rewards = self.reward_func(prompts=prompts, completions=texts, **columns)
        except Exception as error:
            name = getattr(self.reward_func, "__name__", type(self.reward_func).__name__)
            raise RuntimeError(f"Reward function {name!r} raised {type(error).__name__}: {error}.") from error
        if not hasattr(rewards, "__len__") or len(rewards) != len(ids):
            got = len(rewards) if hasattr(rewards, "__len__") else type(rewards).__name__
            raise ValueError(f"`reward_func` must return {len(ids)} rewards, one for each completion, got {got}.")
        numbers = torch.tensor([torch.nan if reward is None else float(reward) for reward in rewards])
        # An infinite reward would make its group's mean, and then its advantages, infinite.
        return self.gather(torch.where(numbers.isfinite(), numbers, torch.nan).to(self.device))

    # -----------------------------------------------------------------------------------------------------------------
    # For the causal step
    # -----------------------------------------------------------------------------------------------------------------

    @property
    def unwrapped(self) -> Any:
        return getattr(self.model, "module", self.model)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.unwrapped.device

    @property
    def rows_per_forward(self) -> int:
        return self.options.context_batch_size or self.context_batch_size

    @property
    def ending_ids(self) -> list[int]:
        return self.eos_token_ids

    @property
    def step_seed(self) -> int:
        return self.seed + 1_000_003 * self._steps

    def log(self, name: str, value: torch.Tensor | float) -> None:
        if float(value) == float(value):
            self.metrics[name] = float(value)

    @property
    def can_decode(self) -> bool:
        return self.can_continue and decodes_after_keys(self.generation_kwargs)

    @torch.no_grad()
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
            return self._sample(prompts, limit, temperature, keep=False, greedy=greedy)[0]

    def _decode_after(
        self,
        past: list[list[Piece]],
        ids: list[Ids],
        positions: list[int],
        limit: int,
        temperature: float | None,
        greedy: Sequence[bool] | None,
    ) -> list[Ids]:
        with continued_from(self.backbone, past, positions, self.device):
            return self._sample(ids, limit, temperature, keep=False, greedy=greedy)[0]

    @torch.no_grad()
    def sample_states(self, prompts: list[Ids], seed: int, rows: int) -> tuple[list[Ids], torch.Tensor]:
        return super().sample_states(prompts, seed, rows)

    def _sample_outputs(self, prompts: list[Ids]) -> tuple[list[Ids], RolloutStates | None]:
        return self._sample(prompts, self.max_completion_length, None)

    def _tokenize(self, prompt: Prompt) -> Ids:
        if not isinstance(prompt, str | list) or prompt == []:
            raise ValueError(f"`prompt` must be text, or a list of messages with `role` and `content`, got {prompt!r}.")
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        else:
            ids = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        if not len(ids):
            raise ValueError(f"`prompt` must hold a token, got {prompt!r}.")
        return list(ids)

    def _sample(
        self,
        prompts: list[Ids],
        limit: int,
        temperature: float | None,
        keep: bool = True,
        greedy: Sequence[bool] | None = None,
    ) -> tuple[list[Ids], RolloutStates | None]:
        """Completions up to and with their end token, and with `keep` what generating them computed anyway."""
        ids, mask = self.pad(prompts, "left")
        given = {**_PLAIN_SAMPLING, **self.generation_kwargs}
        if given.get("min_new_tokens"):  # asked for of candidates: colliders may be shorter
            given["min_new_tokens"] = min(given["min_new_tokens"], limit)
        config = GenerationConfig(
            max_new_tokens=limit,
            do_sample=True,
            temperature=self.temperature if temperature is None else temperature,
            pad_token_id=self.pad_token_id,
            eos_token_id=self.eos_token_ids,
            disable_compile=True,
            **given,
        )
        keep = keep and self.options.reuse_rollout and self.options.uses_rollout_states
        recorder = GenerationRecorder(self.options.representation, self.eos_token_ids, limit, ids.shape[1])
        with ExitStack() as stack:
            stack.enter_context(without_dropout(self.model))
            stack.enter_context(_generating(self.unwrapped))
            if self.shares and len(set(map(tuple, prompts))) < len(prompts):
                stack.enter_context(read_repeated_prompts_once(self.backbone))
            if keep:
                stack.enter_context(recorder.attached(self.backbone))
            output = self.unwrapped.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([] if greedy is None else [GreedyRows(greedy)]),
            )
            completions = [self._until_end(row) for row in output[:, ids.shape[1] :].tolist()]
            return completions, recorder.finish(self, prompts, completions) if keep else None

    def _until_end(self, ids: Ids) -> Ids:
        stop = next((k for k, token in enumerate(ids, 1) if token in self.eos_token_ids), len(ids))
        return ids[:stop]

    def _log_probs(self, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The output layer is applied where a token is asked for, to what the backbone hands to it."""
        found: list[torch.Tensor] = []
        handle = self.backbone.register_forward_hook(
            lambda module, args, output: found.append(output.last_hidden_state)
        )
        try:
            with (
                self.autocast()
            ):  # through the model, so that what wraps it has its say; but for one place without its logits
                keeps = "past_key_values" in inputs
                self.model(**inputs, use_cache=keeps, logits_to_keep=1, **no_auxiliary_loss(self.unwrapped))
        finally:
            handle.remove()
        head, asked = self.unwrapped.get_output_embeddings(), labels != -100
        hidden = found[-1][:, -labels.shape[1] :][asked]  # an adapter may put virtual tokens before them
        scores: Any = linear_logprob(
            hidden,
            head.weight,
            labels[asked],
            bias=head.bias,
            temperature=self.temperature,
            **self._head_options,
        )
        return scores.new_zeros(labels.shape).masked_scatter(asked, scores)


@contextmanager
def _generating(model: Any) -> Iterator[None]:
    """In evaluation mode: layers in training mode may drop the keys and values that generation needs."""
    before = model.training
    model.training = False
    try:
        yield
    finally:
        model.training = before


def _head_options(model: Any) -> dict[str, Any]:
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise ValueError(
            "The output layer must be a linear layer without an adapter, for it is read by its weight, got "
            f"{type(head).__name__}. Leave it out of what the adapter changes."
        )
    return logit_options(model.config.get_text_config())
