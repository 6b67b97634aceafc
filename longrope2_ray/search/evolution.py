"""LongRoPE2's search for the critical dimension and the factors beyond it (Alg. 1 and 2), as ask and tell.

A candidate is a critical dimension and the tail of factors from there on, non-decreasing inside the bounds; the head is
derived (NTK, Eq. 9). Nothing here knows how candidates are scored.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from longrope2_ray.errors import StoppedError
from longrope2_ray.recipe.sections import SearchSection
from longrope2_ray.search.mutation import (
    CROSSOVERS,
    MAX_TRIES,
    MUTATIONS,
    MutationContext,
    shift_tail,
)
from longrope2_ray.search.space import Candidate, SearchSpace


def select(
    totals: Mapping[str, float], critical_dims: Mapping[str, int], top_k: int, niche_size: int
) -> list[str]:
    """Ids of the survivors, best first: the best ``niche_size`` of each critical dimension, then the best of all.

    ``totals`` are summed NLLs of completely scored candidates. Ties are broken by id, so that order is total.
    """
    ranked = sorted(totals, key=lambda id: (totals[id], id))
    taken: dict[int, int] = {}
    niches = []
    for id in ranked:
        dim = critical_dims[id]
        if taken.get(dim, 0) < niche_size:
            taken[dim] = taken.get(dim, 0) + 1
            niches.append(id)
    kept = set(niches[:top_k])
    for id in ranked:
        if len(kept) >= top_k:
            break
        kept.add(id)
    return [id for id in ranked if id in kept]


@dataclass(frozen=True)
class Generation:
    """The whole state of a search: who survived so far, with their totals, and who has to be scored now."""

    index: int
    survivors: tuple[Candidate, ...]
    totals: Mapping[str, float]
    candidates: tuple[Candidate, ...]


class Evolution:
    """LongRoPE2's evolutionary search.

    ``ask()`` returns the candidates of the open generation, again and again until ``tell()`` closes it. The random
    stream of a generation depends on the seed and its index alone, so that a search told the same totals takes the
    same way, however often it was interrupted.
    """

    def __init__(self, space: SearchSpace, settings: SearchSection):
        """
        Raises:
            ValueError: if the population cannot hold one candidate for each critical dimension.
        """
        dims = space.critical_dims
        needed = len(space.starts or dims)
        if settings.population_size < needed:
            each = f"critical dimension {dims[0]} ... {dims[-1]} (search.critical_dims)"
            raise ValueError(
                f"search.population_size: expected at least {needed}, one candidate for each "
                f"{'vector it starts from (search.starts)' if space.starts else each}, got {settings.population_size}"
            )
        self.space, self.settings = space, settings
        self.generation = Generation(0, (), {}, tuple(self._initial_population()))
        self._seen = {c.id for c in self.generation.candidates}

    @property
    def finished(self) -> bool:
        """Whether every iteration of the recipe has been told."""
        return self.generation.index > self.settings.iterations

    def ask(self) -> tuple[Candidate, ...]:
        """Candidates of the open generation that have to be scored; the same ones until it is told."""
        return () if self.finished else self.generation.candidates

    def tell(self, totals: Mapping[str, float]) -> None:
        """Close the generation with the summed NLL of every asked candidate that was scored completely.

        Candidates missing from ``totals`` were raced out: they are worse than every survivor.

        Raises:
            RuntimeError: if the search is finished.
            StoppedError: if no candidate at all has a finite score.
        """
        if self.finished:
            raise RuntimeError("tell: the search is finished")
        standing = self.preview(self.generation, totals)
        children = self.children(standing)
        self._seen.update(child.id for child in children)
        self.generation = replace(standing, candidates=children)

    def preview(self, generation: Generation, totals: Mapping[str, float]) -> Generation:
        """What follows a generation if its candidates have these totals, not bred yet; nothing changes.

        Raises:
            StoppedError: if no candidate at all has a finite score.
        """
        known = {**generation.totals, **totals}
        everyone = (*generation.survivors, *generation.candidates)
        pool = {c.id: c for c in everyone if c.id in known and math.isfinite(known[c.id])}
        if not pool:
            raise StoppedError(
                "no candidate has a finite score: the model returns NaN or infinity; try model.dtype = 'float32'"
            )
        kept = select(
            {id: known[id] for id in pool},
            {id: c.critical_dim for id, c in pool.items()},
            self.settings.top_k,
            self.settings.niche_size,
        )  # Alg. 2, line 11
        return Generation(
            generation.index + 1, tuple(pool[id] for id in kept), {id: known[id] for id in kept}, ()
        )

    def children(
        self, standing: Generation, also_seen: Set[str] = frozenset()
    ) -> tuple[Candidate, ...]:
        """What a previewed generation asks for: children of its survivors, none after the last one; nothing changes.

        The random stream is the one that ``tell`` will use, so children of a guess are right as far as the ranks of
        their parents are. Ids in ``also_seen`` are avoided like those of former generations.
        """
        if standing.index > self.settings.iterations:
            return ()
        return tuple(
            self._breed(standing.survivors, self._rng(standing.index), self._seen | also_seen)
        )

    @property
    def best(self) -> Candidate:
        """The best candidate told so far."""
        if not self.generation.survivors:
            raise RuntimeError("best: no generation has been told yet")
        return self.generation.survivors[0]

    def _rng(self, generation: int) -> np.random.Generator:
        return np.random.default_rng((self.settings.seed, generation))

    def _initial_population(self) -> Iterator[Candidate]:
        """Alg. 1: a constant random tail for every critical dimension, then others (``search.initial``) until there are P."""
        rng = self._rng(0)
        seeds = [
            Candidate(
                dim,
                tail,
                float(rng.uniform(*self.space.attention_bounds)),
                None,
                self.space.start_tokens[0],
            )
            for dim, tail in self._starts(rng)
        ]
        yield from seeds

        def fill(seed: Candidate, rng: np.random.Generator) -> Candidate:
            mutants = self.settings.initial == "mutants"
            return self._mutate(seed, rng) if mutants else self._draw(seed.critical_dim, rng)

        seen = {seed.id for seed in seeds}
        yield from self._fresh(seeds, self.settings.population_size - len(seeds), rng, fill, seen)

    def _starts(self, rng: np.random.Generator) -> Iterator[tuple[int, tuple[float, ...]]]:
        """Critical dimensions and tails that the population grows from."""
        if self.space.starts:
            yield from ((0, start) for start in self.space.starts)
            return
        for dim in self.space.critical_dims:  # Alg. 1, line 3
            factor = float(rng.uniform(*self.space.tail_bounds))  # Alg. 1, line 4
            yield dim, (factor,) * (self.space.num_cosines - dim)

    def _breed(
        self, survivors: Sequence[Candidate], rng: np.random.Generator, seen: Set[str]
    ) -> Iterator[Candidate]:
        """Alg. 2, lines 3-10: one child after the other from the survivors, best first."""

        def child(parent: Candidate, rng: np.random.Generator) -> Candidate:
            if rng.random() < self.settings.immigrants:
                return self._draw(int(rng.choice(self.space.critical_dims)), rng)
            if self.settings.crossover != "none" and rng.random() < self.settings.crossover_share:
                mates = [
                    c
                    for c in survivors
                    if c.critical_dim == parent.critical_dim and c.id != parent.id
                ]
                if mates:
                    return self._cross(parent, mates[rng.integers(len(mates))], rng)
            return self._mutate(parent, rng)

        yield from self._fresh(survivors, self.settings.num_children, rng, child, seen)

    def _fresh(
        self,
        parents: Sequence[Candidate],
        count: int,
        rng: np.random.Generator,
        make: Callable[[Candidate, np.random.Generator], Candidate],
        seen: Set[str],
    ) -> Iterator[Candidate]:
        """``count`` children that nobody saw before, parents taking turns; fewer if the space is exhausted."""
        here: set[str] = set()
        made = tries = 0
        while made < count and tries < MAX_TRIES * count:
            child = make(parents[tries % len(parents)], rng)
            tries += 1
            if child.id not in seen and child.id not in here:
                here.add(child.id)
                made += 1
                yield child

    def _mutate(self, parent: Candidate, rng: np.random.Generator) -> Candidate:
        """Alg. 2, lines 4-8: mutate the tail; the head follows from it."""
        (low, high), settings = self.space.tail_bounds, self.settings
        tail, dim = np.array(parent.tail), parent.critical_dim
        if settings.mutation == "random":
            return self._draw(int(rng.choice(self.space.critical_dims)), rng)
        if rng.random() < settings.shift_probability:
            moved = int(
                np.clip(
                    dim + rng.choice((-1, 1)),
                    self.space.critical_dims[0],
                    self.space.critical_dims[-1],
                )
            )
            dim, tail = moved, shift_tail(tail, dim, moved, low, high)
        context = MutationContext(
            low, high, settings.mutation_probability, settings.mutation_step, rng
        )
        tail = MUTATIONS[settings.mutation](tail, context)
        attention, start = (
            self._attention(parent.attention_factor, rng),
            self._start_tokens(parent.start_tokens, rng),
        )
        return Candidate(dim, tuple(map(float, tail)), attention, parent.id, start)

    def _draw(self, dim: int, rng: np.random.Generator) -> Candidate:
        """[ours] A tail of the monotone box: uniform, or in one to four steps. Uniform ones all rise alike, near a
        straight line; steps also reach the tails that stay low and then jump."""
        size = self.space.num_cosines - dim
        if self.settings.initial == "steps":
            levels = np.sort(rng.uniform(*self.space.tail_bounds, rng.integers(1, 5)))
            cuts = np.sort(rng.integers(0, size + 1, len(levels) - 1))
            tail = np.repeat(levels, np.diff([0, *cuts, size]))
        else:
            tail = np.sort(rng.uniform(*self.space.tail_bounds, size))
        attention = float(rng.uniform(*self.space.attention_bounds))
        return Candidate(
            dim, tuple(map(float, tail)), attention, None, self._start_tokens(None, rng)
        )

    def _cross(self, parent: Candidate, mate: Candidate, rng: np.random.Generator) -> Candidate:
        tail = CROSSOVERS[self.settings.crossover](np.array(parent.tail), np.array(mate.tail), rng)
        attention = parent.attention_factor if rng.random() < 0.5 else mate.attention_factor
        start = parent.start_tokens
        if start != mate.start_tokens and rng.random() < 0.5:
            start = mate.start_tokens
        return Candidate(parent.critical_dim, tuple(map(float, tail)), attention, parent.id, start)

    def _attention(self, value: float, rng: np.random.Generator) -> float:
        """The temperature as one more gene, where it is searched."""
        low, high = self.space.attention_bounds
        if low == high or rng.random() >= self.settings.mutation_probability:
            return value
        return float(
            np.clip(value + rng.normal(0, self.settings.mutation_step * (high - low)), low, high)
        )

    def _start_tokens(self, value: int | None, rng: np.random.Generator) -> int:
        """LongRoPE's ``n_hat`` as one more gene, where there is a choice; drawn anew if the parent has none to give."""
        choices = self.space.start_tokens
        if len(choices) == 1:
            return choices[0]
        if value is not None and rng.random() >= self.settings.mutation_probability:
            return value
        return int(rng.choice(choices))
