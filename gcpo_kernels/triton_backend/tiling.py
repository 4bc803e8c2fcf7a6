"""
How many tokens a tile of logits holds.

High tiles are better: the weight's gradient is read and written once a tile. But the tile takes memory, and the product
that makes the gradient of the hidden states, (M, V) @ (V, H), is cut into blocks of the output, (M, H), which the
multiprocessors take in waves: 132 of them with 150 blocks are idle for almost half of the time.
"""

import math

TILE_BYTES = 2 << 30
# Heights are multiples of the blocks' own.
_STEP = 128
# (height, width) of the blocks that vendors' libraries use on large products, and what the smaller one loses.
_BLOCKS = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.87))
# Tokens whose product with the weight takes as long as reading and writing the weight's float32 gradient once more,
# half of it hidden behind the product: 4 bytes a weight at 200 operations a byte, two operations a token and weight.
_ROUND_TRIP = 400
# As much for rounding that gradient to the weight's type in the end, which a single tile does by itself.
_CAST = 600


def wave_fill(rows: int, columns: int, sms: int) -> float:
    """Share of the multiprocessors' time that goes into a product with a (rows, columns) output, in (0, 1]."""
    best = 0.0
    for height, width, speed in _BLOCKS:
        waves = math.ceil(math.ceil(rows / height) * math.ceil(columns / width) / sms)
        best = max(best, speed * rows * columns / (height * width * sms * waves))
    return min(best, 1.0)


def tile_cost(rows: int, tokens: int, hidden: int, sms: int) -> float:
    """What depends on the height of tiles, in tokens' worth of one product, of `tokens` in tiles of `rows`."""
    whole, rest = divmod(tokens, rows)
    tiles = whole + (rest > 0)
    cost = whole * rows / wave_fill(rows, hidden, sms) + (tiles - 1) * _ROUND_TRIP + (_CAST if tiles > 1 else 0)
    return cost + (rest / wave_fill(rest, hidden, sms) if rest else 0.0)


def tile_rows(
    tokens: int, hidden: int, vocab: int, sms: int, bytes_per_logit: int = 4, narrow_weight: bool = True
) -> int:
    """
    The height of tiles for `tokens` tokens: the cheapest that `TILE_BYTES` allows, at least one step high. Where the
    weight's gradient is wanted in a narrow type, a single tile needs no float32 one beside it, and may have its bytes.
    """
    if tokens <= _STEP:
        return _STEP
    vocab = max(vocab, 1)
    most = max(_STEP, TILE_BYTES // (bytes_per_logit * vocab) // _STEP * _STEP)
    single = math.ceil(tokens / _STEP) * _STEP
    if narrow_weight and tokens * bytes_per_logit * vocab <= TILE_BYTES + 4 * vocab * hidden:
        most = max(most, single)
    heights = range(_STEP, max(_STEP, min(most, single)) + 1, _STEP)
    return min(heights, key=lambda rows: (tile_cost(min(rows, tokens), tokens, hidden, sms), -rows))
