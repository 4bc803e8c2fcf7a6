"""What studies share: a starting model, its prompts, and runs from it, each done once and kept."""

import itertools
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback, TrainerCallback
from trl import GRPOConfig

from gcpo import GCPOConfig, __version__
from gcpo.reports.diagnose import overheads
from gcpo.reports.intervals import Interval, interval
from gcpo.run.checkpoints import last_complete_checkpoint
from gcpo.run.quiet import quiet
from gcpo.run.records import read_run, write_whole
from gcpo.run.redaction import redacted
from gcpo.study.beds import digest, make_bed
from gcpo.study.definitions import GRPO, Arm
from gcpo.study.diagnostics import diagnosed
from gcpo.study.scale import SEED_LISTS, StudyScale
from gcpo.study.trainers import QueryGCPOTrainer, ScaledGRPOTrainer, StudyGCPOTrainer

# What is found out before arms are compared, with a seed that no table reports.
TUNING_SEED = SEED_LISTS["tuning"][0]
COLLIDER_BATCHES = 24
TIMED_ROUNDS, TIMED_STEPS = 2, 6
# One result per line of settings; another layout of the files must not be taken for it.
_LAYOUT = 2


class Workbench:
    """
    Runs of one starting model on one set of prompts, kept under their settings: what was done is not done again.

    Args:
        scale: how much to train and to measure.
        folder: where models and runs are kept.
        tick: called after every optimizer step.
    """

    def __init__(self, scale: StudyScale, folder: Path, tick: Callable[[], None] = lambda: None):
        self.scale = scale
        self.folder = folder
        self.tick = tick
        self.bed = make_bed(scale)
        self._start: str | None = None

    @property
    def start(self) -> str:
        """The model that every run starts from: a folder, or a name on the hub."""
        if self._start is None:
            self._start = self.bed.start(self.folder)
        return self._start

    def load(self) -> Any:
        """The starting model, in the type it trains in."""
        dtype = self.scale.options.get("model_init_kwargs", {}).get("dtype", self.bed.dtype)
        return AutoModelForCausalLM.from_pretrained(self.start, dtype=dtype)

    # -----------------------------------------------------------------------------------------------------------------
    # A run
    # -----------------------------------------------------------------------------------------------------------------

    def run(self, arm: Arm, seed: int) -> dict[str, Any]:
        """
        Train and measure, or read what was measured before.

        Returns:
            `pass_at_1`, `mean_score`, `num_passed` and `prompt_scores` (per held-out prompt), `metrics` (see
            `summarize`) and `folder`, with the run's log.
        """
        folder = self._run_folder(arm, seed)
        result_file = folder / "result.json"
        if result_file.exists():
            return json.loads(result_file.read_text())
        with quiet():
            trainer = self.trainer(arm, seed, folder)
            trainer.train(resume_from_checkpoint=last_complete_checkpoint(str(folder)))
            result = {**self.measure(trainer.model, arm, seed), "folder": str(folder)}
        result["metrics"] = summarize(folder)
        result["settings"] = redacted(self._settings(arm, seed))
        write_whole(result_file, result)
        return result

    def before(self) -> dict[str, float]:
        """`pass_at_1` and `mean_score` of the starting model, and in the demo its score on the open-ended task."""
        file = self.folder / "runs" / f"before-{self.fingerprint(0)}.json"
        if not file.exists():
            with quiet():
                model = self.load()
                found = self.measure(model, Arm("before"), 0)
                found["open_ended"] = self.measure(model, Arm("before", open_ended=True), 0)["mean_score"]
            write_whole(file, {key: found[key] for key in ("pass_at_1", "mean_score", "open_ended")})
        return json.loads(file.read_text())

    def check(self, arms: Iterable[Arm]) -> None:
        """
        Refuse what could not be trained, before a starting model is made.

        Raises:
            ValueError, TypeError: an option is refused, or cuts off every completion that could be right.
        """
        for arm in arms:
            options = self._options(arm, 0, self.folder)
            with quiet():
                GCPOConfig(**options)
            most = options["max_completion_length"]
            if most < self.bed.shortest:
                whose = f" for {arm.name!r}" if "max_completion_length" in arm.options else ""
                raise ValueError(
                    f"Completions must have at least {self.bed.shortest} tokens on `--bed {self.scale.bed}`, as right "
                    f"answers have, got {most}{whose}."
                )

    def collider_gains(self) -> dict[str, Interval]:
        """
        The mean reward of colliders less that of the candidates that they were shown, before anything is trained, with
        an interval over batches of prompts: as the options of the bed have them drawn, and after a text that shows the
        candidates.
        """
        file = self.folder / "runs" / f"colliders-{self.fingerprint(TUNING_SEED)}.json"
        if not file.exists():
            found = {}
            for name, options in (("by default", {}), ("after a text", {"collider_attention": "full"})):
                arm = Arm(name, options={"log_collider_reward": True, **options})
                with quiet():
                    trainer = self.trainer(arm, TUNING_SEED, file.parent / "colliders")
                    trainer.model.train()
                    batches = itertools.islice(iter(trainer.get_train_dataloader()), COLLIDER_BATCHES)
                    for number, batch in enumerate(batches):
                        trainer.state.global_step = number  # the colliders of each batch are draws of their own
                        trainer._generate_and_score_completions(batch)
                logged = trainer._metrics["train"]
                pairs = zip(logged["gcpo/colliders/reward"], logged["reward"], strict=True)
                found[name] = [colliders - candidates for colliders, candidates in pairs]
            write_whole(file, found)
        return {name: interval(values) for name, values in json.loads(file.read_text()).items()}

    def resolved(self, arm: Arm) -> Arm:
        """The arm, with the number of candidates that makes its step as long as another's, where it asks for that."""
        if arm.as_long_as is None:
            return arm
        seconds, n = self._seconds_per_step(arm.as_long_as), self._num_generations
        per_candidate = (seconds["twice"] - seconds["grpo"]) / n
        more = (seconds["other"] - seconds["grpo"]) / per_candidate if per_candidate > 0 else 0.0
        count = min(max(round(n + more), n), 4 * n)
        options = {"num_generations": count, "per_device_train_batch_size": count * self.scale.prompts_per_step}
        return replace(arm, name=f"{arm.name} (n = {count})", options={**arm.options, **options}, as_long_as=None)

    @property
    def _num_generations(self) -> int:
        return self._options(GRPO, TUNING_SEED, self.folder)["num_generations"]

    def _seconds_per_step(self, other: Arm) -> dict[str, float]:
        """Median seconds of a step: of GRPO, of GRPO with twice the candidates, and of an arm; measured in turn."""
        name = digest([self._settings(other, TUNING_SEED), torch.get_num_threads()])
        file = self.folder / "runs" / f"seconds-{name}.json"
        if not file.exists():
            n = 2 * self._num_generations
            twice = {"num_generations": n, "per_device_train_batch_size": n * self.scale.prompts_per_step}
            arms = {"grpo": Arm("", "grpo"), "twice": Arm("", "grpo", options=twice), "other": other}
            times: dict[str, list[float]] = {name: [] for name in arms}
            for _ in range(TIMED_ROUNDS):
                for name, arm in arms.items():
                    with quiet():
                        trainer = self.trainer(arm, TUNING_SEED, file.parent / "seconds", steps=TIMED_STEPS)
                        trainer.train()
                    # The first step also allocates.
                    times[name] += [row["step_time"] for row in trainer.state.log_history if "step_time" in row][1:]
            write_whole(file, {name: statistics.median(values) for name, values in times.items()})
        return json.loads(file.read_text())

    def fingerprint(self, seed: int) -> str:
        """Of all that a run depends on beside its arm."""
        return digest(self._settings(Arm(""), seed))

    def left(self, runs: list[tuple[Arm, int]]) -> list[tuple[Arm, int]]:
        """Of some runs, an arm and a seed each, those that are not done; once where arms mean the same."""
        by_folder = {self._run_folder(arm, seed): (arm, seed) for arm, seed in runs}
        return [run for folder, run in by_folder.items() if not (folder / "result.json").exists()]

    def trainer(
        self,
        arm: Arm,
        seed: int,
        folder: Path,
        gcpo_class: type[StudyGCPOTrainer] | None = None,
        steps: int | None = None,
    ) -> Any:
        """
        The trainer of an arm, ready to train.

        Args:
            gcpo_class: its class where its method is GCPO. None: as the arm says.
            steps: in place of the scale's.
        """
        options = self._options(arm, seed, folder)
        if steps is not None:
            options["max_steps"] = steps
        reward = self._reward_of(arm)
        common: dict[str, Any] = {
            "train_dataset": self.bed.train,
            "processing_class": AutoTokenizer.from_pretrained(self.start),
        }
        if arm.method == "grpo":
            scales: list[float] = []
            if arm.scaled_by is not None:
                self.run(arm.scaled_by, seed)
                weights = read_run(self._run_folder(arm.scaled_by, seed)).log
                scales = [row.get("gcpo/upsilon/mean") or 1.0 for row in weights]
            ours = {item.name for item in fields(GCPOConfig)} - {item.name for item in fields(GRPOConfig)}
            config = GRPOConfig(**{key: value for key, value in options.items() if key not in ours})
            trainer: Any = ScaledGRPOTrainer(self.load(), reward, args=config, scales=scales, **common)
        else:
            config = GCPOConfig(**options)
            gcpo_class = gcpo_class or (QueryGCPOTrainer if arm.pulls_to_query else StudyGCPOTrainer)
            trainer = gcpo_class(self.load(), reward, args=config, **common)
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(_Tick(self.tick))
        return trainer

    def measure(self, model: Any, arm: Arm, seed: int) -> dict[str, Any]:
        """Score a model on the held-out prompts, sampled at temperature 1 whatever the arm trained with."""
        reward = self._reward_of(arm)
        result = self.scale.measure(model, self.start, self.bed.held_out, reward, seed, progress=False)
        return {key: getattr(result, key) for key in ("pass_at_1", "mean_score", "num_passed", "prompt_scores")}

    def _reward_of(self, arm: Arm) -> Callable[..., list[float]]:
        return self.bed.open_ended if arm.open_ended else self.bed.reward

    def _options(self, arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
        scale = self.scale
        options = scale.trainer_options(folder, seed) | scale.causal_options() | {"disable_tqdm": True}
        if not torch.accelerator.is_available():
            options.update(use_cpu=True, bf16=False)
        return {**options, **self.bed.options, **scale.options, **arm.options}

    def _settings(self, arm: Arm, seed: int) -> dict[str, Any]:
        scale = {key: value for key, value in asdict(self.scale).items() if key != "seeds"}
        # An arm that spells out what holds anyway is the arm that does not.
        base = {item.name: item.default for item in fields(GCPOConfig)} | self._options(Arm(""), seed, Path())
        settings = arm.settings()
        settings["options"] = {key: value for key, value in arm.options.items() if value != base[key]}
        versions = {"gcpo": __version__, "torch": torch.__version__, "trl": trl.__version__, "layout": _LAYOUT}
        start = {} if self.bed.made_from is None else {"start": self.bed.made_from}
        return {"scale": scale, "arm": settings, "seed": seed, "versions": versions, **start}

    def _run_folder(self, arm: Arm, seed: int) -> Path:
        return self.folder / "runs" / f"{arm.method}-seed{seed}-{digest(self._settings(arm, seed))}"


def summarize(folder: Path) -> dict[str, float]:
    """
    What tables show of a run: means over the steps of its log's second half; of the reward, over its last ten steps;
    of the time of a step and its ratio to GRPO's part, medians; and over all steps, what `diagnosed` finds.
    """
    run = read_run(folder)
    means = {
        "upsilon_mean": "gcpo/upsilon/mean",
        "upsilon_std": "gcpo/upsilon/std",
        "unit_std": "gcpo/upsilon/unit_std",
        "ended_mean": "gcpo/upsilon/ended_mean",
        "truncated_mean": "gcpo/upsilon/truncated_mean",
        "norm_ratio": "gcpo/projection/norm_ratio",
        "kl_causal": "gcpo/kl_causal",
        "kl_causal_correlation": "gcpo/kl_causal_correlation",
        "causal_clipped": "gcpo/kl_causal_clipped",
        "proj_clamped": "gcpo/proj_clamped",
        "collider_reward": "gcpo/colliders/reward",
        "kl": "kl",
        "grad_norm": "grad_norm",
        "zero_variance": "frac_reward_zero_std",
        "clipped_ratio": "completions/clipped_ratio",
        "distinct": "study/distinct",
        "scale": "study/scale",
    }
    found = {name: mean for name, key in means.items() if (mean := run.recent_mean(key)) is not None}
    found["reward"] = statistics.fmean(run.values("reward")[-10:])
    found["step_seconds"] = statistics.median(run.values("step_time"))
    if ratios := overheads(run):
        found["overhead"] = statistics.median(ratios)
    return found | diagnosed(run)


class _Tick(TrainerCallback):
    def __init__(self, tick: Callable[[], None]):
        self.tick = tick

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.tick()
