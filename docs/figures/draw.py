"""Draw the figure of README.md, ``docs/figures/results.png``.

    python docs/figures/draw.py

Every number stands in ``jobs/LOG.md``; the found factors are those that ``make demo`` writes to
``runs/demo/winner.json``, the other curves are computed from their formulas.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from longrope2_ray.rope.baselines import baseline
from longrope2_ray.rope.geometry import RopeGeometry

COLORS = {
    "unscaled": "#9a9a9a",
    "PI": "#8c6bb1",
    "NTK": "#3b7dd8",
    "Llama 3": "#d99b26",
    "YaRN": "#2a9d68",
    "LongRoPE2": "#d1362f",
}

# jobs/LOG.md, "SmolLM2-135M, 12,288 tokens …": in bfloat16, four held-out needles at the start.
SMOLLM2 = {
    "12,288 tokens": {
        "unscaled": 54.26,
        "PI": 18.01,
        "NTK": 17.85,
        "YaRN": 18.16,
        "LongRoPE2": 1.329,
    },
    "16,384 tokens": {
        "unscaled": 117.5,
        "PI": 17.48,
        "NTK": 18.21,
        "YaRN": 18.99,
        "LongRoPE2": 1.489,
    },
}

# jobs/LOG.md, "Proposals at equal cost": 120 held-out needles each; medians of five searches,
# baselines at 1.118.
DEMO = {
    "the start": {"Llama 3": 1.724, "YaRN": 1.295, "LongRoPE2": 1.080},
    "all depths": {"Llama 3": 1.222, "YaRN": 1.316, "LongRoPE2": 1.114},
}

# The factors of runs/demo/winner.json, and the first dimension at the ratio.
DEMO_GEOMETRY = RopeGeometry(head_dim=64, rotary_dim=64, base=10000.0, original_length=256)
DEMO_TARGET = 1024
DEMO_CRITICAL_DIM = 13
DEMO_HEAD = [1.0, 1.0302, 1.0632, 1.0997, 1.1402, 1.1855, 1.2367, 1.2952, 1.3628]
DEMO_RAMP = [1.7955, 1.8156, 2.6268, 3.0024]
DEMO_TAIL = 15 * [5.012] + 4 * [5.029]


def main() -> None:
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(15, 4.6), width_ratios=[1.15, 1, 1], layout="constrained"
    )
    figure.get_layout_engine().set(wspace=0.06)
    draw_perplexity(left, SMOLLM2, "SmolLM2-135M: needle at the start (by evolution)", log=True)
    draw_factors(middle, "Demo model: factors, 256 to 1,024 tokens")
    draw_perplexity(right, DEMO, "Demo model: needle at …", log=False)
    handles = [Patch(color=color, label=method) for method, color in COLORS.items()]
    figure.legend(handles=handles, ncols=len(COLORS), frameon=False, loc="outside lower center")
    figure.savefig(Path(__file__).parent / "results.png", dpi=110)


def draw_perplexity(axes: Axes, groups: dict[str, dict[str, float]], title: str, log: bool) -> None:
    """Draw bars from 1, the perplexity of a certain answer; groups from left to right."""
    methods = list(next(iter(groups.values())))
    width = 0.84 / len(methods)
    for index, method in enumerate(methods):
        heights = [values[method] for values in groups.values()]
        left = [group + (index - (len(methods) - 1) / 2) * width for group in range(len(groups))]
        bars = axes.bar(
            left,
            [height - 1 for height in heights],
            0.9 * width,
            bottom=1,
            color=COLORS[method],
        )
        labels = [f"{height:.1f}" if height >= 10 else f"{height:.2f}" for height in heights]
        bold = "bold" if method == "LongRoPE2" else "normal"
        axes.bar_label(bars, labels, padding=2, fontsize=9.5, fontweight=bold)
    if log:
        axes.set_yscale("log")
        axes.set_ylim(1, 200)
        axes.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
        axes.minorticks_off()
    else:
        axes.set_ylim(1, 1.9)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("needle perplexity (lower is better)")
    axes.set_title(title, loc="left", fontweight="bold", fontsize=12)


def draw_factors(axes: Axes, title: str) -> None:
    """Draw the factor of each cosine dimension, of four methods and of the search."""
    for method, name in {"ntk": "NTK", "llama3": "Llama 3", "yarn": "YaRN"}.items():
        factors = baseline(method, DEMO_GEOMETRY, DEMO_TARGET).values
        axes.plot(factors, color=COLORS[name], linewidth=1.6)
    found = DEMO_HEAD + DEMO_RAMP + DEMO_TAIL
    axes.plot(found, color=COLORS["LongRoPE2"], linewidth=2.2, marker=".")
    theory = DEMO_GEOMETRY.theoretical_critical_dim
    for dim, style, text, side in (
        (DEMO_CRITICAL_DIM, "-", "found", "right"),
        (theory, ":", "theory", "left"),
    ):
        axes.axvline(dim, color="#555555", linewidth=1, linestyle=style, zorder=0)
        shift = -0.4 if side == "right" else 0.4
        axes.text(dim + shift, 0.15, f"{text}: {dim}", ha=side, fontsize=9.5, color="#333333")
    axes.set_ylim(0, 9)
    axes.set_xlabel("cosine dimension, from short to long periods")
    axes.set_ylabel("rescale factor")
    axes.set_title(title, loc="left", fontweight="bold", fontsize=12)


if __name__ == "__main__":
    main()
