"""The loop, over scorers that are a plain function: same bytes whoever scores, in any order,
interrupted or not."""

import json
import math
import re
import uuid
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import (
    GEOMETRY,
    NEEDLE_SETS,
    NUM_SAMPLES,
    TARGET_LENGTH,
    KilledError,
    ToyScorers,
    ledger_of,
    toy_nll,
    toy_recipe,
    toy_run,
    without_racing,
)

from longrope2_ray.errors import StoppedError
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.rope.factors import factors_from_json
from longrope2_ray.search.scores import (
    SEARCH_SET,
    NeedleSet,
    NeedleSummary,
    Score,
    Unit,
    UnitScore,
    perplexity,
    report_set,
)
from longrope2_ray.search.status import Status, read_status
from longrope2_ray.search.winner import read_generations, read_winner
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.workers.done import Done


def memory() -> RunDir:
    return RunDir(f"memory://{uuid.uuid4().hex}/run")


def winner_bytes(run_dir: RunDir) -> bytes:
    return bytes((run_dir.path / "winner.json").read_bytes())


def finished(scorers: ToyScorers, recipe: Recipe | None = None, racing: bool = True) -> RunDir:
    run_dir = memory()
    with without_racing(not racing):
        toy_run(recipe or toy_recipe(), run_dir, scorers).run()
    return run_dir


@cache
def undisturbed(**search: Any) -> bytes:
    return winner_bytes(finished(ToyScorers(), toy_recipe(**search)))


@pytest.mark.parametrize("racing", [True, False])
@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("shuffle", [None, 1])
def test_the_winner_is_the_same_bytes_for_any_number_of_scorers_and_order(
    width: int, shuffle: int | None, racing: bool
) -> None:
    run_dir = finished(ToyScorers(width, shuffle, batch=3), racing=racing)
    assert winner_bytes(run_dir) == undisturbed()


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_factor": "search"},
        {"critical_dims": (0, 0)},
        {"preset": "authors"},
        {"preset": "longrope"},
    ],
    ids=str,
)
def test_the_winner_is_the_same_bytes_in_every_kind_of_search(changes: dict[str, Any]) -> None:
    raced = winner_bytes(finished(ToyScorers(3, shuffle=4, batch=2), toy_recipe(**changes)))
    assert raced == winner_bytes(finished(ToyScorers(), toy_recipe(**changes), racing=False))


@settings(max_examples=8, deadline=None)
@given(
    kills=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    width=st.sampled_from([1, 2, 5]),
    shuffle=st.integers(0, 99),
    racing=st.booleans(),
)
def test_kills_at_any_unit_change_no_byte_and_no_unit_is_scored_twice(
    kills: list[int], width: int, shuffle: int, racing: bool
) -> None:
    run_dir, recipe, scored = memory(), toy_recipe(), list[tuple[str, str]]()
    for n in (*kills, None):
        scorers = ToyScorers(width, shuffle, kill_after=n, batch=3)
        try:
            with without_racing(not racing):
                toy_run(recipe, RunDir(run_dir.url), scorers).run()
        except KilledError:
            assert n is not None
        scored += scorers.scored
    assert winner_bytes(run_dir) == undisturbed()
    assert len(scored) == len(set(scored))


def test_a_kill_after_every_single_unit_changes_no_byte() -> None:
    run_dir, recipe = memory(), toy_recipe(iterations=0)
    for lives in range(1000):
        try:
            toy_run(recipe, RunDir(run_dir.url), ToyScorers(2, shuffle=lives, kill_after=1)).run()
        except KilledError:
            continue
        break
    assert lives > 20
    assert winner_bytes(run_dir) == undisturbed(iterations=0)


def test_generations_are_the_same_bytes_after_a_kill(tmp_path: Path) -> None:
    whole, killed = RunDir(str(tmp_path / "whole")), RunDir(str(tmp_path / "killed"))
    toy_run(toy_recipe(), whole, ToyScorers()).run()
    with pytest.raises(KilledError):
        toy_run(toy_recipe(), killed, ToyScorers(5, shuffle=1, kill_after=70)).run()
    toy_run(toy_recipe(), killed, ToyScorers(2, shuffle=2)).run()
    files = [sorted((run.path / "generations").iterdir()) for run in (whole, killed)]
    assert (
        [p.name for p in files[0]]
        == [p.name for p in files[1]]
        == [f"{i:04d}.json" for i in range(4)]
    )
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]


