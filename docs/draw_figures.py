"""Draws the figures of method.md: `python docs/draw_figures.py [FOLDER]`. Curves come from what they explain."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch

from gcpo_kernels import causal_weights, gcpo_loss

HERE = Path(__file__).resolve().parent
STEP_RESULT = HERE.parent / "bench" / "results" / "cpu" / "step_overhead_smollm2_512.json"
PHASES = ("rollout", "colliders", "contexts", "scoring", "loss")
INK, BLUE, ORANGE, GREEN, GREY = "#222222", "#1f6fb2", "#d9720f", "#2f8f5b", "#9a9a9a"


def node(axis: Axes, at: tuple[float, float], text: str, color: str = INK, faded: bool = False) -> None:
    face = "#f2f2f2" if faded else "white"
    axis.text(
        *at, text, ha="center", va="center", fontsize=13, color=GREY if faded else color, zorder=3,
        bbox={"boxstyle": "circle,pad=0.35", "fc": face, "ec": GREY if faded else color, "lw": 1.4},
    )  # fmt: skip


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], faded: bool = False) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 13, "shrinkA": 20, "shrinkB": 20, "lw": 1.2}
    axis.add_patch(FancyArrowPatch(start, end, color="#d0d0d0" if faded else INK, zorder=1, **style))


def graph(axes: list[Axes]) -> None:
    """The group's graph; the same with what the context x_1 holds."""
    q, c = (2.0, 3.0), (2.0, 0.0)
    candidates = [(0.5, 1.5), (1.5, 1.5), (2.5, 1.5), (3.5, 1.5)]
    for axis, left_out in zip(axes, (None, 1), strict=True):
        for i, place in enumerate(candidates):
            arrow(axis, q, place, faded=i == left_out)
            arrow(axis, place, c, faded=i == left_out)
            node(axis, place, f"$y_{i}$", BLUE, faded=i == left_out)
        node(axis, q, "$q$")
        node(axis, c, "$c_l$", ORANGE)
        axis.set_xlim(-0.2, 4.2)
        axis.set_ylim(-0.6, 3.5)
        axis.axis("off")
    axes[0].set_title("a fork at the prompt, a collider at the integrated answer", fontsize=10)
    axes[1].set_title("the context $x_{1,l}$: all but $y_1$", fontsize=10)


def weights(axes: list[Axes]) -> None:
    """z, zbar and t in a plane; Upsilon along a circle of directions of z."""
    plane, curve = axes
    zbar, difference = torch.tensor([1.0, 0.25]), torch.tensor([-0.12, 0.28])
    target, z = zbar + difference, torch.tensor([0.55, 0.95])
    for vector, text, color in ((zbar, r"$\bar{z}$", GREY), (target, "$t_i$", GREEN), (z, "$z_i$", BLUE)):
        plane.annotate("", vector.tolist(), (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.8})
        plane.text(*(vector * 1.07).tolist(), text, color=color, fontsize=13, va="center")
    plane.annotate("", target.tolist(), zbar.tolist(), arrowprops={"arrowstyle": "-|>", "color": ORANGE, "lw": 1.5})
    plane.text(1.0, 0.42, r"$\bar{Z}_i - Z'_i$", color=ORANGE, fontsize=11)
    plane.set_xlim(0, 1.35)
    plane.set_ylim(-0.05, 1.15)
    plane.set_aspect("equal")
    plane.set_xticks([])
    plane.set_yticks([])
    plane.set_title("representations, two of H dimensions", fontsize=10)
    # Two candidates: the first turns through all angles, the second keeps zbar at length one along angle 0.
    angles = torch.linspace(-180, 180, 181)
    radians = torch.deg2rad(angles)
    first = torch.stack([radians.cos(), radians.sin()], dim=-1)
    second = torch.tensor([1.0, 0.0]).expand_as(first)
    z_pairs = torch.stack([first, second], dim=1)  # (P, 2, H)
    no_projection = torch.zeros(len(angles), 2, 1, 1, 2)
    for similarity, color in (("cosine", BLUE), ("euclidean", ORANGE), ("gaussian", GREEN)):
        upsilon = causal_weights(z_pairs, no_projection, baseline="loo", similarity=similarity)[:, 0]
        curve.plot(angles, upsilon, color=color, label=similarity)
    curve.axhline(1, color=GREY, lw=0.8, ls=":")
    curve.set_xticks([-180, -90, 0, 90, 180])
    curve.set_xlabel("angle between $z_i$ and $t_i$, degrees")
    curve.set_title(r"$\Upsilon_i$ at $\alpha = 2$; dotted: GRPO", fontsize=10)
    curve.legend(frameon=False, fontsize=9)


