"""Cheap scores against full-length ones: points, ratios of eliminated candidates, correlation."""

from collections.abc import Mapping

import pytest

from longrope2_ray.search.cascade import Cascade, cascade, rank_correlation
from longrope2_ray.search.scores import SEARCH_SET, SKIPPED_SET, Score, report_set


def score(id: str, needle_set: str, sample: int, nll: float | None) -> Score:
    return Score(
        vector_id=id,
        sample_id=f"{needle_set}/{sample}",
        needle_set=needle_set,
        sample=sample,
        nll_sum=nll,
        num_tokens=7,
        correct=False,
    )


def rows(needle_set: str, nlls: Mapping[str, list[float | None]]) -> list[Score]:
    """Scores of each id's first samples."""
    return [score(id, needle_set, i, nll) for id, row in nlls.items() for i, nll in enumerate(row)]


def test_a_complete_candidate_is_compared_by_its_total() -> None:
    cheap = rows(SKIPPED_SET, {"a": [1, 1], "b": [2, 2], "c": [4, 2], "never raced": [0.5, 0.5]})
    full = rows(SEARCH_SET, {"a": [2, 4], "b": [3, 6], "c": [10, 8]})
    found = cascade([*cheap, *full])
    assert [(p.vector_id, p.cheap, p.full, p.complete) for p in found.points] == [
        ("a", 1.0, 1.0, True),
        ("b", 2.0, 1.5, True),
        ("c", 3.0, 3.0, True),
    ]
    assert found.correlation == pytest.approx(1.0)


def test_an_eliminated_candidate_is_compared_on_the_samples_that_it_has() -> None:
    cheap = rows(SKIPPED_SET, {"a": [1, 1], "b": [9], "c": [2, 2]})
    full = rows(SEARCH_SET, {"a": [1, 8, 1], "b": [5, 16], "c": [3, 6, 11]})
    points = {p.vector_id: p for p in cascade([*cheap, *full]).points}
    assert (points["b"].full, points["b"].complete) == (21 / 9, False), "not 21 / 10"
    assert points["b"].cheap == 9.0
    assert (points["c"].full, points["c"].complete) == (2.0, True)


def test_the_winners_of_both_sets_may_differ() -> None:
    cheap = rows(SKIPPED_SET, {"a": [2], "b": [1], "c": [4]})
    full = rows(SEARCH_SET, {"a": [1], "b": [3], "c": [2]})
    found = cascade([*cheap, *full])
    assert [(p.vector_id, p.cheap) for p in found.points] == [("a", 2.0), ("c", 4.0), ("b", 1.0)]
    assert found.correlation == pytest.approx(-0.5)


def test_scores_that_are_not_finite_and_other_needle_sets_are_left_out() -> None:
    cheap = rows(SKIPPED_SET, {"a": [1], "b": [None], "c": [2]})
    full = rows(SEARCH_SET, {"a": [1], "b": [2], "c": [None]})
    held_out = rows(report_set(64), {"a": [1], "d": [2]})
    found = cascade([*cheap, *full, *held_out])
    assert [p.vector_id for p in found.points] == ["a"]
    assert found.correlation is None, "one point has no correlation"


def test_without_a_complete_candidate_or_one_of_the_sets_there_is_nothing() -> None:
    cheap = rows(SKIPPED_SET, {"a": [1, 1], "b": [1, 2]})
    assert cascade(cheap) == cascade([]) == Cascade((), None)
    half = [score("a", SEARCH_SET, 0, 1.0), score("b", SEARCH_SET, 1, 1.0)]
    assert cascade([*cheap, *half]) == Cascade((), None), "the race has only begun"


def test_the_order_of_the_rows_does_not_matter() -> None:
    cheap = rows(SKIPPED_SET, {"a": [1, 3], "b": [2, 2], "c": [4, 2]})
    full = rows(SEARCH_SET, {"a": [2, 4], "b": [2, 4], "c": [10, 8]})
    everything = [*cheap, *full]
    assert cascade(everything) == cascade(everything[::-1])


def test_rank_correlation() -> None:
    # The textbook's ten pairs of IQ and hours of television: -29/165.
    iq = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
    hours = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    assert rank_correlation(iq, hours) == pytest.approx(-29 / 165)
    # Equal numbers share the mean of their ranks: 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
