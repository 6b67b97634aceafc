"""The figure of needle perplexity against the needle's depth, one line for each method."""

from statistics import fmean
from typing import TYPE_CHECKING

from longrope2_ray.report.figure_style import (
    STYLES,
    draw_message,
    label_axes,
    name_of_result,
    new_figure,
    use_log_axis,
)
from longrope2_ray.report.rundata import RunData
from longrope2_ray.search.verdict import own_best
from longrope2_ray.search.winner import ComparisonRow, Winner

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_depths(run: RunData) -> "Figure":
    """Draw perplexity by depth, each method at its own best attention factor of those reported."""
    if not run.winner or not run.winner.report:
        return draw_message("the search has not been reported yet")
    rows = _best_rows(run.winner)
    groups = rows[0].needles.by_depth()
    if len(groups) == 1:
        return draw_message(f"all held-out needles stand at depth {next(iter(groups))}")
    figure, (ax,) = new_figure(7.2, 3.4)
    drawn: list[float] = []
    for row in rows:
        drawn += _draw_row(ax, row, run.winner)
    if drawn and max(drawn) > 5 * min(drawn):
        use_log_axis(ax, drawn)
    ax.set_xticks([fmean(needles.depth_per_sample) for needles in groups.values()], list(groups))
    label_axes(
        ax,
        f"needle's depth in {rows[0].length} tokens (0 the start, 1 the end)",
        "needle perplexity (held out)",
    )
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _best_rows(winner: Winner) -> list[ComparisonRow]:
    """Return the row of each method at the target length, or at the first length reported."""
    lengths = [row.length for row in winner.report]
    length = winner.target_length if winner.target_length in lengths else lengths[0]
    rows = [row for row in winner.report if row.length == length]
    methods = dict.fromkeys(row.method for row in rows)
    return [own_best([row for row in rows if row.method == method]) for method in methods]


def _draw_row(ax: "Axes", row: ComparisonRow, winner: Winner) -> list[float]:
    """Draw a method's line, a group of depths at their mean; return its perplexities."""
    groups = row.needles.by_depth().values()
    points = [
        (fmean(needles.depth_per_sample), needles.ppl)
        for needles in groups
        if needles.ppl is not None
    ]
    label, color, line = STYLES[row.method]
    found = row.method == "longrope2"
    if found:
        label = name_of_result(winner.candidate.critical_dim)
    ax.plot(
        [depth for depth, _ in points],
        [ppl for _, ppl in points],
        color=color,
        linestyle=line,
        linewidth=2 if found else 1.4,
        marker="o",
        markersize=3.5,
        label=f"{label}, {row.attention_factor:.3f}",
        zorder=5 if found else 2,
    )
    return [ppl for _, ppl in points]
