"""A run as its directory tells it, and the figures of it.

matplotlib is imported when the first figure is drawn, and only its object API is used: figures are also drawn in a thread
beside the search.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from longrope2_ray.report.rundata import RunData
from longrope2_ray.rope.baselines import WITH_CRITICAL_DIM, baseline
from longrope2_ray.rope.factors import assemble
from longrope2_ray.rope.geometry import RopeGeometry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Method: label, colour, line. Okabe and Ito's palette is told apart by colour-blind readers, the lines also in grey.
STYLES: dict[str, tuple[str, str, Any]] = {
    "longrope2": ("LongRoPE2", "#D55E00", "-"),
    "unscaled": ("unscaled", "#777777", ":"),
    "pi": ("PI", "#0072B2", "--"),
    "ntk": ("NTK", "#009E73", "-."),
    "yarn": ("YaRN", "#CC79A7", (0, (5, 1))),
    "ntk-aware": ("NTK-aware", "#56B4E9", "-."),
    "llama3": ("Llama 3", "#E69F00", (0, (3, 1, 1, 1))),
    "ntk-rcd": ("NTK-rcd", "#009E73", (0, (1, 1))),
    "yarn-rcd": ("YaRN-rcd", "#CC79A7", (0, (1, 1))),
}


FOUND, MEDIAN, SPREAD, RACED_OUT, INK, GREY = (
    "#D55E00",
    "#0072B2",
    "#9CC3DD",
    "#F0C27B",
    "#222222",
    "#888888",
)


DPI = 220


MAX_BOXES = 12  # scorers that get a box each; more share a histogram


NOT_YET = "no generation has been closed yet"


def found_label(critical_dim: int) -> str:
    """Name of what a search found: without a critical dimension (0) it searched every dimension, as LongRoPE did."""
    return STYLES["longrope2"][0] if critical_dim else "LongRoPE"


def _figure(width: float, height: float, columns: int = 1) -> tuple["Figure", list["Axes"]]:
    """A figure with styled, empty axes; the style is set on the axes since rcParams are shared between threads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1))
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GREY)
        ax.tick_params(which="both", labelsize=8, color=GREY, labelcolor=INK)
        ax.set_axisbelow(True)
        ax.grid(axis="y", color="#E6E6E6", linewidth=0.6)
    return figure, axes


def draw_message(text: str) -> "Figure":
    figure, (ax,) = _figure(6.4, 0.8)
    ax.set_axis_off()
    ax.text(
        0.5,
        0.5,
        text,
        ha="center",
        va="center",
        fontsize=10,
        color="#666666",
        transform=ax.transAxes,
    )
    return figure


