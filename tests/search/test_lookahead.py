"""Looking ahead fills idle scorers and changes no byte of the result."""

import itertools
import uuid
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import (
    NUM_SAMPLES,
    TARGET_LENGTH,
    KilledError,
    ToyScorers,
    ledger_of,
    result_bytes,
    toy_nll,
    toy_recipe,
    toy_run,
    without_racing,
)

from longrope2_ray.search.scores import SEARCH_SET, Unit, report_set
from longrope2_ray.search.status import Status, read_status
from longrope2_ray.search.winner import read_generations, read_winner
from longrope2_ray.storage.rundir import RunDir

KINDS: dict[str, dict[str, Any]] = {
    "exact": {},
    "off": {},
    "authors": {"preset": "authors"},
    "longrope": {"preset": "longrope"},
    "authors, temperature": {"preset": "authors", "attention_factor": "search"},
    "many iterations": {"iterations": 6, "num_offspring": 3},
    "tables": {
        "report": {
            "attention_factors": [1.0, "search"],
            "methods": ["unscaled", "pi", "yarn-rcd", "longrope2"],
            "lengths": [TARGET_LENGTH, 2 * TARGET_LENGTH],
        },
        "attention_factor": "search",
    },
}


def memory() -> RunDir:
    return RunDir(f"memory://{uuid.uuid4().hex}/run")


def finished(scorers: ToyScorers, kind: str = "exact", look_ahead: bool = True) -> RunDir:
    run_dir = memory()
    with without_racing(kind == "off"):
        toy_run(toy_recipe(look_ahead=look_ahead, **KINDS[kind]), run_dir, scorers).run()
    return run_dir


@cache
def undisturbed(kind: str) -> dict[str, bytes]:
    """One scorer, never looking ahead."""
    return result_bytes(finished(ToyScorers(), kind, look_ahead=False))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None)  # for each of the settings above
@given(
    lives=st.lists(st.tuples(st.integers(0, 80), st.booleans()), max_size=3),
    width=st.sampled_from([2, 5, 20, 100]),
    shuffle=st.integers(0, 99),
    stragglers=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_looking_ahead_changes_no_byte_for_any_order_kill_and_number_of_scorers(
    kind: str, lives: list[tuple[int, bool]], width: int, shuffle: int, stragglers: float
) -> None:
    run_dir, scored = memory(), list[tuple[str, str, int]]()
    for kill_after, look_ahead in [*lives, (None, True)]:
        scorers = ToyScorers(width, shuffle, kill_after=kill_after, batch=3, stragglers=stragglers)
        recipe = toy_recipe(look_ahead=look_ahead, **KINDS[kind])
        try:
            with without_racing(kind == "off"):
                toy_run(recipe, RunDir(run_dir.url), scorers).run()
        except KilledError:
            assert kill_after is not None
        scored += scorers.scored
    assert result_bytes(run_dir) == undisturbed(kind)
    assert len(scored) == len(set(scored))


def test_a_kill_after_every_unit_changes_no_byte_while_looking_ahead() -> None:
    run_dir, lives = memory(), 0
    while not read_winner(run_dir):
        lives += 1
        scorers = ToyScorers(9, shuffle=lives, kill_after=1, stragglers=0.3)
        try:
            toy_run(toy_recipe(), RunDir(run_dir.url), scorers).run()
        except KilledError:
            assert len(scorers.scored) == 1
    assert lives > 50
    assert result_bytes(run_dir) == undisturbed("exact")


def test_penalties_change_no_byte_while_looking_ahead() -> None:
    def nll(unit: Unit) -> float | None:
        return None if hash(unit.factors.values[-1]) % 12 == unit.sample else toy_nll(unit)

    for racing in (True, False):
        results = []
        for look_ahead in (False, True):
            run_dir = memory()
            scorers = ToyScorers(20, shuffle=1, nll=nll, stragglers=0.2)
            with without_racing(not racing):
                toy_run(toy_recipe(look_ahead=look_ahead), run_dir, scorers).run()
            results.append(result_bytes(run_dir))
        assert results[0] == results[1]


def generation_keys(run_dir: RunDir, scorers: ToyScorers) -> list[list[tuple[str, str]]]:
    """Units of the search by the generation that asked for them."""
    ids = [{c.id for c in generation.candidates} for generation in read_generations(run_dir)]
    return [[key for key in scorers.scored if key[0] in group] for group in ids]


def test_children_are_scored_before_the_last_unit_of_the_generation_before_them() -> None:
    early = {}
    for look_ahead in (False, True):
        scorers = ToyScorers(20, stragglers=0.2)
        generations = generation_keys(finished(scorers, "off", look_ahead), scorers)
        early[look_ahead] = [
            key
            for before, keys in itertools.pairwise(generations)
            for key in keys
            if scorers.submitted_after[key] <= scorers.scored.index(before[-1])
        ]
    assert len(early[True]) >= 10
    assert not early[False]


def test_rows_of_the_tables_that_depend_on_nobody_fill_the_first_tail() -> None:
    scorers = ToyScorers(20, stragglers=0.2)
    first = generation_keys(finished(scorers, "off"), scorers)[0]
    reported = [key for key in scorers.scored if key[1].startswith(report_set(TARGET_LENGTH))]
    early = [
        key for key in reported if scorers.submitted_after[key] <= scorers.scored.index(first[-1])
    ]
    assert len(early) == 5 * NUM_SAMPLES  # every method but LongRoPE2


def test_one_scorer_never_scores_ahead() -> None:
    on, off = ToyScorers(), ToyScorers()
    finished(on)
    finished(off, look_ahead=False)
    assert on.scored == off.scored


def test_units_ahead_of_a_finished_run_are_those_that_nobody_asked_for() -> None:
    scorers = ToyScorers(40, shuffle=3, stragglers=0.2)
    seen: list[int] = []

    def observe(status: Status, event: str) -> None:
        seen.append(status.units_ahead)

    run_dir = memory()
    toy_run(toy_recipe(), run_dir, scorers, [observe]).run()
    winner, status = read_winner(run_dir), read_status(run_dir)
    assert winner is not None
    assert status is not None
    asked = {c.id for generation in read_generations(run_dir) for c in generation.candidates}
    ledger = ledger_of(run_dir)
    sets = [score.needle_set for score in ledger.values()]
    strangers = sum(
        score.vector_id not in asked for score in ledger.values() if score.needle_set == SEARCH_SET
    )
    rows = {row.needles.nll_per_sample for row in winner.report}
    tables = sum(name != SEARCH_SET for name in sets) - len(rows) * NUM_SAMPLES
    assert tables >= 0
    assert status.units_ahead == strangers + tables > 0
    assert status.units_done == len(ledger)
    assert max(seen) >= status.units_ahead
    resumed = ToyScorers()
    toy_run(toy_recipe(), RunDir(run_dir.url), resumed).run()
    assert not resumed.submitted
    again = read_status(run_dir)
    assert again is not None
    assert (again.units_ahead, again.units_done) == (status.units_ahead, len(ledger))
