"""
The study `samples`: how much an estimator of Upsilon spends, and how far its answers scatter.

Nothing is trained. One rollout stays as it is, and its weights are estimated again and again with fresh colliders and
fresh samples, for every budget: group size n, colliders L, samples per context m.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from gcpo.run.quiet import quiet
from gcpo.run.records import write_whole
from gcpo.study.definitions import NO_KL, Arm
from gcpo.study.trainers import RepeatingTrainer
from gcpo.study.workbench import Workbench


@dataclass(frozen=True)
class Budget:
    """An estimator with what it may spend."""

    estimator: str
    n: int
    L: int
    m: int = 1

    @property
    def name(self) -> str:
        samples = f", m = {self.m}" if self.estimator == "sampled" else ""
        return f"{self.estimator}, n = {self.n}, L = {self.L}{samples}"


@dataclass
class Measured:
    """
    What a budget came to, with one seed.

    Attributes:
        variance: of a candidate's Upsilon over repeats, averaged over candidates.
        error: root of the mean squared difference from the reference: the mean over the repeats of the largest sampled
            budget of the same group size.
        seconds: of what GCPO adds to a rollout, without the second KL term; median over repeats.
    """

    variance: float
    error: float
    seconds: float


def budgets(quick: bool) -> list[Budget]:
    """The grid, group size by group size, the reference last in each."""
    grid = []
    for n in (4, 8) if quick else (4, 8, 16):
        grid += [Budget("loo", n, L) for L in ((1, 2, 4) if quick else (1, 2, 4, 8))]
        grid += [Budget("scored", n, L) for L in ((2, 4) if quick else (1, 2, 4, 8))]
        grid += [Budget("sampled", n, 2, m) for m in (1, 2)] if quick else []
        grid += [] if quick else [Budget("sampled", n, L, m) for L, m in ((2, 1), (2, 2), (4, 1), (4, 2), (4, 4))]
    return grid


def measure(bench: Workbench, seed: int, quick: bool, tick: Callable[[], None]) -> dict[str, dict[str, float]]:
    """Every budget's `Measured`, by its name; read where it was measured before."""
    file = bench.folder / "runs" / f"samples-{'quick-' if quick else ''}seed{seed}-{bench.fingerprint(seed)}.json"
    if file.exists():
        for _ in budgets(quick):
            tick()
        return json.loads(file.read_text())
    repeats, prompts = (4, 2) if quick else (8, 4)
    found: dict[str, dict[str, float]] = {}
    grid = budgets(quick)
    for n in dict.fromkeys(budget.n for budget in grid):
        draws: dict[Budget, tuple[torch.Tensor, float]] = {}
        candidates = None
        for budget in [budget for budget in grid if budget.n == n]:
            upsilon, seconds, ids = _repeat(bench, budget, seed, prompts, repeats)
            if candidates is not None and ids != candidates:
                raise RuntimeError(f"{budget.name} saw other candidates than the budgets before it")
            candidates = ids
            draws[budget] = upsilon, seconds
            tick()
        reference = next(reversed(draws.values()))[0].mean(dim=0)  # (P * n,)
        for budget, (upsilon, seconds) in draws.items():
            error = (upsilon - reference).square().mean().sqrt()
            found[budget.name] = asdict(Measured(float(upsilon.var(dim=0).mean()), float(error), seconds))
    write_whole(file, found)
    return found


def _repeat(
    bench: Workbench, budget: Budget, seed: int, prompts: int, repeats: int
) -> tuple[torch.Tensor, float, list[list[int]]]:
    """Upsilon (repeats, P * n) of one rollout, the median seconds of an estimate, and the candidates."""
    options = {
        **NO_KL,
        "estimator": budget.estimator,
        "num_generations": budget.n,
        "num_colliders": budget.L,
        "num_estimator_samples": budget.m,
        "per_device_train_batch_size": prompts * budget.n,
    }
    with quiet():
        arm = Arm(budget.name, options=options)
        trainer = bench.trainer(arm, seed, bench.folder / "runs" / "samples", RepeatingTrainer)
        trainer.repeats = repeats
        trainer.model.train()
        trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    return torch.stack(trainer.upsilon), sorted(trainer.seconds)[repeats // 2], trainer.candidates