def _label(ax: "Axes", x: str, y: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)
    if x == "generation":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _log_axis(ax: "Axes", values: Sequence[float]) -> None:
    """A log axis with plain numbers as labels, few enough to read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    wide = max(values) > 2000 * min(values)
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1,) if wide else (1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def draw_factors(run: RunData) -> "Figure":
    """Factors per dimension, found and baselines, with both critical dimensions (as Fig. 2b and 4 of the paper)."""
    figure, (ax,) = _figure(7.2, 3.4)
    found = run.best["critical_dim"] if run.best else None
    drawn = [np.ones(1)]
    if run.best:
        survivors = np.array(
            [assemble(c["critical_dim"], c["tail"]) for c in run.generations[-1].survivors]
        )
        colour = STYLES["longrope2"][1]
        label = found_label(run.best["critical_dim"]) + ("" if run.winner else ", best so far")
        ax.plot(
            survivors[0], color=colour, linewidth=2, marker="o", markersize=3, label=label, zorder=5
        )
        low, high, dims = survivors.min(0), survivors.max(0), np.arange(survivors.shape[1])
        ax.fill_between(
            dims, low, high, color=colour, alpha=0.15, linewidth=0, label="all survivors"
        )
        drawn.append(high)
    if run.geometry and run.target_length:
        wanted = {*(run.recipe.get("report.methods") or ()), "unscaled", "pi", "ntk", "yarn"}
        wanted -= {"longrope2", *(() if found else WITH_CRITICAL_DIM)}
        for method in (m for m in STYLES if m in wanted):
            dim = found if method in WITH_CRITICAL_DIM else None
            drawn.append(baseline(method, run.geometry, run.target_length, critical_dim=dim).values)
            label, colour, line = STYLES[method]
            ax.plot(drawn[-1], color=colour, linestyle=line, linewidth=1.4, label=label)
        _period_axis(ax, run.geometry)
    _log_axis(ax, np.concatenate(drawn).tolist())
    theory = run.theoretical
    if found and found == theory:
        _mark_dim(ax, found, "found = theoretical", FOUND, "-", left=False)
    else:
        _mark_dim(ax, found, "found", FOUND, "-", left=(found or 0) < (theory or 0))
        _mark_dim(ax, theory, "theoretical", INK, "--", left=(theory or 0) < (found or 0))
    _label(ax, "RoPE dimension (cosine index)", "rescale factor")
    if ax.lines:
        ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _mark_dim(
    ax: "Axes", dim: int | None, text: str, colour: str, line: str, *, left: bool
) -> None:
    """A labelled vertical line; none for dimension 0, which stands for no critical dimension."""
    if not dim:
        return
    ax.axvline(dim, color=colour, linestyle=line, linewidth=0.9, zorder=1)
    ax.text(
        dim, 0.98, f" {text} \n {dim} ", transform=ax.get_xaxis_transform(), va="top", ha="right" if left else "left",
        fontsize=8, color=colour,
    )  # fmt: skip


def _period_axis(ax: "Axes", geometry: RopeGeometry) -> None:
    """Periods in tokens along the top, at powers of ten."""
    dims, periods = np.arange(geometry.num_cosines), np.log10(geometry.periods_tokens)
    powers = np.arange(math.ceil(periods[0]), math.floor(periods[-1]) + 1)
    ax.set_xlim(-0.5, len(dims) - 0.5)
    top = ax.twiny()
    top.set_xlim(ax.get_xlim())
    top.set_xticks(
        np.interp(powers, periods, dims), [f"{10**power:,}" for power in powers.tolist()]
    )
    top.spines[["right", "left", "bottom"]].set_visible(False)
    top.spines["top"].set_color(GREY)
    top.tick_params(labelsize=8, color=GREY, labelcolor=INK)
    top.set_xlabel("period of the dimension (tokens)", fontsize=9, color=INK)


def draw_progress(run: RunData) -> "Figure":
    """Needle perplexity per generation: the best, the survivors' median and spread, and every complete newcomer."""
    figure, (ax,) = _figure(6.4, 3.2)
    indices = [g.index for g in run.generations]
    survivors = [
        [c["ppl"] for c in g.survivors if c["ppl"] is not None] or [math.nan]
        for g in run.generations
    ]
    best, low, median, high = np.array(
        [np.quantile(ppls, (0, 0.1, 0.5, 0.9)) for ppls in survivors]
    ).T
    new = [(g.index, ppl) for g in run.generations for ppl in g.new_ppls]
    ax.plot(
        *zip(*new, strict=True),
        ".",
        ms=6,
        mew=0,
        color=GREY,
        alpha=0.5,
        label="new, scored completely",
    ) if new else None
    ax.fill_between(
        indices, low, high, color=SPREAD, alpha=0.6, linewidth=0, label="survivors, 10 to 90 %"
    )
    ax.plot(
        indices,
        median,
        color=MEDIAN,
        linewidth=1.5,
        marker="s",
        markersize=3,
        label="survivors, median",
    )
    ax.plot(indices, best, color=FOUND, linewidth=2, marker="o", markersize=3.5, label="best")
    seen = [*(ppl for _, ppl in new), *best[np.isfinite(best)].tolist()]
    if seen and max(seen) > 5 * min(seen):
        _log_axis(ax, seen)
    ax.set_xlim(min(indices) - 0.4, max(indices) + 0.4)
    _label(ax, "generation", "needle perplexity (search needles)")
    ax.legend(fontsize=8, frameon=False, loc="upper right")
    return figure


