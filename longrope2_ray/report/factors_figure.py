"""The figure of the rescale factors, found and baselines (as Fig. 2b and 4 of LongRoPE2)."""

import math
from typing import TYPE_CHECKING

import numpy as np

from longrope2_ray.report.figure_style import (
    FOUND,
    GRAY,
    INK,
    STYLES,
    label_axes,
    name_of_result,
    new_figure,
    style_ticks,
    use_log_axis,
)
from longrope2_ray.report.rundata import RunData
from longrope2_ray.rope.baselines import PLAIN, WITH_CRITICAL_DIM, baseline
from longrope2_ray.rope.geometry import RopeGeometry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Factors of a baseline above so many ratios, which stand for infinity, are left out.
HIGHEST_RATIOS = 20


def draw_factors(run: RunData) -> "Figure":
    """Draw the factors of each dimension, found and baselines, with both critical dimensions."""
    figure, (ax,) = new_figure(7.2, 4.2)
    drawn = [np.ones(1), *_draw_survivors(ax, run), *_draw_baselines(ax, run)]
    if run.geometry and run.target_length:
        _add_period_axis(ax, run.geometry)
    use_log_axis(ax, np.concatenate(drawn).tolist())
    _mark_critical_dims(ax, run)
    label_axes(ax, "RoPE dimension (cosine index)", "rescale factor")
    if ax.lines:
        ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw_survivors(ax: "Axes", run: RunData) -> list[np.ndarray]:
    """Draw the best candidate and the range of all survivors; return the highest factors."""
    if not run.best:
        return []
    survivors = np.array([s.candidate.factors.values for s in run.generations[-1].survivors])
    color = STYLES["longrope2"].color
    label = name_of_result(run.best.candidate.critical_dim)
    label += "" if run.winner else ", best so far"
    ax.plot(survivors[0], color=color, linewidth=2, marker="o", markersize=3, label=label, zorder=5)
    low, high, dims = survivors.min(0), survivors.max(0), np.arange(survivors.shape[1])
    ax.fill_between(dims, low, high, color=color, alpha=0.15, linewidth=0, label="all survivors")
    return [high]


def _draw_baselines(ax: "Axes", run: RunData) -> list[np.ndarray]:
    """Draw the baselines at the target length; return their factors.

    Every published method is drawn whatever methods the tables compare; of those that take the
    critical dimension from the search, the tables' ones.
    """
    if not (run.geometry and run.target_length):
        return []
    found = run.best.candidate.critical_dim if run.best else None
    wanted = {*PLAIN, *run.methods} - {"longrope2"}
    if not found:
        wanted -= set(WITH_CRITICAL_DIM)
    drawn = []
    for method in (name for name in STYLES if name in wanted):
        dim = found if method in WITH_CRITICAL_DIM else None
        values = baseline(method, run.geometry, run.target_length, critical_dim=dim).values
        highest = HIGHEST_RATIOS * run.target_length / run.geometry.original_length
        values = values[values <= highest]
        label, color, line = STYLES[method]
        ax.plot(values, color=color, linestyle=line, linewidth=1.4, label=label)
        drawn.append(values)
    return drawn


def _mark_critical_dims(ax: "Axes", run: RunData) -> None:
    found, theory = run.best.candidate.critical_dim if run.best else 0, run.theoretical or 0
    if found and found == theory:
        _mark_dim(ax, found, "found = theoretical", FOUND, "-", left=False)
        return
    _mark_dim(ax, found, "found", FOUND, "-", left=found < theory)
    _mark_dim(ax, theory, "theoretical", INK, "--", left=theory < found)


def _mark_dim(ax: "Axes", dim: int, text: str, color: str, line: str, *, left: bool) -> None:
    """Draw a labelled vertical line; none for dimension 0, which stands for no critical one."""
    if not dim:
        return
    ax.axvline(dim, color=color, linestyle=line, linewidth=0.9, zorder=1)
    ax.text(
        dim,
        0.98,
        f" {text} \n {dim} ",
        transform=ax.get_xaxis_transform(),
        ha="right" if left else "left",
        va="top",
        fontsize=8,
        color=color,
    )


def _add_period_axis(ax: "Axes", geometry: RopeGeometry) -> None:
    """Add an axis along the top with the periods in tokens, at powers of ten."""
    dims, periods = np.arange(geometry.num_cosines), np.log10(geometry.periods_tokens)
    powers = np.arange(math.ceil(periods[0]), math.floor(periods[-1]) + 1)
    ax.set_xlim(-0.5, len(dims) - 0.5)
    top = ax.twiny()
    top.set_xlim(ax.get_xlim())
    labels = [f"{10**power:,}" for power in powers.tolist()]
    top.set_xticks(np.interp(powers, periods, dims), labels)
    top.spines[["right", "left", "bottom"]].set_visible(False)
    top.spines["top"].set_color(GRAY)
    style_ticks(top)
    top.set_xlabel("period of the dimension (tokens)", fontsize=9, color=INK)
