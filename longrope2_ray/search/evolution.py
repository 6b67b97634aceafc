"""LongRoPE2's evolutionary search (Algorithms 1 and 2), as ask and tell.

A candidate is a critical dimension and the tail of factors from there on, non-decreasing inside the
bounds; the head is derived from the tail (NTK, Eq. 9). Scoring is left to the caller.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from longrope2_ray.errors import StoppedError
from longrope2_ray.recipe.search import SearchSection
from longrope2_ray.search.space import Candidate, SearchSpace
from longrope2_ray.search.variation import Variation

# Tries for each new candidate; a space that gives none in so many has been exhausted.
MAX_TRIES = 200


@dataclass(frozen=True)
class Generation:
    """The whole state of a search between two calls of ``tell``.

    Attributes:
        index: 0 for the initial population.
        survivors: the best candidates of the generations told so far, best first.
        totals: id -> summed NLL of each survivor.
        candidates: the candidates that have to be scored now.
    """

    index: int
    survivors: tuple[Candidate, ...]
    totals: Mapping[str, float]
    candidates: tuple[Candidate, ...]


class Evolution:
    """LongRoPE2's evolutionary search.

    ``ask`` returns the candidates of the open generation, the same ones until ``tell`` closes it.
    The random stream of a generation depends on the seed and its index alone, so that a search
    told the same totals takes the same way, however often it was interrupted.

    Raises:
        ValueError: if the population cannot hold one candidate for each critical dimension.
    """

    def __init__(self, space: SearchSpace, settings: SearchSection):
        self.space = space
        self.settings = settings
        self._variation = Variation(space, settings)
        self._seen: set[str] = set()
        self.begin(() if settings.descent_steps else self._initial_population())

    def begin(self, first: Sequence[Candidate]) -> None:
        """[ours] Begin with these candidates as the initial population, as a descent found them."""
        self.generation = Generation(0, (), {}, tuple(first))
        self._seen = {candidate.id for candidate in first}

    def ask(self) -> tuple[Candidate, ...]:
        """Return the candidates that have to be scored; none once the search is finished."""
        return () if self.finished else self.generation.candidates

    def tell(self, totals: Mapping[str, float]) -> None:
        """Close the generation with the summed NLL of every candidate that was scored completely.

        Candidates missing from ``totals`` were eliminated: they are worse than every survivor.

        Raises:
            RuntimeError: if the search is finished.
            StoppedError: if no candidate at all has a finite score.
        """
        if self.finished:
            raise RuntimeError("tell: the search is finished")
        standing = self.preview(self.generation, totals)
        offspring = self.offspring(standing)
        self._seen.update(candidate.id for candidate in offspring)
        self.generation = replace(standing, candidates=offspring)

    @property
    def finished(self) -> bool:
        """Whether every iteration of the recipe has been told."""
        return self.generation.index > self.settings.iterations

    @property
    def best(self) -> Candidate:
        """The best candidate told so far.

        Raises:
            RuntimeError: if no generation has been told yet.
        """
        if not self.generation.survivors:
            raise RuntimeError("best: no generation has been told yet")
        return self.generation.survivors[0]

    # --- Algorithm 1: the initial population

    def _initial_population(self) -> tuple[Candidate, ...]:
        """Return P candidates: one constant tail for each critical dimension, then mutants."""
        _require_room(self.space, self.settings.population_size)
        rng = self._rng(0)
        # Lines 2-9: a constant tail for each critical dimension.
        seeds = list(self._variation.constant_tails(rng))
        seen = {seed.id for seed in seeds}
        count = self.settings.population_size - len(seeds)
        # Sec. 3.2: sample and mutate until the population holds P candidates.
        others = self._unseen(seeds, count, rng, self._variation.mutate, seen)
        return (*seeds, *others)

    # --- Algorithm 2: one iteration

    def preview(self, generation: Generation, totals: Mapping[str, float]) -> Generation:
        """Return the generation that follows these totals, still without candidates.

        Raises:
            StoppedError: if no candidate at all has a finite score.
        """
        # Survivors compete again with the offspring, so a good candidate is never lost. What racing
        # eliminated has no total; NaN and infinity rank nowhere.
        known = {**generation.totals, **totals}
        everyone = (*generation.survivors, *generation.candidates)
        pool = {c.id: c for c in everyone if c.id in known and math.isfinite(known[c.id])}
        if not pool:
            raise StoppedError(
                "no candidate has a finite score: the model returns NaN or infinity; "
                "try model.dtype = 'float32'"
            )
        # Lines 1 and 11: update P with the top k.
        kept = select({id: known[id] for id in pool}, self.settings.top_k)
        survivors = tuple(pool[id] for id in kept)
        return Generation(generation.index + 1, survivors, {id: known[id] for id in kept}, ())

    def offspring(
        self, standing: Generation, also_seen: Set[str] = frozenset()
    ) -> tuple[Candidate, ...]:
        """Return the offspring of a previewed generation's survivors; none after the last one.

        The state of the search does not change. The random stream is the one that ``tell`` will
        use, so the offspring of guessed survivors are right as far as the ranks of their parents
        are. Ids in ``also_seen`` are avoided like those of former generations.
        """
        if standing.index > self.settings.iterations:
            return ()
        survivors = standing.survivors

        # Lines 4-8: mutate a parent, or cross it with another survivor.
        def mutate(parent: Candidate, rng: np.random.Generator) -> Candidate:
            return self._variation.offspring(parent, survivors, rng)

        rng, seen = self._rng(standing.index), self._seen | also_seen
        # Line 3: each of the top k is a parent, in turns.
        return tuple(self._unseen(survivors, self.settings.num_offspring, rng, mutate, seen))

    def _unseen(
        self,
        parents: Sequence[Candidate],
        count: int,
        rng: np.random.Generator,
        make: Callable[[Candidate, np.random.Generator], Candidate],
        seen: Set[str],
    ) -> Iterator[Candidate]:
        """Yield ``count`` candidates that are new, parents taking turns; fewer if none is left."""
        # A candidate that was seen before would teach nothing, so it is made again.
        here: set[str] = set()
        tries = 0
        while len(here) < count and tries < MAX_TRIES * count:
            candidate = make(parents[tries % len(parents)], rng)
            tries += 1
            if candidate.id not in seen and candidate.id not in here:
                here.add(candidate.id)
                yield candidate

    def _rng(self, generation: int) -> np.random.Generator:
        # One stream for each generation: what an earlier one drew cannot shift a later one, so the
        # lookahead and a resumed search draw the same offspring.
        return np.random.default_rng((self.settings.seed, generation))


def select(totals: Mapping[str, float], top_k: int) -> list[str]:
    """Return the ids of the survivors, best first.

    Ties are broken by id, so that the order is total.

    Args:
        totals: id -> summed NLL of the completely scored candidates.
    """
    return sorted(totals, key=lambda id: (totals[id], id))[:top_k]


def _require_room(space: SearchSpace, population_size: int) -> None:
    needed = len(space.starts or space.critical_dims)
    if population_size < needed:
        dims = space.critical_dims
        each = f"critical dimension {dims[0]} ... {dims[-1]} (search.critical_dims)"
        if space.starts:
            each = "vector it starts from (search.starts)"
        raise ValueError(
            f"search.population_size: expected at least {needed}, one candidate for each {each}, "
            f"got {population_size}"
        )