def test_a_finished_run_scores_nothing_again_and_keeps_its_bytes() -> None:
    run_dir = finished(ToyScorers(3, shuffle=0))
    before, again = winner_bytes(run_dir), ToyScorers(3)
    toy_run(toy_recipe(), RunDir(run_dir.url), again).run()
    assert not again.submitted
    assert winner_bytes(run_dir) == before


def test_a_spoiled_segment_costs_its_units_and_no_byte() -> None:
    run_dir = memory()
    with pytest.raises(KilledError):
        toy_run(toy_recipe(), run_dir, ToyScorers(kill_after=60)).run()
    victim = max((run_dir.path / "scores").iterdir(), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-40])
    toy_run(toy_recipe(), RunDir(run_dir.url), ToyScorers()).run()
    assert winner_bytes(run_dir) == undisturbed()


def test_every_unit_is_submitted_once_and_committed_before_the_next_kill() -> None:
    run_dir, scorers = memory(), ToyScorers(5, shuffle=3, kill_after=33)
    with pytest.raises(KilledError):
        toy_run(toy_recipe(), run_dir, scorers).run()
    assert set(scorers.submitted.values()) == {1}
    assert set(ledger_of(run_dir)) == set(scorers.scored)


def test_racing_saves_units_and_says_how_many() -> None:
    raced, whole = ToyScorers(), ToyScorers()
    run_dir = finished(raced)
    finished(whole, racing=False)
    saved = len(whole.scored) - len(raced.scored)
    assert saved > 0
    status = read_status(run_dir)
    assert status is not None
    assert status.units_eliminated == saved
    assert status.units_done == len(raced.scored)


def test_the_status_of_a_finished_run_says_so() -> None:
    run_dir = finished(ToyScorers(2, shuffle=0))
    status = read_status(run_dir)
    assert status is not None
    assert (status.state, status.generation, status.iterations) == ("finished", 3, 3)
    assert (status.units_left, status.eta_seconds) == (0, 0.0)
    winner = read_winner(run_dir)
    assert winner is not None
    assert status.best_ppl == winner.search.ppl
    assert status.median_ppl is not None
    assert winner.search.ppl is not None
    assert winner.search.ppl <= status.median_ppl


def test_observers_see_every_generation_and_one_end() -> None:
    events: list[tuple[str, int, str]] = []

    def observe(status: Status, event: str) -> None:
        if event != "units":
            events.append((event, status.generation, status.state))

    toy_run(toy_recipe(), memory(), ToyScorers(), [observe]).run()
    generations = [("generation", index, "searching") for index in range(4)]
    assert events == [*generations, ("end", 3, "finished")]


# --- the winner


def test_the_winner_is_the_best_of_everything_that_was_asked() -> None:
    run_dir = finished(ToyScorers(), racing=False)
    winner = read_winner(run_dir)
    assert winner is not None
    totals: dict[str, float] = {}
    for generation in read_generations(run_dir):
        for candidate in generation.candidates:
            units = [
                Unit(candidate.id, SEARCH_SET, sample, "", candidate.factors)
                for sample in range(NUM_SAMPLES)
            ]
            totals[candidate.id] = math.fsum(toy_nll(unit) for unit in units)
    assert winner.candidate.id == min(totals, key=lambda id: (totals[id], id))
    num_tokens = sum(NEEDLE_SETS[SEARCH_SET].num_tokens)
    assert winner.search.ppl == perplexity(min(totals.values()), num_tokens)


