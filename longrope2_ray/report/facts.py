"""The numbers of a run as rows of text, for the tables of the page."""

import statistics
from collections.abc import Iterator, Sequence

from longrope2_ray.report.cascade_figure import correlation_words
from longrope2_ray.report.figures import NOT_YET
from longrope2_ray.report.genealogy import (
    Relative,
    line_of,
    name_of_origin,
    name_of_start,
    operator_rows,
    relatives,
)
from longrope2_ray.report.progress import format_seconds
from longrope2_ray.report.rundata import RunData
from longrope2_ray.report.tables import format_critical_dim, format_perplexity
from longrope2_ray.training.records import LoggedStep

TRAINING_HEADINGS = ("training", "steps", "loss, short", "loss, long", "tokens", "tokens/s")
FACTOR_HEADINGS = ("dimension", "period (tokens)", "factor")
OPERATOR_HEADINGS = ("made by", "candidates", "survived their generation", "became the best")
LINE_HEADINGS = (
    "generation",
    "made by",
    "critical dim",
    "attention factor",
    "needle perplexity",
    "candidate",
)


def progress_facts(run: RunData) -> Iterator[tuple[str, str]]:
    """Yield where a run stands that is under way."""
    if run.status is None or run.ended:
        return
    status, state = run.status, run.status.state
    if state == "descending" and status.descent_steps:
        state += f", step {status.descent_step} of {status.descent_steps}"
    yield "state", state
    yield "time left", format_seconds(status.eta_seconds)
    yield "scorers", ", ".join(f"{count} {name}" for name, count in status.scorers.items())


def result_facts(run: RunData) -> Iterator[tuple[str, str]]:
    """Yield name and value of what is known about the best candidate so far."""
    if run.best is None:
        yield "best candidate", f"none: {NOT_YET}"
        return
    best = run.best.candidate
    yield "found critical dimension", format_critical_dim(best.critical_dim)
    if run.geometry:
        theory = f"{run.theoretical} (ten periods: {run.geometry.ten_period_dim})"
        yield "theoretical critical dimension", theory
    yield "factors from there on", f"{best.tail[0]:.4g} to {best.tail[-1]:.4g}"
    yield "attention factor", f"{best.attention_factor:.3f}"
    if best.start_tokens:
        yield "positions that keep the original RoPE", str(best.start_tokens)
    yield "needle perplexity, search needles", format_perplexity(run.best.ppl)
    asked = (g.index for g in run.generations if best.id in {c.id for c in g.candidates})
    yield "candidate", f"{best.id}, first asked for in generation {next(asked, '?')}"


def run_facts(run: RunData) -> Iterator[tuple[str, str]]:
    """Yield name and value of what was run on what, and what it took."""
    yield "model", run.model or "unknown"
    for name, value in sorted(run.fingerprints.items()):
        yield f"fingerprint of {name}", value
    if run.geometry:
        geometry, target = run.geometry, run.target_length
        ratio = target / geometry.original_length
        yield "window", f"{geometry.original_length} -> {target} tokens (ratio {ratio:g})"
        rotary = f"{geometry.rotary_dim} of {geometry.head_dim} dimensions of a head rotary"
        yield "RoPE", f"base {geometry.base:g}, {rotary}"
    expected = "unknown" if run.iterations is None else run.iterations + 1
    yield "generations closed", f"{len(run.generations)} of {expected}"
    yield from _unit_facts(run)
    if run.status and run.status.equivalents:
        cost = f"{run.status.equivalents:.1f} full-length equivalents (FLOPs)"
        if run.status.equivalents_left:
            cost += f", about {run.status.equivalents_left:.0f} left"
        yield "cost of the search", cost
    if run.busy_share is not None:
        seconds = sum(g.end - g.begin for g in run.generations)
        yield "searching", f"{seconds:.4g} s, scorers {run.busy_share:.0%} busy"


