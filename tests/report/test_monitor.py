"""What `longrope2 monitor` shows of directories that searches and trainings left behind."""

import dataclasses
import io
import os
import re
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from toy import KilledError, ToyScorers, toy_recipe, toy_run
from toy_training import begin_training, write_step

from longrope2_ray.cli import main
from longrope2_ray.recipe.identity import identity
from longrope2_ray.report.snapshot import LIFELESS_SECONDS, Monitor
from longrope2_ray.report.terminal import render
from longrope2_ray.search.status import Status, read_status
from longrope2_ray.search.winner import read_generations
from longrope2_ray.storage.rundir import RunDir


@pytest.fixture(params=["local", "memory"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
    """An opened run of the toy, before its first status."""
    local = request.param == "local"
    return open_run(tmp_path / "run" if local else f"memory://{uuid.uuid4().hex}/run")


def open_run(place: Path | str) -> RunDir:
    run_dir = RunDir(str(place))
    recipe = toy_recipe()
    body = recipe.model_dump(mode="json")
    run_dir.open("search", identity(recipe, "search"), {"model": "toy"}, body, {})
    return run_dir


def search(run_dir: RunDir, kill_after: int | None = None) -> None:
    run = toy_run(toy_recipe(), run_dir, ToyScorers(width=2, kill_after=kill_after))
    if kill_after is None:
        run.run()
        return
    with pytest.raises(KilledError):
        run.run()


def shown(run_dir: RunDir, width: int = 110) -> str:
    """The whole picture as plain text."""
    console = Console(file=io.StringIO(), width=width)
    console.print(render(Monitor(RunDir(run_dir.url)).look()))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def write_status(run_dir: RunDir, **values: Any) -> None:
    run_dir.write_json("status.json", dataclasses.asdict(Status("toy", iterations=3, **values)))


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_finished_search_is_shown_whole_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = open_run(tmp_path / "run")
    search(run_dir)
    before = contents(tmp_path)
    began = time.monotonic()
    # Without a terminal it is printed once, although --once was not given.
    assert main(["monitor", str(tmp_path / "run")]) == 0
    assert time.monotonic() - began < 60
    text, status = capsys.readouterr().out, read_status(run_dir)
    assert status
    assert contents(tmp_path) == before
    assert re.search(r"state +finished", text)
    assert "3 of 3" in text
    assert f"best {status.best_ppl:.4g}" in text
    assert f"done {status.units_done}" in text
    assert f"eliminated {status.units_eliminated}" in text
    for dim, count in status.critical_dims.items():
        assert f"d_rcd {dim} {count}" in text
    bests = [generation.survivors[0].ppl for generation in read_generations(run_dir)]
    assert f"{bests[0]:.4g} to {bests[-1]:.4g}" in text
    assert "\x1b" not in text


def test_it_needs_neither_ray_nor_torch(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path))
    begin_training(run_dir)
    write_step(run_dir, 3)
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'ray', 'transformers')))\n"
        "from longrope2_ray.cli import main\n"
        "sys.exit(main(['monitor', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 of 60" in done.stdout


def test_a_search_under_way_shows_where_it_stands(run_dir: RunDir) -> None:
    assert "there is no status yet" in shown(run_dir)
    search(run_dir, kill_after=60)
    write_status(
        run_dir,
        state="searching",
        generation=1,
        best_ppl=1.25,
        best_critical_dim=9,
        median_ppl=1.5,
        worst_ppl=2.0,
        units_done=1060,
        units_ahead=7,
        unit_seconds=0.5,
        eta_seconds=3723.0,
        scorers={"busy": 2, "starting": 1},
        faults={"requeued": 4, "deaths": 3, "preemptions": 2},
        critical_dims={"11": 3, "9": 1},
        committed_at=time.time() - 125,
    )
    text = shown(run_dir)
    for words in (
        "searching",
        "1 of 3",
        "ETA 1:02:03",
        "best 1.25",
        "median 1.5",
        "worst 2",
        "done 1,060",
        "ahead 7",
        "busy 2",
        "starting 1",
        "requeued 4",
        "deaths 3",
        "preemptions 2",
        "stalls 0",
    ):
        assert words in text
    assert text.index("d_rcd 9") < text.index("d_rcd 11"), (
        "in the order of dimensions, not of their names"
    )
    assert re.search(r"last commit +2:\d\d ago", text)
    assert "no sign of life" not in text


