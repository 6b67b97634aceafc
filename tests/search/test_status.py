"""The status of a search: what it has cost, and what is left."""

import copy
from pathlib import Path

import pytest
from toy import ToyScorers, ledger_of, toy_recipe, toy_run

from longrope2_ray.search.scores import SEARCH_SET, SKIPPED_SET, NeedleSet, Score, report_set
from longrope2_ray.search.status import Status, StatusBoard
from longrope2_ray.storage.rundir import RunDir

TABLES = report_set(64)


def needle_set(name: str, equivalents: float) -> NeedleSet:
    return NeedleSet(name, ("a", "b"), (7, 7), (0.0, 0.0), equivalents)


def score(needle_set: str, sample: int) -> Score:
    return Score("vector", f"{needle_set}/{sample}", needle_set, sample, 1.0, 7, True, 1.0)


@pytest.fixture
def board(tmp_path: Path) -> StatusBoard:
    costs = {SEARCH_SET: 1.0, SKIPPED_SET: 0.25, TABLES: 2.0}
    sets = {name: needle_set(name, cost) for name, cost in costs.items()}
    return StatusBoard(Status("toy", "searching"), RunDir(str(tmp_path)), [], sets)


def test_cost_and_time_go_by_the_cost_of_units(board: StatusBoard) -> None:
    board.committed([score(SKIPPED_SET, 0), score(SKIPPED_SET, 1), score(SEARCH_SET, 0)])
    board.committed([score(TABLES, 0)])
    board.refresh(3, {SEARCH_SET: 3, SKIPPED_SET: 2}, [("vector", TABLES)], {}, {})
    status = board.status
    assert status.equivalents == 1.5, "the tables are no part of the search"
    assert status.equivalents_left == 3.5
    assert status.eta_seconds == pytest.approx((3.5 + 2.0) * status.elapsed_seconds / 3.5)
    assert status.units_left == 3


def test_what_racing_spared_so_far_it_will_spare(board: StatusBoard) -> None:
    board.asked([("vector", SEARCH_SET)])
    board.committed([score(SEARCH_SET, 0)])
    board.status.units_eliminated = 3
    board.refresh(4, {SEARCH_SET: 4}, [], {}, {})
    assert board.status.equivalents_left == 1.0


def test_there_is_no_estimate_before_the_first_unit(board: StatusBoard) -> None:
    board.refresh(4, {SEARCH_SET: 4}, [("vector", TABLES)], {}, {})
    assert board.status.eta_seconds is None
    assert board.status.equivalents_left == 4.0


def test_a_search_spends_what_is_left_until_nothing_is(tmp_path: Path) -> None:
    seen: list[Status] = []
    run_dir = RunDir(str(tmp_path))
    loop = toy_run(
        toy_recipe(), run_dir, ToyScorers(), [lambda status, event: seen.append(copy.copy(status))]
    )
    loop.run()
    spent = [status.equivalents for status in seen]
    left = [status.equivalents_left for status in seen]
    assert spent == sorted(spent)
    assert all(amount is not None and amount >= 0 for amount in left)
    assert left[0]
    assert left[-1] == 0
    units = [score for score in ledger_of(run_dir).values() if score.needle_set == SEARCH_SET]
    assert spent[-1] == len(units)