def _unit_facts(run: RunData) -> Iterator[tuple[str, str]]:
    scored = sum(g.units_scored for g in run.generations)
    eliminated = sum(g.units_eliminated for g in run.generations)
    if scored:
        saved = eliminated / (scored + eliminated)
        counts = f"{scored} scored, {eliminated} eliminated ({saved:.1%} saved)"
        yield "units in closed generations", counts
    if len(run.rows) > scored:
        where = "in the open generation or ahead"
        if run.winner:
            where = "outside of every generation"
        yield f"units {where}", f"{len(run.rows) - scored} scored"
    if run.rows:
        median = statistics.median(row.seconds for row in run.rows)
        yield "time per unit", f"median {median:.3g} s"
        yield "number of scorers", str(len({row.scorer for row in run.rows}))


def factor_rows(run: RunData) -> Iterator[tuple[str, str, str]]:
    """Yield dimension, period and factor of the best candidate so far."""
    if run.best and run.geometry:
        factors, periods = run.best.candidate.factors.values, run.geometry.periods_tokens
        for dim, (period, factor) in enumerate(zip(periods, factors, strict=True)):
            yield str(dim), f"{period:.1f}", f"{factor:.6g}"


def operators(run: RunData) -> list[tuple[str, ...]]:
    """Return how many candidates each operator made, and how they did."""
    return list(operator_rows(generation.record for generation in run.generations))


def ancestor_rows(run: RunData) -> list[tuple[str, ...]]:
    """Return the line of ancestors of the best candidate so far, oldest first."""
    if run.best is None:
        return []
    known = relatives(generation.record for generation in run.generations)
    line = line_of(run.best.candidate.id, known)
    steps = {step.vector_id for step in run.descent}
    above = [] if line[0].candidate.parent_id not in steps else _descent_rows(run)
    return [*above, *map(_ancestor_row, line)]


def _descent_rows(run: RunData) -> list[tuple[str, ...]]:
    """Return the rows of a descent that a line of ancestors comes from: its start, its steps."""
    start, count = run.descent[0].vector_id, len(run.descent)
    name = name_of_start(run.descent, [g.record for g in run.generations]) or "the start"
    ending = run.descent[-1].vector_id
    return [
        ("descent", f"start: {name}", "", "", "", start),
        ("descent", f"{count} steps", "", "", "", ending),
    ]


def _ancestor_row(relative: Relative) -> tuple[str, ...]:
    candidate = relative.candidate
    return (
        str(relative.generation),
        name_of_origin(candidate),
        str(candidate.critical_dim or "-"),
        f"{candidate.attention_factor:.3f}",
        format_perplexity(relative.ppl),
        candidate.id,
    )


def origin_sentences(run: RunData) -> Iterator[str]:
    """Yield what the page says in words about a descent and a cascade."""
    if run.descent:
        name = name_of_start(run.descent, [g.record for g in run.generations])
        came_from = f" from {name}" if name else ""
        yield f"The descent took {len(run.descent)} steps{came_from}."
        if run.best and run.best.candidate.id == run.descent[0].vector_id:
            yield "Its start is better at full length than what it ended in."
    if run.cascade.points:
        yield (
            f"Skipped documents against full length: {correlation_words(run.cascade)}. Only "
            f"candidates that were raced at full length, too, are among them."
        )


def training_rows(run: RunData) -> Iterator[tuple[str, ...]]:
    """Yield where each training stands: losses of the last tenth of its logged steps, its pace."""
    for name, steps in run.trainings.items():
        last = steps[-1]
        yield (
            name,
            f"{last.step} of {last.num_steps}",
            _mean_loss(steps, "short"),
            _mean_loss(steps, "long"),
            f"{last.step * last.num_positions:,}",
            f"{statistics.median(step.tokens_per_second for step in steps):,.0f}",
        )


def _mean_loss(steps: Sequence[LoggedStep], window: str) -> str:
    tenth = steps[-max(len(steps) // 10, 1) :]
    losses = [step.window_losses[window] for step in tenth if window in step.window_losses]
    return f"{statistics.fmean(losses):.3f}" if losses else "-"
