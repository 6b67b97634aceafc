import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import GEOMETRY, TARGET_LENGTH

from longrope2_ray.recipe.search import SearchSection
from longrope2_ray.rope.baselines import baseline, su_attention_factor, yarn_attention_factor
from longrope2_ray.search.evolution import Evolution, select
from longrope2_ray.search.operators import OPERATORS, MutationContext, cross_authors
from longrope2_ray.search.space import Candidate, SearchSpace, attention_factor

RATIO = TARGET_LENGTH / GEOMETRY.original_length
seeds = st.integers(0, 2**32 - 1)


def section(**changes: Any) -> SearchSection:
    small = {
        "target_length": TARGET_LENGTH,
        "preset": "paper",
        "population_size": 12,
        "iterations": 3,
        "top_k": 4,
        "num_offspring": 6,
    }
    return SearchSection.model_validate({**small, **changes})


def evolution(**changes: Any) -> Evolution:
    search = section(**changes)
    return Evolution(SearchSpace.from_recipe(GEOMETRY, search), search)


def score(candidate: Candidate) -> float:
    """Any pure function of the content will do."""
    return float(
        np.sum((np.log(candidate.factors.values) - np.linspace(0, 1.9, GEOMETRY.num_cosines)) ** 2)
    )


def totals_of(candidates: tuple[Candidate, ...]) -> dict[str, float]:
    return {c.id: score(c) for c in candidates}


def finish(search: Evolution) -> list[list[str]]:
    """Ids asked for in each generation, to the end."""
    asked = []
    while not search.finished:
        asked.append([c.id for c in search.ask()])
        search.tell(totals_of(search.ask()))
    return asked


def is_legal(candidate: Candidate, space: SearchSpace) -> bool:
    tail, (low, high) = np.array(candidate.tail), space.tail_bounds
    return bool(
        candidate.critical_dim in space.critical_dims
        and candidate.critical_dim + len(tail) == space.num_cosines
        and np.all(np.diff(tail) >= 0)
        and low <= tail[0]
        and tail[-1] <= high
        and space.attention_bounds[0] <= candidate.attention_factor <= space.attention_bounds[1]
        and candidate.start_tokens in space.start_tokens
    )


# --- candidates and their space


def test_an_id_is_the_content_and_nothing_else() -> None:
    one = Candidate(3, (1.0, 2.0), 1.0, parent_id="a")
    assert one.id == Candidate(3, (1.0, 2.0), 1.0, parent_id="b").id
    others = [
        Candidate(4, (1.0, 2.0)),
        Candidate(3, (1.0, 2.0000000000000004)),
        Candidate(3, (1.0, 2.0), 1.1),
    ]
    others += [Candidate(3, (1.0, 2.0), start_tokens=1), Candidate(3, (1.0, 2.0), start_tokens=2)]
    assert len({one.id, *(c.id for c in others)}) == 6
    assert len(one.id) == 12


def test_the_factors_of_a_candidate_have_the_derived_head() -> None:
    factors = Candidate(2, (4.0, 5.0), 1.1, start_tokens=8).factors
    np.testing.assert_allclose(factors.values, [1, 2, 4, 5])
    assert (factors.critical_dim, factors.attention_factor, factors.start_tokens) == (2, 1.1, 8)


def test_the_default_space_is_the_papers() -> None:
    space = SearchSpace.from_recipe(GEOMETRY, section())
    assert space.critical_dims == tuple(
        range(GEOMETRY.ten_period_dim, GEOMETRY.theoretical_critical_dim + 1)
    )
    assert space.tail_bounds == (RATIO, 2 * RATIO)
    assert space.attention_bounds == (1.0, 1.0)


def test_the_space_follows_the_recipe() -> None:
    space = SearchSpace.from_recipe(
        GEOMETRY, section(critical_dims=(2, 4), tail_bounds=(0.5, 3), attention_factor="search")
    )
    assert (space.critical_dims, space.tail_bounds) == ((2, 3, 4), (0.5 * RATIO, 3 * RATIO))
    strongest = max(
        su_attention_factor(RATIO, GEOMETRY.original_length), yarn_attention_factor(RATIO)
    )
    assert space.attention_bounds[0] == 1.0
    assert space.attention_bounds[1] > strongest
    space = SearchSpace.from_recipe(GEOMETRY, section(attention_factor=(1.1, 1.4)))
    assert space.attention_bounds == (1.1, 1.4)
    assert space.fixed_attention is None
    assert SearchSpace.from_recipe(GEOMETRY, section(attention_factor=1.2)).fixed_attention == 1.2


