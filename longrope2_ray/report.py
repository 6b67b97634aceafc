"""Tables and figures of a run, from its directory alone: a text table, PNGs and one self-contained ``report.html``.

Works at every stage of a run. matplotlib is imported when the first figure is drawn, and only its object API is used:
figures are also drawn in a thread beside the search.
"""

import base64
import html
import io
import logging
import math
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from longrope2_ray.baselines import METHODS, WITH_CRITICAL_DIM, baseline
from longrope2_ray.factors import assemble
from longrope2_ray.rope import RopeGeometry
from longrope2_ray.rundir import RunDir, Score
from longrope2_ray.search import SEARCH_SET, Status, perplexity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger("longrope2")

LABELS = {
    "unscaled": "unscaled", "pi": "PI", "ntk": "NTK", "ntk-aware": "NTK-aware", "yarn": "YaRN", "llama3": "Llama 3",
    "ntk-rcd": "NTK-rcd", "yarn-rcd": "YaRN-rcd", "longrope2": "LongRoPE2",
}  # fmt: skip
# Okabe and Ito's palette: told apart by colour-blind readers; the line styles also survive a black-and-white printer
LINES = {
    "unscaled": ("#777777", ":"), "pi": ("#0072B2", "--"), "ntk": ("#009E73", "-."), "ntk-aware": ("#56B4E9", "-."),
    "yarn": ("#CC79A7", (0, (5, 1))), "llama3": ("#E69F00", (0, (3, 1, 1, 1))), "ntk-rcd": ("#009E73", (0, (1, 1))),
    "yarn-rcd": ("#CC79A7", (0, (1, 1))),
}  # fmt: skip
FOUND, THEORY, INK, PALE = "#D55E00", "#333333", "#222222", "#9CC3DD"
DPI = 220
MAX_BOXES = 12  # scorers that get a box each; more share a histogram
REFRESH_SECONDS = 20.0
REFRESH_SHARE = 0.05  # of the driver's time that refreshing may take at most

# --- what a run directory tells


@dataclass(frozen=True)
class Work:
    """What one generation took: units, and the time of scorers."""

    scored: int
    raced_out: int
    ppls: tuple[float, ...]  # of its completely scored newcomers
    span_seconds: float
    busy_seconds: float
    num_scorers: int


@dataclass(frozen=True)
class RunData:
    """A run as its directory shows it now; ``rows`` are the ledger's rows on the search's needles."""

    facts: Mapping[str, Any]
    status: Mapping[str, Any]
    winner: Mapping[str, Any] | None
    recipe_toml: str
    generations: Sequence[Mapping[str, Any]]
    rows: Sequence[Score]
    work: Sequence[Work]
    geometry: RopeGeometry | None

    @property
    def recipe(self) -> Mapping[str, Any]:
        """``section.field`` -> value."""
        return self.facts.get("recipe") or {}

    @property
    def target_length(self) -> int | None:
        return self.facts.get("target_length") or (self.winner or {}).get("target_length")

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The best candidate so far, with its perplexity."""
        return self.generations[-1]["survivors"][0] if self.generations else None

    @property
    def busy_share(self) -> float | None:
        """Part of the scorers' time that went into units; pauses between two attempts at a run do not count."""
        room = sum(w.span_seconds * w.num_scorers for w in self.work)
        return sum(w.busy_seconds for w in self.work) / room if room else None


def load_run(run_dir: RunDir) -> RunData:
    """Everything a report needs.

    Raises:
        RunDirError: if another version of this tool wrote the directory.
    """
    generations = run_dir.generations()
    facts, winner = run_dir.read_json("run.json") or {}, run_dir.winner()
    for _ in range(3):
        # a running search replaces segments by one; read while it did, the ledger lacks rows and is read again
        rows = [score for score in run_dir.load_scores().values() if score.needle_set == SEARCH_SET]
        known = {row.vector_id for row in rows}
        if not generations or known.issuperset(c["id"] for c in generations[-1]["survivors"]):
            break
    num_samples = facts.get("num_samples") or max((row.sample + 1 for row in rows), default=1)
    recipe = run_dir.path / "recipe.toml"
    return RunData(
        facts,
        run_dir.status() or {},
        winner,
        recipe.read_text(encoding="utf-8") if recipe.exists() else "",
        generations,
        rows,
        list(_work(generations, rows, num_samples)),
        _geometry(facts.get("geometry"), winner),
    )