def loss(axes: list[Axes]) -> None:
    """Minus the objective over the ratio, and the second KL term over the projected probability."""
    clipped, second = axes
    ratio = torch.linspace(0.4, 1.8, 200)
    for advantage, upsilon, color in ((1.0, 1.0, GREY), (1.0, 1.6, BLUE), (-1.0, 1.0, "#c9c9c9"), (-1.0, 1.6, ORANGE)):
        values = [_token_loss(r.log(), advantage * upsilon) for r in ratio]
        label = f"$A = {advantage:+.0f}$, " + (rf"$\Upsilon = {upsilon}$" if upsilon != 1 else "GRPO")
        clipped.plot(ratio, values, color=color, label=label)
    clipped.set_xlabel(r"$R = \pi_\theta / \pi_{old}$")
    clipped.set_title("first term of the loss", fontsize=10)
    clipped.legend(frameon=False, fontsize=8)
    policy = torch.linspace(0.02, 1.0, 200)
    for projected, color in ((0.2, GREEN), (0.5, BLUE), (0.9, ORANGE)):
        values = [_second_kl(p.log(), projected) for p in policy]
        second.plot(policy, values, color=color, label=f"$p' = {projected}$")
        second.axvline(projected, color=color, lw=0.6, ls=":")
    second.set_ylim(0, 1.2)
    second.set_xlabel(r"$\pi_\theta$ of the token")
    second.set_title(r"second KL term, $k_3(\log p' - \log \pi_\theta)$", fontsize=10)
    second.legend(frameon=False, fontsize=9)


def _token_loss(log_ratio: torch.Tensor, advantage: float) -> float:
    one = torch.ones(1, 1)
    value, _ = gcpo_loss(log_ratio * one - 2, advantage * one, one, old_logp=-2 * one)
    return float(value)


def _second_kl(logp: torch.Tensor, projected: float) -> float:
    """kappa = 1 and no advantage; with one context, a and b cancel and p' is the probability under the query."""
    one = torch.ones(1, 1)
    query = torch.tensor([[projected]]).log()
    value, _ = gcpo_loss(logp * one, 0 * one, one, query_logp=query, context_logp=query[..., None], kappa=1.0)
    return float(value)


def step(axes: list[Axes]) -> None:
    """Seconds per phase as measured."""
    (axis,) = axes
    measured = json.loads(STEP_RESULT.read_text())
    names = list(measured["results"])
    left = [0.0] * len(names)
    colors = (GREY, ORANGE, GREEN, INK, BLUE)
    for phase, color in zip(PHASES, colors, strict=True):
        seconds = [measured["results"][name]["seconds"][phase]["median"] for name in names]
        axis.barh(names, seconds, left=left, color=color, label=phase, height=0.55)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    for name, total in zip(names, left, strict=True):
        axis.text(total + 0.8, name, f"{measured['results'][name]['ratio']['median']:.2f}x", va="center", fontsize=9)
    settings = measured["settings"]
    axis.invert_yaxis()
    axis.set_xlim(0, max(left) * 1.1)
    axis.set_xlabel("seconds per step")
    axis.set_title(
        f"SmolLM2-135M, {settings['threads']} CPU threads, {settings['num_generations']} candidates of "
        f"{settings['completion_tokens']} tokens, {settings['num_colliders']} colliders of "
        f"{settings['collider_tokens']}",
        fontsize=10,
    )
    axis.legend(frameon=False, fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.45, -0.28))


FIGURES = {
    "graph": (graph, 2, (8.6, 3.2)),
    "weights": (weights, 2, (8.6, 3.4)),
    "loss": (loss, 2, (8.6, 3.4)),
    "step": (step, 1, (8.6, 2.5)),
}


def main(folder: Path) -> None:
    plt.rcParams.update({"svg.hashsalt": "gcpo", "font.size": 10})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    folder.mkdir(parents=True, exist_ok=True)
    for name, (draw, columns, size) in FIGURES.items():
        figure, axes = plt.subplots(1, columns, figsize=size, squeeze=False, layout="constrained")
        draw(list(axes[0]))
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None}, facecolor="white")
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "figures")