def test_a_descent_under_way_shows_its_step_its_perplexity_and_its_cost(run_dir: RunDir) -> None:
    descending = Status(
        "toy",
        state="descending",
        descent_step=7,
        descent_steps=16,
        descent_ppls=[1.5, 1.4, None, 1.25],
        best_ppl=1.25,
        eta_seconds=65.0,
        equivalents=1234.56,
        equivalents_left=78.9,
    )
    run_dir.write_json("status.json", dataclasses.asdict(descending))
    text = shown(run_dir)
    assert re.search(r"descent +━+ +step 7 of 16 +ETA 1:05", text)
    assert re.search(r"steps so far +\S+ \S+ +1.5 to 1.25", text)
    assert re.search(r"cost +spent 1,234.6 +left 78.9 +full-length equivalents", text)
    assert "generation" not in text, "it would be 0 of 0"
    run_dir.write_json(
        "status.json",
        dataclasses.asdict(dataclasses.replace(descending, state="finished", descent_step=16)),
    )
    text = shown(run_dir)
    assert "step 16 of 16" in text
    assert "best 1.25" in text


def test_generations_after_a_descent_have_a_bar_of_their_own(run_dir: RunDir) -> None:
    write_status(run_dir, state="searching", generation=1, descent_step=16, descent_steps=16)
    assert re.search(r"generation +━+ +1 of 3", shown(run_dir))


def test_a_driver_that_died_is_recognized(tmp_path: Path) -> None:
    run_dir = open_run(tmp_path / "run")
    write_status(run_dir, state="searching", eta_seconds=50.0)
    assert "no sign of life" not in shown(run_dir)
    long_ago = time.time() - 200
    os.utime(tmp_path / "run" / "status.json", (long_ago, long_ago))
    text = shown(run_dir)
    assert re.search(r"no sign of life for 3:2\d", text)
    assert "run the same command again to resume" in text
    assert "ETA" not in text, "nobody is working on it"
    write_status(run_dir, state="finished")
    os.utime(tmp_path / "run" / "status.json", (long_ago, long_ago))
    assert "no sign of life" not in shown(run_dir)


def test_a_storage_with_another_clock_does_not_make_a_living_driver_look_dead(
    tmp_path: Path,
) -> None:
    """Its files seem ten minutes old when they are written; one that changes was written now."""
    run_dir = open_run(tmp_path / "run")
    monitor = Monitor(run_dir)
    for units in (1, 2):
        write_status(run_dir, state="searching", units_done=units)
        behind = time.time() - 10 * LIFELESS_SECONDS
        os.utime(tmp_path / "run" / "status.json", (behind, behind))
        snapshot = monitor.look()
        assert snapshot.lifeless == (units == 1)


def test_trainings_are_found_beside_the_search(run_dir: RunDir) -> None:
    search(run_dir)
    for folder in ("train", "train-yarn"):
        begin_training(run_dir, folder)
    for step in range(1, 51):
        write_step(run_dir, step)
    text = shown(run_dir)
    for words in (
        "training: train ",
        "training: train-yarn",
        "50 of 60",
        "ETA 0:20",
        "all 2.5",
        "short 2.5",
        "long 3.5",
        "tokens/s 1,23",
        "MFU 42%",
        "no step yet",
        "2.89 to 2.5",
    ):
        assert words in text
    assert not Monitor(run_dir).look().finished, "the search is, its trainings are not"
    for folder in ("train", "train-yarn"):
        run_dir.write_json(f"{folder}/result.json", {"step": 60, "loss": 2.4})
    assert Monitor(run_dir).look().finished