def test_winner_json_holds_the_vector_and_the_table_and_no_time() -> None:
    run_dir = finished(ToyScorers())
    winner, text = read_winner(run_dir), winner_bytes(run_dir).decode()
    assert winner is not None
    factors = factors_from_json(text, "winner.json").require_length(GEOMETRY.num_cosines)
    assert factors.critical_dim == winner.candidate.critical_dim in range(3, 8)
    assert factors.monotone
    assert winner.geometry.theoretical_critical_dim == GEOMETRY.theoretical_critical_dim
    assert [row.method for row in winner.report] == [
        "unscaled",
        "pi",
        "ntk",
        "llama3",
        "yarn",
        "longrope2",
    ]
    assert {row.length for row in winner.report} == {TARGET_LENGTH}
    assert all(len(row.needles.nll_per_sample) == NUM_SAMPLES for row in winner.report)
    assert not re.search(r"second|time|started|elapsed|scorer", text)


def test_tables_compare_all_methods_at_each_attention_factor_but_unscaled_at_one() -> None:
    recipe = toy_recipe(report={"attention_factors": [1.0, "su", "search"]}, attention_factor=1.05)
    winner = read_winner(finished(ToyScorers(4), recipe))
    assert winner is not None
    assert list(dict.fromkeys(row.compared_at for row in winner.report)) == pytest.approx(
        [1.0, math.sqrt(1.25), 1.05]
    )
    assert len(winner.report) == 3 * 6
    for row in winner.report:
        assert row.attention_factor == (1.0 if row.method == "unscaled" else row.compared_at)


def test_equal_vectors_share_their_scores() -> None:
    scorers = ToyScorers()
    recipe = toy_recipe(report={"attention_factors": [1.0, 1.1], "methods": ["unscaled", "pi"]})
    finished(scorers, recipe)
    reported = [key for key in scorers.scored if key[1].startswith(report_set(TARGET_LENGTH))]
    assert len(reported) == 3 * NUM_SAMPLES  # unscaled once, PI at both factors


def test_rcd_methods_are_reported_at_the_found_critical_dim() -> None:
    recipe = toy_recipe(report={"methods": ["yarn-rcd", "ntk-rcd", "longrope2"]})
    winner = read_winner(finished(ToyScorers(), recipe))
    assert winner is not None
    assert {row.critical_dim for row in winner.report} == {winner.candidate.critical_dim}


# --- scores that are not finite


def test_a_candidate_with_a_score_that_is_not_finite_never_wins_and_the_run_goes_on() -> None:
    def nll(unit: Unit) -> float | None:
        best = unit.needle_set == SEARCH_SET and unit.factors.values[-1] > 6.5
        return None if best and unit.sample == 1 else toy_nll(unit)

    whole = finished(ToyScorers(nll=nll), racing=False)
    winner = read_winner(whole)
    assert winner is not None
    assert winner.factors.values[-1] <= 6.5
    assert None not in winner.search.nll_per_sample
    ids = {
        s.candidate.id: s.candidate.tail[-1] for g in read_generations(whole) for s in g.survivors
    }
    assert max(ids.values()) <= 6.5
    raced = finished(ToyScorers(3, shuffle=1, nll=nll))
    assert winner_bytes(raced) == winner_bytes(whole)


@pytest.mark.parametrize("racing", [True, False])
def test_no_finite_score_at_all_is_a_runtime_error_with_a_hint(racing: bool) -> None:
    with pytest.raises(RuntimeError, match=r"no candidate has a finite score.*model.dtype"):
        finished(ToyScorers(2, nll=lambda unit: None), racing=racing)


def test_a_baseline_with_a_score_that_is_not_finite_is_a_row_without_perplexity() -> None:
    def nll(unit: Unit) -> float | None:
        return None if unit.factors.source == "unscaled" and unit.sample == 0 else toy_nll(unit)

    winner = read_winner(finished(ToyScorers(nll=nll)))
    assert winner is not None
    unscaled = next(row for row in winner.report if row.method == "unscaled")
    assert unscaled.needles.ppl is None
    assert unscaled.needles.nll_per_sample[0] is None
    assert None not in unscaled.needles.nll_per_sample[1:]


# --- small functions


def test_perplexity_is_the_exponential_of_the_mean_or_none() -> None:
    assert perplexity(7 * math.log(2.0), 7) == pytest.approx(2.0)
    assert perplexity(0.0, 7) == 1.0
    assert perplexity(math.inf, 7) is perplexity(7e5, 7) is None


