"""[ours] What a descent starts from, and what it leaves to the full-length race."""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from longrope2_ray.rope.baselines import PLAIN, longrope2_start
from longrope2_ray.rope.geometry import RopeGeometry
from longrope2_ray.search.space import Candidate, SearchSpace

# Attention factors that the result of a descent is raced with, where it is searched.
NUM_ATTENTION_FACTORS = 3
# Dimensions that turn more often than this in the pre-trained window may be kept; Llama 3's
# ``high_freq_factor``.
MAX_TURNS = 4.0
# Shapes: heights of the tail in extension ratios, dimensions that it takes to rise to it, and
# critical dimensions beyond the theoretical one.
HEIGHTS = (1.25, 1.6)
RAMPS = (1, 4)
NUM_BEYOND = 2
# Names of the published methods.
PUBLISHED = tuple(name for name in PLAIN if name != "unscaled")


def num_kept_dims(geometry: RopeGeometry) -> int:
    """Return how many first dimensions turn so often in L0 that the model knows all their angles.

    No descent moves their factors: the score is rough in them, and its gradient mostly noise.
    """
    return int(np.sum(geometry.original_length / geometry.periods_tokens > MAX_TURNS))


def published(
    geometry: RopeGeometry, target_length: int, attention_factor: float
) -> list[Candidate]:
    """Return the published methods as candidates, non-decreasing."""
    ratio = target_length / geometry.original_length
    methods = {name: PLAIN[name](geometry, target_length) for name in PUBLISHED}
    return [
        Candidate.of_vector(np.maximum.accumulate(values), ratio, attention_factor, origin=name)
        for name, values in methods.items()
    ]


def starts(
    geometry: RopeGeometry, space: SearchSpace, target_length: int, attention_factor: float
) -> list[Candidate]:
    """Return the vectors that a descent may start from, non-decreasing.

    They are the published methods and, for every critical dimension, a constant tail of the ratio
    (Alg. 1).
    """
    ratio = target_length / geometry.original_length
    candidates = published(geometry, target_length, attention_factor)
    for dim in space.critical_dims:
        values = longrope2_start(geometry, target_length, dim)
        origin = "constant tail"
        candidates.append(Candidate.of_vector(values, ratio, attention_factor, origin=origin))
    return list({candidate.id: candidate for candidate in candidates}.values())


def shapes(
    geometry: RopeGeometry, space: SearchSpace, target_length: int, attention_factor: float
) -> list[Candidate]:
    """Return shapes to start from where no published method is good.

    Their first dimensions are kept, and their tails are higher than the ratio, as a model asks for
    whose window is longer than what it has learned.
    """
    ratio, candidates = target_length / geometry.original_length, []
    last = min(space.critical_dims[-1] + NUM_BEYOND, geometry.num_cosines - 1)
    dims = range(space.critical_dims[0], last + 1)
    for dim, width, height in product(dims, RAMPS, HEIGHTS):
        values = shape(geometry, dim, width, height * ratio)
        candidates.append(Candidate.of_vector(values, ratio, attention_factor, origin="shape"))
    return candidates


def shape(geometry: RopeGeometry, critical_dim: int, width: int, factor: float) -> np.ndarray:
    """Return factors of 1 that rise to ``factor`` over ``width`` dimensions, and stay there."""
    risen = (np.arange(geometry.num_cosines) - critical_dim) / width + 1
    values: np.ndarray = factor ** np.clip(risen, 0, 1)
    return values


def mean_of(parents: Sequence[Candidate], ratio: float, highest: float) -> Candidate:
    """Return the geometric mean of several vectors, as evolution strategies recombine parents.

    Where the best of them is a matter of chance, their mean is the steadier start. Factors above
    the highest one, which stand for infinity (CoPE), are cut.
    """
    vectors = [np.clip(parent.factors.values, 1.0, highest) for parent in parents]
    logs = np.mean(np.log(vectors), axis=0)
    best = parents[0]
    origin = "mean of " + " and ".join(parent.origin for parent in parents)
    return Candidate.of_vector(np.exp(logs), ratio, best.attention_factor, best.id, origin)


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
    # Inside the bounds: their ends are too weak or too strong for nearly every vector.
    inside = np.linspace(low, high, NUM_ATTENTION_FACTORS + 2)[1:-1].round(4).tolist()
    values = np.array(descended.head + descended.tail)
    for factor in inside if low < high else [low]:
        yield Candidate.of_vector(values, ratio, factor, descended.parent_id, "attention factor")
    yield from others
