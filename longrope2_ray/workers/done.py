"""A unit of work that was done. This module imports no Ray: readers of results need none."""

from dataclasses import dataclass
from typing import Generic, TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Done(Generic[Work, Result]):
    """A unit of work with its result.

    Attributes:
        work: the unit of work.
        result: its result.
        worker: name of the actor that did it.
        started: Unix time at which it was handed out.
    """

    work: Work
    result: Result
    worker: str = ""
    started: float = 0.0
