"""Decisions about failures, without any Ray."""

import math

from longrope2_ray.workers.failures import (
    Decision,
    Failure,
    Limits,
    decide,
    reason,
    start_pause_seconds,
)
from longrope2_ray.workers.resources import capacity, use_gpu

LIMITS = Limits(max_attempts=3, memory_advice="lower scorer.mlp_chunk_tokens")


def test_what_ray_says_about_memory_is_memory() -> None:
    """Its words for a process that the node's memory monitor killed, and for a task of one."""
    for words in (
        "Task was killed due to the node running low on memory.",
        "The actor died.\n\tclass_name: Worker\nThe actor is dead because its worker process has "
        "died. Worker exit type: NODE_OUT_OF_MEMORY",
    ):
        assert decide(Failure("died", words), 3, LIMITS)[1] == LIMITS.memory_advice
    words = "The actor died unexpectedly before finishing this task."
    assert decide(Failure("died", words), 3, LIMITS)[1] == "3 attempts failed (scorer.max_attempts)"


def test_decisions_are_retry_until_attempts_are_used_up() -> None:
    assert decide(Failure("died", "node lost"), 1, LIMITS)[0] is Decision.RETRY
    assert decide(Failure("died", "node lost"), 3, LIMITS)[0] is Decision.STOP


def test_memory_that_never_was_enough_stops_at_once() -> None:
    words = "CUDA out of memory"
    assert decide(Failure("raised", words), 1, LIMITS)[0] is Decision.STOP
    assert decide(Failure("raised", words), 1, LIMITS, fitted=True)[0] is Decision.RETRY
    assert decide(Failure("died", words), 1, LIMITS)[0] is Decision.RETRY


def test_an_exception_says_why_in_its_last_line_and_ray_somewhere_inside() -> None:
    assert reason(Failure("raised", "ValueError:\n  field: missing")) == "field: missing"
    death = "The actor died.\n\tclass: Worker\nThe actor is dead because its node is gone.\nMore."
    assert reason(Failure("died", death)) == "The actor is dead because its node is gone."
    assert len(reason(Failure("raised", "word " * 1000))) <= 240


def test_starts_pause_twice_as_long_each_time_and_five_minutes_at_most() -> None:
    assert [start_pause_seconds(n) for n in (0, 1, 2, 3, 20)] == [0, 1, 2, 4, 300]
    assert math.isfinite(start_pause_seconds(1000))


def test_capacity_counts_whole_workers_and_none_spans_two_nodes() -> None:
    assert capacity([{"CPU": 8, "GPU": 3}], {"CPU": 1, "GPU": 2}) == 1
    assert capacity([{"CPU": 2}], {"CPU": 1, "GPU": 0}) == 2
    assert capacity([{"CPU": 2}], {"CPU": 1, "GPU": 1}) == 0
    assert capacity([{"CPU": 3}, {"CPU": 3}, {"CPU": 3}], {"CPU": 2, "GPU": 0}) == 3


def test_gpus_are_used_if_asked_for_or_there() -> None:
    with_gpu, without = {"CPU": 2.0, "GPU": 8.0}, {"CPU": 2.0}
    assert use_gpu("auto", with_gpu)
    assert not use_gpu("auto", without)
    assert use_gpu("cuda", without), "an autoscaler may bring them"
    assert not use_gpu("cpu", with_gpu)
