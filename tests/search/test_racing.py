"""Exact racing: survivors and their totals are those of the full evaluation, in any order of
completion."""

import copy
import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope2_ray.search.evolution import select
from longrope2_ray.search.racing import Race, hardest_first

Table = dict[str, list[float]]  # id -> NLL of each sample
INF = math.inf


@dataclass(frozen=True)
class Case:
    """Everything that a race depends on but the order of completion."""

    newcomers: Table
    incumbents: Table = field(default_factory=dict)
    top_k: int = 2
    racing: bool = True

    @property
    def num_samples(self) -> int:
        return len(next(iter(self.newcomers.values())))

    @property
    def num_units(self) -> int:
        return len(self.newcomers) * self.num_samples

    def race(self) -> Race:
        incumbents = {id: dict(enumerate(row)) for id, row in self.incumbents.items()}
        top_k = self.top_k if self.racing else None
        return Race(list(self.newcomers), incumbents, self.num_samples, top_k)

    def survivors(self, totals: Mapping[str, float]) -> list[tuple[str, float]]:
        """Who is selected, and the exact bits of their totals, from newcomers' totals."""
        known = {id: math.fsum(row) for id, row in self.incumbents.items()} | dict(totals)
        finite = {id: total for id, total in known.items() if math.isfinite(total)}
        return [(id, finite[id]) for id in select(finite, self.top_k)]

    def full_evaluation(self) -> list[tuple[str, float]]:
        return self.survivors({id: math.fsum(row) for id, row in self.newcomers.items()})

    def kth_total(self) -> float:
        rows = [*self.newcomers.values(), *self.incumbents.values()]
        totals = sorted(math.fsum(row) for row in rows)
        return totals[self.top_k - 1] if len(totals) >= self.top_k else INF


def preload(race: Race, case: Case, units: list[tuple[str, int]]) -> None:
    for id, sample in units:
        race.add(id, sample, case.newcomers[id][sample])


def drive(
    race: Race, case: Case, width: int, rng: random.Random, trouble: bool = False
) -> list[tuple[str, int]]:
    """Run a race to its end with up to ``width`` units in flight, completed in random order; units
    in order of start.

    With ``trouble`` units are told twice as well.
    """
    in_flight: list[tuple[str, int]] = []
    spent: list[tuple[str, int]] = []
    told: set[tuple[str, int]] = set()
    while not race.finished:
        while len(in_flight) < width and (unit := race.next_unit()):
            assert unit not in in_flight, "handed out twice"
            assert unit not in told, "handed out although it is scored"
            in_flight.append(unit)
            spent.append(unit)
        assert in_flight, "a race that is not finished hands nothing out"
        unit = in_flight.pop(rng.randrange(len(in_flight)))
        race.add(*unit, case.newcomers[unit[0]][unit[1]])
        told.add(unit)
        if trouble and rng.random() < 0.2:
            twice = rng.choice(sorted(told))
            race.add(*twice, case.newcomers[twice[0]][twice[1]])
    assert race.next_unit() is None
    assert race.num_units_left == 0
    before = case.survivors(race.totals)
    preload(race, case, in_flight)  # what was under way comes in late
    assert case.survivors(race.totals) == before
    return spent


# --- by enumeration

THREE_BY_TWO: list[Table] = [
    {"a": [1, 2], "b": [2, 1], "c": [3, 3]},
    {"a": [0, 0], "b": [0, 0], "c": [0, 1]},
    {"a": [1, 1], "b": [1, 1], "c": [1, 1]},
    {"a": [5, 0], "b": [0, 5], "c": [2, 2]},
    {"a": [INF, 0], "b": [1, 1], "c": [0, INF]},
    {"a": [0.1, 0.2], "b": [0.3, 0.0], "c": [0.2, 0.1]},
]
INCUMBENTS: list[Table] = [{}, {"x": [0, 1], "y": [2, 1]}, {"A": [1, 2], "z": [1, 2]}]


