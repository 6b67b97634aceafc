"""Operators that make a candidate's tail from one or two others.

A mutation takes (T,) factors to (T,) factors, non-decreasing, inside ``[low, high]``. The paper
says only "with probability p, inside the space, non-decreasing" (Alg. 2, line 5).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Passes of the authors' mutation until the tail rises.
MAX_PASSES = 200
AUTHORS_GRID = 0.01


@dataclass(frozen=True)
class MutationContext:
    """The bounds, the probability and the random stream that a mutation works with.

    Attributes:
        low: lowest factor of the tail.
        high: highest factor of the tail.
        probability: probability p that an entry mutates (Alg. 2).
        rng: the generation's random stream.
    """

    low: float
    high: float
    probability: float
    rng: np.random.Generator

    def chosen(self, size: int) -> np.ndarray:
        """Return the indices that mutate, in random order; at least one."""
        picked = np.flatnonzero(self.rng.random(size) < self.probability)
        return self.rng.permutation(picked) if len(picked) else self.rng.integers(size, size=1)


def mutate_neighbors(tail: np.ndarray, at: MutationContext) -> np.ndarray:
    """Draw each chosen entry between its neighbors, left to right: the paper read literally."""
    tail = tail.copy()
    for i in sorted(at.chosen(len(tail))):
        low = tail[i - 1] if i > 0 else at.low
        high = tail[i + 1] if i + 1 < len(tail) else at.high
        tail[i] = at.rng.uniform(low, high)
    return tail


def mutate_authors(tail: np.ndarray, at: MutationContext) -> np.ndarray:
    """Mutate as the authors' tool does.

    It makes passes of the literal reading on a 0.01 grid until the tail strictly rises.
    """
    grid = AUTHORS_GRID
    for _ in range(MAX_PASSES):
        tail = tail.copy()
        for i in range(len(tail)):
            if at.rng.random() >= at.probability:
                continue
            low = tail[i - 1] if i > 0 else at.low
            high = tail[i + 1] if i + 1 < len(tail) else min(low + 4, at.high)
            first, last = math.ceil(low / grid - 1e-9), math.floor(high / grid + 1e-9)
            if last >= first:
                tail[i] = grid * int(at.rng.integers(first, last + 1))
        if np.all(np.diff(tail) > 0):
            break
    return np.clip(np.maximum.accumulate(tail), at.low, at.high)


def cross_authors(tail: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cross as the authors' tool does.

    It takes entries of the other parent one by one and returns the first rising mix that differs.
    """
    for _ in range(20):
        mixed = tail.copy()
        for i in range(len(tail)):
            if rng.random() < 0.3:
                if rng.random() < 0.5:
                    mixed[i] = other[i]
                if not np.array_equal(mixed, tail) and np.all(np.diff(mixed) > 0):
                    return mixed
    return tail


Crossover = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Operators:
    """The operators of a preset.

    Attributes:
        mutate: the mutation of a tail.
        cross: the crossover of two tails; None if there is none.
    """

    mutate: Callable[[np.ndarray, MutationContext], np.ndarray]
    cross: Crossover | None = None


# search.preset -> its operators; a descent has none.
OPERATORS = {
    "paper": Operators(mutate_neighbors),
    "authors": Operators(mutate_authors, cross_authors),
    "longrope": Operators(mutate_neighbors, cross_authors),
}
