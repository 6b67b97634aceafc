"""The table of a study: medians over seeds, worst seeds, and ratios to the first variant.

Statistics and text only. Equal outcomes make an equal table: it holds no times, and the bootstrap
draws from a fixed seed.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from longrope2_ray.report.figure_style import STYLES
from longrope2_ray.report.tables import format_perplexity

DRAWS = 10_000
INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Baseline:
    """A row of a report beside the winner's.

    Attributes:
        method: name of the method.
        ppl: its held-out needle perplexity; None if it is not finite.
        accuracy: its held-out accuracy.
        start_ppl: its perplexity of the needles at the start alone.
        start_accuracy: its accuracy there; None where no needle or every one stands there.
    """

    method: str
    ppl: float | None
    accuracy: float
    start_ppl: float | None = None
    start_accuracy: float | None = None


@dataclass(frozen=True)
class Outcome:
    """The outcome of a finished trial.

    Attributes:
        search_ppl: the winner's perplexity on the search's needles; None if it is not finite.
        held_out_ppl: the winner's on the held-out needles of the report's first table; None also
            where the report leaves the winner out, as ``accuracy`` is.
        accuracy: share of held-out answers that are exactly right.
        start_ppl: the winner's held-out perplexity of the needles at the start alone.
        start_accuracy: its accuracy there; None where no needle or every one stands there.
        equivalents: cost of the search's scores, in forward passes of the target length by FLOPs.
        critical_dim: critical dimension found; 0 if every dimension was searched.
        loss: loss of the training's last step; None without a training.
        trained_ppl: the trained model's held-out perplexity at ``length``; None without a training,
            and where it is not finite.
        trained_accuracy: its accuracy there.
        short_ppl: its perplexity at the shortest reported length, which its short window serves if
            that is no longer than L0; None without a training or another length.
        short_accuracy: its accuracy there.
        length: tokens of the report's first table.
        attention_factor: attention factor of the report's first table.
        baselines: the other rows of the report's first table.
    """

    variant: str
    seed: int
    search_ppl: float | None
    held_out_ppl: float | None
    accuracy: float | None
    start_ppl: float | None
    start_accuracy: float | None
    equivalents: float
    critical_dim: int
    loss: float | None
    trained_ppl: float | None
    trained_accuracy: float | None
    short_ppl: float | None
    short_accuracy: float | None
    length: int
    attention_factor: float
    baselines: Sequence[Baseline]


@dataclass(frozen=True)
class Failure:
    """A trial that did not finish.

    Attributes:
        reason: why, in one line.
        fenced: whether a newer driver has taken it over.
    """

    variant: str
    seed: int
    reason: str
    fenced: bool = False


class Metric(NamedTuple):
    """A number of each outcome that is compared between variants.

    Attributes:
        name: its field in ``Outcome``.
        heading: the column's heading.
        worst: ``max`` where less is better, else ``min``.
        text: formats one value.
    """

    name: str
    heading: str
    worst: Callable[..., float]
    text: Callable[[float | None], str]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


METRICS = (
    Metric("search_ppl", "search perplexity", max, format_perplexity),
    Metric("held_out_ppl", "held-out perplexity", max, format_perplexity),
    Metric("accuracy", "answers right", min, _percent),
    Metric("start_ppl", "at the start: perplexity", max, format_perplexity),
    Metric("start_accuracy", "at the start: right", min, _percent),
    Metric("equivalents", "full-length equivalents", max, _count),
    Metric("loss", "training loss", max, format_perplexity),
    Metric("trained_ppl", "trained: perplexity", max, format_perplexity),
    Metric("trained_accuracy", "trained: right", min, _percent),
    Metric("short_ppl", "trained, shortest: perplexity", max, format_perplexity),
    Metric("short_accuracy", "trained, shortest: right", min, _percent),
)

# Metric of the winners -> the baselines' field beside it.
BASELINE_FIELDS = {
    "held_out_ppl": "ppl",
    "accuracy": "accuracy",
    "start_ppl": "start_ppl",
    "start_accuracy": "start_accuracy",
}


@dataclass(frozen=True)
class Ratio:
    """The ratio of a variant's median to the first variant's, with its 95 % interval."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """A metric of one variant over its seeds.

    Attributes:
        median: the median; None if it is not finite.
        worst: the worst seed's value; None if it is not finite.
        worst_seed: the seed that it belongs to.
        to_first: ratio to the first variant over the seeds that both have; None for the first
            variant, below two seeds, and where a median of the bootstrap is 0 or not finite.
    """

    median: float | None
    worst: float | None
    worst_seed: int
    to_first: Ratio | None


@dataclass(frozen=True)
class Row:
    """A variant's row of the table.

    Attributes:
        seeds: the seeds of its finished trials.
        summaries: metric -> its summary, for the metrics that its trials have.
        critical_dims: the critical dimension of each seed.
    """

    variant: str
    seeds: Sequence[int]
    summaries: Mapping[str, Summary]
    critical_dims: Sequence[int]


@dataclass(frozen=True)
class Table:
    """The table of a study.

    Attributes:
        name: the study's name.
        recipe: the recipe that its file names.
        rows: a row for each variant, in the order of the file.
        outcomes: the finished trials.
        failures: the trials that did not finish.
    """

    name: str
    recipe: str
    rows: Sequence[Row]
    outcomes: Sequence[Outcome]
    failures: Sequence[Failure]

    @property
    def reference(self) -> Outcome | None:
        """The outcome whose baselines the table shows, the first; None without any."""
        return self.outcomes[0] if self.outcomes else None

    def to_json(self) -> dict[str, Any]:
        """Return the table as a JSON object, the baselines of one outcome in it."""
        body = asdict(self)
        for outcome in body["outcomes"]:
            del outcome["baselines"]
        baselines = self.reference.baselines if self.reference else ()
        return {**body, "baselines": [asdict(row) for row in baselines]}


def bootstrap_ratio(values: Sequence[float], first: Sequence[float]) -> Ratio | None:
    """Return the ratio of two medians over the same seeds, with its 95 % interval.

    A percentile bootstrap draws seeds with replacement, and a seed's two values together.

    Args:
        values: a variant's value for each seed.
        first: the first variant's values for the same seeds.
    """
    if len(values) < 2:
        return None
    draws = np.random.default_rng(0).integers(0, len(values), size=(DRAWS, len(values)))
    with np.errstate(all="ignore"):
        over = np.median(np.array(values, dtype=float)[draws], axis=1)
        under = np.median(np.array(first, dtype=float)[draws], axis=1)
        ratios = over / under
    if not np.isfinite(ratios).all():
        return None
    low, high = np.percentile(ratios, INTERVAL)
    return Ratio(statistics.median(values) / statistics.median(first), float(low), float(high))


def build_table(
    name: str,
    recipe: str,
    variants: Sequence[str],
    outcomes: Sequence[Outcome],
    failures: Sequence[Failure],
) -> Table:
    """Return the table of a study.

    Args:
        variants: names of all variants, the one that the others are compared with first.
        outcomes: the finished trials, in the order of the study.
        failures: the others.
    """
    by_variant = {
        variant: {its.seed: its for its in outcomes if its.variant == variant}
        for variant in variants
    }
    first = by_variant[variants[0]]
    rows = [_row(variant, by_variant[variant], first) for variant in variants]
    return Table(name, recipe, rows, outcomes, failures)


def _row(variant: str, own: Mapping[int, Outcome], first: Mapping[int, Outcome]) -> Row:
    summaries = {}
    for metric in METRICS:
        values = _values(metric, own)
        if values:
            compared = {} if own is first else _values(metric, first)
            summaries[metric.name] = _summary(metric, values, compared)
    dims = [outcome.critical_dim for outcome in own.values()]
    return Row(variant, list(own), summaries, dims)


def _values(metric: Metric, outcomes: Mapping[int, Outcome]) -> dict[int, float]:
    """Return seed -> value, for the seeds that have the metric."""
    found = {seed: _value(metric.name, outcome) for seed, outcome in outcomes.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def _value(name: str, outcome: Outcome) -> float | None:
    """Return one value; a perplexity that was measured and is not finite is infinite."""
    value: float | None = getattr(outcome, name)
    measured = {
        "search_ppl": True,
        "held_out_ppl": outcome.accuracy is not None,
        "start_ppl": outcome.start_accuracy is not None,
        "trained_ppl": outcome.trained_accuracy is not None,
        "short_ppl": outcome.short_accuracy is not None,
    }.get(name, False)
    return math.inf if value is None and measured else value


def _summary(metric: Metric, values: Mapping[int, float], first: Mapping[int, float]) -> Summary:
    worst = metric.worst(values.values())
    both = [seed for seed in values if seed in first]
    return Summary(
        median=_finite(statistics.median(values.values())),
        worst=_finite(worst),
        worst_seed=next(seed for seed, value in values.items() if value == worst),
        to_first=bootstrap_ratio([values[s] for s in both], [first[s] for s in both]),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- text


def format_markdown(table: Table) -> str:
    """Return the table in Markdown, ready for a log."""
    lines = [f"{line}  " for line in _notes(table)]
    for head, *rows in _blocks(table):
        lines += ["", _bar(head), "|" + "---|" * len(head), *map(_bar, rows)]
    return "\n".join([*lines, *_failure_lines(table)]) + "\n"


def _bar(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def format_text(table: Table) -> str:
    """Return the table as plain text with columns."""
    lines = list(_notes(table))
    for block in _blocks(table):
        widths = [max(map(len, column)) for column in zip(*block, strict=True)]
        lines.append("")
        for row in block:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *_failure_lines(table)])


def _notes(table: Table) -> Iterator[str]:
    yield f"Study {table.name}, recipe {table.recipe}: median over the seeds (worst seed)."
    if any(its.to_first for row in table.rows for its in row.summaries.values()):
        yield (
            f"x is the ratio to {table.rows[0].variant}'s median and its 95 % interval, a "
            f"bootstrap over the seeds in pairs."
        )
    if table.reference:
        yield (
            f"Held out: {table.reference.length} tokens at attention factor "
            f"{table.reference.attention_factor:.3f}."
        )


def _blocks(table: Table) -> Iterator[list[tuple[str, ...]]]:
    """Yield the variants' block and the baselines', each with its headings first."""
    metrics = [metric for metric in METRICS if any(metric.name in r.summaries for r in table.rows)]
    headings = ("variant", "seeds", *(its.heading for its in metrics), "critical dim, each seed")
    yield [headings, *(_cells(row, metrics) for row in table.rows)]
    reference = table.reference
    if reference and reference.baselines:
        found = f"baseline ({reference.variant}, seed {reference.seed})"
        shown = [its for its in METRICS if its.name in BASELINE_FIELDS]
        if all(its.start_accuracy is None for its in reference.baselines):
            shown = shown[:2]
        rows = [
            (
                STYLES[its.method].label,
                *(metric.text(getattr(its, BASELINE_FIELDS[metric.name])) for metric in shown),
            )
            for its in reference.baselines
        ]
        yield [(found, *(metric.heading for metric in shown)), *rows]


def _cells(row: Row, metrics: Sequence[Metric]) -> tuple[str, ...]:
    values = (_cell(metric, row.summaries.get(metric.name)) for metric in metrics)
    dims = " ".join(str(dim) if dim else "all" for dim in row.critical_dims)
    return (row.variant, str(len(row.seeds)), *values, dims or "-")


def _cell(metric: Metric, summary: Summary | None) -> str:
    if summary is None:
        return "-"
    cell = f"{metric.text(summary.median)} ({metric.text(summary.worst)})"
    if summary.to_first:
        its = summary.to_first
        cell += f" x {its.ratio:.3f} [{its.low:.3f}, {its.high:.3f}]"
    return cell


def _failure_lines(table: Table) -> list[str]:
    if not table.failures:
        return []
    lines = [f"- {its.variant}, seed {its.seed}: {its.reason}" for its in table.failures]
    return ["", "Not finished:", "", *lines]
