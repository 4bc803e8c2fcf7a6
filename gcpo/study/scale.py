"""How much a study trains and measures, on which bed."""

from dataclasses import dataclass, field, replace
from typing import Any

from gcpo.demo.settings import Scale

# Seeds that tables report, and others for whoever tunes something, so that nothing is tuned on what is reported.
SEED_LISTS = {"reported": tuple(range(10)), "tuning": (100, 101, 102, 103)}


@dataclass(frozen=True)
class StudyScale(Scale):
    """
    How much a study trains and measures, with every seed of `seeds`.

    `model` and `dataset` are the bed's where they are None; `options` go to every trainer.
    """

    bed: str = "tiny"
    seeds: tuple[int, ...] = ()
    model: str | None = None
    dataset: str | None = None
    reward: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


_TINY = StudyScale(steps=32, seeds=(0, 1, 2, 3), num_held_out=256)
_INTEGRATING = StudyScale(
    bed="integrating",
    steps=50,
    seeds=SEED_LISTS["reported"],
    num_colliders=4,
    completion_tokens=18,
    num_held_out=512,
    beta=0.0,
)
# By bed, and whether it is to be quick.
PRESETS = {
    ("tiny", False): _TINY,
    ("tiny", True): replace(_TINY, steps=20, seeds=(0, 1, 2), warm_target=0.25),
    ("integrating", False): _INTEGRATING,
    ("integrating", True): replace(_INTEGRATING, steps=10, seeds=(0, 1), num_held_out=128),
}
BEDS = tuple(dict.fromkeys(bed for bed, _ in PRESETS))
