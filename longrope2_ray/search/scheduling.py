"""The way of a unit: from the race to a scorer, as a score to the ledger, and to the race."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Protocol

from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.search.racing import Race
from longrope2_ray.search.scores import NeedleSet, NeedleSummary, Score, Unit, UnitScore
from longrope2_ray.storage.ledger import Ledger
from longrope2_ray.workers.done import Done


class Scorers(Protocol):
    """What scores units: the Ray pool, or a plain function in tests."""

    def free(self) -> int:
        """Return how many units can be submitted now."""

    def submit(self, work: Unit) -> None:
        """Hand a unit over; it comes out of ``wait`` sooner or later, exactly once."""

    def wait(self) -> list[Done[Unit, UnitScore]]:
        """Return what has been scored, after waiting a little for the first; may be empty."""

    def flush(self) -> list[Done[Unit, UnitScore]]:
        """Return what has been scored by now, without waiting."""

    def counts(self) -> Mapping[str, int]:
        """Return the number of scorers by state: ``starting``, ``idle``, ``busy``."""

    def faults(self) -> Mapping[str, int]:
        """Return the number of faults since the start, by kind.

        ``requeued`` units, ``deaths`` of scorers, ``preemptions`` among them, ``stalls``, and units
        that were ``disputed`` because a number was not finite.
        """


class Scheduler:
    """The scheduler that feeds scorers with the units of a race until the race is over.

    Args:
        scorers: the scorers that units are handed to.
        ledger: the ledger that scores are committed to before they count.
        needle_sets: name -> needle set.
        on_commit: called with the scores of each commit and the open race.
    """

    def __init__(
        self,
        scorers: Scorers,
        ledger: Ledger[Score],
        needle_sets: Mapping[str, NeedleSet],
        on_commit: Callable[[Sequence[Score], Race], None],
    ):
        self._scorers = scorers
        self._ledger = ledger
        self._needle_sets = needle_sets
        self._on_commit = on_commit
        self._pending: set[tuple[str, str]] = set()
        self._to_commit: list[Score] = []

    def run(
        self,
        race: Race,
        vectors: Mapping[str, RescaleFactors],
        needle_set: str,
        later: Callable[[Race], Iterator[Unit]],
    ) -> None:
        """Run a race to its end; what the ledger knows is not scored again.

        Args:
            race: the race, whose newcomers are the ids of ``vectors``.
            vectors: id -> factor vector of the newcomers.
            needle_set: name of the needle set that they are scored on.
            later: returns units for scorers that the race leaves idle.

        Raises:
            StoppedError: if scorers cannot go on.
        """
        # A resumed search, or one that looked ahead, has some of the scores already.
        for id in vectors:
            for sample in range(len(self._needle_sets[needle_set])):
                if (nll := self.known_nll(id, needle_set, sample)) is not None:
                    race.add(id, sample, nll)
        while not race.finished:
            self._hand_out(chain(self._units(race, vectors, needle_set), later(race)))
            self._to_commit += map(Score.of, self._scorers.wait())
            # The ledger comes before the race: whatever the race decides can be repeated from it.
            scores = self._commit()
            for score in scores:
                if score.needle_set == needle_set:
                    race.add(score.vector_id, score.sample, score.nll)
            self._on_commit(scores, race)

    def unit(self, id: str, factors: RescaleFactors, needle_set: str, sample: int) -> Unit:
        """Return the unit of work of a sample under a vector."""
        sample_id = self._needle_sets[needle_set].sample_ids[sample]
        return Unit(id, needle_set, sample, sample_id, factors)

    def known_nll(self, vector_id: str, needle_set: str, sample: int) -> float | None:
        """Return the NLL of a sample under a vector; None if the ledger does not hold it."""
        key = vector_id, self._needle_sets[needle_set].sample_ids[sample]
        score = self._ledger.get(key)
        return None if score is None else score.nll

    def summary(self, vector_id: str, needle_set: str) -> NeedleSummary:
        """Return the summary of a vector that was scored on a whole needle set."""
        scored_on = self._needle_sets[needle_set]
        scores = [self._ledger[vector_id, sample_id] for sample_id in scored_on.sample_ids]
        return NeedleSummary.of(scores, scored_on)

    def rescue(self) -> None:
        """Commit the scores that have come in by now, at an early end.

        Raises:
            RunDirError: if storage does not allow it.
        """
        # The end may have come in the middle of a commit, whose chunk may be whole.
        if self._to_commit:
            self._ledger.load()
        self._to_commit += map(Score.of, self._scorers.flush())
        self._commit()

    def _commit(self) -> list[Score]:
        """Write the scores that have come in, and return those that are new."""
        new = self._ledger.commit(self._to_commit)
        self._pending.difference_update(score.key for score in self._to_commit)
        self._to_commit = []
        return new

    def _units(
        self, race: Race, vectors: Mapping[str, RescaleFactors], needle_set: str
    ) -> Iterator[Unit]:
        while unit := race.next_unit():
            id, sample = unit
            yield self.unit(id, vectors[id], needle_set, sample)

    def _hand_out(self, units: Iterable[Unit]) -> None:
        """Give every free scorer a unit that is neither scored nor pending."""
        # ``units`` is lazy: what no scorer takes now is chosen anew after the next scores.
        free = self._scorers.free()
        if free <= 0:
            return
        for unit in units:
            if unit.key in self._pending or unit.key in self._ledger:
                continue
            self._pending.add(unit.key)
            self._scorers.submit(unit)
            free -= 1
            if free == 0:
                return
