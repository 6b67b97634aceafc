"""The progress of a study: how many trials are done, what runs, what is best, when it ends."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StudyStatus:
    """The status of a study.

    Attributes:
        total: number of trials.
        finished: trials that are finished, in this and former runs of the study.
        failed: trials that have failed in this run.
        running: the trials under way and how far each is.
        best_ppl: the lowest needle perplexity so far on the search's needles; None before any.
        best_trial: the trial that has it.
        eta_seconds: seconds to the study's end at the pace so far; None before there is one.
    """

    total: int
    finished: int
    failed: int
    running: tuple[str, ...]
    best_ppl: float | None
    best_trial: str
    eta_seconds: float | None


StudyObserver = Callable[[StudyStatus], None]


class StudyProgress:
    """Follows the trials of a study and tells an observer.

    Args:
        total: number of trials.
        finished: trials that are finished already.
        observe: called with the status after every change.
        best: the lowest needle perplexity of the finished trials, and whose it is.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        total: int,
        finished: int,
        observe: StudyObserver,
        best: tuple[float, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total = total
        self._before = finished
        self._finished = finished
        self._failed = 0
        self._observe = observe
        self._clock = clock
        self._began = clock()
        self._shares: dict[str, float] = {}
        self._texts: dict[str, str] = {}
        self._best = best

    def started(self, trial: str) -> None:
        """Note that a trial has started."""
        self._shares[trial] = 0.0
        self._texts[trial] = trial
        self._show()

    def generation(
        self, trial: str, index: int, iterations: int, ppl: float | None, trains: bool = False
    ) -> None:
        """Note that a trial has closed a generation.

        Args:
            index: the generation, 0 for the initial population.
            iterations: generations after the initial one.
            ppl: the best needle perplexity of the trial so far; None if none is finite.
            trains: whether a training follows, beside which the search does not count as work.
        """
        self._shares[trial] = 0.0 if trains else (index + 1) / (iterations + 1)
        self._texts[trial] = f"{trial} at generation {index} of {iterations}"
        if ppl is not None and (self._best is None or ppl < self._best[0]):
            self._best = ppl, trial
        self._show()

    def ended(self, trial: str, failed: bool) -> None:
        """Note that a trial has ended."""
        self._shares.pop(trial, None)
        self._texts.pop(trial, None)
        self._failed += failed
        self._finished += not failed
        self._show()

    def _show(self) -> None:
        left = self._total - self._finished - self._failed - sum(self._shares.values())
        done = self._total - self._before - left
        elapsed = self._clock() - self._began
        best = self._best or (None, "")
        self._observe(
            StudyStatus(
                total=self._total,
                finished=self._finished,
                failed=self._failed,
                running=tuple(self._texts.values()),
                best_ppl=best[0],
                best_trial=best[1],
                eta_seconds=elapsed * left / done if done > 0 else None,
            )
        )