@pytest.mark.parametrize("incumbents", INCUMBENTS, ids=lambda table: "-".join(table) or "none")
@pytest.mark.parametrize("top_k", [1, 2])
def test_survivors_do_not_depend_on_the_order_of_completion_in_all_orders_of_three_by_two(
    top_k: int, incumbents: Table
) -> None:
    for table in THREE_BY_TWO:
        case = Case(table, incumbents, top_k)
        expected = case.full_evaluation()
        for order in itertools.permutations(itertools.product(table, range(2))):
            race = case.race()
            preload(race, case, list(order))
            assert race.finished
            assert case.survivors(race.totals) == expected


def every_interleaving(case: Case, width: int, verdict: Callable[[Race], None]) -> int:
    """Every way in which up to ``width`` units in flight can complete; states reached twice
    are entered once."""
    entered: set[Any] = set()
    ends = 0

    def step(
        race: Race, in_flight: frozenset[tuple[str, int]], told: frozenset[tuple[str, int]]
    ) -> None:
        nonlocal ends
        while not race.finished and len(in_flight) < width and (unit := race.next_unit()):
            assert unit not in in_flight | told
            in_flight |= {unit}
        state = (
            in_flight,
            told,
            race.num_units_left,
            race.num_units_saved,
            tuple(sorted(race.totals.items())),
        )
        if state in entered:
            return
        entered.add(state)
        if race.finished:
            ends += 1
            verdict(race)
            return
        assert in_flight, "a race that is not finished hands nothing out"
        for id, sample in in_flight:
            after = copy.deepcopy(race)
            after.add(id, sample, case.newcomers[id][sample])
            step(after, in_flight - {(id, sample)}, told | {(id, sample)})

    step(case.race(), frozenset(), frozenset())
    return ends


FOUR_BY_THREE: list[Table] = [
    {"a": [3, 1, 1], "b": [1, 3, 1], "c": [1, 1, 4], "d": [9, 0, 0]},
    {"a": [1, 1, 1], "b": [0, 3, 0], "c": [1, 2, 0], "d": [2, 2, 2]},
    {"a": [0, 0, 0], "b": [0, 0, INF], "c": [0, 0, 1], "d": [1, 0, 0]},
]


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("incumbents", [{}, {"x": [1, 2, 1], "y": [2, 1, 2]}], ids=["none", "two"])
def test_survivors_do_not_depend_on_the_order_of_completion_in_all_interleavings_of_four_by_three(
    width: int, incumbents: Table
) -> None:
    for table in FOUR_BY_THREE:
        case = Case(table, incumbents)
        expected = case.full_evaluation()

        def same(
            race: Race, case: Case = case, expected: list[tuple[str, float]] = expected
        ) -> None:
            assert case.survivors(race.totals) == expected

        assert every_interleaving(case, width, same) >= 1


# --- by hypothesis

nlls = (
    st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0, 2.0])
    | st.floats(0, 50)
    | st.sampled_from([INF, 5e-324, 1e17])
)
finite_nlls = st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0, 2.0]) | st.floats(0, 50)


@st.composite
def cases(draw: st.DrawFn, racing: bool = True) -> Case:
    num_samples = draw(st.integers(1, 6))

    def table(names: str, values: st.SearchStrategy[float], least: int) -> Table:
        count = draw(st.integers(least, len(names)))
        row = st.lists(values, min_size=num_samples, max_size=num_samples)
        return {name: draw(row) for name in draw(st.permutations(names))[:count]}

    newcomers = table("abcdefg", nlls, 1)
    incumbents = table("ABxyz", finite_nlls, 0)
    return Case(newcomers, incumbents, draw(st.integers(1, 6)), racing)


@settings(max_examples=100, deadline=None)
@given(
    case=cases(),
    width=st.integers(1, 40),
    rng=st.randoms(use_true_random=False),
    trouble=st.booleans(),
)
def test_survivors_of_an_exact_race_are_those_of_the_full_evaluation_bit_by_bit(
    case: Case, width: int, rng: random.Random, trouble: bool
) -> None:
    race = case.race()
    spent = drive(race, case, width, rng, trouble)
    assert case.survivors(race.totals) == case.full_evaluation()
    assert len(spent) == len(set(spent)) <= case.num_units