def test_a_training_that_stopped_says_why_until_it_goes_on(run_dir: RunDir) -> None:
    search(run_dir)
    begin_training(run_dir)
    write_step(run_dir, 1)
    monitor = Monitor(run_dir)
    monitor.look()
    run_dir.write_json("train/stop.json", {"claim": "a", "message": "the loss of step 2 is nan"})
    time.sleep(0.01)
    assert monitor.look().trainings[0].stopped == "the loss of step 2 is nan"
    assert "stopped: the loss of step 2 is nan" in shown(run_dir)
    time.sleep(0.01)
    write_step(run_dir, 2)
    assert monitor.look().trainings[0].stopped is None


def test_a_run_that_only_trains_needs_no_search(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path))
    begin_training(run_dir)
    write_step(run_dir, 3)
    text = shown(run_dir)
    assert "3 of 60" in text
    assert "perplexity" not in text


def test_a_torn_status_or_step_is_passed_over(run_dir: RunDir) -> None:
    search(run_dir, kill_after=60)
    begin_training(run_dir)
    write_step(run_dir, 1)
    (run_dir.path / "status.json").write_bytes(b'{"name": "to')
    (run_dir.path / "train" / "steps" / "0000002.json").write_bytes(b"")
    text = shown(run_dir)
    assert "there is no status yet" in text
    assert "1 of 60" in text


def test_a_status_of_another_version_is_read_as_far_as_it_goes(run_dir: RunDir) -> None:
    run_dir.write_json(
        "status.json",
        {"name": "toy", "state": "searching", "generation": 2, "iterations": 5, "new": 1},
    )
    assert "2 of 5" in shown(run_dir)


def test_it_fits_a_narrow_terminal(run_dir: RunDir) -> None:
    search(run_dir)
    begin_training(run_dir)
    write_step(run_dir, 1)
    assert max(map(len, shown(run_dir, width=60).splitlines())) <= 60


def test_it_follows_a_run_on_a_terminal_until_the_run_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = open_run(tmp_path / "run")  # memory:// is not for two threads
    screen = io.StringIO()
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's own word for: this is a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", screen)
    search(run_dir, kill_after=20)

    def go_on() -> None:
        while "searching" not in screen.getvalue():
            time.sleep(0.05)
        search(run_dir)

    driver = threading.Thread(target=go_on, daemon=True)
    driver.start()
    assert main(["monitor", run_dir.url, "--every", "0.05"]) == 0
    driver.join()
    assert "searching" in screen.getvalue()
    assert "finished" in screen.getvalue().rsplit("searching", 1)[1]


@pytest.mark.parametrize("kind", ["nothing", "empty", "folder of runs", "training", "torn"])
def test_what_is_no_run_is_refused_in_one_line(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "place"
    if kind != "nothing":
        place.mkdir()
    if kind == "folder of runs":
        open_run(place / "run")
    if kind == "training":
        begin_training(RunDir(str(tmp_path)), "place")
    if kind == "torn":
        (place / "run.json").write_text("{")
    assert main(["monitor", str(place), "--once"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    expected = {"training": "the folder of a training", "torn": "torn or corrupt"}
    assert expected.get(kind, "RUN_DIR: expected the directory of a run") in error
    assert main(["monitor", str(place), "--every", "0"]) == 2
    assert "--every" in capsys.readouterr().err


def test_a_status_that_is_torn_for_a_moment_leaves_the_last_one_standing(run_dir: RunDir) -> None:
    write_status(run_dir, state="searching", units_done=5)
    monitor = Monitor(run_dir)
    assert monitor.look().status
    (run_dir.path / "status.json").write_bytes(b'{"name": "to')
    status = monitor.look().status
    assert status
    assert status.units_done == 5


def test_a_search_whose_driver_died_after_writing_its_winner_is_finished(run_dir: RunDir) -> None:
    write_status(run_dir, state="reporting")
    assert not Monitor(run_dir).look().finished
    run_dir.write_json("winner.json", {"name": "toy"})  # that it is whole is enough
    assert Monitor(run_dir).look().finished