def draw_dimensions(run: RunData) -> "Figure":
    """How many survivors each critical dimension has, generation by generation."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    dims = {c["critical_dim"] for g in run.generations for c in (*g.candidates, *g.survivors)}
    if dims == {0}:
        return draw_message("every dimension is searched: there is no critical one")
    dims |= {run.theoretical} - {None}
    first, last, end = min(dims), max(dims), run.generations[-1].index
    figure, (ax,) = _figure(6.4, 1.1 + 0.24 * max(last - first + 1, 6))
    counts = np.zeros((last - first + 1, end + 1))
    for generation in run.generations:
        for dim, count in Counter(c["critical_dim"] for c in generation.survivors).items():
            counts[dim - first, generation.index] = count
    extent = (-0.5, end + 0.5, first - 0.5, last + 0.5)
    blues = LinearSegmentedColormap.from_list(
        "", colormaps["Blues"](np.linspace(0.2, 1, 9))
    )  # one is not none, white
    image = ax.imshow(
        np.ma.masked_equal(counts, 0),
        cmap=blues,
        aspect="auto",
        origin="lower",
        extent=extent,
        vmin=1,
    )
    best = [(g.index, g.survivors[0]["critical_dim"]) for g in run.generations]
    ax.plot(
        *zip(*best, strict=True),
        "o",
        color=FOUND,
        markersize=4.5,
        markeredgecolor="white",
        label="best candidate",
    )
    if run.theoretical is not None:
        ax.add_patch(
            Rectangle(
                (-0.5, run.theoretical - 0.5), end + 1, 1, fill=False, edgecolor=INK, linestyle="--", linewidth=1.1,
                clip_on=False, label=f"theoretical, {run.theoretical}",
            )
        )  # fmt: skip
    ax.grid(visible=False)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=24, integer=True))
    bar = figure.colorbar(image, ax=ax, pad=0.02, ticks=MaxNLocator(integer=True, nbins=5))
    bar.set_label("survivors", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8, color=GREY, labelcolor=INK)
    bar.outline.set_edgecolor(GREY)
    _label(ax, "generation", "critical dimension")
    ax.legend(
        fontsize=8,
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=2,
        borderaxespad=0.2,
    )
    return figure


def draw_units(run: RunData) -> "Figure":
    """Units scored and raced out per generation, time per unit, and how busy the scorers were."""
    figure, (units, times, busy) = _figure(9.6, 3.0, columns=3)
    indices = [g.index for g in run.generations]
    scored, out = [g.scored for g in run.generations], [g.raced_out for g in run.generations]
    units.bar(indices, scored, color=MEDIAN, label="scored")
    units.bar(
        indices,
        out,
        bottom=scored,
        color=RACED_OUT,
        hatch="////",
        edgecolor="white",
        lw=0,
        label="raced out",
    )
    units.set_ylim(0, 1.2 * max(map(sum, zip(scored, out, strict=True))))
    units.legend(fontsize=8, frameon=False, loc="upper right", ncols=2)
    _label(units, "generation", "units (candidate, sample)")

    names = sorted({row.scorer for row in run.rows})
    seconds = [[row.seconds for row in run.rows if row.scorer == name] for name in names]
    if len(names) <= MAX_BOXES:
        lines = {"color": MEDIAN}
        times.boxplot(
            seconds, widths=0.5, patch_artist=True, boxprops={"facecolor": SPREAD, "edgecolor": MEDIAN},
            medianprops={"color": FOUND}, whiskerprops=lines, capprops=lines,
            flierprops={"markersize": 2, "markeredgecolor": GREY},
        )  # fmt: skip
        times.set_xticks(range(1, len(names) + 1), [name.removeprefix("scorer-") for name in names])
        times.set_ylim(bottom=0)
        _label(times, "scorer", "time per unit (s)")
    else:
        times.hist(np.concatenate(seconds), bins=30, color=MEDIAN)
        _label(times, f"time per unit (s), {len(names)} scorers", "units")

    shares = [
        g.busy_seconds / g.scorer_seconds if g.scorer_seconds else math.nan for g in run.generations
    ]
    busy.plot(indices, shares, color=MEDIAN, linewidth=1.5, marker="o", markersize=3)
    if run.busy_share is not None:
        busy.axhline(
            run.busy_share, color=FOUND, ls="--", lw=1.2, label=f"whole search {run.busy_share:.0%}"
        )
        busy.legend(fontsize=8, frameon=False, loc="lower right")
    busy.set_ylim(0, 1.05)
    busy.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _label(busy, "generation", "busy share of scorers")
    return figure


def draw_training(run: RunData) -> "Figure":
    """Loss of each training by step, short and long segments apart."""
    figure, axes = _figure(6.4, 2.8, columns=2)
    colours = [style[1] for style in STYLES.values()]
    for ax, window in zip(axes, ("short", "long"), strict=True):
        for colour, (name, rows) in zip(
            itertools.cycle(colours), run.trainings.items(), strict=False
        ):
            points = [
                (row["step"], row["window_losses"][window])
                for row in rows
                if window in row["window_losses"]
            ]
            if points:
                steps, losses = np.array(points).T
                ax.plot(steps, losses, color=colour, linewidth=0.7, alpha=0.35)
                width = max(len(losses) // 10, 1)  # a running mean over a tenth of what was logged
                smooth = np.convolve(losses, np.full(width, 1 / width), mode="valid")
                ax.plot(steps[width - 1 :], smooth, color=colour, linewidth=1.6, label=name)
        _label(ax, "optimizer step", f"loss, {window} segments")
    handles, labels = axes[-1].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(
            handles,
            labels,
            fontsize=7,
            frameon=False,
            loc="outside lower center",
            ncols=min(len(labels), 4),
        )
    return figure


# PNG, how it is drawn, its caption
FIGURES: tuple[tuple[str, Callable[[RunData], "Figure"], str], ...] = (
    ("factors.png", draw_factors,
     "Rescale factor per RoPE dimension, found and baselines, on a log axis. Vertical lines: the critical dimension that "
     "the search found and the theoretical one."),
    ("progress.png", draw_progress,
     "Needle perplexity on the search's needles. Candidates that racing stopped have no perplexity and are not shown."),
    ("dimensions.png", draw_dimensions,
     "Survivors per critical dimension after each generation. Points: the best candidate; dashed: the theoretical one."),
    ("units.png", draw_units,
     "Units of work, (candidate, sample): scored, or never scored because racing stopped the candidate; time per unit by "
     "scorer; the part of the scorers' time that went into units."),
)  # fmt: skip


TRAINING: tuple[str, Callable[[RunData], "Figure"], str] = (
    "training.png", draw_training, "Loss in nats per token by the window of the segments: each logged step, and the mean "
    "over a tenth of them.",
)  # fmt: skip
