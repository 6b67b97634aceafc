"""What a training writes down, and reads again."""

import json
from pathlib import Path

import numpy as np
import pytest

from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.training.records import (
    LoggedStep,
    TrainingResult,
    read_result,
    read_step,
    stop_message,
    write_result,
    write_step,
    write_stop,
)

STEP = LoggedStep(
    step=3,
    num_steps=9,
    loss=2.0,
    window_losses={"long": 2.5},
    num_tokens=90,
    num_positions=96,
    num_pairs=4608.0,
    grad_norm=1.0,
    learning_rate=1e-3,
    seconds=1.0,
    tokens_per_second=96.0,
    model_tflops_per_second=0.1,
    model_flops_utilization=None,
)


@pytest.fixture
def train_dir(tmp_path: Path) -> RunDir:
    made = RunDir(str(tmp_path))
    made.create()
    return made


def test_a_logged_step_is_read_as_it_was_written(train_dir: RunDir) -> None:
    assert read_step(train_dir, 3) is None
    write_step(train_dir, STEP)
    assert read_step(train_dir, 3) == STEP
    assert train_dir.names("steps") == ["steps/0000003.json"]
    with pytest.raises(TypeError, match="no_such_field"):
        LoggedStep.from_json({**STEP.to_json(), "no_such_field": 1})


def test_a_result_is_read_as_it_was_written(train_dir: RunDir) -> None:
    factors = RescaleFactors(np.array([1.0, 2.5]), 1.1, source="yarn")
    result = TrainingResult(9, 2.0, {"short": 2.0}, 90, factors, mixed=False)
    assert read_result(train_dir) is None
    write_result(train_dir, result)
    again = read_result(train_dir)
    assert again is not None
    assert json.dumps(again.to_json()) == json.dumps(result.to_json())
    assert (again.factors.attention_factor, again.factors.source) == (1.1, "yarn")


def test_a_stop_counts_for_the_command_that_it_stopped(train_dir: RunDir) -> None:
    train_dir.take_over()
    assert stop_message(train_dir) is None
    write_stop(train_dir, "lower train.learning_rate")
    assert stop_message(train_dir) == "lower train.learning_rate"
    later = RunDir(train_dir.url)
    later.take_over()
    assert stop_message(later) is None
