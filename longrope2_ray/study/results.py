"""The results of a study, read from the run directories of its trials."""

import math
from collections.abc import Mapping, Sequence

from longrope2_ray.search.scores import NeedleSummary, is_report, report_set, scores_of
from longrope2_ray.search.winner import ComparisonRow, Winner, read_winner
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.study.preparation import PreparedTrial
from longrope2_ray.study.spec import STUDY_JSON, STUDY_MARKDOWN, Study
from longrope2_ray.study.table import (
    Baseline,
    Failure,
    Outcome,
    Table,
    build_table,
    format_markdown,
)
from longrope2_ray.study.trained import read_trained
from longrope2_ray.training.records import read_result, training_dir

NOT_RUN = "not finished; run the same command again"


def read_outcome(job: PreparedTrial) -> Outcome | None:
    """Read the outcome of a trial; None if it is not finished."""
    if not job.is_finished():
        return None
    trial, run_dir = job.trial, RunDir(job.url)
    winner = read_winner(run_dir)
    if winner is None:
        return None
    result = read_result(training_dir(trial.recipe, run_dir)) if trial.train else None
    return outcome_of(
        winner,
        variant=trial.variant,
        seed=trial.seed,
        equivalents=_equivalents(job, run_dir),
        loss=result.loss if result else None,
        trained=read_trained(job) if result else {},
    )


def _equivalents(job: PreparedTrial, run_dir: RunDir) -> float:
    """Return what the search's scores cost, the report's not counted."""
    sets = job.prepared.needle_sets
    costs = {name: its.equivalents for name, its in sets.items() if not is_report(name)}
    scores = scores_of(run_dir).load().values()
    return round(math.fsum(costs.get(score.needle_set, 0.0) for score in scores), 6)


def _at_start(needles: NeedleSummary | None) -> NeedleSummary | None:
    """Return the summary of the needles at the start; None if there is none, or no other."""
    groups = needles.by_depth() if needles else {}
    return groups.get("0") if len(groups) > 1 else None


def outcome_of(
    winner: Winner,
    *,
    variant: str,
    seed: int,
    equivalents: float,
    loss: float | None,
    trained: Mapping[str, NeedleSummary],
) -> Outcome:
    """Return the outcome of a trial, given the winner of its search.

    Args:
        trained: needle set -> the trained model's scores; empty without a training.
    """
    head = winner.report[0]
    block = [
        row
        for row in winner.report
        if (row.length, row.compared_at) == (head.length, head.compared_at)
    ]
    own = next((row.needles for row in block if row.method == "longrope2"), None)
    start = _at_start(own)
    shortest = min(row.length for row in winner.report)
    long = trained.get(report_set(head.length))
    short = trained.get(report_set(shortest)) if shortest < head.length else None
    return Outcome(
        variant=variant,
        seed=seed,
        search_ppl=winner.search.ppl,
        held_out_ppl=own.ppl if own else None,
        accuracy=own.accuracy if own else None,
        start_ppl=start.ppl if start else None,
        start_accuracy=start.accuracy if start else None,
        equivalents=equivalents,
        critical_dim=winner.candidate.critical_dim,
        loss=loss,
        trained_ppl=long.ppl if long else None,
        trained_accuracy=long.accuracy if long else None,
        short_ppl=short.ppl if short else None,
        short_accuracy=short.accuracy if short else None,
        length=head.length,
        attention_factor=head.compared_at,
        baselines=tuple(_baseline(row) for row in block if row.method != "longrope2"),
    )


def _baseline(row: ComparisonRow) -> Baseline:
    start = _at_start(row.needles)
    return Baseline(
        method=row.method,
        ppl=row.needles.ppl,
        accuracy=row.needles.accuracy,
        start_ppl=start.ppl if start else None,
        start_accuracy=start.accuracy if start else None,
    )


def read_table(
    study: Study, jobs: Sequence[PreparedTrial], failures: Mapping[str, Failure]
) -> Table:
    """Read the table of a study.

    Args:
        failures: folder of a trial -> its failure, for the trials that failed just now.
    """
    outcomes, missing = [], []
    for job in jobs:
        trial, outcome = job.trial, read_outcome(job)
        if outcome is not None:
            outcomes.append(outcome)
            continue
        unknown = Failure(trial.variant, trial.seed, NOT_RUN)
        missing.append(failures.get(trial.folder, unknown))
    variants = [variant.name for variant in study.spec.variants]
    return build_table(study.spec.name, study.spec.recipe, variants, outcomes, missing)


def write_table(study_dir: RunDir, table: Table) -> None:
    """Write ``study.json`` and ``study.md``.

    Raises:
        FencedError: if a newer driver owns the study's directory.
    """
    study_dir.require_ownership()
    study_dir.write_json(STUDY_JSON, table.to_json())
    study_dir.write_bytes(STUDY_MARKDOWN, format_markdown(table).encode())
