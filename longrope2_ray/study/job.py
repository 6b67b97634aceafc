"""A study on Ray Tune: each trial is a whole search, and a training where its variant has one.

The trials' run directories are the state of a study. A trial that is finished is only read, one
that was interrupted goes on where it stopped, so the same command resumes a study that was killed
at any moment. What Ray Tune itself would restore from, which it writes every few seconds and only
on the driver's machine, is not kept: Tune's files lie in a temporary folder.

A trial's driver waits and decides. It takes no CPU, so that all of them are left to the scorers and
the training's workers, which the trial starts beside its own reservation.
"""

import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayError

from longrope2_ray.errors import FencedError, StoppedError
from longrope2_ray.search.job import run_search, score_vectors
from longrope2_ray.search.scores import NeedleSummary
from longrope2_ray.search.status import Status
from longrope2_ray.search.winner import read_winner
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.study.preparation import PreparedTrial, prepare_study
from longrope2_ray.study.progress import StudyObserver, StudyProgress
from longrope2_ray.study.results import read_table, write_table
from longrope2_ray.study.spec import Study, Trial
from longrope2_ray.study.table import Failure, Table
from longrope2_ray.study.trained import prepare_trained, window_factors, write_trained
from longrope2_ray.training.records import Trained
from longrope2_ray.workers.connection import ray_session

# Ray Tune needs some resource to place a trial by, and every node has memory.
TRIAL_RESOURCES: dict[str, float] = {"memory": 2**28}

# Tune reads these when it starts: relative paths stay what they are, no copies of the results, no
# output on stdout, and Ctrl-C ends the study as it ends a search.
_TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


def run_study(
    study: Study, run_dir: str | None = None, observe: StudyObserver | None = None
) -> Table:
    """Run or resume a study on the cluster at ``RAY_ADDRESS``, or on this machine.

    Trials that fail end no other: the table has their reasons, and ``require_whole`` raises for
    them.

    Args:
        study: the loaded study.
        run_dir: directory or URL, ``runs/<study name>`` unless given.
        observe: called with the status when a trial starts, closes a generation or ends.

    Raises:
        ValueError: if a trial cannot be run as the study says, before any starts.
        FencedError: if a newer driver has taken the study over.
    """
    study_dir = RunDir(run_dir or str(Path("runs") / study.spec.name))
    jobs = prepare_study(study, study_dir)
    finished: list[PreparedTrial] = []
    missing: list[PreparedTrial] = []
    for job in jobs:
        (finished if job.is_finished() else missing).append(job)
    failures: Mapping[str, Failure] = {}
    if missing:
        study_dir.take_over()
        best = min(map(_search_ppl, finished), default=None)
        progress = StudyProgress(len(jobs), len(finished), observe or (lambda status: None), best)
        with ray_session():
            failures = run_trials(missing, study_dir, study.spec.max_concurrent_trials, progress)
    table = read_table(study, jobs, failures)
    write_table(study_dir, table)
    return table


def _search_ppl(job: PreparedTrial) -> tuple[float, str]:
    """Return the needle perplexity of a finished trial on the search's needles, and its folder."""
    winner = read_winner(RunDir(job.url))
    ppl = winner.search.ppl if winner else None
    return math.inf if ppl is None else ppl, job.trial.folder


def require_whole(table: Table) -> None:
    """Refuse a table from which trials are missing.

    Raises:
        FencedError: if a newer driver has taken over one of them.
        StoppedError: if any has failed.
    """
    if not table.failures:
        return
    kind = FencedError if any(failure.fenced for failure in table.failures) else StoppedError
    whole = len(table.failures) + len(table.outcomes)
    raise kind(f"{len(table.failures)} of {whole} trials did not finish; the table says why")


