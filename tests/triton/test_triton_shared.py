"""
The tests of the torch backend, run on the Triton backend: conftest.py makes it the default.

Left out, with the reason: tests in float64 or bfloat16, which the interpreter does not take, and tests of what only the
torch backend has. What they leave uncovered is covered in the other files here.
"""

from collections.abc import Callable
from typing import Any

import pytest
import test_bad_input
import test_hidden_weights
import test_inert
import test_layout
import test_linear_gradients
import test_losses
import test_numerics
import test_projection_floor
import test_properties
import test_transforms

FLOAT64 = "float64, which goes to the torch backend"
BFLOAT16 = "bfloat16, which the interpreter computes wrongly"
CONSTANTS = "operators take numbers as constants: one compilation for each value"
NOT_TRITON = "a function without backends, or the torch backend's own"
LEFT_OUT = {
    test_bad_input: {"available_backends": NOT_TRITON},
    test_hidden_weights: {},
    test_inert: {"rows_do_not_depend_on_what_is_masked_elsewhere": FLOAT64},
    test_layout: {"no_silent_second_derivative": FLOAT64},
    test_linear_gradients: {"rounded_once_more": BFLOAT16},
    test_losses: {
        "derivatives_by_hand_are_autograds": NOT_TRITON,
        "loss_gradients": FLOAT64,
    },
    test_numerics: {
        "error_does_not_grow_with_tiles": BFLOAT16,
        "projection_at_extremes": NOT_TRITON,
        "projection_keeps_relative_precision": NOT_TRITON,
        "one_context_is_the_query": NOT_TRITON,
        "k3_is_not_negative": NOT_TRITON,
    },
    test_projection_floor: {
        "a_rare_token_that_all_agree_on_in_float64": FLOAT64,
        "gradients_in_float64": FLOAT64,
        "other_tokens_have_the_target_they_had": NOT_TRITON,
    },
    test_properties: {
        "permuting_a_group_permutes_upsilon": FLOAT64,
        "upsilon_does_not_depend_on_the_scale": FLOAT64,
        "one_context_cancels": FLOAT64,
        "adding_to_all_contexts_changes_nothing": FLOAT64,
        "projection_is_a_probability": NOT_TRITON,
        "order_of_sequences_does_not_matter": FLOAT64,
        "padding_does_not_matter": FLOAT64,
        "shifting_rewards_changes_nothing": NOT_TRITON,
        "equal_rewards_give_exactly_zero": NOT_TRITON,
        "tenths": NOT_TRITON,
    },
    test_transforms: {
        "compiled_with_a_frozen_head_and_autocast": BFLOAT16,
        "compiled_with_inductor": NOT_TRITON,
        "compiled_with_a_schedule": CONSTANTS,
        "operators_keep_their_contract": NOT_TRITON,
    },
}

# Of tests that cost seconds here, the cases that run: the others differ in what both backends share, or meet the same
# kernels in other cases.
FEWER: dict[str, Callable[[dict[str, Any]], bool]] = {
    "test_numerics__limits": lambda case: (
        case["loss_type"] in ("dapo", "vespo")
        or (case["function"] == "gcpo_loss" and case["loss_type"] not in ("luspo", "cispo"))
    ),
    "test_inert__no_tokens": lambda case: case["function"] == "gcpo_loss" or case["loss_type"] in ("dapo", "vespo"),
    "test_inert__each_argument": lambda case: (
        case["function"] == "gcpo_loss" or (case["level"] == "token") == (len(case["name"]) % 2 == 0)
    ),
    "test_inert__all_arguments": lambda case: (
        case["function"] == "gcpo_loss" or case["case"][0]["loss_type"] in ("grpo", "dapo")
    ),
    "test_transforms__compiled_whole": lambda case: not case["name"].endswith("sequence"),
    "test_transforms__checkpointed": lambda case: not case["name"].endswith("sequence"),
}

for _module, _left_out in LEFT_OUT.items():
    _names = {name.removeprefix("test_") for name in vars(_module) if name.startswith("test_")}
    assert _names >= set(_left_out), f"{_module.__name__} has no {set(_left_out) - _names}"
    for _name in sorted(_names - set(_left_out)):
        globals()[f"{_module.__name__}__{_name}"] = getattr(_module, f"test_{_name}")


@pytest.fixture(autouse=True)
def _fewer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tokens and kinds of garbage, where a module's tests do not depend on them: the interpreter is slow."""
    monkeypatch.setattr(test_inert, "GARBAGE", (float("nan"), -1e4))
    shared = request.function.__module__ in ("test_inert", "test_layout", "test_linear_gradients", "test_transforms")
    if shared and request.function.__name__ != "test_contexts_of_weight_zero":
        request.getfixturevalue("small_inputs")
