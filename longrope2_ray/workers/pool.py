"""A pool that runs any picklable work on resident actors: elastic, self-healing, drain-aware.

The driver owns retries: when an actor dies, its unit goes to another one. The pool does not know
what a unit of work or its result is.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic

from ray.exceptions import RayError

from longrope2_ray.errors import StoppedError
from longrope2_ray.workers.actors import Actors, Slot
from longrope2_ray.workers.done import Done, Result, Work
from longrope2_ray.workers.failures import (
    Decision,
    Failure,
    Limits,
    Starts,
    decide,
    reason,
)

log = logging.getLogger("longrope2")


@dataclass(eq=False)
class _Task(Generic[Work]):
    """A submitted unit of work.

    Attributes:
        work: the unit of work.
        attempts: number of failures that count as attempts.
        disputed_by: name of the worker whose result needs a second opinion.
        started: Unix time at which it was handed out.
    """

    work: Work
    attempts: int = 0
    disputed_by: str | None = None
    started: float = 0.0


class Pool(Generic[Work, Result]):
    """A pool that hands units of work to idle actors and returns the result of each once.

    Args:
        actors: the actors that do the work.
        limits: the limits at which a worker is replaced or the run stops.
        is_doubtful: tells whether a result needs a second opinion. Where another worker's is not
            doubtful, that one counts and the first worker is replaced.
    """

    def __init__(
        self,
        actors: Actors,
        limits: Limits,
        is_doubtful: Callable[[Result], bool] = lambda result: False,
    ):
        self.actors = actors
        self._limits = limits
        self._is_doubtful = is_doubtful
        self._queue: deque[_Task[Work]] = deque()
        # Results that have come in: the failure of another unit loses none of them.
        self._done: list[Done[Work, Result]] = []
        self._stopped: StoppedError | None = None
        kinds = ("requeued", "deaths", "preemptions", "stalls", "disputed")
        self._faults = dict.fromkeys(kinds, 0)
        self._starts = Starts()
        actors.resize()

    def free(self) -> int:
        """Return the number of idle workers that no queued unit waits for."""
        return len(self.actors.idle) - len(self._queue)

    def submit(self, work: Work) -> None:
        """Queue a unit; the next idle worker takes it."""
        self._queue.append(_Task(work))
        self._dispatch()

    def wait(self) -> list[Done[Work, Result]]:
        """Return the results that have come in, waiting up to a second for the first.

        Raises:
            StoppedError: if a failure will not mend.
        """
        if self._starts.is_due:
            self.actors.resize()
        self._replace_overdue()
        self._dispatch()
        self.actors.wait()
        self._gather()
        if self._stopped is not None:
            raise self._stopped
        self._require_some_worker()
        self._dispatch()
        return self.flush()

    def flush(self) -> list[Done[Work, Result]]:
        """Return the results that have come in by now, whatever failed beside them."""
        self._gather()
        done, self._done = self._done, []
        return done

    def counts(self) -> dict[str, int]:
        """Return the number of workers by state: ``starting``, ``idle``, ``busy``."""
        return self.actors.counts()

    def faults(self) -> dict[str, int]:
        """Return the number of faults since the start, by kind."""
        return dict(self._faults)

    def close(self) -> None:
        """Stop every worker."""
        self.actors.close()

    # --- handing out and taking in

    def _dispatch(self) -> None:
        while self._queue and self.actors.idle:
            task = self._queue[0]
            slot = self.actors.idle_slot(not_named=task.disputed_by)
            if slot is None:
                return
            self._queue.popleft()
            task.started = time.time()
            slot.task = task
            self.actors.ask(slot, "busy", slot.actor.work.remote(task.work))

    def _gather(self) -> None:
        for slot, answer in self.actors.answered():
            try:
                self._take(slot, answer)
            except StoppedError as error:
                self._stopped = self._stopped or error

    def _take(self, slot: Slot, answer: Future[Any]) -> None:
        """Take an actor's answer: it has a place, is ready, has done its unit, or has failed.

        Raises:
            StoppedError: if a failure will not mend.
        """
        try:
            result = answer.result()
        except RayError as error:
            failure = Failure.of(error)
            self._faults["deaths"] += failure.kind == "died"
            self._faults["preemptions"] += failure.preempted
            self._fail(slot, failure)
            return
        if slot.stage == "placing":
            slot.process, slot.node = result
            self.actors.ask(slot, "loading", slot.actor.ready.remote())
            return
        task, slot.task = slot.task, None
        self.actors.rest(slot)
        if slot.node in self.actors.draining:
            self._preempt(slot)
        if task is None:
            self._starts.succeeded()
            log.info("%s is ready", slot.name)
            return
        slot.num_done += 1
        self._judge(slot, task, result)

    def _judge(self, slot: Slot, task: _Task[Work], result: Result) -> None:
        """Accept a result, or ask another worker for a second opinion on a doubtful one."""
        # A broken device can compute NaN where a sound one computes a number.
        first, task.disputed_by = task.disputed_by, None
        if self._is_doubtful(result) and first is None:
            log.warning("%s gave %s while %s: asking again", slot.name, result, task.work)
            task.disputed_by = slot.name
            self._faults["disputed"] += 1
            self._requeue(task)
            return
        if not self._is_doubtful(result) and first in self.actors.slots:
            log.warning("%s is replaced: %s gave %s on the same work", first, slot.name, result)
            self._drop(self.actors.slots[str(first)])
        self._done.append(Done(task.work, result, slot.name, round(task.started, 3)))

    # --- failures

    def _fail(self, slot: Slot, failure: Failure) -> None:
        """Replace a worker that failed, and give its unit to another one, or stop.

        Raises:
            StoppedError: if the failure will not mend.
        """
        task: _Task[Work] | None = slot.task
        if task is None:
            attempts = self._starts.failed(failure.counts)
        else:
            task.attempts += failure.counts
            attempts = task.attempts
        fitted = slot.num_done > 0
        decision, hint = decide(failure, attempts, self._limits, fitted)
        doing = str(task.work) if task else "starting"
        why = reason(failure)
        # A start that keeps failing does not stop a run that others can finish.
        others_work = task is None and self.actors.some_are_up
        if decision is Decision.STOP and not others_work:
            raise StoppedError(f"{slot.name} failed {doing}: {why} ({hint})")
        log.warning("%s %s while %s: %s; %s", slot.name, failure.kind, doing, why, hint)
        # A worker that raised could fail every other unit as fast: it would take all of them.
        self._drop(slot)

    def _requeue(self, task: _Task[Work]) -> None:
        self._queue.appendleft(task)
        self._faults["requeued"] += 1

    def _drop(self, slot: Slot) -> None:
        """Replace a worker; what it was busy with goes to another one."""
        task, slot.task = slot.task, None
        self.actors.drop(slot)
        if task is not None:
            self._requeue(task)

    def _preempt(self, slot: Slot) -> None:
        """Give up a worker whose node will be taken away, before it takes another unit."""
        log.warning("%s is given up: its node is being drained", slot.name)
        self._faults["deaths"] += 1
        self._faults["preemptions"] += 1
        self._drop(slot)

    def _replace_overdue(self) -> None:
        """Replace workers on draining nodes, and those that are busy, or loading, for too long."""
        if not self.actors.look():
            return
        for slot in self.actors.on_draining_nodes():
            self._preempt(slot)
        for slot, why in self.actors.overdue(self._limits):
            self._faults["stalls"] += 1
            self._fail(slot, Failure("died", why))

    def _require_some_worker(self) -> None:
        """Stop the run if there has been no worker for too long."""
        if self.actors.some_are_up:
            self._starts.some_worker_is_up()
        elif self._starts.waited_seconds > self._limits.start_seconds:
            raise StoppedError(
                f"no worker came up within {self._limits.start_seconds:g} s "
                f"({self._limits.section}.start_seconds): {self.actors.describe_room()}"
            )
