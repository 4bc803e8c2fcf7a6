"""Options that travel whole from the public functions to the backends, checked once, where they are made."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
# What the policy term of a token is; types that are not named have the clipped one, and are reductions of it.
KINDS = ("clipped", "cispo", "sapo", "vespo")
# How the tokens of types that share a reduction with another are reduced.
_REDUCTION_OF = {"sapo": "grpo", "cispo": "dapo", "vespo": "dapo"}
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence")
BASELINES = ("mean", "loo")
SIMILARITIES = ("cosine", "euclidean", "gaussian")
ADVANTAGE_SCALES = ("group", "batch", "none")


@dataclass(frozen=True)
class LossOptions:
    """Options of the GCPO objective (eq. 10). See `gcpo_kernels.gcpo_loss` for their meaning."""

    beta: float = 0.0
    kappa: float = 0.0
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    importance_sampling_level: str = "token"
    loss_type: str = "grpo"
    max_completion_length: int | None = None
    num_items_in_batch: float | torch.Tensor | None = None
    proj_floor: float = 1e-6
    kl_clip: float | None = None
    bias_correction_kl: bool = False
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0.0)
        check_number("kappa", self.kappa, low=0.0)
        check_number("epsilon_low", self.epsilon_low, low=0.0)
        check_number("epsilon_high", self.epsilon_high, low=0.0)
        if self.delta is not None:
            check_number("delta", self.delta, above=0.0)
        check_number("proj_floor", self.proj_floor, above=0.0, below=1.0)
        if self.kl_clip is not None:
            check_number("kl_clip", self.kl_clip, above=0.0)
        check_flag("bias_correction_kl", self.bias_correction_kl)
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            check_number(name, getattr(self, name), above=0.0)
        for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"):
            check_number(name, getattr(self, name), low=0.0)
        check_choice("importance_sampling_level", self.importance_sampling_level, IMPORTANCE_SAMPLING_LEVELS)
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        if self.max_completion_length is not None:
            check_count("max_completion_length", self.max_completion_length)
        elif self.loss_type == "dr_grpo":
            raise ValueError("`loss_type='dr_grpo'` divides by `max_completion_length`, which must be given, got None.")
        items = self.num_items_in_batch
        if isinstance(items, torch.Tensor):
            if items.numel() != 1:
                raise ValueError(
                    f"`num_items_in_batch` must be one number, got a tensor of shape {tuple(items.shape)}."
                )
        elif items is not None:
            check_number("num_items_in_batch", items, low=0.0)

    @property
    def kind(self) -> str:
        """The policy term of a token, one of KINDS."""
        return self.loss_type if self.loss_type in KINDS else "clipped"

    @property
    def reduction(self) -> str:
        """What is done with the tokens' losses: "grpo", "bnpo", "dr_grpo", "dapo" or "luspo"."""
        return _REDUCTION_OF.get(self.loss_type, self.loss_type)

    @property
    def whole_sequences(self) -> bool:
        """Whether a token's derivative depends on the other tokens of its sequence."""
        return self.importance_sampling_level == "sequence" or self.kind == "vespo"

    def per_token(self) -> "LossOptions":
        """The same without what only the reduction over tokens needs: the types of one kind become one."""
        kind = self.loss_type if self.loss_type in KINDS else "grpo"
        return replace(self, loss_type=kind, max_completion_length=None, num_items_in_batch=None)

    def pack(self) -> list[float]:
        """
        The options as operators take them, whose schemas know numbers but no dataclasses. A `num_items_in_batch` that
        is a tensor is left out: it is an argument of its own.
        """
        items = self.num_items_in_batch
        return [
            self.beta,
            self.kappa,
            self.epsilon_low,
            self.epsilon_high,
            _or_zero(self.delta),
            float(IMPORTANCE_SAMPLING_LEVELS.index(self.importance_sampling_level)),
            float(LOSS_TYPES.index(self.loss_type)),
            float(self.max_completion_length or 0),
            -1.0 if items is None or isinstance(items, torch.Tensor) else float(items),
            self.proj_floor,
            _or_zero(self.kl_clip),
            float(self.bias_correction_kl),
            self.sapo_temperature_pos,
            self.sapo_temperature_neg,
            self.vespo_k_pos,
            self.vespo_lambda_pos,
            self.vespo_k_neg,
            self.vespo_lambda_neg,
        ]

    @classmethod
    def unpack(cls, numbers: list[float], items: torch.Tensor | None = None) -> "LossOptions":
        """The options that `pack` made into numbers, with a `num_items_in_batch` that is a tensor."""
        beta, kappa, low, high, delta, level, loss_type, length, number, floor, kl_clip, correct, *of_kinds = numbers
        return cls(
            beta,
            kappa,
            low,
            high,
            delta or None,
            IMPORTANCE_SAMPLING_LEVELS[int(level)],
            LOSS_TYPES[int(loss_type)],
            int(length) or None,
            number if items is None and number >= 0 else items,
            floor,
            kl_clip or None,
            bool(correct),
            *of_kinds,
        )


@dataclass(frozen=True)
class HeadOptions:
    """What happens between hidden @ weight.T and a logit: softcap(logit_scale * u) / temperature."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above=0.0)
        check_number("logit_scale", self.logit_scale)
        if self.logit_softcap is not None:
            check_number("logit_softcap", self.logit_softcap, above=0.0)

    def pack(self) -> list[float]:
        """The options as operators take them."""
        return [self.temperature, self.logit_scale, _or_zero(self.logit_softcap)]

    @classmethod
    def unpack(cls, numbers: list[float]) -> "HeadOptions":
        temperature, scale, softcap = numbers
        return cls(temperature, scale, softcap or None)


def _or_zero(number: float | None) -> float:
    """0 for an option that is off: where it is on, it is above 0."""
    return 0.0 if number is None else number


def check_number(
    name: str,
    value: Any,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> None:
    """
    Check that a number is finite, and at least `low`, above `above`, at most `high` and below `below` where given.

    Raises:
        TypeError: `value` is not a number.
        ValueError: it is outside the bounds; the message names the argument, what it got and what it wants.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__}.")
    # Comparisons, not math.isfinite: torch.compile traces them for a number that changes between calls.
    fits = -math.inf < value < math.inf
    fits = fits and (low is None or value >= low) and (above is None or value > above)
    fits = fits and (high is None or value <= high) and (below is None or value < below)
    if not fits:
        bounds = (("at least", low), ("above", above), ("at most", high), ("below", below))
        wanted = " and ".join(["finite", *(f"{words} {bound:g}" for words, bound in bounds if bound is not None)])
        raise ValueError(f"`{name}` must be {wanted}, got {value}.")


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {type(value).__name__}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {type(value).__name__}.")
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
