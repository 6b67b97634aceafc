"""[ours] What a descent starts from, and what it leaves to the full-length race."""

from collections.abc import Iterator, Sequence

import numpy as np

from longrope2_ray.rope.baselines import PLAIN, longrope2_start
from longrope2_ray.rope.geometry import RopeGeometry
from longrope2_ray.search.space import Candidate, SearchSpace

# Attention factors that the result of a descent is raced with, where it is searched.
NUM_ATTENTION_FACTORS = 5
# Dimensions that turn more often than this in the pre-trained window may be kept; Llama 3's
# ``high_freq_factor``.
MAX_TURNS = 4.0


def num_kept_dims(geometry: RopeGeometry) -> int:
    """Return how many first dimensions turn so often in L0 that the model knows all their angles.

    A kept head has factors of 1 there, and no descent moves them: the score is rough in them.
    """
    return int(np.sum(geometry.original_length / geometry.periods_tokens > MAX_TURNS))


def published(
    geometry: RopeGeometry, target_length: int, attention_factor: float
) -> list[Candidate]:
    """Return the published methods as candidates, non-decreasing."""
    ratio = target_length / geometry.original_length
    methods = {name: PLAIN[name](geometry, target_length) for name in PLAIN if name != "unscaled"}
    return [
        Candidate.of_vector(np.maximum.accumulate(values), ratio, attention_factor, origin=name)
        for name, values in methods.items()
    ]


def starts(
    geometry: RopeGeometry, space: SearchSpace, target_length: int, attention_factor: float
) -> list[Candidate]:
    """Return the vectors that a descent may start from, non-decreasing.

    They are the published methods and, for every critical dimension, a constant tail of the ratio
    (Alg. 1); and each of them once more with a kept head, which is better where needles are near,
    if the model can bear it.
    """
    ratio = target_length / geometry.original_length
    wholes = [
        (candidate.origin, candidate.factors.values)
        for candidate in published(geometry, target_length, attention_factor)
    ]
    for dim in space.critical_dims:
        wholes.append(("constant tail", longrope2_start(geometry, target_length, dim)))
    kept = num_kept_dims(geometry)
    found: dict[str, Candidate] = {}
    for name, whole in wholes:
        with_head = np.concatenate([np.ones(kept), whole[kept:]])
        for origin, vector in ((name, whole), (f"{name}, kept head", with_head)):
            values = np.maximum.accumulate(vector)
            candidate = Candidate.of_vector(values, ratio, attention_factor, origin=origin)
            found.setdefault(candidate.id, candidate)
    return list(found.values())


def finalists(
    descended: Candidate, others: Sequence[Candidate], space: SearchSpace, ratio: float
) -> Iterator[Candidate]:
    """Yield the first generation: the result under several attention factors, and others.

    Args:
        descended: the vector that the descent ended in.
        others: vectors that compete with it as they are.
        ratio: the extension ratio.
    """
    low, high = space.attention_bounds
    count = NUM_ATTENTION_FACTORS if low < high else 1
    values = np.array(descended.head + descended.tail)
    for factor in np.linspace(low, high, count).round(4).tolist():
        yield Candidate.of_vector(values, ratio, factor, descended.parent_id, "attention factor")
    yield from others
