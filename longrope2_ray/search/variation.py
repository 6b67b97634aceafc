"""How candidates are made: drawn from the search space, mutated, or crossed from survivors."""

from collections.abc import Iterator, Sequence

import numpy as np

from longrope2_ray.recipe.search import SearchSection
from longrope2_ray.search.operators import CROSSOVERS, MUTATIONS, MutationContext, shift_tail
from longrope2_ray.search.space import Candidate, SearchSpace

# Steps of a tail that is drawn in steps.
MAX_STEPS = 4


class Variation:
    """The operators of a recipe, which make candidates inside a search space.

    Args:
        space: the bounds of the candidates.
        settings: the recipe's search section: mutation, crossover, and what fills the initial
            population.
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

    def initial(self, seed: Candidate, rng: np.random.Generator) -> Candidate:
        """Return one more candidate for the initial population (``search.initial``)."""
        if self._settings.initial == "mutants":
            return self.mutate(seed, rng)
        return self.draw(seed.critical_dim, rng)

    def offspring(
        self, parent: Candidate, survivors: Sequence[Candidate], rng: np.random.Generator
    ) -> Candidate:
        """Return one offspring: an immigrant, a cross with another survivor, or a mutant."""
        settings = self._settings
        if rng.random() < settings.immigrants:
            return self.draw(self._any_dim(rng), rng)
        if settings.crossover != "none" and rng.random() < settings.crossover_share:
            dim = parent.critical_dim
            mates = [c for c in survivors if c.critical_dim == dim and c.id != parent.id]
            if mates:
                return self.cross(parent, mates[rng.integers(len(mates))], rng)
        return self.mutate(parent, rng)

    def mutate(self, parent: Candidate, rng: np.random.Generator) -> Candidate:
        """Mutate the tail of a candidate, from which its head follows (Alg. 2, lines 4-8)."""
        settings = self._settings
        low, high = self._space.tail_bounds
        dim, tail = parent.critical_dim, np.array(parent.tail)
        if settings.mutation == "random":
            return self.draw(self._any_dim(rng), rng)
        if rng.random() < settings.shift_probability:
            dims = self._space.critical_dims
            moved = int(np.clip(dim + rng.choice((-1, 1)), dims[0], dims[-1]))
            dim, tail = moved, shift_tail(tail, dim, moved, low, high)
        probability, step = settings.mutation_probability, settings.mutation_step
        context = MutationContext(low, high, probability, step, rng)
        tail = MUTATIONS[settings.mutation](tail, context)
        attention = self._attention_factor(parent.attention_factor, rng)
        start_tokens = self._start_tokens(parent.start_tokens, rng)
        return Candidate(
            dim,
            tuple(map(float, tail)),
            attention,
            parent.id,
            start_tokens,
            origin="mutation",
        )

    def draw(self, dim: int, rng: np.random.Generator) -> Candidate:
        """[ours] Draw a tail of the monotone box: uniformly, or in one to four steps.

        Uniform tails all rise alike, near a straight line; steps also reach those that stay low and
        then jump.
        """
        size = self._space.num_cosines - dim
        bounds = self._space.tail_bounds
        if self._settings.initial == "steps":
            levels = np.sort(rng.uniform(*bounds, rng.integers(1, MAX_STEPS + 1)))
            cuts = np.sort(rng.integers(0, size + 1, len(levels) - 1))
            tail = np.repeat(levels, np.diff([0, *cuts, size]))
        else:
            tail = np.sort(rng.uniform(*bounds, size))
        attention = float(rng.uniform(*self._space.attention_bounds))
        start_tokens = self._start_tokens(None, rng)
        return Candidate(dim, tuple(map(float, tail)), attention, None, start_tokens, origin="draw")

    def cross(self, parent: Candidate, mate: Candidate, rng: np.random.Generator) -> Candidate:
        """Cross two candidates of the same critical dimension."""
        operator = CROSSOVERS[self._settings.crossover]
        tail = operator(np.array(parent.tail), np.array(mate.tail), rng)
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

    def _any_dim(self, rng: np.random.Generator) -> int:
        return int(rng.choice(self._space.critical_dims))

    def _attention_factor(self, value: float, rng: np.random.Generator) -> float:
        """Return an offspring's attention factor, mutated where it is searched."""
        low, high = self._space.attention_bounds
        if low == high or rng.random() >= self._settings.mutation_probability:
            return value
        step = self._settings.mutation_step * (high - low)
        return float(np.clip(value + rng.normal(0, step), low, high))

    def _start_tokens(self, value: int | None, rng: np.random.Generator) -> int:
        """Return an offspring's start tokens, mutated where there is a choice.

        They are drawn anew where there is no parent (``value`` None).
        """
        choices = self._space.start_tokens
        if len(choices) == 1:
            return choices[0]
        if value is not None and rng.random() >= self._settings.mutation_probability:
            return value
        return int(rng.choice(choices))
