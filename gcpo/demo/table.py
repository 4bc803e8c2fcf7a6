"""What the demo measures beside TRL's own metrics, and how it shows it: summary and table."""

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from gcpo.causal.account import SECONDS, TOKENS
from gcpo.run.progress import StepProgress

History = list[dict[str, float]]


class RewardProgress(StepProgress):
    """The progress with the reward beside it, in place of a line of metrics per step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "reward" in (logs or {}):
            self.training_bar.set_postfix(reward=f"{logs['reward']:.3f}")


def summarize(histories: dict[str, History]) -> dict[str, Any]:
    """
    Per method, from one dict of metrics per step: the last reward, medians over steps of the time of a step and of its
    phases (seconds; the first step, which warms up, is left out of longer runs) and of its tokens, and the ratio of
    step times GCPO / GRPO.
    """
    summary: dict[str, Any] = {}
    for method, history in histories.items():
        settled = history[1:] if len(history) > 2 else history
        last = history[-10:]
        summary[method] = {
            "last_reward": statistics.fmean(step["reward"] for step in last),
            "last_reward_steps": len(last),
            "step_seconds": _median(settled, "step_time"),
            "seconds": {name: _median(settled, f"gcpo/seconds/{name}") for name in SECONDS},
            "tokens": {name: _median(settled, f"gcpo/tokens/{name}") for name in TOKENS},
        }
    times = [summary.get(method, {}).get("step_seconds") for method in ("GCPO", "GRPO")]
    summary["overhead"] = times[0] / times[1] if all(times) else None
    return summary


def print_table(result: dict[str, Any]) -> None:
    """Print what `gcpo.commands.demo.run` returns, as measured."""
    console = Console()
    evaluations, summary = result["evaluations"], result["summary"]
    methods = [name for name in ("GRPO", "GCPO") if name in summary]
    settings, before = result["settings"], evaluations["before"]
    table = Table(title=f"{settings['task']}, {settings['steps']} steps, seed {result['seed']}")
    table.add_column("")
    for name in ("before", *methods):
        table.add_column(name, justify="right")
    columns = [before, *(evaluations[name] for name in methods)]
    for key, label in (("pass_at_1", "pass@1, held out"), ("mean_score", "score, held out")):
        table.add_row(label, *(f"{column[key]:.3f} ± {column[key + '_se']:.3f}" for column in columns))
    steps = summary[methods[0]]["last_reward_steps"]
    table.add_row(f"reward, last {steps} steps", "", *(f"{summary[name]['last_reward']:.3f}" for name in methods))
    table.add_section()
    table.add_row("seconds per step", "", *(_number(summary[name]["step_seconds"]) for name in methods))
    labels = {"loss": "loss and gradient"}
    for phase in SECONDS:
        table.add_row(f"  {labels.get(phase, phase)}", "", *(_number(summary[m]["seconds"][phase]) for m in methods))
    table.add_section()
    for name in TOKENS:
        values = [summary[method]["tokens"][name] for method in methods]
        if not any(values):
            continue
        table.add_row(f"tokens {name.replace('_', ', ')}", "", *(_number(value, ",.0f") for value in values))
    console.print(table)
    console.print(
        f"pass@1: {before['num_prompts']} prompts that training never sees, {before['num_samples']} samples each at "
        "temperature 1; ± is the standard error over prompts."
    )
    if summary["overhead"]:
        console.print(f"A step of GCPO takes {summary['overhead']:.2f} times one of GRPO (medians).")
    console.print("One seed of a tiny problem: another seed can put either method ahead.")


def _median(history: History, key: str) -> float | None:
    values = [step[key] for step in history if step.get(key) is not None]
    return statistics.median(values) if values else None


def _number(value: float | None, form: str = ".3f") -> str:
    # Nothing for a phase that a method does not have.
    return format(value, form) if value else ""
