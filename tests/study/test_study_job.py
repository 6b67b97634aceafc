"""A whole study on a real Ray: a trial that fails ends no other, and is all that is run again."""

import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from longrope2_ray.cli import main
from longrope2_ray.errors import FencedError, StoppedError
from longrope2_ray.recipe.loading import load_recipe
from longrope2_ray.rope.baselines import baseline
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.study import job
from longrope2_ray.study.preparation import prepare_study
from longrope2_ray.study.spec import load_study
from longrope2_ray.study.table import Failure, Table, build_table
from longrope2_ray.study.trained import window_factors
from longrope2_ray.training.records import TrainingResult

ROOT = Path(__file__).parents[2]

STUDY = """
name = "tiny"
recipe = "debug"
seeds = [0, 1]
max_concurrent_trials = 2
settings.report.methods = ["yarn", "longrope2"]

[[variants]]
name = "default"

[[variants]]
name = "other"
settings.search.preset = "authors"
"""
TINY = (
    "--search.iterations", "0", "--search.population-size", "4", "--search.critical-dims",
    "[11, 12]", "--needles.num-samples", "1", "--report.num-samples", "1",
    "--scorer.num-scorers", "1", "--report.depth", "start",
)  # fmt: skip


@pytest.fixture
def study_file(tmp_path: Path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(STUDY)
    return str(path)


def modified(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
@pytest.mark.usefixtures("ray_on_this_machine")
def test_a_failed_trial_ends_no_other_and_is_resumed_alone(
    tmp_path: Path,
    study_file: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = tmp_path / "study"
    command = ["study", study_file, "--run-dir", str(place), *TINY]
    obstacle = place / "default" / "seed-1" / "drivers"
    run_trials: Any = job.run_trials
    run: list[list[str]] = []

    def with_an_obstacle(jobs: Any, *rest: Any) -> Any:
        run.append([its.trial.folder for its in jobs])
        if len(run) == 1:
            obstacle.write_text("a file where the trial needs a folder")
        return run_trials(jobs, *rest)

    monkeypatch.setattr(job, "run_trials", with_an_obstacle)
    assert main(command) == 1
    captured = capsys.readouterr()
    assert "study: 3 of 4 trials finished, 1 failed" in captured.err
    assert "stopped: 1 of 4 trials did not finish" in captured.err
    assert "- default, seed 1: --run-dir: cannot write" in captured.out
    assert len(json.loads((place / "study.json").read_text())["outcomes"]) == 3

    obstacle.unlink()
    finished = modified(place / "other")
    assert main(command) == 0
    every = ["default/seed-0", "other/seed-0", "default/seed-1", "other/seed-1"]
    assert run == [every, ["default/seed-1"]]
    assert modified(place / "other") == finished
    body = json.loads((place / "study.json").read_text())
    assert [row["seeds"] for row in body["rows"]] == [[0, 1], [0, 1]]
    assert body["failures"] == []
    assert "YaRN" in (place / "study.md").read_text()

    # A finished study is read without Ray, and its table is the same bytes.
    before = (place / "study.json").read_bytes()
    assert main(command) == 0
    assert len(run) == 2
    assert (place / "study.json").read_bytes() == before
    # A trial of another recipe is not taken for one of this study.
    capsys.readouterr()
    assert main([*command, "--needles.seed", "5"]) == 2
    assert "needles.seed is 0 there and 5 now" in capsys.readouterr().err


TRAINED = """
name = "trained"
recipe = "small.toml"
seeds = [0]

[settings]
search.preset = "paper"
needles.depth = "start"
report.methods = ["yarn", "longrope2"]
report.lengths = [1024, 256]
scorer.look_ahead = false

[[variants]]
name = "plain"

[[variants]]
name = "mixed"
train = true
"""


def small_recipe() -> str:
    """The demo's recipe with a few steps of training on a few tokens."""
    recipe = tomllib.loads((ROOT / "jobs" / "recipes" / "demo.toml").read_text())
    recipe["report"]["attention_factors"] = [1.0]
    recipe["data"]["sources"].pop()  # two sources for two bands
    for band, source in zip(recipe["data"]["bands"], recipe["data"]["sources"], strict=True):
        band.update(tokens=20_000, sources=[source["name"]])
    recipe["train"].update(max_steps=4, checkpoint_steps=1, global_batch_size=2, num_workers=1)
    return tomli_w.dumps(recipe)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("ray_on_this_machine", "ray_train_ends_soon")
def test_a_study_killed_with_9_in_a_training_ends_in_the_same_table(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(small_recipe())
    file = tmp_path / "trained.toml"
    file.write_text(TRAINED)
    place = tmp_path / "killed"

    def command(folder: Path) -> list[str]:
        return ["study", str(file), "--run-dir", str(folder), *TINY]

    null = subprocess.DEVNULL
    driver = subprocess.Popen(
        [sys.executable, "-m", "longrope2_ray", *command(place)],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        stdout=null,
        stderr=null,
    )
    steps = place / "mixed" / "seed-0" / "train" / "steps"
    began = time.monotonic()
    while not list(steps.glob("*.json")):
        assert driver.poll() is None, "the study ended before it could be killed"
        assert time.monotonic() - began < 500, "no training came"
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    assert not (place / "study.json").exists()
    winner = place / "mixed" / "seed-0" / "winner.json"
    finished = modified(place / "plain"), winner.stat().st_mtime_ns

    assert main(command(place)) == 0
    assert (modified(place / "plain"), winner.stat().st_mtime_ns) == finished
    assert main(command(tmp_path / "whole")) == 0
    table = (place / "study.json").read_bytes()
    assert table == (tmp_path / "whole" / "study.json").read_bytes()
    plain, mixed = json.loads(table)["rows"]
    trained = {"loss", "trained_ppl", "trained_accuracy", "short_ppl", "short_accuracy"}
    assert set(mixed["summaries"]) - set(plain["summaries"]) == trained


@pytest.mark.parametrize("mixed", [True, False])
def test_a_trained_model_serves_short_prompts_under_what_they_were_trained_with(
    mixed: bool,
) -> None:
    shape = load_recipe("llama3_8b_128k").model.shape
    assert shape is not None
    factors = baseline("yarn", shape.geometry, 131_072)
    result = TrainingResult(4, 1.0, {}, 9, factors, mixed)
    served = window_factors(result, shape, [8192, 8193])
    assert served["report@8193"] is factors
    short = np.ones(shape.geometry.num_cosines) if mixed else factors.values
    np.testing.assert_array_equal(served["report@8192"].values, short)


def test_a_mistake_that_only_the_model_shows_is_found_before_anything_is_made(
    tmp_path: Path, study_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "study"
    dims = ["--search.critical-dims", "[11, 99]", "--search.population-size", "99", *TINY[-4:]]
    assert main(["study", study_file, "--run-dir", str(place), *dims]) == 2
    assert "error: variant default: search.critical_dims" in capsys.readouterr().err
    assert not place.exists()


def test_options_before_the_study_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--search.seed", "1", "tiny.toml"]) == 2
    assert capsys.readouterr().err.startswith("error: STUDY: expected before --search.seed")


def test_a_newer_study_in_the_same_directory_ends_the_trials_of_the_older(
    tmp_path: Path, study_file: str
) -> None:
    study_dir = RunDir(str(tmp_path / "study"))
    jobs = prepare_study(load_study(study_file, TINY), study_dir)
    study_dir.take_over()
    RunDir(study_dir.url).take_over()
    with pytest.raises(FencedError, match="a newer driver"):
        job._run_trial({"trial": 0}, jobs, study_dir.absolute_url, str(study_dir.claim))


@pytest.mark.parametrize(("fenced", "kind"), [(False, StoppedError), (True, FencedError)])
def test_a_table_with_gaps_is_told_by_its_error(fenced: bool, kind: type[Exception]) -> None:
    def table(*failures: Failure) -> Table:
        return build_table("s", "demo", ["a"], [], failures)

    job.require_whole(table())
    with pytest.raises(kind, match="2 of 2 trials did not finish"):
        job.require_whole(table(Failure("a", 0, "why"), Failure("a", 1, "why", fenced)))
