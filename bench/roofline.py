"""Plots of a result: time, memory and error against tokens, and the roofline."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from bench.registry import LEAVES

# What is plotted against tokens, by file name: the axis, whether a floor is drawn.
AGAINST_TOKENS = {"time": "ms", "memory": "MiB beyond inputs and results", "error": "relative error of the value"}


def phase_of(entry: dict[str, Any]) -> str:
    """What an operation is judged by."""
    return "both" if entry["op"] in LEAVES else "forward"


def plots(result: dict[str, Any], folder: Path) -> list[Path]:
    """kernels_time.png, kernels_memory.png, kernels_error.png and kernels_roofline.png in `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    made = [against_tokens(result, measure, folder / f"kernels_{measure}.png") for measure in AGAINST_TOKENS]
    return [*made, roofline(result, folder / "kernels_roofline.png")]


def series(result: dict[str, Any], measure: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """By panel (an operation of a model), by implementation: (tokens, value), in order of tokens."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for entry in result["cases"]:
        if "floor" not in entry or entry["masked"] != "none":
            continue
        variant = [entry["model"], entry["objective"], entry["logits"]]
        panel = f"{entry['op']}: {', '.join(x for x in variant if x)}"
        tokens = entry["batch"] * entry["tokens"]
        phase = phase_of(entry)
        if measure == "time":
            panels[panel]["floor"].append((tokens, entry["floor"][phase]["median"]))
        for row in entry["results"]:
            if "times" not in row:
                continue
            value = {
                "time": row["times"][phase]["median"],
                "memory": None if row["memory_bytes"] is None else row["memory_bytes"] / 2**20,
                "error": row["errors"]["value"],
            }[measure]
            if value is not None:
                panels[panel][row["name"]].append((tokens, value))
    return {panel: {name: sorted(points) for name, points in lines.items()} for panel, lines in panels.items()}


def against_tokens(result: dict[str, Any], measure: str, path: Path) -> Path:
    from matplotlib import pyplot as plt

    panels = series(result, measure)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colours = {name: plt.get_cmap("tab20")(k % 20) for k, name in enumerate(names)}
    across = min(3, max(1, len(panels)))
    down = -(-max(1, len(panels)) // across)
    figure, axes = plt.subplots(down, across, figsize=(5.2 * across, 3.6 * down + 1.2), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (panel, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, points in lines.items():
            tokens, values = zip(*points, strict=True)
            style = {"linestyle": "--", "color": "black"} if name == "floor" else {"color": colours[name]}
            axis.plot(tokens, values, marker="o", markersize=4, **style)
        axis.set_title(panel, fontsize=8)
        axis.set_xscale("log", base=2)
        positive = all(value > 0 for points in lines.values() for _, value in points)
        axis.set_yscale("log" if positive else "symlog")
        axis.set_xlabel("tokens (candidates, for causal weights)", fontsize=7)
        axis.set_ylabel(AGAINST_TOKENS[measure], fontsize=7)
        axis.grid(alpha=0.3)
    handles = [
        plt.Line2D([], [], color="black" if name == "floor" else colours[name], marker="o", label=name)
        for name in names
    ]
    figure.legend(handles=handles, loc="lower center", ncol=4, fontsize=7)
    figure.suptitle(f"{result['environment']['device']}: {measure}", fontsize=9)
    figure.tight_layout(rect=(0, 0.9 / (3.6 * down + 1.2), 1, 0.98))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


def roofline(result: dict[str, Any], path: Path) -> Path:
    """What is achieved beside the floor's rate, per case: products in one panel, memory traffic in the other."""
    from matplotlib import pyplot as plt

    kinds = ("flops", "bytes")
    shown = [[e for e in result["cases"] if "floor" in e and kind in e["floor"][phase_of(e)]] for kind in kinds]
    names = list(dict.fromkeys(r["name"] for e in result["cases"] for r in e["results"] if "times" in r))
    height = 0.32 * sum(max(1, len(entries)) for entries in shown) + 2.5
    ratios = [max(1, len(entries)) for entries in shown]
    figure, axes = plt.subplots(2, 1, figsize=(11, height), gridspec_kw={"height_ratios": ratios})
    for axis, kind, entries in zip(axes, kinds, shown, strict=True):
        unit, scale = ("TFLOP/s", 1e12) if kind == "flops" else ("GB/s", 1e9)
        for k, entry in enumerate(entries):
            phase = phase_of(entry)
            roof = entry["floor"][phase]["per_second"] / scale
            axis.plot([roof, roof], [k - 0.4, k + 0.4], color="black", linewidth=2)
            for row in entry["results"]:
                if "times" in row:
                    colour = plt.get_cmap("tab20")(names.index(row["name"]) % 20)
                    at = row["times"][phase]["per_second"] / scale
                    axis.plot(at, k, marker="o" if row["ours"] else "x", color=colour)
        axis.set_yticks(range(len(entries)), [e["key"] for e in entries], fontsize=6)
        axis.set_xscale("log")
        axis.set_title(f"{unit} of the work that must be done; the black line is the floor's", fontsize=8)
        axis.grid(alpha=0.3)
    handles = [
        plt.Line2D([], [], color=plt.get_cmap("tab20")(k % 20), marker="o", linestyle="", label=name)
        for k, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="lower center", ncol=4, fontsize=7)
    figure.suptitle(f"{result['environment']['device']}: roofline", fontsize=9)
    figure.tight_layout(rect=(0, 0.9 / height, 1, 0.98))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path
