"""What follows from the step: the learning rate, the segments of a batch, their targets and positions."""

import math
from typing import TYPE_CHECKING

import numpy as np

from longrope2_ray.data.packing import Segment
from longrope2_ray.recipe.training import TrainSection

if TYPE_CHECKING:
    pass


def check_parallel(world: int, num_kv_heads: int, settings: TrainSection) -> None:
    """Refuse a split that does not come out even; cheap, for the driver to call first.

    Raises:
        ValueError: naming the field to change.
    """
    degree, batch = settings.sequence_parallel, settings.global_batch_size
    if num_kv_heads % degree:
        raise ValueError(
            f"train.sequence_parallel: expected a divisor of {num_kv_heads} KV heads, got {degree}"
        )
    if world % degree:
        raise ValueError(
            f"train.sequence_parallel: expected a divisor of {world} workers, got {degree}"
        )
    if batch % (world // degree):
        raise ValueError(
            f"train.global_batch_size: expected a multiple of {world // degree} "
            f"({world} workers / sequence_parallel {degree}), got {batch}"
        )


IGNORED = -100  # a position whose next token is not a target


def learning_rate(step: int, num_steps: int, settings: TrainSection) -> float:
    """Linear warm-up, then a cosine to zero at ``num_steps``; ``step`` counts from 0."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(num_steps - settings.warmup_steps, 1)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def steps_per_epoch(num_segments: int, settings: TrainSection) -> int:
    """Whole global batches in one pass over the data."""
    return num_segments // settings.global_batch_size


def batch_indices(step: int, num_segments: int, settings: TrainSection) -> list[int]:
    """Segments of one optimizer step: the data position is a function of the step, so that a resume repeats nothing."""
    epoch, batch = divmod(step, steps_per_epoch(num_segments, settings))
    order = np.random.default_rng((settings.seed, epoch)).permutation(num_segments)
    size = settings.global_batch_size
    return [int(i) for i in order[batch * size : (batch + 1) * size]]


def targets_of(segment: Segment) -> np.ndarray:
    """(T,) the next token at every position; ``IGNORED`` where it is the first one of a document, or there is none."""
    targets = np.full(len(segment.input_ids), IGNORED, dtype=np.int64)
    targets[:-1] = segment.input_ids[1:]
    targets[np.asarray(segment.cu_seqlens[1:]) - 1] = IGNORED
    return targets


def attention_ranges(segment: Segment) -> np.ndarray:
    """Bounds of what attends to what: documents in a short segment, everything in a long one (Fig. 5)."""
    ends = segment.cu_seqlens if segment.window == "short" else (0, len(segment.input_ids))
    return np.asarray(ends, dtype=np.int32)


def position_ids_of(segment: Segment) -> np.ndarray:
    """(T,) positions, from 0 in each attention range."""
    ranges = attention_ranges(segment)
    starts: np.ndarray = np.repeat(ranges[:-1], np.diff(ranges))
    return np.arange(len(segment.input_ids)) - starts
