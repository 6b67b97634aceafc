"""The verdict of a search in one or two sentences, computed from its intervals."""

from collections.abc import Mapping, Sequence

from longrope2_ray.report.figure_style import STYLES
from longrope2_ray.search.verdict import (
    BETTER,
    NOT_SHOWN,
    TOO_FEW,
    WORSE,
    BaselineContrast,
    Interval,
    contrasts,
)
from longrope2_ray.search.winner import Winner

# Verdict -> what is said before the names of baselines.
SAYS = {
    BETTER: "better than",
    WORSE: "worse than",
    NOT_SHOWN: "not shown to differ from",
    TOO_FEW: "too few needles against",
}
# So many intervals stand in a sentence; more are in the table alone.
MAX_INTERVALS = 2

# (baseline, group of depths) -> interval.
Cells = Mapping[tuple[str, str], Interval]


def verdict_lines(winner: Winner) -> list[str]:
    """Return the verdict at each length; nothing without the winner or a baseline in the tables."""
    found = [contrast for contrast in contrasts(winner) if contrast.own_best]
    lengths = dict.fromkeys(contrast.length for contrast in found)
    lines = []
    for length in lengths:
        line = verdict([contrast for contrast in found if contrast.length == length])
        lines.append(f"{length} tokens: {line}" if len(lengths) > 1 else line)
    return lines


def verdict(found: Sequence[BaselineContrast]) -> str:
    """Return the verdict over all depths and by depth.

    Args:
        found: the winner against each baseline, on the same needles.
    """
    overall = {STYLES[c.method].label: c.contrast.overall for c in found}
    by_depth = {
        (STYLES[c.method].label, depth): interval
        for c in found
        for depth, interval in c.contrast.by_depth.items()
    }
    depths = list(found[0].contrast.by_depth)
    if len(depths) == 1:
        return _overall(overall, f"at depth {depths[0]}") + "."
    if {i.verdict for i in (*overall.values(), *by_depth.values())} == {BETTER}:
        return "Better than every baseline at every depth."
    first = _overall(overall, "over all depths")
    return f"{first}. By depth: {_by_depth(by_depth, list(overall), depths)}."


def format_interval(interval: Interval) -> str:
    """Return a ratio with its interval."""
    return f"{interval.ratio:.4g}, {interval.low:.4g} to {interval.high:.4g}"


def _overall(intervals: Mapping[str, Interval], place: str) -> str:
    """Return the verdict over all needles.

    Args:
        intervals: name of each baseline -> interval.
        place: where the needles stand.
    """
    verdicts = {interval.verdict for interval in intervals.values()}
    if verdicts == {TOO_FEW}:
        return f"Too few needles {place}"
    if len(verdicts) == 1:
        (only,) = verdicts
        everyone = "any baseline" if only == NOT_SHOWN else "every baseline"
        return f"{SAYS[only].capitalize()} {everyone} {place}"
    clauses = []
    for said, words in SAYS.items():
        names = [
            name if said == BETTER else f"{name} (ratio {format_interval(interval)})"
            for name, interval in intervals.items()
            if interval.verdict == said
        ]
        if names:
            clauses.append(f"{words} {_listed(names)}")
    return f"{place.capitalize()}: {'; '.join(clauses)}"


def _by_depth(cells: Cells, baselines: Sequence[str], depths: Sequence[str]) -> str:
    """Return the verdict by depth: what is not better, one by one, and whether the rest is."""
    clauses = []
    for said in (WORSE, NOT_SHOWN, TOO_FEW):
        chosen = {cell: i for cell, i in cells.items() if i.verdict == said}
        if chosen:
            clauses.append(_clause(said, chosen, baselines, depths))
    if any(interval.verdict == BETTER for interval in cells.values()):
        clauses.append("otherwise better" if clauses else "better than every baseline")
    return "; ".join(clauses)


def _clause(said: str, cells: Cells, baselines: Sequence[str], depths: Sequence[str]) -> str:
    """Return one clause about all cells that have the same verdict."""
    if said != TOO_FEW and len(cells) <= MAX_INTERVALS:
        named = [
            f"{name} at depth {depth} (ratio {format_interval(interval)})"
            for (name, depth), interval in cells.items()
        ]
        return f"{SAYS[said]} {_listed(named)}"
    # Baselines that share their depths are named together.
    sharing: dict[tuple[str, ...], list[str]] = {}
    for name in baselines:
        where = tuple(depth for depth in depths if (name, depth) in cells)
        if where:
            sharing.setdefault(where, []).append(name)
    if said == TOO_FEW and list(sharing.values()) == [list(baselines)]:
        (where,) = sharing
        return f"too few needles {_places(where, depths)}"
    everyone = "any baseline" if said == NOT_SHOWN else "every baseline"
    named = [
        f"{everyone if names == list(baselines) else _listed(names)} {_places(where, depths)}"
        for where, names in sharing.items()
    ]
    return f"{SAYS[said]} {', '.join(named)}"


def _places(where: Sequence[str], depths: Sequence[str]) -> str:
    if list(where) == list(depths):
        return "at every depth"
    return f"at depth{'s' if len(where) > 1 else ''} {_listed(where)}"


def _listed(names: Sequence[str]) -> str:
    """Return ``a``, ``a and b`` or ``a, b and c``."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
