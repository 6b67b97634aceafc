"""What others see while a run goes on."""

import contextlib
import dataclasses
import json
import time
import urllib.request
from collections.abc import Callable

import pytest
import ray
from toy_training import logged_step

from longrope2_ray.report.metrics import SearchMetrics, TrainingMetrics
from longrope2_ray.report.progress import ProgressBar, format_seconds, log_generation
from longrope2_ray.report.training_observer import TrainObserver
from longrope2_ray.search.status import Status

STATUS = Status(
    "seen",
    state="searching",
    generation=3,
    iterations=8,
    best_ppl=1.25,
    median_ppl=1.5,
    worst_ppl=2.0,
    best_critical_dim=12,
    critical_dims={"10": 1, "11": 3},
    units_done=100,
    units_eliminated=20,
    units_left=30,
    units_ahead=5,
    unit_seconds=0.5,
    elapsed_seconds=60.0,
    eta_seconds=90.0,
    scorers={"busy": 2, "idle": 1},
    faults={"requeued": 4},
    committed_at=1.7e9,
    equivalents=123.5,
    equivalents_left=0.0,
    descent_step=7,
    descent_steps=16,
)


def scrape() -> str:
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read().decode()


def value_of(name: str, text: str, tag: str = "") -> float | None:
    lines = [line for line in text.splitlines() if line.startswith(f"ray_longrope2_{name}{{")]
    lines = [line for line in lines if 'run="seen"' in line and tag in line]
    return float(lines[0].rsplit(" ", 1)[1]) if lines else None


def scrape_until(seen: Callable[[str], bool]) -> str:
    """What Ray exports once it exports that."""
    text, began = "", time.monotonic()
    while not seen(text):
        assert time.monotonic() - began < 120, text[-2000:]
        time.sleep(1)
        with contextlib.suppress(OSError):  # the endpoint comes up after Ray
            text = scrape()
    return text


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_on_this_machine")
def test_the_drivers_metrics_come_out_of_rays_endpoint():
    """Twice, since each time Ray's agent takes seconds: what was shown first, what came later."""
    metrics, training = SearchMetrics("seen"), TrainingMetrics("seen", checkpoint_steps=2)
    metrics(STATUS, "units")
    began = time.time()
    training(logged_step(1, window_losses={"long": 2.5}))
    training(logged_step(2))  # its checkpoint is still being written
    text = scrape_until(
        lambda text: (
            value_of("units_requeued_total", text) == 4 and value_of("train_step", text) == 2
        )
    )
    gauges = {
        "best_ppl": 1.25,
        "median_ppl": 1.5,
        "worst_ppl": 2,
        "generation": 3,
        "iterations": 8,
        "eta_seconds": 90,
        "units_eliminated": 20,
        "units_ahead": 5,
        "last_commit_timestamp_seconds": 1.7e9,
        "equivalents": 123.5,
        "equivalents_left": 0,
        "descent_step": 7,
        "descent_steps": 16,
    }
    assert {name: value_of(name, text) for name in gauges} == gauges
    assert value_of("scorers", text, 'state="busy"') == 2
    assert value_of("survivors", text, 'critical_dim="10"') == 1
    assert value_of("scorer_deaths_total", text) == 0, "nothing died, and that is a number"
    assert value_of("train_last_checkpoint_timestamp_seconds", text) <= began
    assert value_of("train_last_step_timestamp_seconds", text) >= began
    assert value_of("train_loss_short", text) == 2.5
    assert value_of("train_eta_seconds", text) == 58 * 2.0

    later = dataclasses.replace(
        STATUS, faults={"requeued": 6, "deaths": 2}, critical_dims={"11": 4}
    )
    for _ in range(3):  # running totals are counted once, however often they are shown
        metrics(later, "units")
    training(logged_step(3))
    text = scrape_until(
        lambda text: (
            value_of("units_requeued_total", text) == 6
            and value_of("survivors", text, 'critical_dim="11"') == 4
            and value_of("train_step", text) == 3
        )
    )
    assert value_of("scorer_deaths_total", text) == 2
    assert value_of("survivors", text, 'critical_dim="10"') == 0, (
        "a dimension that died out is shown as such"
    )
    assert value_of("train_last_checkpoint_timestamp_seconds", text) > began


def test_each_logged_step_is_one_json_line_and_reaches_the_metrics(capsys):
    exported = []
    observer = TrainObserver(exported.append)
    steps = [logged_step(1, seconds=1.0), logged_step(2, seconds=3.0)]
    for step in steps:
        observer(step)
    observer.stop()
    bodies = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert [(body["event"], body["step"], body["loss_long"]) for body in bodies] == [
        ("step", 1, 3.5),
        ("step", 2, 3.5),
    ]
    assert bodies[1]["eta_seconds"] == 58 * 2.0  # at the median pace
    assert exported == steps


def test_the_log_has_one_json_line_a_generation_and_none_for_units(capsys):
    log_generation(STATUS, "units")
    assert capsys.readouterr().err == ""
    log_generation(STATUS, "generation")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    body = json.loads(lines[0])
    assert (body["event"], body["generation"], body["best_ppl"]) == ("generation", 3, 1.25)


def test_the_progress_bar_follows_a_status_and_is_silent_without_a_terminal(capsys):
    bar = ProgressBar()
    bar(STATUS, "units")
    bar.stop()
    assert capsys.readouterr().err == ""


def test_the_progress_bar_counts_the_steps_of_a_descent():
    descending = dataclasses.replace(
        STATUS, state="descending", generation=0, iterations=0, descent_step=7, descent_steps=16
    )
    bar = ProgressBar()
    bar(descending, "generation")
    (task,) = bar._progress.tasks
    assert (task.completed, task.total) == (7, 16)
    assert task.fields["best"] == "perplexity 1.25 on its documents"
    assert task.fields["eta"] == "ETA 1:30"
    bar(dataclasses.replace(descending, state="searching", descent_step=16), "units")
    assert (task.completed, task.total) == (16, 16)
    assert task.fields["best"] == "best 1.25 at d_rcd 12"
    bar(STATUS, "units")
    assert (task.completed, task.total) == (3, 8)
    bar.stop()


def test_seconds_are_printed_as_a_clock():
    assert format_seconds(3723) == "1:02:03"
    assert format_seconds(65.9) == "1:05"
    assert format_seconds(None) == "?"