def _geometry(known: Mapping[str, Any] | None, winner: Mapping[str, Any] | None) -> RopeGeometry | None:
    source = known or winner
    if source is None:
        return None
    rotary = source["rotary_dim"]
    return RopeGeometry(source.get("head_dim", rotary), rotary, source["rope_base"], source["original_length"])


def _work(generations: Sequence[Mapping[str, Any]], rows: Sequence[Score], num_samples: int) -> Iterator[Work]:
    by_id: dict[str, list[Score]] = {}
    for row in rows:
        by_id.setdefault(row.vector_id, []).append(row)
    timed = [row for row in rows if row.started > 0]
    starts = np.array([row.started for row in timed])
    ends = starts + np.array([row.seconds for row in timed])
    own = [[row for c in body["candidates"] for row in by_id.get(c["id"], ())] for body in generations]
    begins = [min((row.started for row in rows_ if row.started > 0), default=math.inf) for rows_ in own]
    followings = [*begins, math.inf][1:]
    for body, rows_, begin, following in zip(generations, own, begins, followings, strict=True):
        complete = [by_id[c["id"]] for c in body["candidates"] if len(by_id.get(c["id"], ())) == num_samples]
        ppls = (_ppl(scores) for scores in complete)
        # units of a race that ended without them run on into the next generation; each second counts where it falls
        end = min(max((row.started + row.seconds for row in rows_), default=0.0), following)
        busy = np.clip(np.minimum(ends, end) - np.maximum(starts, begin), 0, None) if end > begin else np.zeros(0)
        yield Work(
            len(rows_),
            len(body["candidates"]) * num_samples - len(rows_),
            tuple(p for p in ppls if p is not None),
            max(end - begin, 0.0),
            float(busy.sum()),
            len({timed[i].scorer for i in np.flatnonzero(busy)}),
        )


def _ppl(scores: Iterable[Score]) -> float | None:
    scores = list(scores)
    total = math.fsum(math.inf if s.nll_sum is None else s.nll_sum for s in scores)
    return perplexity(total, sum(s.num_tokens for s in scores))


# --- the held-out table


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


@dataclass(frozen=True)
class Block:
    """One table of the comparison: all methods at one length and attention factor."""

    title: str
    rows: Sequence[Sequence[str]]
    best: frozenset[int]  # rows with the lowest perplexity


HEADINGS = ("method", "critical dim", "attention factor", "needle perplexity", "needle accuracy")


def _blocks(winner: Mapping[str, Any]) -> Iterator[Block]:
    target, original = winner["target_length"], winner["original_length"]
    for length, factor in dict.fromkeys((row["length"], row["compared_at"]) for row in winner["report"]):
        rows = [row for row in winner["report"] if (row["length"], row["compared_at"]) == (length, factor)]
        title = f"{length} tokens ({length / original:g} x L0), compared at attention factor {factor:.3f}"
        if length > target:
            title += f"; beyond the target: baselines at ratio {length / original:g}, LongRoPE2 as found for {target}"
        ppls = [math.inf if row["ppl"] is None else row["ppl"] for row in rows]
        cells = [
            (
                LABELS.get(row["method"], row["method"]),
                "–" if row["critical_dim"] is None else str(row["critical_dim"]),
                f"{row['attention_factor']:.3f}",
                _number(row["ppl"]),
                _share(row["accuracy"]),
            )
            for row in rows
        ]
        best = frozenset(i for i, ppl in enumerate(ppls) if ppl == min(ppls) < math.inf)
        yield Block(title, cells, best)


def _held_out_note(winner: Mapping[str, Any]) -> str:
    note = "Held out: reported on texts and needles that the search did not see."
    if any(row["length"] > winner["target_length"] for row in winner["report"]):
        note += " At lengths beyond the target the baselines get the larger ratio."
    return note


