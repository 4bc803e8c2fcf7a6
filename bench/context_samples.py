"""
Many outputs sampled under each of a few contexts, with their representations: what `sampled` does with a large m, from
one reading of every context.

The samples of a context stand side by side in one row of the batch and share its keys and values; a mask keeps them
apart. The representations come from the decoding itself, so that nothing is encoded twice.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

Ids = list[int]


@dataclass
class ContextSamples:
    last: torch.Tensor  # (C, m, H) float32: hidden state of each output's last token
    mean: torch.Tensor  # (C, m, H) float32: mean over its tokens
    outputs: list[list[Ids]]  # C x m; the end token is part of an output
    tokens_read: int  # of the contexts, what they share counted once
    tokens_sampled: int


@torch.no_grad()
def sample_under(
    model: Any,
    contexts: list[Ids],
    m: int,
    max_new_tokens: int,
    temperature: float,
    eos_token_ids: list[int],
    generator: torch.Generator,
) -> ContextSamples:
    """
    Sample m outputs under each of C contexts (the whole vocabulary, no top-k or top-p), until an end token or
    `max_new_tokens`.

    Needs a causal model whose attention takes a 4-D bool mask (`sdpa`) and sees every earlier token.
    """
    count, device = len(contexts), model.device
    cache, hidden, seen, positions = _read(model, contexts)
    width = hidden.shape[-1]
    last = torch.zeros(count, m, width, device=device)
    total = torch.zeros(count, m, width, device=device)
    outputs: list[list[Ids]] = [[[] for _ in range(m)] for _ in range(count)]
    owners = torch.zeros(count, 0, dtype=torch.long, device=device)  # which sample each key after the context is of
    open_ = [list(range(m)) for _ in range(count)]
    state = hidden[:, None].expand(count, m, width)
    for step in range(max_new_tokens):
        drawn = _draw(model, state, temperature, generator)
        columns = max(map(len, open_))
        ids = torch.zeros(count, columns, dtype=torch.long, device=device)
        who = torch.full((count, columns), -1, device=device)
        for c, samples in enumerate(open_):
            ids[c, : len(samples)] = drawn[c, : len(samples)]
            who[c, : len(samples)] = torch.tensor(samples, dtype=torch.long)
        # A column of nobody's sees the context, so that its softmax is defined, and is seen by nobody.
        owners = torch.cat([owners, torch.where(who < 0, -2, who)], dim=1)
        mask = torch.cat([seen[:, None].expand(-1, columns, -1), who[:, :, None] == owners[:, None, :]], dim=2)
        state = model.base_model(
            input_ids=ids,
            attention_mask=mask[:, None],
            position_ids=(positions + step)[:, None].expand(-1, columns),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        kept: list[list[int]] = []
        for c, samples in enumerate(open_):
            kept.append([])
            for column, s in enumerate(samples):
                last[c, s] = state[c, column]
                total[c, s] += state[c, column]
                outputs[c][s].append(int(ids[c, column]))
                if outputs[c][s][-1] not in eos_token_ids:
                    kept[c].append(column)
        open_ = [[samples[k] for k in columns_] for samples, columns_ in zip(open_, kept, strict=True)]
        columns = max(map(len, open_))
        if columns == 0:
            break
        index = torch.tensor([columns_ + [0] * (columns - len(columns_)) for columns_ in kept], device=device)
        state = state.gather(1, index[:, :, None].expand(-1, -1, width))
    lengths = torch.tensor([[len(ids) for ids in row] for row in outputs], device=device)
    prefix = _shared(contexts)
    read = prefix + sum(len(context) - prefix for context in contexts)
    return ContextSamples(last, total / lengths[:, :, None], outputs, read, int(lengths.sum()))


def _shared(contexts: list[Ids]) -> int:
    """How many tokens all contexts begin with, the last of any left out: it is read on a row of its own."""
    shortest = min(map(len, contexts)) - 1
    columns = zip(*(context[:shortest] for context in contexts), strict=True)
    return next((k for k, column in enumerate(columns) if len(set(column)) > 1), shortest)


def _read(model: Any, contexts: list[Ids]) -> tuple[DynamicCache, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cache, state of each context's last token (C, H), which keys are a context's (C, S), and the next positions."""
    device = model.device
    prefix = _shared(contexts)
    rests = [context[prefix:] for context in contexts]
    longest = max(map(len, rests))
    cache = DynamicCache(config=model.config)
    if prefix:
        shared = torch.tensor([contexts[0][:prefix]], device=device)
        cache = model.base_model(input_ids=shared, past_key_values=cache, use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(contexts))
    ids = torch.zeros(len(contexts), longest, dtype=torch.long, device=device)
    real = torch.zeros(len(contexts), prefix + longest, dtype=torch.bool, device=device)
    real[:, :prefix] = True
    for c, rest in enumerate(rests):
        ids[c, longest - len(rest) :] = torch.tensor(rest)
        real[c, prefix + longest - len(rest) :] = True
    places = torch.arange(prefix + longest, device=device)
    queries = places[prefix:, None]
    # Padding sees itself, so that its softmax is defined.
    mask = (real[:, None] & (places <= queries)) | (places == queries)
    positions = (real.long().cumsum(dim=1) - 1)[:, prefix:].clamp(min=0)
    hidden = model.base_model(
        input_ids=ids, attention_mask=mask[:, None], position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state[:, -1]
    return cache, hidden, real, positions[:, -1] + 1


def _draw(model: Any, state: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """A token for each state, (C, columns), by inverting the distribution function: one pass, unlike multinomial."""
    logits = model.get_output_embeddings()(state).float() / temperature
    steps = torch.softmax(logits, dim=-1).cumsum(dim=-1)
    chance = torch.rand(*steps.shape[:2], 1, generator=generator).to(steps.device)
    return torch.searchsorted(steps, chance * steps[..., -1:]).clamp(max=steps.shape[-1] - 1)[..., 0]
