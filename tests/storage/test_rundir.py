import errno
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longrope2_ray.errors import CorruptFileError, FencedError, RunDirError
from longrope2_ray.search.scores import Score, scores_of
from longrope2_ray.search.space import Candidate
from longrope2_ray.search.status import read_status
from longrope2_ray.search.winner import (
    GenerationRecord,
    Survivor,
    read_generations,
    read_winner,
    write_generation,
)
from longrope2_ray.storage.rundir import RunDir

RECIPE = {
    "name": "x",
    "search.seed": 0,
    "search.tail_bounds": [1.0, 2.0],
    "search.critical_dims": None,
}
CANDIDATE = Candidate(3, (2.0, 2.5))
PRINTS = {"model": "abc", "needles search": "def"}
NESTED = {"name": "x", "search": {"seed": 0, "critical_dims": None, "tail_bounds": (1.0, 2.0)}}


@pytest.fixture(params=["local", "memory"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunDir]:
    if request.param == "local":
        yield RunDir(str(tmp_path / "deep" / "run"))
    else:
        yield RunDir(f"memory://{uuid.uuid4().hex}/run")


def begin(
    run_dir: RunDir, recipe: dict[str, Any] = RECIPE, prints: dict[str, str] = PRINTS
) -> bool:
    """Open and own it."""
    folders = ("scores", "generations")
    found = run_dir.open("search", recipe, prints, NESTED, {"target_length": 1024}, folders)
    run_dir.take_over()
    return found


def commit(run_dir: RunDir, *scores: Score) -> None:
    scores_of(run_dir).commit(scores)


def score(sample: int, vector: str = "v", nll: float | None = 1.5) -> Score:
    return Score(vector, f"id-{sample}", "search", sample, nll, 7, True, 0.5, "scorer-00", 12.0)


def chunks(run_dir: RunDir) -> list[str]:
    return sorted(p.name for p in (run_dir.path / "scores").iterdir())


def spoil(run_dir: RunDir, name: str, how: str) -> None:
    path = run_dir.path / name
    data = path.read_bytes()
    path.write_bytes(
        {
            "torn": data[: len(data) // 2],
            "empty": b"",
            "edited": data.replace(b"1.5", b"1.4"),
            "binary": b"\x00\xff\xfe" * 20,
            "other json": b"[1, 2]",
            "no checksum": b'{"schema_version": 2, "rows": []}',
        }[how]
    )


SPOILED = ["torn", "empty", "edited", "binary", "other json", "no checksum"]


def test_json_comes_back_as_written_and_nothing_else_is_left(run_dir: RunDir) -> None:
    run_dir.create()
    run_dir.write_json("winner.json", {"factors": [1.0, 0.1 + 0.2], "name": "ü"})
    assert run_dir.read_json("winner.json") == {"factors": [1.0, 0.1 + 0.2], "name": "ü"}
    assert sorted(p.name for p in run_dir.path.iterdir() if p.is_file()) == ["winner.json"]


def test_a_file_url_is_the_same_directory_as_its_path(tmp_path: Path) -> None:
    run_dir = RunDir(f"file://{tmp_path}/run")
    run_dir.create()
    begin(run_dir)
    commit(run_dir, score(0))
    again = RunDir(str(tmp_path / "run"))
    assert again.local
    assert run_dir.names("scores") == again.names("scores")
    assert (
        dict(scores_of(RunDir(f"file://{tmp_path}/run")).load())
        == dict(scores_of(again).load())
        != {}
    )


def test_a_probe_that_another_driver_removes_first_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(str(tmp_path / "run"))
    write = run_dir.write_bytes

    def written_and_gone(name: str, data: bytes) -> None:
        write(name, data)
        (tmp_path / "run" / name).unlink()

    monkeypatch.setattr(run_dir, "write_bytes", written_and_gone)
    run_dir.create()


def test_a_client_that_is_not_installed_is_one_clear_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(str(tmp_path / "run"), patience_seconds=60)

    def missing(*arguments: Any) -> bytes:
        raise ImportError("Install gcsfs to access Google Storage")

    monkeypatch.setattr(type(run_dir.path), "read_bytes", missing)
    with pytest.raises(RunDirError, match="Install gcsfs"):
        run_dir.read_json("run.json")


def test_what_is_not_there_is_none(run_dir: RunDir) -> None:
    assert run_dir.read_json("winner.json") is None
    run_dir.create()
    assert read_winner(run_dir) is read_status(run_dir) is None
    assert read_generations(run_dir) == []
    assert dict(scores_of(run_dir).load()) == {}


def test_the_same_content_is_the_same_bytes(run_dir: RunDir) -> None:
    run_dir.create()
    run_dir.write_json("a.json", {"x": 1, "y": [2.5]})
    run_dir.write_json("b.json", {"y": [2.5], "x": 1})
    assert (run_dir.path / "a.json").read_bytes() == (run_dir.path / "b.json").read_bytes()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path))
    run_dir.write_json("winner.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        run_dir.write_json("winner.json", {"x": float("nan")})
    assert run_dir.read_json("winner.json") == {"x": 1}
    with pytest.raises(TypeError):
        run_dir.write_bytes("winner.json", "text, not bytes")  # type: ignore[arg-type]
    assert run_dir.read_json("winner.json") == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["winner.json"]


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_file_is_named_by_reading_and_skipped_with_one_warning(
    run_dir: RunDir, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir.create()
    run_dir.write_json("winner.json", {"x": 1.5})
    spoil(run_dir, "winner.json", how)
    with pytest.raises(CorruptFileError, match=r"winner.json is torn or corrupt"):
        run_dir.read_json("winner.json")
    with caplog.at_level(logging.WARNING, "longrope2"):
        assert run_dir.read_or_skip("winner.json") is None
        assert run_dir.read_or_skip("winner.json") is None
    assert [r.getMessage().count("winner.json is torn or corrupt") for r in caplog.records] == [1]


def test_a_file_of_another_version_is_refused_not_skipped(run_dir: RunDir) -> None:
    run_dir.create()
    run_dir.write_json("winner.json", {"x": 1, "schema_version": 99})
    with pytest.raises(RunDirError, match=r"winner.json was written by another version"):
        run_dir.read_or_skip("winner.json")


# --- identity


def test_a_run_is_begun_once_and_resumed_after(run_dir: RunDir) -> None:
    assert begin(run_dir) is False
    before = (run_dir.path / "run.json").read_bytes()
    assert begin(run_dir) is True
    assert begin(RunDir(run_dir.url)) is True
    assert (run_dir.path / "run.json").read_bytes() == before
    body = run_dir.read_json("run.json")
    assert body is not None
    assert (body["recipe"], body["fingerprints"], body["target_length"]) == (RECIPE, PRINTS, 1024)


def test_the_recipe_is_kept_as_toml_without_what_is_not_set(run_dir: RunDir) -> None:
    import tomllib

    begin(run_dir)
    kept = tomllib.loads((run_dir.path / "recipe.toml").read_text())
    assert kept == {"name": "x", "search": {"seed": 0, "tail_bounds": [1.0, 2.0]}}


@pytest.mark.parametrize(
    ("recipe", "prints", "field", "old", "new"),
    [
        ({**RECIPE, "search.seed": 1}, PRINTS, "search.seed", "0", "1"),
        (
            {**RECIPE, "search.tail_bounds": [1.0, 3.0]},
            PRINTS,
            "search.tail_bounds",
            "[1.0, 2.0]",
            "[1.0, 3.0]",
        ),
        (
            {**RECIPE, "search.critical_dims": [3, 4]},
            PRINTS,
            "search.critical_dims",
            "None",
            "[3, 4]",
        ),
        ({**RECIPE, "search.new": 3}, PRINTS, "search.new", "None", "3"),
        (RECIPE, {**PRINTS, "model": "xyz"}, "fingerprint of model", "'abc'", "'xyz'"),
        (
            RECIPE,
            {**PRINTS, "needles search": "x"},
            "fingerprint of needles search",
            "'def'",
            "'x'",
        ),
    ],
)
def test_a_directory_of_another_run_is_refused_by_field(
    run_dir: RunDir, recipe: dict[str, Any], prints: dict[str, str], field: str, old: str, new: str
) -> None:
    begin(run_dir)
    before = {p.name: p.read_bytes() for p in run_dir.path.iterdir() if p.is_file()}
    with pytest.raises(RunDirError) as caught:
        begin(run_dir, recipe, prints)
    assert f"{field} is {old} there and {new} now" in str(caught.value)
    assert "--run-dir" in str(caught.value)
    assert {p.name: p.read_bytes() for p in run_dir.path.iterdir() if p.is_file()} == before


def test_a_lost_identity_is_written_again_if_the_files_say_whose_they_are(run_dir: RunDir) -> None:
    begin(run_dir)
    commit(run_dir, score(0))
    write_generation(run_dir, GenerationRecord(0, (), ()))
    spoil(run_dir, "run.json", "torn")
    again = RunDir(run_dir.url)
    assert begin(again) is True
    assert len(scores_of(again).load()) == 1
    (run_dir.path / "run.json").unlink()
    assert begin(RunDir(run_dir.url)) is True
    assert RunDir(run_dir.url).read_json("run.json") is not None


@pytest.mark.parametrize("folder", ["scores", "generations"])
def test_a_lost_identity_is_not_made_up_for_the_files_of_another_run(
    run_dir: RunDir, folder: str
) -> None:
    begin(run_dir)
    if folder == "scores":
        commit(run_dir, score(0))
    else:
        write_generation(run_dir, GenerationRecord(0, (), ()))
    spoil(run_dir, "run.json", "torn")
    before = (run_dir.path / "run.json").read_bytes()
    with pytest.raises(RunDirError, match=rf"holds {folder}/.* of another run"):
        begin(RunDir(run_dir.url), {**RECIPE, "search.seed": 1})
    assert (run_dir.path / "run.json").read_bytes() == before
    assert begin(RunDir(run_dir.url)) is True, (
        "the refused run has spoiled the directory for its owner"
    )


def test_a_torn_identity_without_scores_is_written_again(run_dir: RunDir) -> None:
    begin(run_dir)
    spoil(run_dir, "run.json", "torn")
    assert begin(RunDir(run_dir.url)) is False
    assert begin(RunDir(run_dir.url)) is True


def test_a_file_in_place_of_the_directory_is_one_clear_message(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("x")
    for url in (place, place / "below"):
        with pytest.raises(
            RunDirError, match=r"^--run-dir: expected a directory that can be written, got"
        ):
            RunDir(str(url)).create()


def test_reading_below_a_file_is_no_stack_trace(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("x")
    run_dir = RunDir(str(place))
    assert run_dir.read_json("run.json") is None
    assert run_dir.read_or_skip("winner.json") is None


def test_a_place_that_cannot_be_written_is_one_clear_message(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path))
    (tmp_path / "winner.json").mkdir()
    with pytest.raises(
        RunDirError, match=r"^--run-dir: cannot write .*winner.json.*run again to resume"
    ):
        run_dir.write_json("winner.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["winner.json"]


# --- generations


def test_generations_come_back_oldest_first_and_a_spoiled_one_is_skipped(run_dir: RunDir) -> None:
    begin(run_dir)
    for index in (2, 0, 10, 1):
        write_generation(run_dir, GenerationRecord(index, (), (Survivor(CANDIDATE, 1.5, 1.5),)))
    assert [g.index for g in read_generations(run_dir)] == [0, 1, 2, 10]
    spoil(run_dir, "generations/0001.json", "torn")
    assert [g.index for g in read_generations(RunDir(run_dir.url))] == [0, 2, 10]
    write_generation(run_dir, GenerationRecord(1, (), (Survivor(CANDIDATE, 1.5, 1.5),)))
    assert [g.index for g in read_generations(RunDir(run_dir.url))] == [0, 1, 2, 10]


def test_a_driver_that_is_fenced_off_closes_no_generation(run_dir: RunDir) -> None:
    begin(run_dir)
    begin(RunDir(run_dir.url))
    with pytest.raises(FencedError):
        write_generation(run_dir, GenerationRecord(0, (), ()))
    assert run_dir.names("generations") == []


def test_claims_are_ordered_by_number_whatever_the_clock_says(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    drivers = []
    for now in (1e9, 5e8, 2e9, 0.0):
        monkeypatch.setattr("time.time", lambda now=now: now)
        drivers.append(RunDir(run_dir.url))
        begin(drivers[-1])
    for old in drivers[:-1]:
        with pytest.raises(FencedError):
            old.require_ownership()
    drivers[-1].require_ownership()


def test_a_torn_claim_counts_as_one(run_dir: RunDir) -> None:
    older, newer = RunDir(run_dir.url), RunDir(run_dir.url)
    begin(older)
    begin(newer)
    spoil(run_dir, newer.names("drivers")[-1], "torn")
    with pytest.raises(FencedError):
        older.require_ownership()
    begin(RunDir(run_dir.url))
    with pytest.raises(FencedError):
        newer.require_ownership()


def test_who_only_reads_owns_nothing_and_is_never_fenced_off(run_dir: RunDir) -> None:
    begin(run_dir)
    reader = RunDir(run_dir.url)
    begin(RunDir(run_dir.url))
    reader.require_ownership()
    assert dict(scores_of(reader).load()) == {}


def test_a_secret_in_the_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(
        RunDirError, match=r"--run-dir: expected a URL without credentials, got s3://\*\*\*@bucket"
    ) as caught:
        RunDir("s3://key:secret@bucket/run")
    assert "secret" not in str(caught.value)


def test_storage_that_cannot_be_written_is_one_clear_message() -> None:
    for url in ("https://example.com/run", "zip://run"):
        with pytest.raises(
            RunDirError,
            match=rf"--run-dir: .* can be written, got {url}: this kind of storage cannot$",
        ):
            RunDir(url).create()


def test_what_storage_cannot_do_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(str(tmp_path / "run"), patience_seconds=60)

    def cannot(*arguments: Any) -> bytes:
        raise NotImplementedError

    monkeypatch.setattr(run_dir, "_write_once", cannot)
    with pytest.raises(RunDirError, match="cannot write"):
        run_dir.write_bytes("report.html", b"x")


# --- storage that is away


class FlakyRunDir(RunDir):
    """Storage that fails ``failures`` times with ``error``, then works."""

    def __init__(self, url: str, error: Exception, failures: int, patience_seconds: float):
        super().__init__(url, patience_seconds=patience_seconds)
        self.create()
        self.error, self.left = error, failures

    def _write_once(self, target: Any, data: bytes) -> None:
        if getattr(self, "left", 0):
            self.left -= 1
            raise self.error
        super()._write_once(target, data)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), ConnectionError("away"), TimeoutError("slow")]
)
def test_storage_that_comes_back_costs_nothing_but_time(
    tmp_path: Path, error: Exception, caplog: Any
) -> None:
    run_dir = FlakyRunDir(str(tmp_path), error, failures=2, patience_seconds=60)
    with caplog.at_level(logging.WARNING):
        commit(run_dir, score(0))
    assert len(scores_of(RunDir(str(tmp_path))).load()) == 1
    assert [r.message for r in caplog.records if "storage.patience_seconds" in r.message], (
        "nobody was told"
    )


def test_storage_that_stays_away_ends_in_one_clear_message(tmp_path: Path) -> None:
    run_dir = FlakyRunDir(
        str(tmp_path), OSError(errno.ENOSPC, "full"), failures=99, patience_seconds=1
    )
    with pytest.raises(RunDirError, match=r"cannot write .*full.*run again to resume"):
        commit(run_dir, score(0))
    assert run_dir.left < 98, "it did not try again"


def test_a_file_that_cannot_be_read_now_is_not_taken_for_a_corrupt_one(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path))
    run_dir.create()
    (tmp_path / "winner.json").mkdir()  # reading it is an error of the storage
    with pytest.raises(RunDirError, match=r"cannot read .*winner\.json") as caught:
        run_dir.read_or_skip("winner.json")
    assert not isinstance(caught.value, CorruptFileError)


def test_what_waiting_does_not_mend_is_said_at_once(tmp_path: Path) -> None:
    run_dir = FlakyRunDir(
        str(tmp_path), PermissionError("forbidden"), failures=1, patience_seconds=60
    )
    with pytest.raises(RunDirError, match="forbidden"):
        commit(run_dir, score(0))