def run_trials(
    jobs: Sequence[PreparedTrial], study_dir: RunDir, at_once: int, progress: StudyProgress
) -> dict[str, Failure]:
    """Run trials as one experiment of Ray Tune, inside a Ray session, until each has ended.

    Args:
        jobs: the trials to run.
        study_dir: the study's directory, which this process has taken over.
        at_once: trials at once.
        progress: is told of them.

    Returns:
        Folder of a trial -> its failure, for those that failed.
    """
    _quiet_tune()
    trainable = tune.with_parameters(
        _run_trial, jobs=jobs, study_url=study_dir.absolute_url, claim=study_dir.claim
    )
    with tempfile.TemporaryDirectory(prefix="longrope2-tune-") as scratch:
        results: Any = tune.Tuner(
            tune.with_resources(trainable, tune.PlacementGroupFactory([TRIAL_RESOURCES])),
            param_space={"trial": tune.grid_search(list(range(len(jobs))))},
            # One process runs one trial after the other: starting it takes longer than a small one.
            tune_config=tune.TuneConfig(max_concurrent_trials=at_once, reuse_actors=True),
            run_config=tune.RunConfig(
                name="study",
                storage_path=scratch,
                verbose=0,
                callbacks=[_Watcher(jobs, progress)],
            ),
        ).fit()
        errors = {result.config["trial"]: result.error for result in results if result.error}
    return {jobs[i].trial.folder: _failure(jobs[i], error) for i, error in errors.items()}


def _quiet_tune() -> None:
    os.environ.update(_TUNE_ENVIRONMENT)
    # What it would say, that trials failed, stands in the table.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)


class _Watcher(tune.Callback):
    """Tells of Tune's trials as they come and go.

    Args:
        jobs: the trials, by Tune's ``config["trial"]``.
        progress: is told.
    """

    def __init__(self, jobs: Sequence[PreparedTrial], progress: StudyProgress):
        self._jobs = jobs
        self._progress = progress

    def _trial(self, trial: Any) -> Trial:
        number: int = trial.config["trial"]
        return self._jobs[number].trial

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._progress.started(self._trial(trial).folder)

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        its = self._trial(trial)
        generation, of = result["generation"], result["iterations"]
        self._progress.generation(its.folder, generation, of, result["best_ppl"], its.train)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._progress.ended(self._trial(trial).folder, failed=False)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._progress.ended(self._trial(trial).folder, failed=True)


def _run_trial(
    config: Mapping[str, int], jobs: Sequence[PreparedTrial], study_url: str, claim: str
) -> None:
    """Run one trial in a process of Ray Tune, from where its run directory stands.

    Raises:
        FencedError: if a newer driver has taken over the study, or the trial's run directory.
    """
    job = jobs[config["trial"]]
    study_dir = RunDir(study_url)
    study_dir.claim = claim
    study_dir.require_ownership()
    run_dir = job.open()
    if not job.has_winner():
        run_search(job.prepared, run_dir, [_report_generation])
    if job.trial.train:
        needles = _score_trained(job, _train(job))
        study_dir.require_ownership()
        write_trained(job, needles)


def _report_generation(status: Status, event: str) -> None:
    if event == "generation":
        tune.report(
            {
                "generation": status.generation,
                "iterations": status.iterations,
                "best_ppl": status.best_ppl,
            }
        )


def _train(job: PreparedTrial) -> Trained:
    from longrope2_ray.data.job import build_data, finished
    from longrope2_ray.data.plan import prepare_data
    from longrope2_ray.training.job import train

    plan = prepare_data(job.trial.recipe, job.url)
    if finished(plan) is None:
        build_data(plan)
    return train(job.trial.recipe, job.url)


def _score_trained(job: PreparedTrial, trained: Trained) -> dict[str, NeedleSummary]:
    """Score the trained model on the report's needles, each length under the window it serves."""
    prepared = prepare_trained(job, trained)
    vectors = window_factors(trained.result, prepared.shape, job.report_lengths)
    return score_vectors(prepared, vectors)


def _failure(job: PreparedTrial, error: BaseException) -> Failure:
    """Return a trial's failure, with the reason that its process gave."""
    inner: BaseException = error
    while isinstance(inner, RayError) and (cause := getattr(inner, "cause", None)):
        inner = cause
    known = isinstance(inner, (ValueError, StoppedError))
    reason = " ".join(str(inner).split()) if known else f"{type(inner).__name__}: {_last(inner)}"
    fenced = isinstance(inner, FencedError)
    return Failure(job.trial.variant, job.trial.seed, reason, fenced)


def _last(error: BaseException) -> str:
    """Return the last line of an error's text; Ray puts the remote stack trace before it."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else ""
