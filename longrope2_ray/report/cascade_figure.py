"""The figure of a cascade: cheap scores against full-length ones."""

from typing import TYPE_CHECKING

from longrope2_ray.report.figure_style import (
    ELIMINATED,
    INK,
    MEDIAN,
    draw_message,
    label_axes,
    new_figure,
    style_ticks,
)
from longrope2_ray.report.rundata import RunData
from longrope2_ray.search.cascade import Cascade

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_cascade(run: RunData) -> "Figure":
    """Draw cheap against full-length scores, on log axes, with their rank correlation."""
    points = run.cascade.points
    if not points:
        return draw_message("no candidate has both scores yet")
    figure, (ax,) = new_figure(7.2, 3.4)
    groups = (
        ("complete at full length", MEDIAN, "o", [p for p in points if p.complete]),
        ("eliminated at full length", ELIMINATED, "s", [p for p in points if not p.complete]),
    )
    for label, color, marker, group in groups:
        if group:
            ax.plot(
                [p.cheap for p in group],
                [p.full for p in group],
                marker,
                color=color,
                markeredgecolor=INK,
                markeredgewidth=0.5,
                markersize=6,
                label=f"{label}, {len(group)}",
            )
    ax.set_title(correlation_words(run.cascade), fontsize=9, color=INK)
    label_axes(ax, "cheap score (ratio to its best)", "full-length score (ratio to its best)")
    for axis in (ax.xaxis, ax.yaxis):
        _use_ratios(ax, axis.axis_name)
    ax.grid(axis="x", color="#E6E6E6", linewidth=0.6)
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def correlation_words(cascade: Cascade) -> str:
    """Return the rank correlation in words, with the number of candidates."""
    count = len(cascade.points)
    if cascade.correlation is None:
        return f"{count} candidates: too few for a rank correlation"
    return f"Spearman's rank correlation {cascade.correlation:.2f}, {count} candidates"


def _use_ratios(ax: "Axes", axis: str) -> None:
    """Make an axis logarithmic, with plain numbers as a few labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set(**{f"{axis}scale": "log"})
    chosen = ax.xaxis if axis == "x" else ax.yaxis
    low, high = ax.get_xlim() if axis == "x" else ax.get_ylim()
    steps = (1,) if high > 2000 * low else (1, 2, 5)
    chosen.set_major_locator(LogLocator(base=10, subs=steps))
    chosen.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    chosen.set_minor_formatter(NullFormatter())
    style_ticks(ax)
