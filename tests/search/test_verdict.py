"""The verdict: what a paired bootstrap over held-out needles shows, and what it does not."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import GEOMETRY

from longrope2_ray.search.scores import NeedleSummary
from longrope2_ray.search.space import Candidate
from longrope2_ray.search.verdict import (
    BETTER,
    NOT_SHOWN,
    TOO_FEW,
    WORSE,
    Contrast,
    Interval,
    compare,
    contrasts,
)
from longrope2_ray.search.winner import ComparisonRow, Winner

DRAWS = 500
DEPTHS = (0.0, 0.25, 0.5, 0.75)

Nlls = list[float | None]


def summary(nlls: Nlls, depths: tuple[float, ...] = DEPTHS, num_tokens: int = 7) -> NeedleSummary:
    """A summary whose samples take the depths in turns."""
    n = len(nlls)
    turns = tuple(depths[i % len(depths)] for i in range(n))
    return NeedleSummary(tuple(nlls), (num_tokens,) * n, (True,) * n, turns)


def overall(ours: Nlls, theirs: Nlls, **settings: int) -> Interval:
    return compare(summary(ours, (0.0,)), summary(theirs, (0.0,)), **settings).overall


NLLS = st.lists(st.floats(0, 50), min_size=4, max_size=24)


@settings(max_examples=25, deadline=None)
@given(NLLS)
def test_equal_scores_have_the_ratio_1_and_show_nothing(nlls: list[float]) -> None:
    contrast = compare(summary(list(nlls)), summary(list(nlls)), draws=DRAWS)
    assert contrast.overall == Interval(1.0, 1.0, 1.0, len(nlls))
    assert contrast.overall.verdict == NOT_SHOWN
    for interval in contrast.by_depth.values():
        assert (interval.ratio, interval.low, interval.high) == (1.0, 1.0, 1.0)


@settings(max_examples=25, deadline=None)
@given(NLLS, st.floats(0.1, 20), st.floats(0, 0.05))
def test_a_clear_winner_is_better_and_the_other_way_round_worse(
    nlls: list[float], lead: float, noise: float
) -> None:
    theirs: Nlls = [nll + lead + noise * (i % 2) for i, nll in enumerate(nlls)]
    better = overall(list(nlls), theirs, draws=DRAWS)
    worse = overall(theirs, list(nlls), draws=DRAWS)
    assert (better.verdict, worse.verdict) == (BETTER, WORSE)
    assert better.ratio == pytest.approx(1 / worse.ratio)
    assert 1 < better.low <= better.high
    assert worse.low <= worse.high < 1


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50)), min_size=4, max_size=24))
def test_the_ratio_is_that_of_the_perplexities_and_lies_in_its_interval(
    pairs: list[tuple[float, float]],
) -> None:
    ours, theirs = summary([a for a, _ in pairs]), summary([b for _, b in pairs])
    contrast = compare(ours, theirs, draws=DRAWS)
    assert ours.ppl is not None
    assert theirs.ppl is not None
    assert contrast.overall.ratio == pytest.approx(theirs.ppl / ours.ppl)
    parts = zip(ours.by_depth().values(), theirs.by_depth().values(), strict=True)
    for interval, (mine, other) in zip(contrast.by_depth.values(), parts, strict=True):
        assert mine.ppl is not None
        assert other.ppl is not None
        assert interval.ratio == pytest.approx(other.ppl / mine.ppl)
        assert interval.num_needles == len(mine)
    assert compare(ours, theirs, draws=DRAWS) == contrast, "the same input, the same interval"


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 50), st.floats(0, 50) | st.none(), st.sampled_from(DEPTHS)),
        min_size=4,
        max_size=24,
    ),
    st.randoms(use_true_random=False),
)
def test_the_order_of_the_needles_does_not_matter(
    needles: list[tuple[float, float | None, float]], rng: random.Random
) -> None:
    def contrast() -> Contrast:
        ours, theirs, depths = zip(*needles, strict=True)
        one, two = summary(list(ours), depths), summary(list(theirs), depths)
        return compare(one, two, draws=DRAWS)

    before = contrast()
    rng.shuffle(needles)
    assert contrast() == before


def test_another_seed_draws_other_needles() -> None:
    ours: Nlls = [1.0, 2.0, 3.0, 4.0, 5.0]
    theirs: Nlls = [2.0, 1.0, 5.0, 4.5, 5.0]
    one, two = (overall(ours, theirs, draws=41, seed=seed) for seed in (0, 1))
    assert one.ratio == two.ratio
    assert (one.low, one.high) != (two.low, two.high)


def test_the_interval_has_the_width_that_theory_says() -> None:
    rng = random.Random(0)
    differences = [rng.gauss(0.7, 1.4) for _ in range(400)]
    theirs: Nlls = [5 + difference for difference in differences]
    interval = overall([5.0] * 400, theirs)
    mean, error = 0.1, 0.2 / math.sqrt(400)  # of the mean difference a token: 7 tokens a needle
    assert math.log(interval.ratio) == pytest.approx(mean, abs=3 * error)
    half = math.log(interval.high / interval.low) / 2
    assert half == pytest.approx(1.96 * error, rel=0.15)


def test_fewer_than_four_needles_have_no_verdict() -> None:
    assert overall([1.0] * 3, [2.0] * 3).verdict == TOO_FEW
    assert overall([1.0] * 4, [2.0] * 4).verdict == BETTER
    contrast = compare(summary([1.0] * 13), summary([2.0] * 13))
    assert [i.verdict for i in contrast.by_depth.values()] == [BETTER, *[TOO_FEW] * 3]


def test_a_score_that_is_not_finite_is_infinitely_poor() -> None:
    good: Nlls = [1.0] * 8
    broken: Nlls = [None] * 5 + [1.0] * 3
    better, worse = overall(good, broken), overall(broken, good)
    assert (better.ratio, better.high, better.verdict) == (math.inf, math.inf, BETTER)
    assert (worse.ratio, worse.low, worse.verdict) == (0.0, 0.0, WORSE)
    # One needle is missing in a third of the draws, and nothing but it tells the two apart.
    one = overall(good, [None, *good[1:]])
    assert (one.ratio, one.low, one.verdict) == (math.inf, 1.0, NOT_SHOWN)


def test_needles_that_neither_answers_are_left_out_and_two_failures_cancel_out() -> None:
    left = overall([None, 1.0, 2.0, 3.0, 4.0], [None, 2.0, 3.0, 4.0, 5.0])
    assert left == overall([1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0])
    assert left.num_needles == 4
    both = overall([None, 1.0, 2.0, 3.0], [1.0, None, 2.0, 3.0])
    assert (both.ratio, both.low, both.high, both.verdict) == (1.0, 0.0, math.inf, NOT_SHOWN)
    nothing = overall([None] * 4, [None] * 4)
    assert (nothing.num_needles, nothing.verdict) == (0, TOO_FEW)


def test_other_needles_cannot_be_compared() -> None:
    for other in (summary([1.0] * 5), summary([1.0] * 4, (0.5,)), summary([1.0] * 4, num_tokens=8)):
        with pytest.raises(ValueError, match="expected two summaries of the same needles"):
            compare(summary([1.0] * 4), other)


def row(method: str, compared_at: float, nll: float, length: int = 1024) -> ComparisonRow:
    factor = 1.0 if method == "unscaled" else compared_at
    return ComparisonRow(length, method, factor, compared_at, None, summary([nll] * 4))


def winner(*rows: ComparisonRow) -> Winner:
    candidate = Candidate(5, (4.0,) * 11)
    return Winner("toy", candidate, GEOMETRY, 1024, summary([1.0] * 4), rows, {})


def test_the_winner_meets_each_baseline_at_the_same_and_at_the_best_attention_factors() -> None:
    found = winner(
        row("unscaled", 1.0, 9.0),
        row("yarn", 1.0, 4.0),
        row("longrope2", 1.0, 2.0),
        row("unscaled", 1.2, 9.0),
        row("yarn", 1.2, 1.0),
        row("longrope2", 1.2, 3.0),
    )
    said = [
        (c.method, c.our_factor, c.their_factor, c.own_best, c.contrast.overall.verdict)
        for c in contrasts(found)
    ]
    assert said == [
        ("unscaled", 1.0, 1.0, False, BETTER),
        ("yarn", 1.0, 1.0, False, BETTER),
        ("unscaled", 1.2, 1.0, False, BETTER),
        ("yarn", 1.2, 1.2, False, WORSE),
        ("unscaled", 1.0, 1.0, True, BETTER),
        ("yarn", 1.0, 1.2, True, WORSE),
    ]


def test_lengths_are_compared_apart_and_tables_without_the_winner_are_not() -> None:
    one, two = row("yarn", 1.0, 4.0), row("yarn", 1.0, 1.0, length=2048)
    found = winner(one, row("longrope2", 1.0, 2.0), two, row("longrope2", 1.0, 2.0, length=2048))
    assert [(c.length, c.contrast.overall.verdict) for c in contrasts(found) if c.own_best] == [
        (1024, BETTER),
        (2048, WORSE),
    ]
    assert not list(contrasts(winner(one, two)))
    assert not list(contrasts(winner(row("longrope2", 1.0, 2.0))))
