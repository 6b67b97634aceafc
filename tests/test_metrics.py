"""What others see while a run goes on."""

import json
import time
import urllib.request

import ray

from longrope2_ray import driver
from longrope2_ray.metrics import ProgressBar, RayMetrics, format_seconds, log_generation
from longrope2_ray.search import Status

STATUS = Status(
    "seen", "searching", 3, 8, 1.25, 1.5, 12, 100, 20, 30, 0.5, 60.0, 90.0, {"busy": 2, "idle": 1}, {"requeued": 4}
)


def scrape() -> str:
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read().decode()


def value_of(line_start: str, text: str) -> float | None:
    lines = [line for line in text.splitlines() if line.startswith(line_start) and 'run="seen"' in line]
    return float(lines[0].rsplit(" ", 1)[1]) if lines else None


def test_the_drivers_metrics_come_out_of_rays_endpoint():
    with driver.ray_session():
        metrics = RayMetrics("seen")
        text, began = "", time.monotonic()
        while value_of("ray_longrope2_units_requeued", text) is None and time.monotonic() - began < 90:
            metrics(STATUS, "units")
            time.sleep(2)
            text = scrape()
    assert value_of("ray_longrope2_best_ppl", text) == 1.25
    assert value_of("ray_longrope2_generation", text) == 3
    assert value_of("ray_longrope2_units_raced_out", text) == 20
    assert value_of("ray_longrope2_eta_seconds", text) == 90
    assert value_of("ray_longrope2_units_requeued", text) == 4
    busy = [line for line in text.splitlines() if line.startswith("ray_longrope2_scorers") and 'state="busy"' in line]
    assert float(busy[0].rsplit(" ", 1)[1]) == 2


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
    assert capsys.readouterr().err.strip() == ""


def test_seconds_are_printed_as_a_clock():
    assert format_seconds(3723) == "1:02:03"
    assert format_seconds(65.9) == "1:05"
    assert format_seconds(None) == "?"
