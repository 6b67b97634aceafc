"""What idle scorers do while the last units of a generation are under way: children of the generations to come.

Who survives is guessed from the scores so far, and children are bred from the guess. The random stream of a generation
depends on the seed and its index alone, so children of a right guess are exactly those that will be asked for; a wrong
one costs time that was idle anyway. Scores go into the ledger as all others: the result cannot change.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from longrope2_ray.recipe.sections import SearchSection
from longrope2_ray.search.evolution import Evolution, Generation
from longrope2_ray.search.racing import Race
from longrope2_ray.search.space import Candidate

DEPTH = 3  # generations; jobs/LOG.md compares


@dataclass
class _Guess:
    """A generation that may come, and its race.

    Attributes:
        source: the race that it was guessed from.
        units_left: of the source, when it was guessed.
        generation: survivors with guessed totals, and their children.
        race: of the children.
    """

    source: Race
    units_left: int
    generation: Generation
    race: Race
    children: dict[str, Candidate]


class Ahead:
    """Looks a few generations ahead of an open race.

    Args:
        evolution: asked, never told.
        settings: of the search.
        num_samples: samples of a complete score.
        known: (id, sample) -> NLL in the ledger, None if it is not there.
    """

    def __init__(
        self,
        evolution: Evolution,
        settings: SearchSection,
        num_samples: int,
        known: Callable[[str, int], float | None],
    ):
        self._evolution, self._settings, self._num_samples, self._known = (
            evolution,
            settings,
            num_samples,
            known,
        )
        self._guesses: list[_Guess] = []  # of the next generation, of the one after it, ...

    def units(self, race: Race) -> Iterator[tuple[Candidate, int]]:
        """(child, sample) that will probably be needed after the open race; those of the next generation first."""
        generation = self._evolution.generation
        for depth in range(DEPTH):
            guess = self._guess(depth, generation, race)
            if guess is None:
                return
            while unit := guess.race.next_unit():
                yield guess.children[unit[0]], unit[1]
            generation, race = guess.generation, guess.race

    def add(self, id: str, sample: int, nll: float) -> None:
        """Commit one score, if it is of a child."""
        for guess in self._guesses:
            guess.race.add(id, sample, nll)

    @property
    def best(self) -> Candidate | None:
        """Who will probably be the best when the open race is over, as guessed by the last ``units``."""
        return self._guesses[0].generation.survivors[0] if self._guesses else None

    def _guess(self, depth: int, generation: Generation, race: Race) -> _Guess | None:
        """The guess at what follows a generation and its race, renewed once an eighth of the race's units came in."""
        old = self._guesses[depth] if depth < len(self._guesses) else None
        left = race.num_units_left
        if (
            old
            and old.source is race
            and (left > old.units_left * 7 // 8 or left == old.units_left)
        ):
            return old
        rows = {**race.incumbents, **race.estimates()}
        if generation.index > self._settings.iterations or not rows:
            del self._guesses[depth:]
            return None
        standing = self._evolution.preview(
            generation, {id: math.fsum(row.values()) for id, row in rows.items()}
        )
        if old and old.source is race and old.generation.survivors == standing.survivors:
            old.units_left = left
            return old
        del self._guesses[depth:]  # what was guessed from this guess is as wrong
        seen = {id for guess in self._guesses for id in guess.children}
        children = {child.id: child for child in self._evolution.children(standing, seen)}
        dims = {c.id: c.critical_dim for c in (*standing.survivors, *children.values())}
        incumbents = {c.id: rows[c.id] for c in standing.survivors}
        ahead = Race(dims, list(children), incumbents, self._num_samples, self._settings)
        for id in children:
            for sample in range(self._num_samples):
                if (nll := self._known(id, sample)) is not None:
                    ahead.add(id, sample, nll)
        candidates = tuple(children.values())
        guess = _Guess(race, left, replace(standing, candidates=candidates), ahead, children)
        self._guesses.append(guess)
        return guess