@settings(max_examples=100, deadline=None)
@given(
    case=cases(),
    width=st.integers(1, 8),
    rng=st.randoms(use_true_random=False),
    share=st.floats(0, 1),
)
def test_scores_known_before_change_no_survivor_and_are_not_asked_for_again(
    case: Case, width: int, rng: random.Random, share: float
) -> None:
    units = [(id, sample) for id in case.newcomers for sample in range(case.num_samples)]
    known = [unit for unit in units if rng.random() < share]
    rng.shuffle(known)
    race = case.race()
    preload(race, case, known + known[: len(known) // 2])
    spent = drive(race, case, width, rng)
    assert not set(spent) & set(known)
    assert case.survivors(race.totals) == case.full_evaluation()


@settings(max_examples=60, deadline=None)
@given(
    case=cases(),
    rng=st.randoms(use_true_random=False),
    share=st.sampled_from([0.0, 0.0, 0.3]),
)
def test_one_scorer_spends_nothing_on_who_is_above_the_final_kth_total(
    case: Case, rng: random.Random, share: float
) -> None:
    units = [(id, sample) for id in case.newcomers for sample in range(case.num_samples)]
    race, final = case.race(), case.kth_total()
    preload(race, case, [unit for unit in units if rng.random() < share])
    while not race.finished:
        unit = race.next_unit()
        assert unit is not None
        assert race.lower_bound(unit[0]) <= final
        race.add(*unit, case.newcomers[unit[0]][unit[1]])
    assert case.survivors(race.totals) == case.full_evaluation()


@settings(max_examples=60, deadline=None)
@given(case=cases(racing=False), width=st.integers(1, 8), rng=st.randoms(use_true_random=False))
def test_without_racing_every_sample_of_every_finite_candidate_is_scored(
    case: Case, width: int, rng: random.Random
) -> None:
    race = case.race()
    spent = drive(race, case, width, rng)
    finite = [id for id, row in case.newcomers.items() if all(map(math.isfinite, row))]
    assert {(id, sample) for id in finite for sample in range(case.num_samples)} <= set(spent)
    assert case.survivors(race.totals) == case.full_evaluation()


@settings(max_examples=50, deadline=None)
@given(case=cases(), width=st.integers(1, 9), rng=st.randoms(use_true_random=False))
def test_every_unit_is_handed_out_or_saved(case: Case, width: int, rng: random.Random) -> None:
    race = case.race()
    assert race.num_units_left == case.num_units
    handed_out = drive(race, case, width, rng)
    # Units under way at the end are scored, not saved.
    assert len(handed_out) + race.num_units_saved == case.num_units


# --- facts about single races


def test_who_ties_with_the_last_place_is_scored_to_the_end() -> None:
    case = Case({"a": [1.0, 1.0]}, {"b": [1.0, 1.0]}, top_k=1)
    race = case.race()
    assert len(drive(race, case, 1, random.Random(0))) == 2
    assert case.survivors(race.totals) == [("a", 2.0)]


def test_a_hopeless_candidate_is_stopped_at_its_first_sample() -> None:
    case = Case({"a": [9.0, 0.0, 0.0]}, {"x": [1.0, 1.0, 1.0]}, top_k=1)
    race = case.race()
    assert drive(race, case, 1, random.Random(0)) == [("a", 0)]
    assert race.num_units_saved == 2
    assert race.totals == {}


def test_the_hardest_sample_of_the_incumbents_goes_first() -> None:
    case = Case({"a": [0.0, 0.0, 0.0]}, {"x": [1.0, 3.0, 2.0], "y": [1.0, 0.0, 2.0]})
    assert [sample for _, sample in drive(case.race(), case, 1, random.Random(0))] == [2, 1, 0]
    assert hardest_first([], 3) == [0, 1, 2]
    assert hardest_first([{0: 1.0, 1: 1.0, 2: 1.0}], 3) == [0, 1, 2]


def test_many_scorers_spread_over_candidates_before_they_double_up() -> None:
    race = Case({id: [1.0, 1.0] for id in "abc"}, top_k=1).race()
    first = [race.next_unit() for _ in range(3)]
    assert [unit[0] for unit in first if unit] == ["a", "b", "c"]


def test_scores_of_strangers_are_ignored() -> None:
    race = Case({"a": [1.0]}, {"x": [2.0]}).race()
    race.add("stranger", 0, 0.0)
    race.add("x", 0, 0.0)
    assert race.totals == {}
    assert race.num_units_left == 1


def test_a_second_telling_does_not_change_the_first() -> None:
    race = Case({"a": [1.0, 1.0]}).race()
    race.add("a", 0, 1.0)
    race.add("a", 0, 5.0)
    race.add("a", 1, 1.0)
    assert race.totals == {"a": 2.0}


@pytest.mark.parametrize("racing", [True, False])
def test_a_penalized_candidate_never_survives_and_counts_as_documented(racing: bool) -> None:
    """``totals``: the penalized ones as infinity, or not there at all; never a finite number."""
    case = Case({"a": [INF, 0.0], "b": [1.0, 1.0]}, racing=racing)
    race = case.race()
    drive(race, case, 1, random.Random(0))
    assert race.totals.get("a", INF) == INF
    assert case.survivors(race.totals) == [("b", 2.0)]


def test_without_racing_a_penalized_candidate_is_scored_to_the_end_and_totals_infinity() -> None:
    """A row of a table needs all its samples, also where one of them is not a number."""
    case = Case({"a": [INF, 0.0]}, racing=False)
    race = case.race()
    assert len(drive(race, case, 1, random.Random(0))) == 2
    assert race.totals == {"a": INF}
    assert race.num_units_saved == 0


def test_a_race_without_newcomers_is_over() -> None:
    race = Race([], {"x": {0: 1.0}}, 1, 1)
    assert race.finished
    assert race.next_unit() is None


@pytest.mark.parametrize("racing", [True, False])
def test_every_unit_is_handed_out_once_while_none_comes_back(racing: bool) -> None:
    race = Case({id: [1.0] * 3 for id in "abc"}, racing=racing).race()
    units = [race.next_unit() for _ in range(9)]
    assert len(set(units)) == 9
    assert race.next_unit() is None
    if not racing:
        assert [unit[0] for unit in units if unit] == [*"aaabbbccc"]


def test_estimates_fill_gaps_by_what_the_complete_ones_have_there() -> None:
    race = Case(
        {"a": [2.0, 4.0], "b": [3.0, 3.0], "c": [0.0, 0.0]}, {"x": [1.0, 3.0]}, top_k=4
    ).race()
    assert race.estimates() == {}
    race.add("a", 1, 3.0)
    race.add("b", 0, 4.0)
    typical, ratio = 2.0, (2.0 + 4.0) / (2.0 + 1.0)
    assert typical == (1.0 + 3.0) / 2
    assert race.estimates()["b"] == {0: 4.0, 1: ratio * 3.0}
    race.add("b", 1, 6.0)
    assert race.estimates()["b"] == {0: 4.0, 1: 6.0}
    typical, means = 3.5, (2.5, 4.5)  # of the complete ones, b among them
    assert race.estimates()["a"] == {0: (typical + 3.0) / (typical + means[1]) * means[0], 1: 3.0}


def test_estimates_know_nobody_who_cannot_survive() -> None:
    race = Case(
        {"a": [9.0, 9.0], "b": [INF, 1.0], "c": [0.0, 0.0]}, {"x": [1.0, 3.0]}, top_k=1
    ).race()
    race.add("a", 0, 9.0)
    race.add("b", 0, INF)
    race.add("c", 1, 0.0)
    assert set(race.estimates()) == {"c"}
    off = Case({"b": [INF, 1.0], "c": [0.0, 0.0]}, racing=False).race()
    off.add("b", 0, INF)
    off.add("c", 0, 0.0)
    assert off.estimates() == {"c": {0: 0.0, 1: 0.0}}
    off.add("b", 1, 1.0)
    assert set(off.estimates()) == {"c"}


@settings(max_examples=60, deadline=None)
@given(case=cases(), width=st.integers(1, 8), rng=st.randoms(use_true_random=False))
def test_estimates_of_a_finished_exact_race_select_its_survivors(
    case: Case, width: int, rng: random.Random
) -> None:
    race = case.race()
    drive(race, case, width, rng)
    estimated = {id: math.fsum(row.values()) for id, row in race.estimates().items()}
    assert case.survivors(estimated) == case.full_evaluation()
