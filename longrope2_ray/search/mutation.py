"""Operators that make a candidate's tail from one or two others."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MAX_TRIES = (
    200  # for a child that nobody saw before; a search space that gives none has been exhausted
)


@dataclass(frozen=True)
class MutationContext:
    low: float
    high: float
    probability: float
    step: float
    rng: np.random.Generator

    def chosen(self, size: int) -> np.ndarray:
        """Indices that mutate, in random order; at least one."""
        picked = np.flatnonzero(self.rng.random(size) < self.probability)
        return self.rng.permutation(picked) if len(picked) else self.rng.integers(size, size=1)


def mutate_push(tail: np.ndarray, at: MutationContext) -> np.ndarray:
    """Draw each chosen entry anew from the whole interval; it pushes neighbours that stand in the way along."""
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
    """Move each chosen entry by a Gaussian step, pushing neighbours along; steps shrink and grow at random."""
    tail = tail.copy()
    scale = at.step * (at.high - at.low) * 10 ** at.rng.uniform(-1.5, 0)
    for i in at.chosen(len(tail)):
        value = float(np.clip(tail[i] + at.rng.normal(0, scale), at.low, at.high))
        tail[:i] = np.minimum(tail[:i], value)
        tail[i:] = np.maximum(tail[i:], value)
        tail[i] = value
    return tail


def mutate_block(tail: np.ndarray, at: MutationContext) -> np.ndarray:
    """From each chosen entry on, or up to it, move the whole block by one Gaussian step, as far as its neighbour.

    Factors of neighbouring dimensions act alike, so blocks reach a good slope in far fewer steps than single entries.
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


def mutate_neighbours(tail: np.ndarray, at: MutationContext) -> np.ndarray:
    """The literal reading: draw each chosen entry between its neighbours, from left to right."""
    tail = tail.copy()
    for i in sorted(at.chosen(len(tail))):
        low = tail[i - 1] if i > 0 else at.low
        high = tail[i + 1] if i + 1 < len(tail) else at.high
        tail[i] = at.rng.uniform(low, high)
    return tail


def mutate_authors(tail: np.ndarray, at: MutationContext) -> np.ndarray:
    """What the authors' tool does: passes of the literal reading on a 0.01 grid until the tail strictly rises."""
    grid = 0.01
    for _ in range(MAX_TRIES):
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
    "neighbours": mutate_neighbours,
    "authors": mutate_authors,
}


def shift_tail(tail: np.ndarray, dim: int, moved: int, low: float, high: float) -> np.ndarray:
    """[ours] The tail from critical dimension ``moved`` on instead of ``dim``, under the same NTK head if bounds allow.

    The head follows from the tail's first entry alone, and a model feels it more than any entry beyond.
    """
    if moved == dim:
        return tail
    head = float(
        np.clip(tail[0] ** (moved / dim), low, high)
    )  # where the present head is, or would be, at ``moved``
    kept = tail[max(moved - dim, 0) :]
    shifted = np.concatenate([np.full(max(dim - moved, 0), head), np.maximum(kept, head)])
    shifted[0] = head
    return shifted


def cross_blend(tail: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random point between two tails; non-decreasing, since both are."""
    weight = rng.uniform()
    mixed = weight * tail + (1 - weight) * other
    return np.clip(
        mixed, np.minimum(tail, other), np.maximum(tail, other)
    )  # a sum of shares may round out


def cross_authors(tail: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What the authors' tool does: entries of the other parent taken one by one, the first rising mix that differs."""
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
