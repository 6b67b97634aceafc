"""What follows from the step alone: learning rate, segments of a batch, targets, positions.

Shapes: T tokens of a segment.
"""

import math

import numpy as np

from longrope2_ray.data.packing import Segment
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.recipe.training import TrainSection

IGNORED = -100  # stands in the targets where a position has none


def check_parallel(world: int, num_kv_heads: int, settings: TrainSection) -> None:
    """Refuse workers that cannot share segments and batches evenly.

    Args:
        world: workers.
        num_kv_heads: the model's key/value heads.
        settings: the recipe's train section.

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


def learning_rate(step: int, num_steps: int, settings: TrainSection) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to zero at ``num_steps``.

    Args:
        step: the step, from 0.
        num_steps: optimizer steps in all.
        settings: the recipe's train section.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(num_steps - settings.warmup_steps, 1)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def steps_per_epoch(num_segments: int, settings: TrainSection) -> int:
    """Return the whole global batches in one pass over the data."""
    return num_segments // settings.global_batch_size


def require_epoch(recipe: Recipe, num_segments: int, packed_length: int) -> int:
    """Return the optimizer steps of one epoch.

    Args:
        recipe: the recipe.
        num_segments: segments of the training data.
        packed_length: tokens of each segment.

    Raises:
        ValueError: if the data does not fit the recipe.
    """
    settings, target = recipe.train, recipe.search.target_length
    if packed_length != target:
        raise ValueError(
            f"search.target_length: expected {packed_length}, for which the training data was "
            f"packed, got {target}; run longrope2 data again"
        )
    if target % settings.sequence_parallel:
        raise ValueError(
            f"train.sequence_parallel: expected a divisor of the target length {target}, "
            f"got {settings.sequence_parallel}"
        )
    epoch = steps_per_epoch(num_segments, settings)
    if not epoch:
        raise ValueError(
            f"train.global_batch_size: expected at most the {num_segments} segments of the data, "
            f"got {settings.global_batch_size}; lower it or raise data.bands.tokens"
        )
    return epoch


def batch_indices(step: int, num_segments: int, settings: TrainSection) -> list[int]:
    """Return the segments of one optimizer step, by index.

    The data position is a function of the step, so that a resumed training repeats nothing.
    """
    epoch, batch = divmod(step, steps_per_epoch(num_segments, settings))
    order = np.random.default_rng((settings.seed, epoch)).permutation(num_segments)
    size = settings.global_batch_size
    return [int(i) for i in order[batch * size : (batch + 1) * size]]


def targets_of(segment: Segment) -> np.ndarray:
    """Return the next token at every position, (T,).

    It is ``IGNORED`` at the last position of each document.
    """
    targets = np.full(len(segment.input_ids), IGNORED, dtype=np.int64)
    targets[:-1] = segment.input_ids[1:]
    targets[np.asarray(segment.cu_seqlens[1:]) - 1] = IGNORED
    return targets


def attention_ranges(segment: Segment) -> np.ndarray:
    """Return the bounds of the ranges inside which tokens attend to each other (Fig. 5).

    A range is a document in a short segment, and the whole of a long one.
    """
    ends = segment.cu_seqlens if segment.window == "short" else (0, len(segment.input_ids))
    return np.asarray(ends, dtype=np.int32)


def position_ids_of(segment: Segment) -> np.ndarray:
    """Return positions that start at 0 in each attention range, (T,)."""
    ranges = attention_ranges(segment)
    starts: np.ndarray = np.repeat(ranges[:-1], np.diff(ranges))
    return np.arange(len(segment.input_ids)) - starts
