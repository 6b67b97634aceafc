"""The figures of where a winner came from: lines of ancestors, and the steps of a descent."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from longrope2_ray.report.figure_style import (
    FOUND,
    GRAY,
    INK,
    MEDIAN,
    PALETTE,
    SPREAD,
    label_axes,
    new_figure,
    use_log_axis,
)
from longrope2_ray.report.genealogy import (
    DescentStep,
    Relative,
    line_of,
    name_of_origin,
    name_of_start,
    relatives,
)
from longrope2_ray.report.rundata import RunData
from longrope2_ray.search.space import Candidate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The running mean of a descent is over so many steps: each has documents of its own.
SMOOTHED_STEPS = 4
# So many candidates of the race after a descent have a row each, the best ones.
MAX_RACED = 16


def draw_genealogy(run: RunData) -> "Figure":
    """Draw survivors where they were bred, by generation and perplexity, with lines to parents."""
    figure, (ax,) = new_figure(7.2, 3.6)
    known = relatives(g.record for g in run.generations)
    drawn = {id: r for id, r in known.items() if r.ppl is not None}
    last = run.generations[-1].survivors
    lines = [line_of(survivor.candidate.id, drawn) for survivor in last]
    edges = [[drawn[p], r] for r in drawn.values() if (p := r.candidate.parent_id or "") in drawn]
    _draw_lines(ax, edges, GRAY, 0.6, "lines that died out")
    _draw_lines(ax, lines[1:], MEDIAN, 1.2, "lines of the survivors")
    label = "line of the winner" if run.winner else "line of the best so far"
    _draw_lines(ax, lines[:1], FOUND, 2.6, label)
    _draw_relatives(ax, list(drawn.values()))
    ppls = [_ppl(r) for r in drawn.values()]
    if ppls and max(ppls) > 5 * min(ppls):
        use_log_axis(ax, ppls)
    end = run.generations[-1].index
    ax.set_xlim(-0.5, max(end, 1) + 0.5)
    label_axes(ax, "generation", "needle perplexity (search needles)")
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _ppl(relative: Relative | DescentStep) -> float:
    return math.nan if relative.ppl is None else relative.ppl


def _draw_lines(
    ax: "Axes", lines: Iterable[Sequence[Relative]], color: str, width: float, label: str
) -> None:
    """Draw lines of ancestors."""
    from matplotlib.collections import LineCollection

    points = [[(r.generation, _ppl(r)) for r in line] for line in lines if len(line) > 1]
    if points:
        ax.add_collection(LineCollection(points, colors=color, linewidths=width, label=label))


def _draw_relatives(ax: "Axes", everyone: Sequence[Relative]) -> None:
    """Draw a point for each candidate, colored by what made it."""
    origins = dict.fromkeys(name_of_origin(r.candidate) for r in everyone)
    for origin, color in zip(origins, itertools.cycle(PALETTE), strict=False):
        made = [r for r in everyone if name_of_origin(r.candidate) == origin]
        ax.plot(
            [r.generation for r in made],
            [_ppl(r) for r in made],
            "o",
            color=color,
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            label=origin,
            zorder=4,
        )


def draw_descent(run: RunData) -> "Figure":
    """Draw the perplexity of a descent's steps, and the full-length race that followed it."""
    if not run.generations:
        figure, (ax,) = new_figure(7.2, 3.0)
        _draw_steps(ax, run)
        return figure
    figure, (steps, raced) = new_figure(9.6, 3.4, columns=2)
    _draw_steps(steps, run)
    _draw_raced(raced, run)
    return figure


def _draw_steps(ax: "Axes", run: RunData) -> None:
    steps = [step for step in run.descent if step.ppl is not None]
    numbers, ppls = [s.step for s in steps], [_ppl(s) for s in steps]
    ax.plot(
        numbers, ppls, "o", color=SPREAD, markersize=4.5, label="documents of the step", zorder=2
    )
    if len(steps) > SMOOTHED_STEPS:
        means = _running_means(np.log(ppls))
        first = SMOOTHED_STEPS - 1
        label = f"mean of {SMOOTHED_STEPS} steps"
        ax.plot(numbers[first:], np.exp(means), color=MEDIAN, linewidth=1.8, label=label)
    if steps and steps[0].step == 0:
        _mark_start(ax, steps[0], run)
    if ppls and max(ppls) > 5 * min(ppls):
        use_log_axis(ax, ppls)
    ax.margins(y=0.15)
    label_axes(ax, "step of the descent", "needle perplexity (skipped documents)")
    ax.legend(fontsize=8, frameon=False, loc="upper right")


def _running_means(values: np.ndarray) -> np.ndarray:
    means: np.ndarray = np.convolve(values, np.full(SMOOTHED_STEPS, 1 / SMOOTHED_STEPS), "valid")
    return means


def _mark_start(ax: "Axes", start: DescentStep, run: RunData) -> None:
    """Mark the first step, whose vector is the start, with what made that."""
    made_by = name_of_start(run.descent, [g.record for g in run.generations])
    name = f"start: {made_by}" if made_by else "start"
    ax.plot([0], [_ppl(start)], "D", color=INK, markersize=5.5, label=name, zorder=5)


def _draw_raced(ax: "Axes", run: RunData) -> None:
    """Draw the candidates that were raced after the descent, best on top."""
    generation = run.generations[0]
    ppls = {**{s.candidate.id: s.ppl for s in generation.survivors}, **generation.new_ppls}
    by_id = {candidate.id: candidate for candidate in generation.candidates}
    ranked = sorted(by_id.values(), key=lambda c: (_or_infinity(ppls.get(c.id)), c.id))[:MAX_RACED]
    start = run.descent[0].vector_id
    rows = range(len(ranked), 0, -1)
    for row, candidate in zip(rows, ranked, strict=True):
        ppl = ppls.get(candidate.id)
        if ppl is None:
            right = ax.get_yaxis_transform()
            ax.text(
                0.98,
                row,
                "eliminated",
                transform=right,
                ha="right",
                va="center",
                color=GRAY,
                fontsize=8,
            )
            continue
        color = FOUND if candidate is ranked[0] else MEDIAN
        marker = "D" if candidate.id == start else "o"
        ax.plot([ppl], [row], marker, color=color, markersize=6)
        ax.annotate(
            f"{ppl:.4g}", (ppl, row), (6, 0), textcoords="offset points", va="center", fontsize=8
        )
    ax.set_yticks(list(rows), [_label(candidate, start) for candidate in ranked])
    ax.grid(axis="x", color="#E6E6E6", linewidth=0.6)
    ax.set_ylim(0.4, len(ranked) + 0.6)
    ax.margins(x=0.25)
    ax.locator_params(axis="x", nbins=6)
    label_axes(ax, "needle perplexity (search needles)", "")


def _or_infinity(ppl: float | None) -> float:
    return math.inf if ppl is None else ppl


def _label(candidate: Candidate, start: str) -> str:
    """Return what made a candidate and its attention factor."""
    origin = name_of_origin(candidate)
    if candidate.id == start:
        return f"start: {origin}\nattention factor {candidate.attention_factor:.3f}"
    if origin == "attention factor":
        return f"{origin} {candidate.attention_factor:.3f}"
    return f"{origin}, {candidate.attention_factor:.3f}"
