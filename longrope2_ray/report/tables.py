"""The held-out comparison as a text table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from longrope2_ray.report.figure_style import STYLES, name_of_result
from longrope2_ray.search.winner import ComparisonRow, Winner

HEADINGS = ("method", "critical dim", "attention factor", "needle perplexity", "needle accuracy")


@dataclass(frozen=True)
class Block:
    """One table of the comparison: all methods at one length and one attention factor.

    Attributes:
        rows: the cells of each row, under ``HEADINGS``.
        best: numbers of the rows with the lowest perplexity.
    """

    title: str
    rows: Sequence[Sequence[str]]
    best: Sequence[int]


def comparison_blocks(winner: Winner) -> Iterator[Block]:
    """Yield the tables of a finished search in the order of its recipe."""
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
        yield Block(title, [_cells(row, found) for row in rows], best)


def _cells(row: ComparisonRow, found: str) -> tuple[str, ...]:
    return (
        found if row.method == "longrope2" else STYLES[row.method].label,
        str(row.critical_dim or "-"),
        f"{row.attention_factor:.3f}",
        format_perplexity(row.needles.ppl),
        f"{row.needles.accuracy:.0%}",
    )


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
    if winner.candidate.start_tokens:
        notes.append(f"The first {winner.candidate.start_tokens} positions keep the original RoPE.")
    return notes


def format_table(winner: Winner) -> str:
    """Return the held-out comparison as plain text; ``*`` marks the best row of each block."""
    geometry = winner.geometry
    lines = [
        f"{winner.name}: {geometry.original_length} -> {winner.target_length} tokens",
        f"critical dimension: found {format_critical_dim(winner.candidate.critical_dim)}; "
        f"theoretical {geometry.theoretical_critical_dim} (cosine index from 0)",
        *comparison_notes(winner),
    ]
    for block in comparison_blocks(winner):
        widths = [max(map(len, column)) for column in zip(HEADINGS, *block.rows, strict=True)]
        lines += ["", block.title]
        for i, row in enumerate((HEADINGS, *block.rows)):
            numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            mark = "* " if i - 1 in block.best else "  "
            lines.append(mark + "  ".join((row[0].ljust(widths[0]), *numbers)))
    return "\n".join(lines)