def test_a_summary_counts_what_was_answered_right() -> None:
    scores = [Score("v", str(s), "search", s, float(s), 7, s < 1) for s in range(4)]
    summary = NeedleSummary.of(scores, NEEDLE_SETS[SEARCH_SET])
    body = summary.to_json()
    assert body == {
        "ppl": math.exp(6 / 28),
        "accuracy": 0.25,
        "nll_per_sample": [0.0, 1.0, 2.0, 3.0],
        "tokens_per_sample": [7, 7, 7, 7],
        "correct_per_sample": [True, False, False, False],
        "depth_per_sample": [0.0, 0.25, 0.5, 0.75],
    }
    assert NeedleSummary.from_json(json.loads(json.dumps(body))) == summary


def test_a_summary_with_a_penalty_has_no_perplexity() -> None:
    scores = [
        Score("v", "a", "search", 0, None, 7, False),
        Score("v", "b", "search", 1, 1.0, 7, True),
    ]
    needle_set = NeedleSet("search", ("a", "b"), (7, 7), (0.0, 0.5))
    summary = NeedleSummary.of(scores, needle_set)
    assert summary.ppl is None
    assert summary.by_depth()["0"].ppl is None
    assert summary.by_depth()["0.5"].ppl == math.exp(1 / 7)


class InterruptedScorers(ToyScorers):
    """Somebody presses Ctrl-C while units are under way; one of them has come in just then."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(width=3, kill_after=7)
        self.error = error

    def wait(self) -> list[Done[Unit, UnitScore]]:
        try:
            return super().wait()
        except KilledError:
            raise self.error from None

    def flush(self) -> list[Done[Unit, UnitScore]]:
        return [self._complete()]


@pytest.mark.parametrize(
    ("error", "state"),
    [(KeyboardInterrupt(), "interrupted"), (StoppedError("no memory"), "stopped")],
)
def test_a_search_that_is_ended_early_commits_what_has_come_in(
    error: BaseException, state: str
) -> None:
    run_dir, scorers = memory(), InterruptedScorers(error)
    with pytest.raises(type(error)):
        toy_run(toy_recipe(), run_dir, scorers).run()
    assert len(scorers.scored) == 8
    assert set(ledger_of(run_dir)) == set(scorers.scored)
    status = read_status(run_dir)
    assert status is not None
    assert (status.state, status.units_done) == (state, 8)


class InterruptedDir(RunDir):
    """Somebody presses Ctrl-C in the middle of a commit: before the file is there, or just
    after."""

    when = ""

    def write_json(self, name: str, payload: Mapping[str, Any], indent: int | None = 1) -> None:
        when = self.when if name.startswith("scores/") else ""
        if when:
            self.when = ""
        if when == "before":
            raise KeyboardInterrupt
        super().write_json(name, payload, indent)
        if when == "after":
            raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_commit_that_is_interrupted_is_made_once(when: str) -> None:
    run_dir, scorers = InterruptedDir(memory().url), ToyScorers(width=3)
    run_dir.when = when
    with pytest.raises(KeyboardInterrupt):
        toy_run(toy_recipe(), run_dir, scorers).run()
    assert len(run_dir.names("scores")) == 1
    assert set(ledger_of(run_dir)) == set(scorers.scored)
    status = read_status(run_dir)
    assert status is not None
    assert status.state == "interrupted"


@pytest.mark.parametrize("error", [BrokenPipeError("nobody reads"), SystemExit(1)])
def test_an_observer_that_fails_ends_no_search(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def blind(status: Status, event: str) -> None:
        raise error

    seen: list[str] = []
    run_dir = memory()
    toy_run(
        toy_recipe(), run_dir, ToyScorers(), [blind, lambda status, event: seen.append(event)]
    ).run()
    assert winner_bytes(run_dir) == winner_bytes(finished(ToyScorers()))
    assert seen[-1] == "end"
    assert [
        record.getMessage()
        for record in caplog.records
        if "the search goes on" in record.getMessage()
    ] == [f"{type(error).__name__}: {error}; the search goes on"]
