"""
Generation by the transformers engine: what it computes anyway (representations, keys and values of its output) is kept,
and prompts that stand several times in a batch are read once. It can begin after keys and values, and decode some rows
at temperature 0.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, LogitsProcessor

from gcpo.causal.port import Ids, Piece, RolloutStates
from gcpo.forward.key_values import can_cut, cut, join
from gcpo.forward.models import ModelForwards, no_auxiliary_loss


class GenerationRecorder:
    """
    Watches a model's backbone while it generates. Each sampled token is fed back to the model to sample the next: the
    state at that moment is the token's. Only the very last token of a batch is never fed; `finish` does it.

    Args:
        representation: "last" or "mean", as for `HiddenRecorder`.
        eos_token_ids: what ends a completion; it is the last token that counts.
        limit: most tokens that this generation gives a completion, which its settings may set apart from the trainer's
            `max_completion_length`. None: no limit but the end token.
        prompt_width: columns of the padded prompts.
    """

    def __init__(self, representation: str, eos_token_ids: list[int], limit: int | None, prompt_width: int):
        self.representation = representation
        self.eos_token_ids = eos_token_ids
        self.limit = limit
        self.prompt_width = prompt_width
        self.fed: list[torch.Tensor] = []  # (B,) each: the tokens fed after the prompt
        self.cache: Any = None
        self.z: torch.Tensor | None = None  # (B, H): the last state, or the sum of all
        self._counts: torch.Tensor | None = None  # (B,) how many tokens count so far
        self._open: torch.Tensor | None = None  # (B,) bool: not ended yet
        self._ends = torch.empty(0, dtype=torch.long)  # `eos_token_ids`, once their device is known

    @contextmanager
    def attached(self, backbone: nn.Module) -> Iterator[None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            ids, cache = kwargs.get("input_ids"), getattr(output, "past_key_values", None)
            if ids is None or cache is None or cache.get_seq_length() < self.prompt_width:
                return  # a part of the prompts; or a way of decoding that is unknown here
            self.cache = cache
            if cache.get_seq_length() > self.prompt_width and ids.shape[1] == 1:
                self._feed(ids[:, 0], output.last_hidden_state[:, -1])

        handle = backbone.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _feed(self, ids: torch.Tensor, hidden: torch.Tensor) -> None:
        if self.z is None or self._open is None or self._counts is None:
            self.z = torch.zeros_like(hidden, dtype=torch.float32)
            self._open = torch.ones_like(ids, dtype=torch.bool)
            self._counts = torch.zeros_like(ids)
            self._ends = torch.tensor(self.eos_token_ids, device=ids.device)
        counts = self._open if self.limit is None else self._open & (len(self.fed) < self.limit)
        if self.representation == "last":
            self.z = torch.where(counts[:, None], hidden.float(), self.z)
        else:
            self.z = self.z + torch.where(counts[:, None], hidden.float(), 0.0)
        self._counts = self._counts + counts
        self._open = self._open & ~torch.isin(ids, self._ends)
        self.fed.append(ids)

    def finish(self, policy: ModelForwards, prompt_ids: list[Ids], completion_ids: list[Ids]) -> RolloutStates | None:
        """
        Feed the last tokens to the policy's model. Call it while attached; collective.

        Returns:
            None where the model did not generate one token after the other, so that there is nothing to take. If any
            process lacks states, all do without.
        """
        # A cache of fixed size has no place for the last tokens; beams are rows that are no completion's.
        grows = isinstance(self.cache, DynamicCache) and all(len(ids) == len(completion_ids) for ids in self.fed)
        if policy.most(int(not grows or self.cache.get_seq_length() != self.prompt_width + len(self.fed))):
            return None
        longest = max(map(len, completion_ids))
        device, rows = policy.device, len(completion_ids)
        # Where processes wait for each other, one that is done may have fed its last tokens already: once more is idle.
        width = self.prompt_width
        mask = torch.zeros(rows, self.cache.get_seq_length() + 1, dtype=torch.long, device=device)
        last = torch.full((rows, 1), policy.pad_token_id, dtype=torch.long, device=device)
        lengths = [len(ids) for ids in prompt_ids]
        for k, ids in enumerate(completion_ids):
            mask[k, width - lengths[k] :] = 1
            if len(ids) == longest:
                last[k] = ids[-1]
        positions = mask.cumsum(dim=1)[:, -1:] - 1
        with torch.no_grad():
            policy.model(
                input_ids=last,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
                **no_auxiliary_loss(policy.unwrapped),
            )
        fed = torch.stack(self.fed, dim=1).tolist()
        assert self.z is not None and self._counts is not None
        # Where outputs end by another rule than is known here, the state taken is not that of their last token.
        ends_elsewhere = self._counts.tolist() != [len(ids) for ids in completion_ids]
        is_other = any(row[: len(ids)] != ids for row, ids in zip(fed, completion_ids, strict=True))
        if policy.most(int(ends_elsewhere or is_other)):
            return None
        states = RolloutStates(self.z if self.representation == "last" else self.z / self._counts.clamp(min=1)[:, None])
        if can_cut(self.cache):
            states.queries = [cut(self.cache, k, width - length, width - 1) for k, length in enumerate(lengths)]
            states.completions = [cut(self.cache, k, width, width + len(ids)) for k, ids in enumerate(completion_ids)]
        return states


@contextmanager
def read_repeated_prompts_once(backbone: nn.Module) -> Iterator[None]:
    """While active, the first forward of a generation reads each distinct row once, and the others take its cache."""
    is_first = True

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        nonlocal is_first
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if not is_first or ids is None or ids.shape[1] < 2 or cache is None or not can_cut(cache):
            return None
        is_first = False
        mask, positions = kwargs.get("attention_mask"), kwargs["position_ids"].expand(len(ids), -1)
        padded = torch.ones_like(ids) if mask is None else mask  # without padding, `generate` passes no mask
        whole, place = torch.unique(torch.cat([ids, padded], dim=1), dim=0, return_inverse=True)
        row = torch.stack([(place == k).nonzero()[0, 0] for k in range(len(whole))])  # where each stands first
        once = DynamicCache(config=module.config)
        # All but the last token, which every row reads itself: its state is what it samples from.
        module(
            input_ids=ids[row, :-1],
            attention_mask=padded[row, :-1],
            position_ids=positions[row, :-1],
            past_key_values=once,
            use_cache=True,
        )
        for number, layer in enumerate(once.layers):
            cache.update(layer.keys[place], layer.values[place], number)
        return args, {**kwargs, "input_ids": ids[:, -1:], "position_ids": positions[:, -1:]}

    handle = backbone.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def decodes_after_keys(settings: dict[str, Any]) -> bool:
    """
    Whether generation with these arguments of `GenerationConfig` can begin after keys and values (`continued_from`): it
    feeds one token at a time of each row to a cache that grows.
    """
    plain = {"num_beams": 1, "use_cache": True, "cache_implementation": "dynamic", "guidance_scale": 1}
    others = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_early_exit")
    is_plain = all(settings.get(name) in (None, value) for name, value in plain.items())
    return is_plain and not any(settings.get(name) for name in others)


@contextmanager
def continued_from(
    backbone: nn.Module, past: list[list[Piece]], first_positions: list[int], device: torch.device
) -> Iterator[None]:
    """
    While active, a generation of `len(past)` rows begins after keys and values: row k after the pieces of `past[k]`, in
    order, with the first token of its prompt at `first_positions[k]`. The pieces are copied, so that they stay as they
    are; they are padded on the left.
    """
    cache, seen = join(past, backbone.config, device)
    first = torch.tensor(first_positions, device=device)[:, None]
    is_first, is_whole = True, bool(seen.all())

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        nonlocal is_first
        ids, own = args[0] if args else kwargs["input_ids"], kwargs.get("attention_mask")
        used = cache if is_first else kwargs["past_key_values"]
        is_first = False
        if own is None and not is_whole:  # without padding among the prompts, `generate` passes no mask
            own = seen.new_ones(len(ids), used.get_seq_length() - seen.shape[1] + ids.shape[1])
        mask = None if own is None else torch.cat([seen, own.to(seen.dtype)], dim=1)
        positions = kwargs["position_ids"] + first
        return args, {**kwargs, "past_key_values": used, "attention_mask": mask, "position_ids": positions}

    handle = backbone.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class GreedyRows(LogitsProcessor):
    """
    Leaves those rows of a batch that are decoded at temperature 0 nothing but their likeliest token, once all that
    changes scores with or without sampling has had its say. Which numbers the others are drawn with stays the same.

    Args:
        greedy: (rows,), which these are.
    """

    def __init__(self, greedy: Sequence[bool]):
        self.greedy = torch.tensor(list(greedy))[:, None]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        best = scores.argmax(dim=-1, keepdim=True)
        alone = torch.full_like(scores, -torch.inf).scatter(1, best, 0.0)
        return torch.where(self.greedy.to(scores.device), alone, scores)
