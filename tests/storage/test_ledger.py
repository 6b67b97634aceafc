"""The ledger holds any row with a key: committed once, whole or not at all, on a disk or in a
store."""

import json
import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope2_ray.errors import FencedError
from longrope2_ray.storage.ledger import Ledger
from longrope2_ray.storage.rundir import RunDir

SPOILED = ["torn", "empty", "edited", "binary", "other json", "no checksum"]


@dataclass(frozen=True)
class Answer:
    """A row that has nothing to do with needles."""

    question: str
    number: float | None

    @property
    def key(self) -> str:
        return self.question


@pytest.fixture(params=["local", "memory"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
    local = request.param == "local"
    place = RunDir(str(tmp_path / "run") if local else f"memory://{uuid.uuid4().hex}/run")
    place.create()
    place.take_over()
    return place


def ledger(run_dir: RunDir) -> Ledger[Answer]:
    return Ledger(run_dir, "answers", Answer)


def fresh(run_dir: RunDir) -> dict[str, Answer]:
    """What another process reads."""
    return {str(key): row for key, row in ledger(RunDir(run_dir.url)).load().items()}


def answers(*numbers: float | None) -> list[Answer]:
    return [Answer(f"q{i}", number) for i, number in enumerate(numbers)]


def with_three_chunks(run_dir: RunDir) -> Ledger[Answer]:
    written = ledger(run_dir)
    for row in answers(0.0, 1.5, 2.0):
        written.commit([row])
    return written


def chunks(run_dir: RunDir) -> list[str]:
    return sorted(path.name for path in (run_dir.path / "answers").iterdir())


def spoil(run_dir: RunDir, chunk: str, how: str) -> None:
    path = run_dir.path / "answers" / chunk
    data = path.read_bytes()
    path.write_bytes(
        {
            "torn": data[: len(data) // 2],
            "empty": b"",
            "edited": data.replace(b"answ", b"ansv").replace(b"q", b"r"),
            "binary": b"\x00\xff\xfe" * 20,
            "other json": b"[1, 2]",
            "no checksum": b'{"schema_version": 2, "rows": []}',
        }[how]
    )


def test_committed_rows_come_back_by_key(run_dir: RunDir) -> None:
    written = ledger(run_dir)
    written.commit(answers(1.5, None))
    written.commit([])
    written.commit([Answer("other", 0.1 + 0.2)])
    assert fresh(run_dir) == dict(written) == {"q0": Answer("q0", 1.5), "q1": Answer("q1", None),
                                               "other": Answer("other", 0.1 + 0.2)}  # fmt: skip
    assert len(chunks(run_dir)) == 2


@settings(deadline=None)
@given(numbers=st.lists(st.floats(0, 1e300) | st.none(), min_size=1, max_size=20))
def test_numbers_come_back_bit_by_bit(numbers: list[float | None]) -> None:
    place = RunDir(f"memory://{uuid.uuid4().hex}/run")
    ledger(place).commit(answers(*numbers))
    assert [row.number for row in fresh(place).values()] == numbers


def test_a_row_is_committed_once_and_only_new_ones_are_returned(run_dir: RunDir) -> None:
    written = ledger(run_dir)
    assert written.commit([*answers(1.0), *answers(1.0)]) == answers(1.0)
    assert written.commit(answers(1.0)) == []
    assert written.commit(answers(1.0, 2.0)) == answers(1.0, 2.0)[1:]
    assert len(chunks(run_dir)) == 2
    assert len(fresh(run_dir)) == 2


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_chunk_is_named_and_the_rest_is_used(
    run_dir: RunDir, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    with_three_chunks(run_dir)
    victim = chunks(run_dir)[1]
    held = json.loads((run_dir.path / "answers" / victim).read_bytes())["rows"][0]["question"]
    spoil(run_dir, victim, how)
    with caplog.at_level(logging.WARNING, "longrope2"):
        assert set(fresh(run_dir)) == {"q0", "q1", "q2"} - {held}
    assert [victim in record.getMessage() for record in caplog.records] == [True]


def test_compaction_leaves_one_chunk_with_the_same_rows(run_dir: RunDir) -> None:
    written = with_three_chunks(run_dir)
    written.compact()
    only = chunks(run_dir)
    assert len(only) == 1
    assert fresh(run_dir) == dict(written)
    written.compact()
    assert chunks(run_dir) == only


def test_compaction_leaves_a_spoiled_chunk_where_it_is(run_dir: RunDir) -> None:
    with_three_chunks(run_dir)
    victim = chunks(run_dir)[0]
    spoil(run_dir, victim, "torn")
    resumed = ledger(RunDir(run_dir.url)).load()
    resumed.compact()
    assert victim in chunks(run_dir)
    assert len(chunks(run_dir)) == 2
    assert fresh(run_dir) == dict(resumed)


def test_compaction_makes_up_for_a_chunk_that_was_spoiled_since_it_was_written(
    run_dir: RunDir,
) -> None:
    written = with_three_chunks(run_dir)
    spoil(run_dir, chunks(run_dir)[0], "torn")
    written.compact()
    assert fresh(run_dir) == dict(written)


def test_a_kill_within_compaction_loses_nothing(run_dir: RunDir) -> None:
    written = with_three_chunks(run_dir)
    written._write(written.values())  # the new chunk is whole, the old ones are still there
    torn = run_dir.path / "answers" / f"{uuid.uuid4().hex}.json.1234abcd.tmp"
    torn.write_bytes(b"half a chu")
    resumed = ledger(RunDir(run_dir.url)).load()
    assert dict(resumed) == dict(written)
    resumed.compact()
    assert fresh(run_dir) == dict(written)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_commit_that_was_interrupted_is_made_once(run_dir: RunDir, when: str) -> None:
    class InterruptedDir(RunDir):
        def write_json(self, name: str, payload: Mapping[str, Any], indent: int | None = 1) -> None:
            if when == "after":
                super().write_json(name, payload, indent)
            raise KeyboardInterrupt

    place = InterruptedDir(run_dir.url)
    written = ledger(place)
    with pytest.raises(KeyboardInterrupt):
        written.commit(answers(1.0))
    monkey = RunDir(run_dir.url)
    written._run_dir = monkey
    written.load()
    written.commit(answers(1.0))
    assert len(chunks(run_dir)) == 1
    assert fresh(run_dir) == {"q0": Answer("q0", 1.0)}


def test_chunks_replaced_while_they_are_read_are_found_in_their_new_place(run_dir: RunDir) -> None:
    written = with_three_chunks(run_dir)

    class Reader(RunDir):
        compacted = False

        def names(self, folder: str) -> list[str]:
            found = super().names(folder)
            if not self.compacted:  # right after the listing
                self.compacted = True
                written.compact()
            return found

    assert len(ledger(Reader(run_dir.url)).load()) == 3


def test_compaction_keeps_chunks_of_another_process(run_dir: RunDir) -> None:
    ours, theirs = ledger(run_dir), ledger(RunDir(run_dir.url))
    rows = answers(0.0, 1.0, 2.0)
    ours.commit(rows[:1])
    ours.commit(rows[1:2])
    theirs.commit(rows[2:])
    ours.compact()
    assert len(fresh(run_dir)) == 3


def test_a_newer_driver_fences_the_older_one_off(run_dir: RunDir) -> None:
    older = with_three_chunks(run_dir)
    newer = RunDir(run_dir.url)
    newer.take_over()
    before = chunks(run_dir)
    for write in (lambda: older.commit([Answer("late", 1.0)]), older.compact):
        with pytest.raises(FencedError, match=rf"process {os.getpid()} on .* has taken over"):
            write()
    assert chunks(run_dir) == before
    ledger(newer).commit([Answer("late", 1.0)])
    assert len(fresh(run_dir)) == 4


def test_a_chunk_names_its_run(run_dir: RunDir) -> None:
    run_dir.open("search", {"search.seed": 0}, {"model": "abc"}, {"name": "x"}, {}, ["answers"])
    with_three_chunks(run_dir)
    (run_dir.path / "run.json").unlink()
    same = {"search.seed": 0}, {"model": "abc"}, {"name": "x"}, {}, ["answers"]
    assert RunDir(run_dir.url).open("search", *same) is True
