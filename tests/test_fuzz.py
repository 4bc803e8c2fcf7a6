"""A short run of the fuzzer (`make fuzz` is the long one), and that it finds what is planted and can show it."""

import os
from importlib import import_module
from typing import Any

import pytest
import torch
from fuzz import Failure, check, fuzz
from fuzz_cases import OPTIONS, Case, settings, snippet

import gcpo_kernels

SECONDS = float(os.environ.get("FUZZ_SECONDS", "8"))


def test_random_calls_are_right() -> None:
    assert fuzz(SECONDS, seed=0, backend="torch") >= 20


def wrong_loss(*args: Any, **kwargs: Any) -> Any:
    loss, metrics = original(*args, **kwargs)
    return 1.001 * loss, metrics


def drops_gradients(*args: Any, **kwargs: Any) -> Any:
    out = original_logprob(*args, **kwargs)
    return tuple(x.detach() for x in out) if isinstance(out, tuple) else out.detach()


def accepts_anything(rewards: Any, group_size: Any, **kwargs: Any) -> Any:
    try:
        return original_advantages(rewards, group_size, **kwargs)
    except (ValueError, TypeError):
        return torch.zeros(3)


original, original_logprob = gcpo_kernels.gcpo_loss, gcpo_kernels.linear_logprob
original_advantages = gcpo_kernels.group_advantages
PLANTED = {"gcpo_loss": wrong_loss, "linear_logprob": drops_gradients, "group_advantages": accepts_anything}


@pytest.mark.parametrize("function", PLANTED)
def test_a_planted_mistake_is_found_and_shown(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, and as a script that fails with the mistake and passes without it."""
    monkeypatch.setattr("fuzz_cases.OPTIONS", {function: OPTIONS[function]})
    with monkeypatch.context() as patch:
        patch.setattr(gcpo_kernels, function, PLANTED[function])
        with pytest.raises(Failure) as caught:
            fuzz(60, seed=0, backend="torch")
        case = caught.value.case
        for module, values in ((m, v) for modules in settings(case) for m, v in modules.items()):
            for name in values:  # which the script will set, until the test ends
                monkeypatch.setattr(f"{module}.{name}", getattr(import_module(module), name))
        assert sum(case.sizes) <= 12
        script = snippet(case)
        if case.invalid is None:
            with pytest.raises(AssertionError):
                exec(compile(script, "<snippet>", "exec"), {"__name__": "snippet"})
    assert "import fuzz" not in script and "hypothesis" not in script
    if case.invalid is None:
        exec(compile(script, "<snippet>", "exec"), {"__name__": "snippet"})
    else:
        with pytest.raises((ValueError, TypeError)):
            exec(compile(script, "<snippet>", "exec"), {"__name__": "snippet"})


def test_layouts_survive_into_the_script() -> None:
    case = Case("gcpo_loss", "torch", 3, (3, 4, 2), forms=(("logp", "sliced"), ("ref_logp", "expanded")))
    case.options.update({"beta": 0.1, "delta": None})
    check(case)
    namespace: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(snippet(case), "<snippet>", "exec"), namespace)
    assert namespace["arguments"]["logp"].stride() == (18, 2)
    assert namespace["arguments"]["ref_logp"].stride()[0] == 0
