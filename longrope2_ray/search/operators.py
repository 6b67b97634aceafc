"""Operators that make a candidate's tail from one or two others.

A mutation takes (T,) factors to (T,) factors, non-decreasing, inside ``[low, high]``. The paper
says only "with probability p, inside the space, non-decreasing" (Alg. 2, line 5); ``jobs/LOG.md``
compares these readings.
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
    """The bounds, the probabilities and the random stream that a mutation works with.

    Attributes:
        low: lowest factor of the tail.
        high: highest factor of the tail.
        probability: probability p that an entry mutates (Alg. 2).
        step: standard deviation of Gaussian steps, in widths of the bounds.
        rng: the generation's random stream.
    """

    low: float
    high: float
    probability: float
    step: float
    rng: np.random.Generator

    def chosen(self, size: int) -> np.ndarray:
        """Return the indices that mutate, in random order; at least one."""
        picked = np.flatnonzero(self.rng.random(size) < self.probability)
        return self.rng.permutation(picked) if len(picked) else self.rng.integers(size, size=1)


def mutate_push(tail: np.ndarray, at: MutationContext) -> np.ndarray:
    """Draw each chosen entry anew from the whole interval; push the neighbors in its way along."""
    tail = tail.copy()
    for i in at.chosen(len(tail)):
        value = at.rng.uniform(at.low, at.high)
        tail[:i] = np.minimum(tail[:i], value)
        tail[i:] = np.maximum(tail[i:], value)
        tail[i] = value
    return tail


def mutate_sort(tail: np.ndarray, at: MutationContext) -> np.ndarray:
    """Draw each chosen entry anew from the whole interval, then sort."""
    tail, chosen = tail.copy(), at.chosen(len(tail))
    tail[chosen] = at.rng.uniform(at.low, at.high, len(chosen))
    return np.sort(tail)


def mutate_local(tail: np.ndarray, at: MutationContext) -> np.ndarray:
    """Move each chosen entry by a Gaussian step of random size, pushing neighbors along."""
    tail = tail.copy()
    scale = at.step * (at.high - at.low) * 10 ** at.rng.uniform(-1.5, 0)
    for i in at.chosen(len(tail)):
        value = float(np.clip(tail[i] + at.rng.normal(0, scale), at.low, at.high))
        tail[:i] = np.minimum(tail[:i], value)
        tail[i:] = np.maximum(tail[i:], value)
        tail[i] = value
    return tail


def mutate_block(tail: np.ndarray, at: MutationContext) -> np.ndarray:
    """Move the entries from each chosen one on, or up to it, by one Gaussian step.

    They move as far as their neighbor allows. Factors of neighboring dimensions act alike, so
    blocks reach a good slope in far fewer steps than single entries.
    """
    tail = tail.copy()
    for i in at.chosen(len(tail)):
        delta = at.rng.normal(0, at.step * (at.high - at.low))
        if at.rng.random() < 0.5:
            tail[i:] = np.clip(tail[i:] + delta, tail[i - 1] if i > 0 else at.low, at.high)
        else:
            tail[: i + 1] = np.clip(
                tail[: i + 1] + delta, at.low, tail[i + 1] if i + 1 < len(tail) else at.high
            )
    return tail


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


MUTATIONS: dict[str, Callable[[np.ndarray, MutationContext], np.ndarray]] = {
    "push": mutate_push,
    "sort": mutate_sort,
    "local": mutate_local,
    "block": mutate_block,
    "neighbors": mutate_neighbors,
    "authors": mutate_authors,
}


def shift_tail(tail: np.ndarray, dim: int, moved: int, low: float, high: float) -> np.ndarray:
    """[ours] Return the tail from critical dimension ``moved`` on instead of ``dim``.

    The NTK head stays, if the bounds allow: it follows from the tail's first entry alone, and a
    model feels it more than any entry beyond.
    """
    if moved == dim:
        return tail
    # Where the present head is, or would be, at ``moved``.
    head = float(np.clip(tail[0] ** (moved / dim), low, high))
    kept = tail[max(moved - dim, 0) :]
    shifted = np.concatenate([np.full(max(dim - moved, 0), head), np.maximum(kept, head)])
    shifted[0] = head
    return shifted


def cross_blend(tail: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random point between two tails; it is non-decreasing, since both are."""
    weight = rng.uniform()
    mixed = weight * tail + (1 - weight) * other
    # A sum of shares may round out of the interval.
    return np.clip(mixed, np.minimum(tail, other), np.maximum(tail, other))


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


CROSSOVERS: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "blend": cross_blend,
    "authors": cross_authors,
}
