"""How candidates are made: constant tails, mutants, and crosses of two survivors."""

from collections.abc import Iterator, Sequence

import numpy as np

from longrope2_ray.recipe.search import SearchSection
from longrope2_ray.search.operators import OPERATORS, Crossover, MutationContext, Operators
from longrope2_ray.search.space import Candidate, SearchSpace

# Share of the offspring that crossover makes, where a preset has one.
CROSSOVER_SHARE = 0.5
# Step of a searched attention factor, in widths of its bounds.
ATTENTION_STEP = 0.25


class Variation:
    """The operators of a recipe's preset, which make candidates inside a search space.

    Args:
        space: the bounds of the candidates.
        settings: the recipe's search section.
    """

    def __init__(self, space: SearchSpace, settings: SearchSection):
        self._space = space
        self._settings = settings

    def constant_tails(self, rng: np.random.Generator) -> Iterator[Candidate]:
        """Yield a constant random tail for each critical dimension (Alg. 1, lines 3-8).

        Where every dimension is searched, yield the vectors that the search starts from instead.
        """
        for dim, tail in self._start_tails(rng):
            attention = float(rng.uniform(*self._space.attention_bounds))
            origin = "start" if self._space.starts else "constant tail"
            start_tokens = self._space.start_tokens[0]
            yield Candidate(dim, tail, attention, None, start_tokens, origin=origin)

    def _start_tails(self, rng: np.random.Generator) -> Iterator[tuple[int, tuple[float, ...]]]:
        if self._space.starts:
            yield from ((0, start) for start in self._space.starts)
            return
        for dim in self._space.critical_dims:
            factor = float(rng.uniform(*self._space.tail_bounds))
            yield dim, (factor,) * (self._space.num_cosines - dim)

    def offspring(
        self, parent: Candidate, survivors: Sequence[Candidate], rng: np.random.Generator
    ) -> Candidate:
        """Return one offspring: a cross with another survivor, or a mutant."""
        _skip_draw(rng)
        cross = self._operators.cross
        if cross and rng.random() < CROSSOVER_SHARE:
            dim = parent.critical_dim
            mates = [c for c in survivors if c.critical_dim == dim and c.id != parent.id]
            if mates:
                return self._crossed(cross, parent, mates[rng.integers(len(mates))], rng)
        return self.mutate(parent, rng)

    def mutate(self, parent: Candidate, rng: np.random.Generator) -> Candidate:
        """Mutate the tail of a candidate, from which its head follows (Alg. 2, lines 4-8)."""
        _skip_draw(rng)
        probability = self._settings.mutation_probability
        context = MutationContext(*self._space.tail_bounds, probability, rng)
        tail = self._operators.mutate(np.array(parent.tail), context)
        attention = self._attention_factor(parent.attention_factor, rng)
        start_tokens = self._start_tokens(parent.start_tokens, rng)
        return Candidate(
            parent.critical_dim,
            tuple(map(float, tail)),
            attention,
            parent.id,
            start_tokens,
            origin="mutation",
        )

    @property
    def _operators(self) -> Operators:
        return OPERATORS[self._settings.preset]

    def _crossed(
        self, cross: Crossover, parent: Candidate, mate: Candidate, rng: np.random.Generator
    ) -> Candidate:
        """Cross two candidates of the same critical dimension."""
        tail = cross(np.array(parent.tail), np.array(mate.tail), rng)
        attention = parent.attention_factor if rng.random() < 0.5 else mate.attention_factor
        start = parent.start_tokens
        if start != mate.start_tokens and rng.random() < 0.5:
            start = mate.start_tokens
        return Candidate(
            parent.critical_dim,
            tuple(map(float, tail)),
            attention,
            parent.id,
            start,
            origin="crossover",
        )

    def _attention_factor(self, value: float, rng: np.random.Generator) -> float:
        """Return an offspring's attention factor, mutated where it is searched."""
        low, high = self._space.attention_bounds
        if low == high or rng.random() >= self._settings.mutation_probability:
            return value
        step = ATTENTION_STEP * (high - low)
        return float(np.clip(value + rng.normal(0, step), low, high))

    def _start_tokens(self, value: int, rng: np.random.Generator) -> int:
        """Return an offspring's start tokens, mutated where there is a choice."""
        choices = self._space.start_tokens
        if len(choices) == 1 or rng.random() >= self._settings.mutation_probability:
            return value
        return int(rng.choice(choices))


def _skip_draw(rng: np.random.Generator) -> None:
    """Leave out one number, so that the random streams are those that jobs/LOG.md measured."""
    rng.random()