def test_all_dimensions_are_one_tail_from_one_on() -> None:
    space = SearchSpace.from_recipe(GEOMETRY, section(critical_dims=(0, 0)))
    assert (space.critical_dims, space.tail_bounds) == ((0,), (1.0, 2 * RATIO))
    for candidate in evolution(critical_dims=(0, 0)).ask():
        assert len(candidate.tail) == len(candidate.factors.values) == GEOMETRY.num_cosines


def test_searching_all_dimensions_starts_from_the_published_methods() -> None:
    first = evolution(preset="longrope").ask()[:3]
    for candidate, method in zip(first, ("pi", "ntk", "yarn"), strict=True):
        published = baseline(method, GEOMETRY, int(GEOMETRY.original_length * RATIO)).values
        # NTK ends above the space, so its vector is clipped.
        assert list(candidate.tail) == np.clip(published, 1, 1.25 * RATIO).tolist()
        assert candidate.start_tokens == 0
    with pytest.raises(
        ValueError,
        match=r"^search.population_size: expected at least 3, one .* \(search.starts\), got 2",
    ):
        evolution(preset="longrope", population_size=2, top_k=2)


def test_a_search_may_start_from_any_vector_made_non_decreasing_inside_the_space() -> None:
    mine = [1.0, 3.0, 2.0, *[4.0] * 12, 99.0]
    first = evolution(critical_dims=(0, 0), starts=["llama3", mine]).ask()[:2]
    assert first[0].tail == tuple(baseline("llama3", GEOMETRY, TARGET_LENGTH).values)
    assert first[1].tail == (1.0, 3.0, 3.0, *[4.0] * 12, 2 * RATIO)
    with pytest.raises(ValueError, match=r"^search.starts: expected 16 numbers.*got 3"):
        evolution(critical_dims=(0, 0), starts=[[1.0, 2.0, 3.0]])
    with pytest.raises(
        ValueError,
        match=r"^search.starts: expected unscaled, pi.* or a list of factors, got 'ntk-rcd'",
    ):
        evolution(critical_dims=(0, 0), starts=["ntk-rcd"])
    with pytest.raises(ValueError, match=r"starts: expected none unless critical_dims = \[0, 0\]"):
        evolution(starts=["pi"])


def test_an_extended_models_short_window_is_searched_from_its_own_vector() -> None:
    trained = np.linspace(1, 8, 16).tolist()
    short = evolution(
        critical_dims=(0, 0), target_length=128, tail_bounds=(1, 8), starts=["unscaled", trained]
    )
    assert short.space.tail_bounds == (1.0, 8.0), "the ratio is never below 1"
    assert [c.tail for c in short.ask()[:2]] == [(1.0,) * 16, tuple(trained)]


def test_start_tokens_are_one_more_gene_where_there_is_a_choice() -> None:
    choices = [0, 1, 4, 16]
    for preset in OPERATORS:
        search = evolution(critical_dims=(0, 0), start_tokens=choices, preset=preset, iterations=5)
        born = [c.start_tokens for c in search.ask()]
        assert born[:3] == [0, 0, 0]
        while not search.finished:
            born += [c.start_tokens for c in search.ask()]
            search.tell(totals_of(search.ask()))
        assert set(born) == set(choices)
    assert {c.start_tokens for c in evolution(start_tokens=[8]).ask()} == {8}


def test_one_choice_of_start_tokens_leaves_the_random_stream_as_it_was() -> None:
    plain, fixed = evolution(), evolution(start_tokens=[8])
    assert [c.tail for c in plain.ask()] == [c.tail for c in fixed.ask()]


