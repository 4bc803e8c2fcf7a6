"""
Settings that cut the smallest inputs into several tiles, slices and blocks, as the sizes of a real model would be.

Values are Python's source, so that a script can say them too.
"""

from importlib import import_module

import pytest

BOTH = "{'cpu': %d, 'other': %d}"
SETTINGS = {
    # Tiles of three tokens, blocks of one or two rows, slices of eight rows of the vocabulary.
    "torch": {
        "gcpo_kernels.torch_backend": {
            "_TILE_BYTES": BOTH % (0, 0),
            "_MIN_TILE_ROWS": BOTH % (3, 3),
            "_BLOCK_ELEMENTS": BOTH % (80, 80),
            "_WIDEN_ROWS": "8",
        }
    },
    # Tiles of three tokens, slices of two rows by eight columns, blocks of sixteen columns of a row; products of blocks
    # of 16 x 32, in two parts, of a chunk of four rows.
    "triton": {
        "gcpo_kernels.triton_backend.tiling": {"TILE_BYTES": "-(2**60)", "_STEP": "3"},
        "gcpo_kernels.triton_backend.linear": {
            "_SLICE_ROWS": "2",
            "_SLICE_VOCAB": "8",
            "_SCORED_BYTES": "0",
            "_SCORED_ROWS": "4",
        },
        "gcpo_kernels.triton_backend.logprob": {
            "row_block": "lambda vocab, itemsize, shape=module.Shape(2, 4, 2): shape"
        },
        "gcpo_kernels.triton_backend.product": {
            **dict.fromkeys(("POINTER_BLOCKS", "FLOAT32_BLOCKS"), "module.Blocks(16, 32, 16, 4, 2, 2)"),
            **dict.fromkeys(("COMBINE_ROWS", "COMBINE_PARTS", "TARGET_BLOCK", "LIST_BLOCK"), "4"),
        },
    },
}
# Of the kernels whose blocks span a prompt's hidden dimension and a sequence's tokens.
BLOCKS = {
    "torch": {},
    "triton": {
        # Slices of two candidates, blocks of four columns; sums of two blocks and four candidates are added at once.
        "gcpo_kernels.triton_backend.causal": {
            "tiling": "lambda n, hidden, elements: {'ONE_SLICE': n <= 2, 'H': hidden, 'N_TILE': 2, 'BLOCK_H': 4}",
            "FINISH_TILE": "(2, 4)",
        },
        "gcpo_kernels.triton_backend.token_loss": {
            "blocking": "lambda b, t, by_sequence: (1 if by_sequence else 2, 2)"
        },
    },
}


def apply(patch: pytest.MonkeyPatch, *settings: dict[str, dict[str, str]]) -> None:
    """Until `patch` is undone."""
    for modules in settings:
        for name, values in modules.items():
            module = import_module(name)
            for attribute, value in values.items():
                patch.setattr(module, attribute, eval(value, {"module": module}))


def source(*settings: dict[str, dict[str, str]]) -> list[str]:
    """The same as lines of a script."""
    return [
        line
        for modules in settings
        for module, values in modules.items()
        for line in (f"import {module} as module", *(f"module.{name} = {value}" for name, value in values.items()))
    ]
