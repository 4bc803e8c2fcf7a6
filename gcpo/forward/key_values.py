"""
Keys and values of tokens that a model has read, cut out of one cache and put together in another, so that what several
sequences begin with, or look back at, passes through the model once.
"""

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from gcpo.causal.port import Piece, length_of


def can_cut(cache: Any) -> bool:
    """Whether a cache holds the keys and values of every token, in order: no window, no recurrent state."""
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def keeps_every_token(model: Any) -> bool:
    """`can_cut` for the caches that this model makes."""
    return can_cut(DynamicCache(config=model.config))


def cut(cache: DynamicCache, row: int, start: int, stop: int) -> Piece:
    """A view of the tokens [start, stop) of one row."""
    return [(layer.keys[row, :, start:stop], layer.values[row, :, start:stop]) for layer in cache.layers]


def join(rows: list[list[Piece]], config: Any, device: torch.device) -> tuple[DynamicCache, torch.Tensor]:
    """
    One cache whose row k holds the pieces of `rows[k]` one after the other, padded on the left.

    Returns:
        The cache and a mask (rows, longest) int64 of its real tokens. Gradients flow back to the pieces.
    """
    lengths = [sum(map(length_of, pieces)) for pieces in rows]
    longest = max(lengths)
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=device)
    for k, length in enumerate(lengths):
        mask[k, longest - length :] = 1
    cache = DynamicCache(config=config)
    if longest == 0:  # a model's first layer makes an empty cache of the right type itself
        return cache, mask
    some = next(piece for pieces in rows for piece in pieces)
    for number, layer in enumerate(cache.layers):
        both = []
        for part in (0, 1):
            like = some[number][part]
            whole = like.new_zeros(len(rows), like.shape[0], longest, like.shape[2])
            for k, pieces in enumerate(rows):
                start = longest - lengths[k]
                for piece in pieces:
                    stop = start + length_of(piece)
                    whole[k, :, start:stop] = piece[number][part]
                    start = stop
            both.append(whole)
        layer.lazy_initialization(*both)
        layer.keys, layer.values = both  # as `update` would, less a copy
    return cache, mask