@pytest.mark.parametrize(
    ("start_tokens", "message"),
    [
        ([0, 257], "start_tokens: expected at most the original length 256, got 257"),
        ([1, 1], "expected different numbers"),
    ],
)
def test_start_tokens_that_cannot_be_are_refused(start_tokens: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evolution(start_tokens=start_tokens)


@pytest.mark.parametrize("dims", [(1, 16), (16, 20), (3, 100)])
def test_critical_dims_outside_the_model_are_refused(dims: tuple[int, int]) -> None:
    with pytest.raises(
        ValueError, match=r"^search.critical_dims: expected cosine indices in 1 \.\.\. 15"
    ):
        SearchSpace.from_recipe(GEOMETRY, section(critical_dims=dims))


@pytest.mark.parametrize("target", [255, 256])
def test_a_target_not_above_the_window_is_refused(target: int) -> None:
    with pytest.raises(
        ValueError, match=r"^search.target_length: expected more than the original length 256"
    ):
        SearchSpace.from_recipe(GEOMETRY, section(target_length=target))


def test_an_attention_factor_setting_becomes_its_number() -> None:
    assert attention_factor(1.3, RATIO, 256) == 1.3
    assert attention_factor("su", RATIO, 256) == su_attention_factor(RATIO, 256)
    assert attention_factor("yarn", RATIO, 256) == yarn_attention_factor(RATIO)
    assert attention_factor("search", RATIO, 256) is None


# --- mutation and crossover


@st.composite
def contexts(draw: st.DrawFn) -> tuple[list[float], MutationContext]:
    """A rising tail inside bounds, ends of the bounds included, and a context."""
    low = draw(st.floats(1.0, 64.0))
    high = low * draw(st.sampled_from([1.0, 1.001, 1.5, 2.0, 4.0]))
    entry = st.floats(low, high) | st.sampled_from([low, high])
    tail = sorted(draw(st.lists(entry, min_size=1, max_size=40)))
    probability = draw(st.sampled_from([0.01, 0.3, 1.0]))
    return tail, MutationContext(low, high, probability, np.random.default_rng(draw(seeds)))


@pytest.mark.parametrize("preset", ["paper", "authors"])
@settings(max_examples=40, deadline=None)
@given(drawn=contexts())
def test_a_mutated_tail_rises_stays_in_bounds_and_keeps_its_length(
    preset: str, drawn: tuple[list[float], MutationContext]
) -> None:
    parent, context = drawn
    tail = np.array(parent)
    mutated = OPERATORS[preset].mutate(tail, context)
    assert mutated.shape == tail.shape
    assert np.all(np.diff(mutated) >= 0)
    assert context.low <= mutated[0]
    assert mutated[-1] <= context.high
    assert tail.tolist() == parent, "the parent was changed"


@settings(max_examples=100, deadline=None)
@given(
    tails=st.integers(1, 30).flatmap(
        lambda n: st.tuples(
            *[st.lists(st.floats(4, 8) | st.sampled_from([4.0, 4.2, 8.0]), min_size=n, max_size=n)]
            * 2
        )
    ),
    seed=seeds,
)
def test_a_crossed_tail_rises_and_stays_between_its_parents(
    tails: tuple[list[float], list[float]], seed: int
) -> None:
    one, other = (np.sort(tail) for tail in tails)
    crossed = cross_authors(one, other, np.random.default_rng(seed))
    assert crossed.shape == one.shape
    assert np.all(np.diff(crossed) >= 0)
    assert np.all((np.minimum(one, other) <= crossed) & (crossed <= np.maximum(one, other)))


def raised(index: int, trials: int = 300) -> int:
    """How often drawing between neighbors raised one entry of a constant tail."""
    context = MutationContext(4.0, 8.0, 0.3, np.random.default_rng(0))
    tail = np.full(13, 5.0)
    return sum(OPERATORS["paper"].mutate(tail, context)[index] > 5.0 for _ in range(trials))


@pytest.mark.parametrize("index", [0, 6], ids=["first", "middle"])
def test_drawing_between_neighbors_cannot_raise_the_first_or_a_middle_entry_of_a_constant_tail(
    index: int,
) -> None:
    assert raised(index) == 0
    assert raised(12) > 0


def test_the_authors_loop_makes_a_constant_tail_rise_strictly_on_their_grid() -> None:
    context = MutationContext(16.0, 32.0, 0.3, np.random.default_rng(0))
    tail = OPERATORS["authors"].mutate(np.full(30, 20.0), context)
    assert np.all(np.diff(tail) > 0)
    np.testing.assert_allclose(tail * 100, np.round(tail * 100), atol=1e-6)
    assert np.sum(tail != 20.0) >= 29


# --- selection


@settings(deadline=None)
@given(
    totals=st.dictionaries(
        st.text("abc", min_size=1, max_size=3),
        st.sampled_from([0.0, 0.5, 1.0, 2.0]) | st.floats(0, 3),
        min_size=1,
        max_size=12,
    ),
    top_k=st.integers(1, 14),
    shuffle=st.randoms(use_true_random=False),
)
def test_selection_keeps_the_best_whatever_the_order(
    totals: dict[str, float], top_k: int, shuffle: Any
) -> None:
    kept = select(totals, top_k)
    mixed = list(totals)
    shuffle.shuffle(mixed)
    assert kept == select({id: totals[id] for id in mixed}, top_k)
    assert kept == sorted(totals, key=lambda id: (totals[id], id))[:top_k]


def test_ties_of_a_selection_go_by_id() -> None:
    assert select({"b": 1.0, "a": 1.0, "c": 0.5, "d": 9.0}, 2) == ["c", "a"]


# --- ask and tell

SEARCHES = st.fixed_dictionaries(
    {
        "preset": st.sampled_from(sorted(OPERATORS)),
        "critical_dims": st.sampled_from([None, (0, 0)]),
        "attention_factor": st.sampled_from([1.0, "su", "yarn", "search", (1.2, 1.6)]),
        "start_tokens": st.sampled_from([[0], [0, 2, 8]]),
        "seed": st.integers(0, 1000),
    }
)


@settings(max_examples=25, deadline=None)
@given(changes=SEARCHES)
def test_every_candidate_of_a_search_is_legal_and_new_and_bred_from_a_survivor_or_drawn(
    changes: dict[str, Any],
) -> None:
    search = evolution(**changes)
    seen: set[str] = set()
    while not search.finished:
        parents = {c.id for c in search.generation.survivors}
        for candidate in search.ask():
            assert is_legal(candidate, search.space)
            assert candidate.id not in seen
            assert candidate.parent_id in {None, *(parents or (c.id for c in search.ask()))}
            seen.add(candidate.id)
        search.tell(totals_of(search.ask()))
    assert search.ask() == ()
    assert len(seen) <= 12 + 3 * 6


def test_the_initial_population_holds_constant_tails_then_their_mutants() -> None:
    search = evolution()
    candidates, dims = search.ask(), search.space.critical_dims
    assert len(candidates) == 12
    assert [c.critical_dim for c in candidates[: len(dims)]] == list(dims)
    assert all(len(set(c.tail)) == 1 and c.parent_id is None for c in candidates[: len(dims)])
    assert all(
        c.parent_id in {s.id for s in candidates[: len(dims)]} for c in candidates[len(dims) :]
    )


@settings(max_examples=20, deadline=None)
@given(changes=SEARCHES, asks=st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_the_same_seed_takes_the_same_way_however_often_it_is_asked(
    changes: dict[str, Any], asks: list[int]
) -> None:
    undisturbed = finish(evolution(**changes))
    search, asked = evolution(**changes), []
    for times in asks:
        first = search.ask()
        assert all(search.ask() is first or search.ask() == first for _ in range(times))
        asked.append([c.id for c in first])
        search.tell(totals_of(first))
    assert asked == undisturbed
    assert search.finished


@pytest.mark.parametrize("killed_after", [0, 1, 2, 3])
def test_a_replayed_search_breeds_the_same_generations(killed_after: int) -> None:
    undisturbed, killed, again = finish(evolution()), evolution(), evolution()
    for _ in range(killed_after):
        killed.tell(totals_of(killed.ask()))
    for _ in range(killed_after):
        again.tell(totals_of(again.ask()))
    assert again.generation == killed.generation
    assert finish(again) == undisturbed[killed_after:]


def test_other_seeds_take_other_ways() -> None:
    assert finish(evolution(seed=0)) != finish(evolution(seed=1))


def test_leaving_out_who_cannot_survive_changes_nothing() -> None:
    whole, raced = evolution(), evolution()
    while not whole.finished:
        assert raced.ask() == whole.ask()
        totals = totals_of(whole.ask())
        known = {**totals, **whole.generation.totals}
        worst = sorted(known.values())[whole.settings.top_k - 1]
        raced.tell({id: total for id, total in totals.items() if total <= worst})
        whole.tell(totals)
        assert raced.generation == whole.generation


@settings(max_examples=25, deadline=None)
@given(changes=SEARCHES)
def test_the_best_never_gets_worse_and_survivors_are_ranked(changes: dict[str, Any]) -> None:
    search, best = evolution(**changes), math.inf
    while not search.finished:
        search.tell(totals_of(search.ask()))
        totals = [search.generation.totals[c.id] for c in search.generation.survivors]
        assert totals == sorted(totals)
        assert len(totals) == 4
        assert score(search.best) == totals[0] <= best
        best = totals[0]


def test_penalized_candidates_are_never_survivors() -> None:
    search = evolution()
    asked = search.ask()
    search.tell({**totals_of(asked), asked[0].id: math.inf, asked[1].id: math.nan})
    assert not {asked[0].id, asked[1].id} & {c.id for c in search.generation.survivors}


def test_a_generation_of_penalties_keeps_the_old_survivors() -> None:
    search = evolution()
    search.tell(totals_of(search.ask()))
    before = search.generation.survivors
    search.tell(dict.fromkeys((c.id for c in search.ask()), math.inf))
    assert search.generation.survivors == before


@pytest.mark.parametrize("worst", [math.inf, math.nan])
def test_no_finite_score_at_all_stops_with_a_hint(worst: float) -> None:
    search = evolution()
    with pytest.raises(RuntimeError, match=r"no candidate has a finite score.*model.dtype"):
        search.tell(dict.fromkeys((c.id for c in search.ask()), worst))
    with pytest.raises(RuntimeError, match="no candidate has a finite score"):
        evolution().tell({})


def test_misuse_of_the_protocol_is_a_runtime_error() -> None:
    search = evolution(iterations=0)
    with pytest.raises(RuntimeError, match="no generation has been told yet"):
        _ = search.best
    search.tell(totals_of(search.ask()))
    assert search.finished
    with pytest.raises(RuntimeError, match="the search is finished"):
        search.tell({})


def test_an_exhausted_space_ends_the_search_with_what_it_has() -> None:
    search = evolution(tail_bounds=(1.5, 1.5), iterations=2)
    asked = finish(search)
    assert [len(ids) for ids in asked] == [len(search.space.critical_dims), 0, 0]
    assert search.best.tail[0] == 1.5 * RATIO


def test_a_population_smaller_than_the_critical_dims_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^search.population_size: expected at least 5, .*3 \.\.\. 7 .*, got 4"
    ):
        evolution(population_size=4)
    assert len(evolution(population_size=5).ask()) == 5


@pytest.mark.parametrize("searched", ["search", (1.2, 1.6)])
def test_a_searched_attention_factor_moves_and_stays_in_bounds(
    searched: str | tuple[float, float],
) -> None:
    search = evolution(attention_factor=searched, iterations=10)
    low, high = search.space.attention_bounds
    values = set()
    while not search.finished:
        values |= {c.attention_factor for c in search.ask()}
        search.tell(totals_of(search.ask()))
    assert len(values) > 10
    assert low <= min(values) < max(values) <= high


def test_a_fixed_attention_factor_is_the_same_number_everywhere() -> None:
    search = evolution(attention_factor="su")
    while not search.finished:
        assert {c.attention_factor for c in search.ask()} == {su_attention_factor(RATIO, 256)}
        search.tell(totals_of(search.ask()))


def test_a_child_keeps_its_parents_critical_dim() -> None:
    search = evolution(population_size=40)
    by_id = {c.id: c for c in search.ask()}
    assert all(
        c.critical_dim == by_id[c.parent_id].critical_dim for c in search.ask() if c.parent_id
    )


# --- looking ahead


@pytest.mark.parametrize("preset", OPERATORS)
def test_a_preview_is_the_generation_that_is_told_and_changes_nothing(preset: str) -> None:
    search, undisturbed = evolution(preset=preset), evolution(preset=preset)
    while not search.finished:
        totals = totals_of(search.ask())
        search.offspring(
            search.preview(search.generation, {id: -total for id, total in totals.items()})
        )
        standing = search.preview(search.generation, totals)
        children = search.offspring(standing)
        search.tell(totals)
        undisturbed.tell(totals)
        assert standing.survivors == search.generation.survivors
        assert children == search.generation.candidates == undisturbed.generation.candidates
        assert search.generation == undisturbed.generation


def test_two_generations_ahead_are_right_where_the_guess_is() -> None:
    search = evolution()
    first = search.preview(search.generation, totals_of(search.ask()))
    first = replace(first, candidates=search.offspring(first))
    second = search.preview(first, totals_of(first.candidates))
    ahead = search.offspring(second, {c.id for c in first.candidates})
    for _ in range(2):
        search.tell(totals_of(search.ask()))
    assert ahead == search.generation.candidates


def test_offspring_of_a_guess_are_right_as_far_as_the_ranks_of_their_parents_are() -> None:
    search = evolution(num_offspring=4, mutation_probability=1.0)
    right = search.preview(search.generation, totals_of(search.ask()))
    stranger = next(c for c in search.ask() if c not in right.survivors)
    wrong = replace(right, survivors=(*right.survivors[:3], stranger))
    assert search.offspring(wrong)[:3] == search.offspring(right)[:3]
    assert search.offspring(wrong)[3] != search.offspring(right)[3]


def test_nothing_is_bred_after_the_last_generation() -> None:
    search = evolution(iterations=0)
    assert search.offspring(search.preview(search.generation, totals_of(search.ask()))) == ()
