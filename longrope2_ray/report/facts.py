"""The numbers of a run as rows of text, for the tables of the page."""

import statistics
from collections.abc import Iterator, Sequence

from longrope2_ray.report.figures import NOT_YET
from longrope2_ray.report.rundata import RunData
from longrope2_ray.report.tables import format_critical_dim, format_perplexity
from longrope2_ray.training.records import LoggedStep

TRAINING_HEADINGS = ("training", "steps", "loss, short", "loss, long", "tokens", "tokens/s")
FACTOR_HEADINGS = ("dimension", "period (tokens)", "factor")


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
        yield "cost of the search", f"{run.status.equivalents:.1f} full-length equivalents (FLOPs)"
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
