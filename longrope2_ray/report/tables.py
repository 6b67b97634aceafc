"""The held-out comparison as text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longrope2_ray.report.figures import STYLES, found_label

HEADINGS = ("method", "critical dim", "attention factor", "needle perplexity", "needle accuracy")


@dataclass(frozen=True)
class Block:
    """One table of the comparison: all methods at one length and attention factor; ``best`` has the lowest perplexity."""

    title: str
    rows: Sequence[Sequence[str]]
    best: Sequence[int]


def _blocks(winner: Mapping[str, Any]) -> Iterator[Block]:
    target, original = winner["target_length"], winner["original_length"]
    found = found_label(winner["critical_dim"])
    for length, factor in dict.fromkeys(
        (row["length"], row["compared_at"]) for row in winner["report"]
    ):
        rows = [
            row
            for row in winner["report"]
            if (row["length"], row["compared_at"]) == (length, factor)
        ]
        title = f"{length} tokens ({length / original:g} x L0), compared at attention factor {factor:.3f}"
        if length > target:
            title += f"; baselines at ratio {length / original:g}, {found} at {target / original:g}"
        cells = [
            (
                found if row["method"] == "longrope2" else STYLES[row["method"]][0],
                str(row["critical_dim"] or "-"),
                f"{row['attention_factor']:.3f}",
                _number(row["ppl"]),
                f"{row['accuracy']:.0%}",
            )
            for row in rows
        ]
        lowest = min((row["ppl"] for row in rows if row["ppl"] is not None), default=None)
        yield Block(
            title,
            cells,
            [i for i, row in enumerate(rows) if lowest is not None and row["ppl"] == lowest],
        )


def _number(ppl: float | None) -> str:
    return "not finite" if ppl is None else f"{ppl:.4g}"


def _critical(dim: int) -> str:
    return str(dim) if dim else "none, every dimension was searched"


def _notes(winner: Mapping[str, Any]) -> list[str]:
    notes = ["Held out: measured on texts and needles that the search did not see."]
    if any(
        row["method"] == "unscaled" and row["compared_at"] != row["attention_factor"]
        for row in winner["report"]
    ):
        notes.append("Unscaled is the model as it is, at attention factor 1.")
    if any(row["length"] > winner["target_length"] for row in winner["report"]):
        notes.append("At lengths beyond the target the baselines get the larger ratio.")
    if winner["start_tokens"]:
        notes.append(f"The first {winner['start_tokens']} positions keep the original RoPE.")
    return notes


def format_table(winner: Mapping[str, Any]) -> str:
    """The held-out comparison of ``winner.json`` as plain text, the best row of each block marked with ``*``."""
    lines = [
        f"{winner['name']}: {winner['original_length']} -> {winner['target_length']} tokens",
        f"critical dimension: found {_critical(winner['critical_dim'])}; "
        f"theoretical {winner['theoretical_critical_dim']} (cosine index from 0)",
        *_notes(winner),
    ]
    for block in _blocks(winner):
        widths = [max(map(len, column)) for column in zip(HEADINGS, *block.rows, strict=True)]
        lines += ["", block.title]
        for i, row in enumerate((HEADINGS, *block.rows)):
            cells = [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
            lines.append(("* " if i - 1 in block.best else "  ") + "  ".join(cells))
    return "\n".join(lines)
