"""Decisions about failed units of work and failed starts; the pool carries them out."""

import re
import textwrap
import time
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from ray.exceptions import RayError, RayTaskError

# The words of torch, of Ray's memory monitor, and of Ray's error where the monitor has killed.
_MEMORY = re.compile(r"out[ _]?of[ _]?memory|low on memory", re.IGNORECASE)
_SHOWN_CHARACTERS = 240

Kind = Literal["died", "raised"]


@dataclass(frozen=True)
class Limits:
    """The limits at which a pool replaces a worker or stops the run.

    Attributes:
        max_attempts: number of times that a unit, or the start of a worker, is tried.
        stall_seconds: a worker busy for longer on one unit is replaced.
        load_seconds: a worker that takes longer to set itself up is replaced.
        start_seconds: time without any worker before the run stops.
        section: section of the recipe that holds these fields, for messages.
        memory_advice: advice for messages where memory does not suffice: which fields to change.
    """

    max_attempts: int = 4
    stall_seconds: float = 1800.0
    load_seconds: float = 900.0
    start_seconds: float = 1800.0
    section: str = "scorer"
    memory_advice: str = "it does not fit into memory"


@dataclass(frozen=True)
class Failure:
    """A failure of a unit of work or of a start.

    Attributes:
        kind: ``died`` if the process died, ``raised`` if the work raised an exception.
        message: message of the error.
        counts: whether it counts as an attempt; it does not if the node went away.
        preempted: whether the process went with a preempted node.
    """

    kind: Kind
    message: str
    counts: bool = True
    preempted: bool = False

    @classmethod
    def of(cls, error: RayError) -> "Failure":
        """Return the failure behind Ray's error for a call."""
        if isinstance(error, RayTaskError):
            cause = error.cause if isinstance(error.cause, Exception) else error
            return cls("raised", f"{type(cause).__name__}: {cause}")
        preempted = bool(getattr(error, "preempted", False))
        counts = not (preempted or "node has died" in str(error))
        return cls("died", str(error), counts, preempted)


class Decision(Enum):
    """A decision about a failure: try again, or stop the run."""

    RETRY = "retry"
    STOP = "stop"


def decide(
    failure: Failure, attempts: int, limits: Limits, fitted: bool = False
) -> tuple[Decision, str]:
    """Return the decision about a failure, and the reason: which recipe field mends it.

    Args:
        failure: the failure.
        attempts: number of times that this unit (or start) has failed.
        limits: the limits of the pool.
        fitted: whether this worker has done units before, so that memory was enough.
    """
    if _MEMORY.search(failure.message):
        again = (failure.kind == "died" or fitted) and attempts < limits.max_attempts
        return (Decision.RETRY if again else Decision.STOP), limits.memory_advice
    if attempts >= limits.max_attempts:
        return Decision.STOP, f"{attempts} attempts failed ({limits.section}.max_attempts)"
    return Decision.RETRY, "another worker takes it"


def reason(failure: Failure) -> str:
    """Return the part of a failure's message that says why, short enough for a line.

    An exception's own words come last; Ray gives the reason for a death somewhere inside.
    """
    lines = failure.message.strip().splitlines() or [""]
    reasons = [line for line in lines if "because" in line or _MEMORY.search(line)]
    said = lines[-1] if failure.kind == "raised" else " ".join(reasons or lines[:1])
    return textwrap.shorten(said, _SHOWN_CHARACTERS)


def start_pause_seconds(failed_starts: int) -> float:
    """Return the pause before the next start: it doubles, up to five minutes."""
    return min(2.0 ** (failed_starts - 1), 300.0) if failed_starts else 0.0


class Starts:
    """The starts of workers: how many failed in a row, and when the next may be tried."""

    def __init__(self) -> None:
        self._failed = 0
        self._next = 0.0
        self._last_ready = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether workers may be started now."""
        return time.monotonic() >= self._next

    @property
    def waited_seconds(self) -> float:
        """Time since a worker was last up."""
        return time.monotonic() - self._last_ready

    def succeeded(self) -> None:
        """Note that a worker has come up."""
        self._failed = 0
        self.some_worker_is_up()

    def some_worker_is_up(self) -> None:
        """Note that a worker is up now."""
        self._last_ready = time.monotonic()

    def failed(self, counts: bool) -> int:
        """Note a failed start and return how many of those that count failed in a row."""
        self._failed += counts
        self._next = time.monotonic() + start_pause_seconds(self._failed)
        return self._failed
