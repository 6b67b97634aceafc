"""The held-out comparison as a text table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from longrope2_ray.report.figure_style import STYLES, name_of_result
from longrope2_ray.report.verdict_sentences import format_interval, verdict_lines
from longrope2_ray.search.verdict import BaselineContrast, contrasts
from longrope2_ray.search.winner import ComparisonRow, Winner

HEADINGS = ("method", "critical dim", "attention factor", "needle perplexity", "needle accuracy")
VERDICT = "Verdict, each method at its own best attention factor of those reported"
INTERVAL_HEADINGS = ("place", "needles", "ratio", "95 % interval", "verdict")
WHAT_RATIOS_ARE = (
    "Ratio: the baseline's needle perplexity to {found}'s on the same held-out needles, with its "
    "95 % interval (paired bootstrap over the needles); {found} is better if the interval lies "
    "above 1."
)


@dataclass(frozen=True)
class Block:
    """One table of the comparison.

    Attributes:
        headings: what stands above each column.
        rows: the cells of each row.
        best: numbers of the rows that stand out.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: Sequence[int]


def comparison_blocks(winner: Winner) -> Iterator[Block]:
    """Yield the tables of a finished search in the order of its recipe.

    Each has all methods at one length and one attention factor. The rows with the lowest perplexity
    over all needles stand out. Where needles stand at several depths, each group of depths has a
    column with perplexity and accuracy.
    """
    target, original = winner.target_length, winner.geometry.original_length
    found = name_of_result(winner.candidate.critical_dim)
    keys = dict.fromkeys((row.length, row.compared_at) for row in winner.report)
    for length, factor in keys:
        rows = [row for row in winner.report if (row.length, row.compared_at) == (length, factor)]
        title = (
            f"{length} tokens ({length / original:g} x L0), compared at attention factor "
            f"{factor:.3f}"
        )
        if length > target:
            title += f"; baselines at ratio {length / original:g}, {found} at {target / original:g}"
        ppls = [row.needles.ppl for row in rows]
        lowest = min((ppl for ppl in ppls if ppl is not None), default=None)
        best = [i for i, ppl in enumerate(ppls) if lowest is not None and ppl == lowest]
        headings = (*HEADINGS, *(f"depth {depth}" for depth in _depths(rows[0])))
        yield Block(title, headings, [_cells(row, found) for row in rows], best)


def _depths(row: ComparisonRow) -> Sequence[str]:
    """Return the groups of depths that have a column; a single one is all needles."""
    depths = list(row.needles.by_depth())
    return depths if len(depths) > 1 else ()


def _cells(row: ComparisonRow, found: str) -> tuple[str, ...]:
    by_depth = row.needles.by_depth()
    return (
        found if row.method == "longrope2" else STYLES[row.method].label,
        str(row.critical_dim or "-"),
        f"{row.attention_factor:.3f}",
        format_perplexity(row.needles.ppl),
        f"{row.needles.accuracy:.0%}",
        *(
            f"{format_perplexity(by_depth[depth].ppl)} / {by_depth[depth].accuracy:.0%}"
            for depth in _depths(row)
        ),
    )


def interval_blocks(winner: Winner) -> Iterator[Block]:
    """Yield a table for each length: the winner against each baseline, over all needles, by depth.

    The rows where each method has its own best attention factor stand out.
    """
    found = name_of_result(winner.candidate.critical_dim)
    headings = ("baseline", "attention factor", f"{found}'s", *INTERVAL_HEADINGS)
    every = list(contrasts(winner))
    for length in dict.fromkeys(contrast.length for contrast in every):
        # What is compared at the same attention factor may be each one's own best, too.
        once = {
            (row.method, row.their_factor, row.our_factor): row
            for row in every
            if row.length == length
        }
        rows = [(cells, row.own_best) for row in once.values() for cells in _interval_rows(row)]
        title = (
            f"{length} tokens: ratios of needle perplexity; in bold, each method at its own best "
            f"attention factor of those reported"
        )
        best = [i for i, (_, own_best) in enumerate(rows) if own_best]
        yield Block(title, headings, [cells for cells, _ in rows], best)


def _interval_rows(row: BaselineContrast) -> Iterator[tuple[str, ...]]:
    """Yield the cells of a comparison: over all needles, then by depth if there is more than one.

    Its name and attention factors stand in the first of them.
    """
    by_depth = {f"depth {depth}": interval for depth, interval in row.contrast.by_depth.items()}
    places = {"all": row.contrast.overall, **(by_depth if len(by_depth) > 1 else {})}
    first = (STYLES[row.method].label, f"{row.their_factor:.3f}", f"{row.our_factor:.3f}")
    for place, interval in places.items():
        ratio, bounds = format_interval(interval).split(", ")
        yield (*first, place, str(interval.num_needles), ratio, bounds, interval.verdict)
        first = ("", "", "")


def format_perplexity(ppl: float | None) -> str:
    """Return a perplexity with four digits."""
    return "not finite" if ppl is None else f"{ppl:.4g}"


def format_critical_dim(dim: int) -> str:
    """Return a critical dimension; 0 is a search over every dimension."""
    return str(dim) if dim else "none, every dimension was searched"


def comparison_notes(winner: Winner) -> list[str]:
    """Return the sentences that a reader of the tables needs."""
    notes = ["Held out: measured on texts and needles that the search did not see."]
    if any(
        row.method == "unscaled" and row.compared_at != row.attention_factor
        for row in winner.report
    ):
        notes.append("Unscaled is the model as it is, at attention factor 1.")
    if any(row.length > winner.target_length for row in winner.report):
        notes.append("At lengths beyond the target the baselines get the larger ratio.")
    depths = list(dict.fromkeys(depth for row in winner.report for depth in row.needles.by_depth()))
    if len(depths) == 1:
        notes.append(f"All needles stand at depth {depths[0]}.")
    elif depths:
        notes.append("By depth (0 the document's start, 1 its end): perplexity / accuracy.")
    if winner.candidate.start_tokens:
        notes.append(f"The first {winner.candidate.start_tokens} positions keep the original RoPE.")
    return notes


def format_table(winner: Winner) -> str:
    """Return the held-out comparison and its verdict as plain text.

    ``*`` marks the best row of each block.
    """
    geometry = winner.geometry
    lines = [
        f"{winner.name}: {geometry.original_length} -> {winner.target_length} tokens",
        f"critical dimension: found {format_critical_dim(winner.candidate.critical_dim)}; "
        f"theoretical {geometry.theoretical_critical_dim} (cosine index from 0)",
        *comparison_notes(winner),
    ]
    for block in comparison_blocks(winner):
        table = (block.headings, *block.rows)
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += ["", block.title]
        for i, row in enumerate(table):
            numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            mark = "* " if i - 1 in block.best else "  "
            lines.append(mark + "  ".join((row[0].ljust(widths[0]), *numbers)))
    verdicts = verdict_lines(winner)
    if verdicts:
        lines += ["", f"{VERDICT}:", *verdicts]
    return "\n".join(lines)
