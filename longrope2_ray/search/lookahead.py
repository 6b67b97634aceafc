"""Looking ahead: work for idle scorers while the last units of a generation are pending.

The survivors are guessed from the scores so far, and offspring are bred from the guess. The random
stream of a generation depends on the seed and its index alone, so the offspring of a right guess
are exactly those that will be asked for; a wrong guess costs time that was idle anyway. The scores
go into the ledger like all others, so the result does not change.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from longrope2_ray.search.comparison import Comparison
from longrope2_ray.search.evolution import Evolution, Generation
from longrope2_ray.search.racing import Race, Scores
from longrope2_ray.search.scheduling import Scheduler
from longrope2_ray.search.scores import SEARCH_SET, NeedleSet, Score, Unit
from longrope2_ray.search.space import Candidate

DEPTH = 3  # generations; jobs/LOG.md compares


@dataclass
class _Guess:
    """A generation that may come, and its race.

    Attributes:
        source: the race that it was guessed from.
        units_left: units that the source had left when the guess was made.
        generation: survivors with guessed totals, and their offspring.
        race: the race of the offspring.
        offspring: id -> candidate of the generation.
    """

    source: Race
    units_left: int
    generation: Generation
    race: Race
    offspring: dict[str, Candidate]


class Lookahead:
    """The generations that will probably follow an open race, with races of their own.

    Args:
        evolution: the search; it is only asked, so its state does not change.
        num_samples: samples of a complete score.
        known: (id, sample) -> NLL in the ledger, None if it is not there.
    """

    def __init__(
        self,
        evolution: Evolution,
        num_samples: int,
        known: Callable[[str, int], float | None],
    ):
        self._evolution = evolution
        self._num_samples = num_samples
        self._known = known
        self._guesses: list[_Guess] = []  # of the next generation, of the one after it, ...

    def units(self, race: Race) -> Iterator[tuple[Candidate, int]]:
        """Yield (offspring, sample) that will probably be needed next, soonest first."""
        # Each guess stands on the one before it, so a deeper one is less certain and comes later.
        generation = self._evolution.generation
        for depth in range(DEPTH):
            guess = self._guess(depth, generation, race)
            if guess is None:
                return
            while unit := guess.race.next_unit():
                yield guess.offspring[unit[0]], unit[1]
            generation, race = guess.generation, guess.race

    def add(self, id: str, sample: int, nll: float) -> None:
        """Count one score, if it belongs to a guessed offspring."""
        for guess in self._guesses:
            guess.race.add(id, sample, nll)

    @property
    def best(self) -> Candidate | None:
        """The best candidate after the open race, as guessed by the last call of ``units``."""
        return self._guesses[0].generation.survivors[0] if self._guesses else None

    def _guess(self, depth: int, generation: Generation, race: Race) -> _Guess | None:
        """Return the guess at what follows a generation and its race.

        It is renewed once an eighth of the race's units came in.
        """
        old = self._guesses[depth] if depth < len(self._guesses) else None
        left = race.num_units_left
        # A new guess costs the driver a generation of offspring, so not every score renews it.
        if (
            old
            and old.source is race
            and (left > old.units_left * 7 // 8 or left == old.units_left)
        ):
            return old
        rows: dict[str, Scores] = {**race.incumbents, **race.estimates()}
        if generation.index > self._evolution.settings.iterations or not rows:
            del self._guesses[depth:]
            return None
        totals = {id: math.fsum(row.values()) for id, row in rows.items()}
        standing = self._evolution.preview(generation, totals)
        if old and old.source is race and old.generation.survivors == standing.survivors:
            old.units_left = left
            return old
        # Guesses that stand on a wrong one are wrong too.
        del self._guesses[depth:]
        guess = self._make(standing, rows, race, left)
        self._guesses.append(guess)
        return guess

    def _make(
        self, standing: Generation, rows: Mapping[str, Scores], source: Race, left: int
    ) -> _Guess:
        """Breed the offspring of guessed survivors and start their race with what is known."""
        seen = {id for guess in self._guesses for id in guess.offspring}
        offspring = {c.id: c for c in self._evolution.offspring(standing, seen)}
        incumbents = {c.id: rows[c.id] for c in standing.survivors}
        # The guessed race eliminates too: offspring that cannot survive get no further units.
        top_k = self._evolution.settings.top_k
        race = Race(list(offspring), incumbents, self._num_samples, top_k)
        for id in offspring:
            for sample in range(self._num_samples):
                if (nll := self._known(id, sample)) is not None:
                    race.add(id, sample, nll)
        generation = replace(standing, candidates=tuple(offspring.values()))
        return _Guess(source, left, generation, race, offspring)


class IdleWork:
    """Units for scorers that the open race leaves idle.

    First come the rows of the tables that do not depend on the winner, then the offspring that will
    be asked for if the ranks stay as they are, and in the last generation the rows of the guessed
    winner.

    Args:
        comparisons: returns the rows of the tables for a winner; for None those that do not depend
            on it.
        enabled: whether there are such units at all (``scorer.look_ahead``).
    """

    def __init__(
        self,
        evolution: Evolution,
        scheduler: Scheduler,
        needle_sets: Mapping[str, NeedleSet],
        comparisons: Callable[[Candidate | None], Sequence[Comparison]],
        enabled: bool,
    ):
        self._evolution = evolution
        self._scheduler = scheduler
        self._needle_sets = needle_sets
        self._comparisons = comparisons
        self._enabled = enabled
        self._guessed_winner = ""
        self._of_tables: deque[Unit] = deque()
        self._lookahead = Lookahead(
            evolution,
            len(needle_sets[SEARCH_SET]),
            lambda id, sample: scheduler.known_nll(id, SEARCH_SET, sample),
        )

    def units(self, race: Race) -> Iterator[Unit]:
        """Yield units that will be needed after those of the open race, soonest first."""
        if not self._enabled:
            return
        yield from self._drain_tables()
        # Before the first generation and after the last one there is nothing to look ahead to.
        if not self._evolution.ask():
            return
        for candidate, sample in self._lookahead.units(race):
            yield self._scheduler.unit(candidate.id, candidate.factors, SEARCH_SET, sample)
        # No generation follows the last one: what comes next are the tables of its winner.
        best = self._lookahead.best
        last = self._evolution.generation.index == self._evolution.settings.iterations
        if last and best and best.id != self._guessed_winner:
            self._guessed_winner = best.id
            self.queue_tables(best)
            yield from self._drain_tables()

    def add(self, score: Score) -> None:
        """Count a committed score on the search's needles."""
        self._lookahead.add(score.vector_id, score.sample, score.nll)

    def queue_tables(self, winner: Candidate | None) -> None:
        """Queue the rows of the tables for a winner, or those that do not depend on it."""
        for row in self._comparisons(winner):
            for sample in range(len(self._needle_sets[row.needle_set])):
                unit = self._scheduler.unit(row.vector_id, row.factors, row.needle_set, sample)
                self._of_tables.append(unit)

    def end_search(self, winner: Candidate) -> None:
        """Note that nothing but the winner's tables is needed any more."""
        self._of_tables.clear()
        self.queue_tables(winner)

    def _drain_tables(self) -> Iterator[Unit]:
        while self._of_tables:
            yield self._of_tables.popleft()
