"""A whole study on a real Ray: a trial that fails ends no other, and is all that is run again."""

import json
from pathlib import Path
from typing import Any

import pytest

from longrope2_ray.cli import main
from longrope2_ray.errors import FencedError, StoppedError
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.study import job
from longrope2_ray.study.preparation import prepare_study
from longrope2_ray.study.spec import load_study
from longrope2_ray.study.table import Failure, Table, build_table

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
