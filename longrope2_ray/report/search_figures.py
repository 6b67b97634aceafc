"""The figures of a search: perplexity, critical dimensions, and units of work by generation."""

import math
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from longrope2_ray.report.figure_style import (
    ELIMINATED,
    FOUND,
    GRAY,
    INK,
    MEDIAN,
    SPREAD,
    draw_message,
    label_axes,
    new_figure,
    style_ticks,
    use_log_axis,
)
from longrope2_ray.report.rundata import ClosedGeneration, RunData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

# So many scorers get a box each; more share a histogram.
MAX_BOXES = 12


def draw_progress(run: RunData) -> "Figure":
    """Draw needle perplexity by generation: the best, the survivors' spread, every newcomer."""
    figure, (ax,) = new_figure(6.4, 3.2)
    indices = [g.index for g in run.generations]
    quantiles = [np.quantile(_survivors_ppls(g), (0, 0.1, 0.5, 0.9)) for g in run.generations]
    best, low, median, high = np.array(quantiles).T
    new = [(g.index, ppl) for g in run.generations for ppl in g.new_ppls.values()]
    if new:
        label = "new, scored completely"
        ax.plot(*zip(*new, strict=True), ".", ms=6, mew=0, color=GRAY, alpha=0.5, label=label)
    label = "survivors, 10 to 90 %"
    ax.fill_between(indices, low, high, color=SPREAD, alpha=0.6, linewidth=0, label=label)
    label = "survivors, median"
    ax.plot(indices, median, color=MEDIAN, linewidth=1.5, marker="s", markersize=3, label=label)
    ax.plot(indices, best, color=FOUND, linewidth=2, marker="o", markersize=3.5, label="best")
    drawn = [*(ppl for _, ppl in new), *best[np.isfinite(best)].tolist()]
    if drawn and max(drawn) > 5 * min(drawn):
        use_log_axis(ax, drawn)
    ax.set_xlim(min(indices) - 0.4, max(indices) + 0.4)
    label_axes(ax, "generation", "needle perplexity (search needles)")
    ax.legend(fontsize=8, frameon=False, loc="upper right")
    return figure


def _survivors_ppls(generation: ClosedGeneration) -> list[float]:
    finite = [s.ppl for s in generation.survivors if s.ppl is not None]
    return finite or [math.nan]


def draw_dimensions(run: RunData) -> "Figure":
    """Draw how many survivors each critical dimension has, generation by generation."""
    dims = {c.critical_dim for g in run.generations for c in g.candidates}
    dims |= {s.candidate.critical_dim for g in run.generations for s in g.survivors}
    if dims == {0}:
        return draw_message("every dimension is searched: there is no critical one")
    if run.theoretical is not None:
        dims.add(run.theoretical)
    figure, (ax,) = new_figure(6.4, 1.1 + 0.24 * max(max(dims) - min(dims) + 1, 6))
    _draw_counts(ax, run, min(dims), max(dims))
    best = [(g.index, g.survivors[0].candidate.critical_dim) for g in run.generations]
    ax.plot(
        *zip(*best, strict=True),
        "o",
        color=FOUND,
        markersize=4.5,
        markeredgecolor="white",
        label="best candidate",
    )
    if run.theoretical is not None:
        _frame_row(ax, run.theoretical, run.generations[-1].index + 1)
    label_axes(ax, "generation", "critical dimension")
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        ncols=2,
        fontsize=8,
        frameon=False,
    )
    return figure


def _draw_counts(ax: "Axes", run: RunData, first: int, last: int) -> None:
    """Draw the map of survivors by critical dimension ``first ... last`` and generation."""
    from matplotlib.ticker import MaxNLocator

    end = run.generations[-1].index
    counts = np.zeros((last - first + 1, end + 1))
    for generation in run.generations:
        survivors = Counter(s.candidate.critical_dim for s in generation.survivors)
        for dim, count in survivors.items():
            counts[dim - first, generation.index] = count
    image = ax.imshow(
        np.ma.masked_equal(counts, 0),
        cmap=_blues(),
        aspect="auto",
        origin="lower",
        extent=(-0.5, end + 0.5, first - 0.5, last + 0.5),
        vmin=1,
    )
    ax.grid(visible=False)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=24, integer=True))
    ticks = MaxNLocator(integer=True, nbins=5)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, ticks=ticks)
    bar.set_label("survivors", fontsize=9, color=INK)
    style_ticks(bar.ax)
    bar.outline.set_edgecolor(GRAY)