def format_table(winner: Mapping[str, Any]) -> str:
    """The held-out comparison of ``winner.json`` as plain text, the best row of each block marked with ``*``."""
    critical = (
        f"found critical dimension {winner['critical_dim']}" if winner["critical_dim"] else "every dimension searched"
    )
    lines = [
        f"{winner['name']}: {winner['original_length']} -> {winner['target_length']} tokens",
        f"{critical}, theoretical {winner['theoretical_critical_dim']} (cosine index from 0)",
        _held_out_note(winner),
    ]
    for block in _blocks(winner):
        widths = [max(map(len, column)) for column in zip(HEADINGS, *block.rows, strict=True)]
        lines += ["", block.title]
        for i, row in enumerate((HEADINGS, *block.rows)):
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            lines.append(("* " if i - 1 in block.best else "  ") + "  ".join(cells))
    return "\n".join(lines)


# --- figures


def _figure(width: float, height: float, columns: int = 1) -> tuple["Figure", list["Axes"]]:
    """A figure with styled, empty axes; the style is set on the axes since rcParams are shared between threads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#888888")
        ax.tick_params(which="both", labelsize=8, color="#888888", labelcolor=INK)
        ax.set_axisbelow(True)
        ax.grid(axis="y", color="#E6E6E6", linewidth=0.6)
    return figure, axes


def _label(ax: "Axes", x: str, y: str) -> None:
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)


def _nothing_yet(ax: "Axes", text: str) -> None:
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, ha="center", va="center", fontsize=9, color="#666666", transform=ax.transAxes)


def _generation_ticks(ax: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _log_axis(ax: "Axes", values: Sequence[float]) -> None:
    """A log axis with plain numbers as labels: few enough to read, enough to have at least two."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    decades = math.log10(max(values) / min(values))
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if decades < 2.5 else (1,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def draw_factors(run: RunData) -> "Figure":
    """Factors per dimension, found and baselines, with both critical dimensions (as Fig. 2b and 4 of the paper)."""
    figure, (ax,) = _figure(7.2, 3.4)
    geometry, target, best = run.geometry, run.target_length, run.best
    values = [1.0]
    if geometry and target:
        for method in dict.fromkeys((*(run.recipe.get("report.methods") or ()), "unscaled", "pi", "ntk", "yarn")):
            dim = best["critical_dim"] if best and method in WITH_CRITICAL_DIM else None
            if method not in LINES or method not in METHODS or (method in WITH_CRITICAL_DIM and not dim):
                continue  # the row longrope2 is the winner itself, and -rcd variants need a found dimension
            vector = baseline(method, geometry, target, critical_dim=dim).values
            colour, style = LINES[method]
            ax.plot(vector, color=colour, linestyle=style, linewidth=1.4, label=LABELS[method])
            values.extend(vector)
        _period_axis(ax, geometry)
    if best:
        survivors = run.generations[-1]["survivors"]
        vectors = np.array([assemble(c["critical_dim"], c["tail"]) for c in survivors])
        ax.fill_between(
            np.arange(vectors.shape[1]), vectors.min(0), vectors.max(0), color=FOUND, alpha=0.15, linewidth=0,
            label="all survivors",
        )  # fmt: skip
        name = "LongRoPE2" if run.winner else "LongRoPE2, best so far"
        ax.plot(vectors[0], color=FOUND, linewidth=2, marker="o", markersize=3, label=name, zorder=5)
        values.extend(vectors.max(0))
    _log_axis(ax, values)
    found = best["critical_dim"] if best else 0
    theory = geometry.theoretical_critical_dim if geometry else 0
    if found and found == theory:
        _mark_dim(ax, found, "found = theoretical", FOUND, "-", left=False)
    else:
        _mark_dim(ax, found, "found", FOUND, "-", left=found < theory)
        _mark_dim(ax, theory, "theoretical", THEORY, "--", left=theory < found)
    _label(ax, "RoPE dimension (cosine index)", "rescale factor")
    handles = ax.get_legend_handles_labels()
    ax.legend(*(h[::-1] for h in handles), fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _mark_dim(ax: "Axes", dim: int, text: str, colour: str, style: str, *, left: bool) -> None:
    """A labelled vertical line; none for dimension 0, which no search finds as critical."""
    if dim:
        ax.axvline(dim, color=colour, linestyle=style, linewidth=0.9, zorder=1)
        ax.annotate(
            f"{text}\n{dim}", (dim, 0.98), xycoords=("data", "axes fraction"), xytext=(-3 if left else 3, 0),
            textcoords="offset points", ha="right" if left else "left", va="top", fontsize=8, color=colour,
        )  # fmt: skip


def _period_axis(ax: "Axes", geometry: RopeGeometry) -> None:
    """Periods in tokens along the top, at powers of ten."""
    dims, periods = np.arange(geometry.num_cosines), geometry.periods_tokens
    powers = np.arange(math.ceil(math.log10(periods[0])), math.floor(math.log10(periods[-1])) + 1)
    ax.set_xlim(-0.5, len(dims) - 0.5)
    top = ax.twiny()
    top.set_xlim(ax.get_xlim())
    top.set_xticks(np.interp(powers, np.log10(periods), dims), [f"{10**power:,}" for power in powers.tolist()])
    top.spines[["right", "left", "bottom"]].set_visible(False)
    top.spines["top"].set_color("#888888")
    top.tick_params(labelsize=8, color="#888888", labelcolor=INK)
    top.set_xlabel("period of the dimension (tokens)", fontsize=9, color=INK)


def draw_progress(run: RunData) -> "Figure":
    """Needle perplexity per generation: the best, the survivors' median and spread, and every complete newcomer."""
    figure, (ax,) = _figure(6.4, 3.2)
    if not run.generations:
        _nothing_yet(ax, "no generation has been closed yet")
        return figure
    indices = [body["index"] for body in run.generations]
    survivors = [
        [c["ppl"] for c in body["survivors"] if c["ppl"] is not None] or [math.nan] for body in run.generations
    ]
    low, median, high = np.array([np.quantile(ppls, (0.1, 0.5, 0.9)) for ppls in survivors]).T
    points = [(index, ppl) for index, work in zip(indices, run.work, strict=True) for ppl in work.ppls]
    if points:
        ax.scatter(
            *zip(*points, strict=True), s=9, color="#999999", alpha=0.55, linewidths=0, label="new, scored completely"
        )
    ax.fill_between(indices, low, high, color=PALE, alpha=0.6, linewidth=0, label="survivors, 10 to 90 %")
    ax.plot(indices, median, color="#0072B2", linewidth=1.5, marker="s", markersize=3, label="survivors, median")
    ax.plot(indices, [min(p) for p in survivors], color=FOUND, linewidth=2, marker="o", markersize=3.5, label="best")
    seen = [ppl for ppl in (*(p for _, p in points), *(p for ps in survivors for p in ps)) if math.isfinite(ppl)]
    if seen and max(seen) > 5 * min(seen):
        _log_axis(ax, seen)
    ax.set_xlim(min(indices) - 0.4, max(indices) + 0.4)
    _generation_ticks(ax)
    _label(ax, "generation", "needle perplexity (search needles)")
    ax.legend(fontsize=8, frameon=False, loc="upper right")
    return figure


def draw_dimensions(run: RunData) -> "Figure":
    """How many survivors each critical dimension has, generation by generation."""
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    found = {c["critical_dim"] for body in run.generations for c in (*body["candidates"], *body["survivors"])}
    if not found or found == {0}:
        figure, (ax,) = _figure(6.4, 3.2)
        _nothing_yet(
            ax,
            "every dimension is searched: there is no critical one" if found else "no generation has been closed yet",
        )
        return figure
    theory = run.geometry.theoretical_critical_dim if run.geometry else None
    first, last = min(found), max(found | ({theory} if theory else set()))
    figure, (ax,) = _figure(6.4, max(2.4, 0.24 * (last - first + 1) + 1.1))
    indices = [body["index"] for body in run.generations]
    counts = np.zeros((last - first + 1, max(indices) + 1))
    for body in run.generations:
        for dim, count in Counter(c["critical_dim"] for c in body["survivors"]).items():
            counts[dim - first, body["index"]] = count
    shown = np.ma.masked_equal(counts, 0)
    extent = (-0.5, max(indices) + 0.5, first - 0.5, last + 0.5)
    image = ax.imshow(
        shown, cmap="Blues", aspect="auto", origin="lower", extent=extent, vmin=0, vmax=max(counts.max(), 1)
    )
    best = [body["survivors"][0]["critical_dim"] for body in run.generations]
    ax.plot(indices, best, "o", color=FOUND, markersize=4.5, markeredgecolor="white", label="best candidate")
    if theory and first <= theory:
        place = (-0.5, theory - 0.5), max(indices) + 1, 1
        ax.add_patch(
            Rectangle(
                *place, fill=False, edgecolor=THEORY, linestyle="--", linewidth=1.1, label="theoretical", clip_on=False
            )
        )
    ax.grid(visible=False)
    _generation_ticks(ax)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    bar = figure.colorbar(image, ax=ax, pad=0.02, ticks=MaxNLocator(integer=True, nbins=5))
    bar.set_label("survivors", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]
    _label(ax, "generation", "critical dimension")
    ax.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    return figure


def draw_units(run: RunData) -> "Figure":
    """Units scored and raced out per generation, time per unit, and how busy the scorers were."""
    figure, (units, times, busy) = _figure(9.6, 3.0, columns=3)
    indices = [body["index"] for body in run.generations]
    if indices:
        scored, out = [w.scored for w in run.work], [w.raced_out for w in run.work]
        units.bar(indices, scored, color="#0072B2", label="scored")
        units.bar(
            indices,
            out,
            bottom=scored,
            color="#F0C27B",
            hatch="////",
            edgecolor="white",
            linewidth=0,
            label="raced out",
        )
        units.set_ylim(0, 1.25 * max(a + b for a, b in zip(scored, out, strict=True)))
        units.legend(fontsize=8, frameon=False, loc="upper right", ncols=2)
        _generation_ticks(units)
        _label(units, "generation", "units (candidate, sample)")
    else:
        _nothing_yet(units, "no generation has been closed yet")
    seconds: dict[str, list[float]] = {}
    for row in run.rows:
        if row.seconds > 0:
            seconds.setdefault(row.scorer or "?", []).append(row.seconds)
    if not seconds:
        _nothing_yet(times, "no unit has been timed yet")
    elif len(seconds) <= MAX_BOXES:
        names = sorted(seconds)
        boxes = times.boxplot([seconds[n] for n in names], widths=0.5, patch_artist=True, flierprops={"markersize": 2})
        for box, middle in zip(boxes["boxes"], boxes["medians"], strict=True):
            box.set(facecolor=PALE, edgecolor="#0072B2", linewidth=0.8)
            middle.set(color=FOUND, linewidth=1.5)
        times.set_xticks(range(1, len(names) + 1), [n.removeprefix("scorer-") for n in names])
        times.set_ylim(bottom=0)
        _label(times, "scorer", "time per unit (s)")
    else:
        times.hist([s for values in seconds.values() for s in values], bins=30, color="#0072B2")
        _label(times, f"time per unit (s), {len(seconds)} scorers", "units")
    shares = [(i, w.busy_seconds / (w.span_seconds * w.num_scorers)) for i, w in zip(indices, run.work, strict=True)
              if w.span_seconds and w.num_scorers]  # fmt: skip
    if shares:
        busy.plot(*zip(*shares, strict=True), color="#0072B2", linewidth=1.5, marker="o", markersize=3)
        overall = run.busy_share or 0.0
        busy.axhline(overall, color=FOUND, linestyle="--", linewidth=1.2, label=f"whole search {overall:.0%}")
        busy.set_ylim(0, 1.05)
        busy.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        busy.legend(fontsize=8, frameon=False, loc="lower right")
        _generation_ticks(busy)
        _label(busy, "generation", "busy share of scorers")
    else:
        _nothing_yet(busy, "no generation has been timed yet")
    return figure


# Name of the PNG, how it is drawn, its caption in the report.
FIGURES: tuple[tuple[str, Callable[[RunData], "Figure"], str], ...] = (
    ("factors.png", draw_factors,
     "Rescale factor per RoPE dimension, found and baselines, on a log axis. Vertical lines: the critical dimension that "
     "the search found and the theoretical one."),
    ("progress.png", draw_progress,
     "Needle perplexity on the search's needles. Candidates that racing stopped have no perplexity and are not shown."),
    ("dimensions.png", draw_dimensions,
     "Survivors per critical dimension after each generation; points: the best candidate; dashed: the theoretical one."),
    ("units.png", draw_units,
     "Units of work, (candidate, sample), scored and never scored because racing stopped the candidate; time per unit by "
     "scorer; the part of the scorers' time that went into units."),
)  # fmt: skip

# --- the HTML report

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62em; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em; margin-bottom: 0 } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: .6em 0; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: .4em 0 }
th, td { padding: .2em .9em .2em 0; text-align: right; border-bottom: 1px solid #eee; vertical-align: top }
th:first-child, td:first-child, .facts td { text-align: left } thead th { border-bottom: 1px solid #999 }
.facts td { overflow-wrap: anywhere } .best td { font-weight: 700; background: #fdf0e6 }
figure { margin: 1.5em 0 } figure img { width: 100%; height: auto }
figcaption, .note { color: #555; font-size: .9em } pre { background: #f7f7f7; padding: 1em; overflow-x: auto }
@media print { body { margin: 0; max-width: none } figure, table { break-inside: avoid } h2 { break-after: avoid } }
"""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], best: Iterable[int] = (), caption: str = "") -> str:
    marked = set(best)
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr{' class=best' if i in marked else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>\n"
        for i, row in enumerate(rows)
    )
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    kind = "" if head else ' class="facts"'
    return f"<table{kind}>{title}{f'<thead><tr>{cells}</tr></thead>' if head else ''}<tbody>\n{body}</tbody></table>\n"


def _result_facts(run: RunData) -> Iterator[tuple[str, str]]:
    """The best candidate so far, for a table of two columns."""
    best = run.best
    if best is None:
        yield "best candidate", "none yet: no generation has been closed"
        return
    tail = best["tail"]
    born = next(
        (body["index"] for body in run.generations if any(c["id"] == best["id"] for c in body["candidates"])), None
    )
    yield "found critical dimension", str(best["critical_dim"]) if best["critical_dim"] else "every dimension searched"
    if run.geometry:
        geometry = run.geometry
        yield (
            "theoretical critical dimension",
            f"{geometry.theoretical_critical_dim} (ten periods: {geometry.ten_period_dim})",
        )
    yield "factors beyond it", f"{tail[0]:.4g} … {tail[-1]:.4g}"
    yield "attention factor", f"{best['attention_factor']:.3f}"
    yield "needle perplexity, search needles", _number(best["ppl"])
    if run.winner:
        yield "needle accuracy, search needles", _share(run.winner["search"]["accuracy"])
    yield "candidate", f"{best['id']}, first scored in generation {'?' if born is None else born}"


def _run_facts(run: RunData) -> Iterator[tuple[str, str]]:
    """What was run on what, and what it took."""
    recipe, geometry, target = run.recipe, run.geometry, run.target_length
    yield "model", str(recipe.get("model.path", "–"))
    for name, value in sorted((run.facts.get("fingerprints") or (run.winner or {}).get("fingerprints") or {}).items()):
        yield f"fingerprint, {name}", str(value)
    if geometry and target:
        ratio = target / geometry.original_length
        yield "window", f"{geometry.original_length} -> {target} tokens (ratio {ratio:g})"
        yield (
            "RoPE",
            f"base {geometry.base:g}, {geometry.rotary_dim} of {geometry.head_dim} dimensions of a head rotary",
        )
    closed, iterations = len(run.generations), recipe.get("search.iterations")
    yield "generations", str(closed) if iterations is None else f"{closed} of {iterations + 1}"
    scored, out = sum(w.scored for w in run.work), sum(w.raced_out for w in run.work)
    if scored:
        yield "units in closed generations", f"{scored} scored, {out} raced out ({out / (scored + out):.1%} saved)"
    if len(run.rows) > scored:
        yield "units in the open generation", f"{len(run.rows) - scored} scored so far"
    seconds = [row.seconds for row in run.rows if row.seconds > 0]
    if seconds:
        yield "time per unit", f"median {statistics.median(seconds):.3g} s, sum {sum(seconds):.4g} s"
        span = sum(w.span_seconds for w in run.work)
        scorers = len({row.scorer for row in run.rows})
        yield "search", f"{span:.4g} s with {scorers} scorer{'s' * (scorers > 1)}, {_share(run.busy_share)} busy"


def _factor_rows(run: RunData) -> Iterator[tuple[str, ...]]:
    assert run.best is not None
    for dim, factor in enumerate(assemble(run.best["critical_dim"], run.best["tail"]).tolist()):
        period = f"{run.geometry.periods_tokens[dim]:.1f}" if run.geometry else "–"
        yield str(dim), period, f"{factor:.6g}"


def _state(run: RunData) -> str:
    if run.winner:
        return "finished"
    return f"{run.status.get('state') or 'starting'}, {len(run.generations)} generations closed"


def render_html(run: RunData, figures: Mapping[str, str]) -> str:
    """The page; ``figures`` is file name -> data URL."""
    name = html.escape(str((run.winner or {}).get("name") or run.recipe.get("name") or run.status.get("name") or "run"))
    refresh = "" if run.winner else f'<meta http-equiv="refresh" content="{REFRESH_SECONDS:g}">\n'
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n{refresh}<title>{name}: LongRoPE2 search</title>\n'
        f"<style>{STYLE}</style></head><body>\n<h1>{name}</h1>\n"
        f'<p class="note">LongRoPE2 search, {html.escape(_state(run))}</p>\n<h2>Result</h2>\n',
        _table((), _result_facts(run)),
    ]
    if run.winner:
        parts.append(
            f'<h2>Comparison on held-out needles</h2>\n<p class="note">{html.escape(_held_out_note(run.winner))}</p>\n'
        )
        parts += [_table(HEADINGS, block.rows, block.best, block.title) for block in _blocks(run.winner)]
    parts.append("<h2>Figures</h2>\n")
    parts += [
        f'<figure><img alt="{html.escape(caption)}" src="{figures[name]}"><figcaption>{html.escape(caption)}</figcaption></figure>\n'
        for name, _, caption in FIGURES
    ]
    parts += ["<h2>Run</h2>\n", _table((), _run_facts(run))]
    if run.best:
        parts += ["<details><summary>Factors by dimension</summary>\n",
                  _table(("dimension", "period (tokens)", "factor"), _factor_rows(run)), "</details>\n"]  # fmt: skip
    parts.append(
        f"<details><summary>Recipe</summary>\n<pre>{html.escape(run.recipe_toml)}</pre></details>\n</body></html>\n"
    )
    return "".join(parts)


def write_report(run_dir: RunDir) -> list[Any]:
    """Write the figures and ``report.html`` of a run at whatever stage it is; returns their paths.

    Raises:
        RunDirError: if the directory cannot be read or written.
    """
    run, urls = load_run(run_dir), {}
    for name, draw, _ in FIGURES:
        figure = draw(run)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=DPI)
        figure.savefig(svg, format="svg")
        run_dir.write_bytes(name, png.getvalue())
        urls[name] = "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()
    run_dir.write_bytes("report.html", render_html(run, urls).encode())
    return [run_dir.path / name for name in ("report.html", *urls)]


class ReportWriter:
    """Observer of a search that refreshes the report beside it, in one thread at a time; it never stops the search.

    Args:
        run_dir: the run.
        write: what makes the report.
        min_seconds: pause between two refreshes; longer if a report takes long to draw.
    """

    def __init__(
        self,
        run_dir: RunDir,
        write: Callable[[RunDir], object] = write_report,
        min_seconds: float = REFRESH_SECONDS,
    ):
        self._run_dir, self._report, self._min_seconds = run_dir, write, min_seconds
        self._thread: threading.Thread | None = None
        self._due = 0.0
        self._warned = False

    def __call__(self, status: Status, event: str) -> None:
        busy = self._thread is not None and self._thread.is_alive()
        if event == "generation" and not busy and time.monotonic() >= self._due:
            self._thread = threading.Thread(target=self._write, name="report", daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Write the last report, after the one under way."""
        if self._thread is not None:
            self._thread.join()
        self._write()

    def _write(self) -> None:
        began = time.monotonic()
        try:
            self._report(self._run_dir)
        except Exception as error:  # whatever it is, a report is not worth a search
            if not self._warned:
                log.warning("the report could not be written (%s: %s); the search goes on", type(error).__name__, error)
            self._warned = True
        ended = time.monotonic()
        self._due = ended + max(self._min_seconds, (ended - began) / REFRESH_SHARE)
