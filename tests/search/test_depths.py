"""Needle scores by depth: which needles are a group, and what is known of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope2_ray.search.scores import MAX_DEPTHS, NeedleSummary, depth_groups


def test_depths_that_are_few_are_a_group_each() -> None:
    assert depth_groups([0.0, 0.5, 0.75, 0.0]) == {"0": [0, 3], "0.5": [1], "0.75": [2]}
    assert list(depth_groups([i / 7 for i in range(8)])) == [
        "0", "0.143", "0.286", "0.429", "0.571", "0.714", "0.857", "1",
    ]  # fmt: skip


def test_depths_that_are_many_are_the_start_and_four_quarters() -> None:
    depths = [0.0, 0.01, 0.25, 0.26, 0.5, 0.6, 0.75, 0.76, 1.0]
    assert depth_groups(depths) == {
        "0": [0],
        "(0, 0.25]": [1, 2],
        "(0.25, 0.5]": [3, 4],
        "(0.5, 0.75]": [5, 6],
        "(0.75, 1]": [7, 8],
    }
    assert list(depth_groups([0.9 + i / 1000 for i in range(9)])) == ["(0.75, 1]"]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_every_sample_is_in_one_group_and_groups_go_from_start_to_end(depths: list[float]) -> None:
    groups = depth_groups(depths)
    assert sorted(sample for samples in groups.values() for sample in samples) == list(
        range(len(depths))
    )
    assert len(groups) <= MAX_DEPTHS
    assert all(samples for samples in groups.values())
    in_order = [depths[sample] for samples in groups.values() for sample in samples]
    ends = [max(depths[sample] for sample in samples) for samples in groups.values()]
    assert ends == sorted(ends)
    assert min(in_order) == min(depths[sample] for sample in next(iter(groups.values())))


def test_a_summary_by_depth_has_perplexity_accuracy_and_number_of_needles() -> None:
    summary = NeedleSummary((1.0, 2.0, 3.0), (7, 7, 8), (True, False, True), (0.0, 0.5, 0.0))
    start, middle = summary.by_depth().values()
    assert start == NeedleSummary((1.0, 3.0), (7, 8), (True, True), (0.0, 0.0))
    assert (len(start), start.accuracy) == (2, 1.0)
    assert (len(middle), middle.accuracy) == (1, 0.0)
    assert summary.accuracy == pytest.approx(2 / 3)
