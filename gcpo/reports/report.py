"""`gcpo report`: one self-contained HTML page about one or several runs."""

import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

from gcpo import __version__
from gcpo.reports import plots
from gcpo.reports.diagnose import answer_about_loss, diagnose, overheads
from gcpo.run.records import Run

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } td, th { padding: .25rem .7rem; border-bottom: 1px solid #eee; text-align: right; }
td:first-child, th:first-child, td.text { text-align: left; }
td.text, .collider { font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { color: #555; font-size: .9rem; } svg { width: 100%; height: auto; }
.finding { border-left: 4px solid #c33; padding: .1rem .8rem; margin: .6rem 0; } .fine { border-color: #393; }
details { margin: .4rem 0; } summary { cursor: pointer; } .wide { overflow-x: auto; }
"""

# Options that a reader asks for first; the rest is in the run's own file.
OPTIONS = (
    "trainer estimator alpha kappa representation similarity num_generations num_colliders learning_rate beta "
    "max_completion_length temperature seed"
).split()


def make_page(runs: Sequence[Run], title: str, num_prompts: int = 4) -> str:
    """
    The page as text. It loads nothing: styles and plots are in it.

    Args:
        runs: at least one.
        title: of the page.
        num_prompts: prompts of each run whose samples are shown, from its first and its last log.
    """
    if not runs:
        raise ValueError("`runs` must not be empty.")
    parts = [_summary(runs), _findings(runs), _plots(runs)]
    parts += [_samples(run, num_prompts) for run in runs]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n{''.join(parts)}\n<p><small>gcpo {__version__}</small></p></body></html>\n"
    )


def _summary(runs: Sequence[Run]) -> str:
    rows: list[tuple[str, list[str]]] = [
        ("logged steps", [str(len(run.log)) for run in runs]),
        ("reward, first ten logs", [_mean(run.values("reward")[:10]) for run in runs]),
        ("reward, last ten logs", [_mean(run.values("reward")[-10:]) for run in runs]),
        ("mean &Upsilon;", [_mean(run.values("gcpo/upsilon/mean")) for run in runs]),
        ("seconds per step (median)", [_median(run.values("step_time")[1:]) for run in runs]),
        ("step time over GRPO's part of it", [_median(overheads(run)) for run in runs]),
        ("correlation of cosine and reward", [_correlation(plots.cosines_and_rewards(run)) for run in runs]),
    ]
    for name in OPTIONS:
        values = [run.config.get(name) for run in runs]
        if any(value is not None for value in values):
            rows.append((f"<code>{name}</code>", ["" if value is None else escape(str(value)) for value in values]))
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    body = "".join(f"<tr><td>{name}</td>{''.join(f'<td>{v}</td>' for v in values)}</tr>" for name, values in rows)
    return f'<h2>Summary</h2><div class="wide"><table id="summary"><tr><th></th>{head}</tr>{body}</table></div>'


def _findings(runs: Sequence[Run]) -> str:
    parts = ["<h2>Diagnosis</h2>"]
    for run in runs:
        found = diagnose(run)
        parts.append(f"<h3>{escape(run.name)}</h3><p>{escape(answer_about_loss(run))}</p>")
        for finding in found:
            parts.append(
                f'<div class="finding"><b>{escape(finding.name)}</b>: {escape(finding.number)}<br>'
                f"{escape(finding.change)}</div>"
            )
        if not found:
            parts.append(
                '<div class="finding fine">Nothing is wrong by the limits of <code>gcpo diagnose</code>.</div>'
            )
    return "".join(parts)


def _plots(runs: Sequence[Run]) -> str:
    lines: list[tuple[str, plots.Draw]] = [
        ("Reward, mean of a batch", plots.rewards),
        ("KL to the reference, per token (k3)", plots.reference_kls),
        ("KL to the causal reference, per token (k3)", plots.causal_kls),
        ("Causal weight &Upsilon;: mean, one standard deviation, least to most", plots.weights),
    ]
    figures = [(caption, plots.as_svg(draw, runs)) for caption, draw in lines]
    for run in runs:
        caption = f"Distribution of &Upsilon; over time, {escape(run.name)}"
        figures.append((caption, plots.as_svg(plots.weight_histogram, [run])))
    cosine = "Cosine (&Upsilon; / &alpha;) against reward, sampled candidates of the second half"
    figures += [
        (cosine, plots.as_svg(plots.cosine_against_reward, runs, "reward", "cosine")),
        ("Where a step's time goes (medians)", plots.as_svg(plots.phases, runs, "seconds of a step")),
        ("Gradient norm", plots.as_svg(plots.gradient_norms, runs)),
        ("Tokens of a completion; dashed: of a collider", plots.as_svg(plots.lengths, runs)),
    ]
    # Ids repeat from one plot to the next, and a browser would take the first for all.
    shown = [
        f"<figure>{_own_ids(svg, k)}<figcaption>{caption}</figcaption></figure>"
        for k, (caption, svg) in enumerate(figures)
        if svg is not None
    ]
    return f'<h2>Plots</h2><div class="plots">{"".join(shown)}</div>'


def _own_ids(svg: str, number: int) -> str:
    for before, after in (('id="', 'id="{}-'), ("url(#", "url(#{}-"), ('href="#', 'href="#{}-')):
        svg = svg.replace(before, after.format(f"p{number}"))
    return svg


def _samples(run: Run, num_prompts: int) -> str:
    head = f"<h2>Samples of {escape(run.name)}</h2>"
    if not run.samples:
        return f"{head}<p>None were written: a run writes them with <code>log_completions</code>.</p>"
    steps = sorted({group["step"] for group in run.samples})
    parts = [head]
    for step in dict.fromkeys((steps[0], steps[-1])):
        groups = [group for group in run.samples if group["step"] == step][:num_prompts]
        parts += [_group(group, opened=k == 0) for k, group in enumerate(groups)]
    return "".join(parts)


def _group(group: dict[str, Any], opened: bool) -> str:
    names = list(dict.fromkeys(name for candidate in group["candidates"] for name in candidate["rewards"]))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = "".join(
        f'<tr><td class="text">{escape(candidate["text"])}</td>'
        + "".join(f"<td>{_number(candidate['rewards'].get(name))}</td>" for name in names)
        + "".join(f"<td>{_number(candidate.get(key))}</td>" for key in ("A", "upsilon", "B"))
        + "</tr>"
        for candidate in group["candidates"]
    )
    colliders = "".join(f'<li class="collider">{escape(text)}</li>' for text in group["colliders"])
    led_to = f"<p>Colliders they led to:</p><ol start='0'>{colliders}</ol>" if colliders else ""
    summary = f"step {group['step']}: <code>{escape(group['prompt'][-200:])}</code>"
    columns = f"<th>candidate</th>{head}<th>A</th><th>&Upsilon;</th><th>B</th>"
    return (
        f"<details{' open' if opened else ''}><summary>{summary}</summary>"
        f'<div class="wide"><table class="samples"><tr>{columns}</tr>{rows}</table></div>{led_to}</details>'
    )


def _correlation(pairs: list[tuple[float, float]]) -> str:
    try:
        return f"{statistics.correlation(*map(list, zip(*pairs, strict=True))):.2f}"
    except (TypeError, statistics.StatisticsError):  # nothing to correlate, or all of one value
        return ""


def _mean(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f}" if values else ""


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.3g}" if values else ""


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.3g}"