def _blues() -> "Colormap":
    """Return a map of blues whose lightest one is not white, which stands for no survivor."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("", colormaps["Blues"](np.linspace(0.2, 1, 9)))


def _frame_row(ax: "Axes", dim: int, width: int) -> None:
    """Draw a dashed frame around the row of the theoretical critical dimension."""
    from matplotlib.patches import Rectangle

    frame = Rectangle(
        (-0.5, dim - 0.5),
        width,
        1,
        fill=False,
        edgecolor=INK,
        linestyle="--",
        linewidth=1.1,
        clip_on=False,
        label=f"theoretical, {dim}",
    )
    ax.add_patch(frame)


def draw_units(run: RunData) -> "Figure":
    """Draw units by generation, time per unit, and the scorers' busy share."""
    figure, (units, times, busy) = new_figure(9.6, 3.0, columns=3)
    _draw_unit_counts(units, run)
    _draw_unit_times(times, run)
    _draw_busy_shares(busy, run)
    return figure


def _draw_unit_counts(ax: "Axes", run: RunData) -> None:
    indices = [g.index for g in run.generations]
    scored = [g.units_scored for g in run.generations]
    eliminated = [g.units_eliminated for g in run.generations]
    ax.bar(indices, scored, color=MEDIAN, label="scored")
    ax.bar(
        indices,
        eliminated,
        bottom=scored,
        color=ELIMINATED,
        hatch="////",
        edgecolor="white",
        lw=0,
        label="eliminated",
    )
    ax.set_ylim(0, 1.2 * max(map(sum, zip(scored, eliminated, strict=True))))
    ax.legend(fontsize=8, frameon=False, loc="upper right", ncols=2)
    label_axes(ax, "generation", "units (candidate, sample)")


def _draw_unit_times(ax: "Axes", run: RunData) -> None:
    names = sorted({row.scorer for row in run.rows})
    seconds = [[row.seconds for row in run.rows if row.scorer == name] for name in names]
    if len(names) > MAX_BOXES:
        ax.hist(np.concatenate(seconds), bins=30, color=MEDIAN)
        label_axes(ax, f"time per unit (s), {len(names)} scorers", "units")
        return
    ax.boxplot(
        seconds,
        widths=0.5,
        patch_artist=True,
        boxprops={"facecolor": SPREAD, "edgecolor": MEDIAN},
        medianprops={"color": FOUND},
        whiskerprops={"color": MEDIAN},
        capprops={"color": MEDIAN},
        flierprops={"markersize": 2, "markeredgecolor": GRAY},
    )
    ax.set_xticks(range(1, len(names) + 1), [name.removeprefix("scorer-") for name in names])
    ax.set_ylim(bottom=0)
    label_axes(ax, "scorer", "time per unit (s)")


def _draw_busy_shares(ax: "Axes", run: RunData) -> None:
    shares = [
        g.busy_seconds / g.scorer_seconds if g.scorer_seconds else math.nan for g in run.generations
    ]
    indices = [g.index for g in run.generations]
    ax.plot(indices, shares, color=MEDIAN, linewidth=1.5, marker="o", markersize=3)
    if run.busy_share is not None:
        label = f"whole search {run.busy_share:.0%}"
        ax.axhline(run.busy_share, color=FOUND, ls="--", lw=1.2, label=label)
        ax.legend(fontsize=8, frameon=False, loc="lower right")
    ax.set_ylim(0, 1.05)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    label_axes(ax, "generation", "busy share of scorers")
