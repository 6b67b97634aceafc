"""The descent: its steps, what it starts from, and a whole search with it on the toy."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import (
    GEOMETRY,
    IDENTITY,
    NEEDLE_SETS,
    NUM_SAMPLES,
    TARGET_LENGTH,
    KilledError,
    ToyScorers,
    ledger_of,
    result_bytes,
    toy_nll,
    toy_recipe,
)

from longrope2_ray.errors import StoppedError
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.rope.baselines import PLAIN
from longrope2_ray.search.descent import Descent
from longrope2_ray.search.loop import SearchLoop
from longrope2_ray.search.scores import SKIPPED_SET, WIDE_SET, NeedleSet, descent_set, is_descent
from longrope2_ray.search.space import Candidate, SearchSpace
from longrope2_ray.search.starts import finalists, mean_of, starts
from longrope2_ray.storage.rundir import RunDir

RATIO = TARGET_LENGTH / GEOMETRY.original_length
STEPS = 6
IDEAL = np.concatenate([np.ones(5), np.linspace(3, 6, 11)])


def descend(start: np.ndarray, steps: int = 60, **settings: Any) -> np.ndarray:
    """Descend to the nearest non-decreasing vector to an ideal one, in logarithms."""
    arguments = {"low": 1.0, "high": 8.0, "num_steps": steps, "rate": 0.1, **settings}
    descent = Descent(start, **arguments)
    while not descent.finished:
        gap = np.log(descent.ask() / IDEAL)
        descent.tell([2 * gap, 2 * gap], num_tokens=14)
    return descent.ask()


def test_a_descent_arrives_where_the_score_is_lowest() -> None:
    found = descend(np.full(16, 4.0), steps=300)
    assert np.allclose(found, IDEAL, rtol=0.05)


@given(start=st.lists(st.floats(1, 8), min_size=16, max_size=16), seed=st.integers(0, 100))
def test_every_step_stays_non_decreasing_and_inside_the_bounds(
    start: list[float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    descent = Descent(np.array(start), low=1.0, high=8.0, num_steps=5, rate=0.5)
    while not descent.finished:
        descent.tell([rng.normal(size=16)], num_tokens=7)
        factors = descent.ask()
        assert np.all(np.diff(factors) >= 0)
        assert np.all((factors >= 1) & (factors <= 8 + 1e-9))


def test_kept_dimensions_keep_their_factors() -> None:
    start = np.linspace(1.0, 2.0, 16)
    found = descend(start, num_kept=6)
    assert np.allclose(found[:6], start[:6])
    assert not np.allclose(found[6:], start[6:], rtol=0.1)


def test_a_sample_without_a_gradient_is_left_out_and_none_at_all_stops() -> None:
    one, other = (Descent(np.full(4, 2.0), low=1, high=4, num_steps=2, rate=0.1) for _ in "ab")
    gradient = [1.0, -1.0, 0.5, 0.0]
    one.tell([gradient, ()], num_tokens=7)
    other.tell([gradient], num_tokens=7)
    assert np.array_equal(one.ask(), other.ask())
    with pytest.raises(StoppedError, match=r"no needle has a finite gradient.*model\.dtype"):
        one.tell([(), ()], num_tokens=0)
    other.tell([gradient], num_tokens=7)
    with pytest.raises(RuntimeError, match="finished"):
        other.tell([gradient], num_tokens=7)


def space_of(**search: Any) -> SearchSpace:
    return SearchSpace.from_recipe(GEOMETRY, toy_recipe(preset="default", **search).search)


def test_published_methods_and_constant_tails_are_what_it_starts_from() -> None:
    space = space_of()
    found = starts(GEOMETRY, space, TARGET_LENGTH, 1.1)
    assert len({candidate.id for candidate in found}) == len(found)
    vectors = [candidate.factors.values for candidate in found]
    for name in set(PLAIN) - {"unscaled"}:
        method = PLAIN[name](GEOMETRY, TARGET_LENGTH)
        assert any(np.allclose(vector, method) for vector in vectors), name
    dims = {candidate.critical_dim for candidate in found}
    assert dims >= set(space.critical_dims)
    assert all(candidate.attention_factor == 1.1 for candidate in found)


def test_the_result_is_raced_with_several_attention_factors_where_they_are_searched() -> None:
    result = Candidate.of_vector(np.linspace(1, 6, 16), RATIO, 1.1)
    other = Candidate.of_vector(np.linspace(1, 5, 16), RATIO, 1.1)
    searched, fixed = space_of(), space_of(attention_factor=1.05)
    first = list(finalists(result, [other], searched, RATIO))
    assert first[-1] is other
    factors = [candidate.attention_factor for candidate in first[:-1]]
    low, high = searched.attention_bounds
    assert factors == pytest.approx(
        [low + share * (high - low) for share in (1 / 4, 1 / 2, 3 / 4)], abs=1e-4
    )
    assert [c.attention_factor for c in finalists(result, [other], fixed, RATIO)] == [1.05, 1.1]


def test_the_mean_of_two_vectors_lies_between_them_and_names_both() -> None:
    first = Candidate.of_vector(np.full(16, 2.0), RATIO, 1.1, origin="yarn")
    second = Candidate.of_vector(np.full(16, 8.0), RATIO, 1.1, origin="ntk")
    mean = mean_of([first, second], RATIO, highest=8.0)
    assert np.allclose(mean.factors.values, 4.0)
    assert np.allclose(mean_of([first, second], RATIO, highest=4.0).factors.values, 8**0.5)
    assert (mean.origin, mean.parent_id) == ("mean of yarn and ntk", first.id)
    assert mean.attention_factor == 1.1


def test_a_vectors_critical_dimension_is_where_it_reaches_the_ratio() -> None:
    values = np.array([1.0, 1.5, 3.9, 4.0, 5.0])
    candidate = Candidate.of_vector(values, 4.0, 1.0)
    assert (candidate.critical_dim, candidate.head, candidate.tail) == (
        3, (1.0, 1.5, 3.9), (4.0, 5.0),
    )  # fmt: skip
    assert np.array_equal(candidate.factors.values, values)
    assert Candidate.from_json(candidate.to_json()) == candidate
    assert Candidate.of_vector(np.ones(5), 4.0, 1.0).critical_dim == 0


# --- a whole search


def descending_recipe(**search: Any) -> Recipe:
    changes = {"descent_steps": STEPS, "skipped_needles": NUM_SAMPLES, **search}
    return toy_recipe(preset="default", **changes)


def sets() -> dict[str, NeedleSet]:
    steps = [descent_set(step, wide) for wide in (False, True) for step in range(STEPS)]
    names = [SKIPPED_SET, WIDE_SET, *steps]
    skipped = {
        name: NeedleSet(
            name,
            tuple(f"{name}/{i}" for i in range(NUM_SAMPLES)),
            (7,) * NUM_SAMPLES,
            (0.0,) * NUM_SAMPLES,
        )
        for name in names
    }
    return {**NEEDLE_SETS, **skipped}


class Gradients(ToyScorers):
    """Toy scorers that give a gradient, by finite differences, where it is asked for, and whose
    answers are right."""

    def _gradient(self, unit: Any) -> Sequence[float]:
        from dataclasses import replace

        from longrope2_ray.rope.factors import RescaleFactors

        def nll(values: np.ndarray) -> float:
            factors = RescaleFactors(values, unit.factors.attention_factor)
            return toy_nll(replace(unit, factors=factors))

        values, step = unit.factors.values, 1e-5
        moved = np.exp(step * np.eye(len(values)))
        return [(nll(values * up) - nll(values / up)) / (2 * step) for up in moved]

    def _complete(self) -> Any:
        from dataclasses import replace

        done = super()._complete()
        if not is_descent(done.work.needle_set):
            return replace(done, result=replace(done.result, correct=True))
        gradient = tuple(map(float, self._gradient(done.work)))
        return replace(done, result=replace(done.result, gradient=gradient))


def run(folder: Path, scorers: ToyScorers, **search: Any) -> SearchLoop:
    run_dir = RunDir(str(folder))
    run_dir.create()
    return SearchLoop(descending_recipe(**search), GEOMETRY, sets(), run_dir, scorers, IDENTITY)


def test_the_winner_is_no_worse_than_the_best_published_method(tmp_path: Path) -> None:
    loop = run(tmp_path, Gradients())
    winner = loop.run()
    (record,) = RunDir(str(tmp_path)).names("generations")
    body = RunDir(str(tmp_path)).read_json(record)
    ppls = [survivor["ppl"] for survivor in body["survivors"] if survivor["ppl"] is not None]
    assert winner.search.ppl == min(ppls)
    assert loop.status.descent_step == STEPS
    descended = {candidate["attention_factor"] for candidate in body["candidates"][:3]}
    assert winner.candidate.attention_factor in descended, "the descent won nothing"


class Lost(Gradients):
    """Toy scorers under which no answer is right."""

    def _complete(self) -> Any:
        from dataclasses import replace

        done = super()._complete()
        return replace(done, result=replace(done.result, correct=False))


class Misleading(Gradients):
    """Toy scorers whose skipped documents rank the other way round unless they are wide."""

    def _complete(self) -> Any:
        from dataclasses import replace

        done = super()._complete()
        if done.work.needle_set != SKIPPED_SET:
            return done
        return replace(done, result=replace(done.result, nll_sum=100 / (1 + done.result.nll_sum)))


def test_skipped_documents_that_rank_badly_or_find_nothing_are_widened(tmp_path: Path) -> None:
    loops = {}
    cases = (("right", Gradients()), ("misled", Misleading()), ("lost", Lost()))
    for name, scorers in cases:
        loops[name] = run(tmp_path / name, scorers, skipped_tokens=TARGET_LENGTH // 4)
        loops[name].run()
    sets = {
        name: {score.needle_set for score in ledger_of(RunDir(str(tmp_path / name))).values()}
        for name in loops
    }
    assert {SKIPPED_SET, descent_set(0)} <= sets["right"]
    assert WIDE_SET not in sets["right"]
    for name in ("misled", "lost"):
        assert {WIDE_SET, descent_set(0, wide=True)} <= sets[name]
        assert descent_set(0) not in sets[name]


def test_kills_and_any_order_end_in_the_same_bytes(tmp_path: Path) -> None:
    run(tmp_path / "whole", Gradients()).run()
    expected = result_bytes(RunDir(str(tmp_path / "whole")))
    total = len(ledger_of(RunDir(str(tmp_path / "whole"))))
    rng = random.Random(0)
    for trial in range(4):
        folder, scored = tmp_path / f"killed-{trial}", 0
        while True:
            scorers = Gradients(
                width=rng.randint(1, 5), shuffle=trial, kill_after=rng.randint(5, 40), batch=3
            )
            try:
                run(folder, scorers).run()
                break
            except KilledError:
                scored += len(scorers.scored)
        assert result_bytes(RunDir(str(folder))) == expected
        assert scored + len(scorers.scored) >= total - 40
