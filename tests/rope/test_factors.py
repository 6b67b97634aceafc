import copy
import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope2_ray.rope.factors import RescaleFactors, assemble, factors_from_json, ntk_head


@settings(deadline=None)
@given(
    dim=st.integers(1, 64),
    tail=st.lists(st.floats(1.0, 1e3), min_size=1, max_size=64).map(sorted),
    base=st.floats(100.0, 1e6),
)
def test_the_head_is_ntk_with_the_base_that_meets_the_tail(
    dim: int, tail: list[float], base: float
) -> None:
    values, d = assemble(dim, tail), 2 * (dim + len(tail))
    moved = base * tail[0] ** (d / (2 * dim))  # Eq. 9
    i = np.arange(dim)
    np.testing.assert_allclose(values[:dim], (moved / base) ** (2 * i / d), rtol=1e-9)
    np.testing.assert_array_equal(values[dim:], tail)
    assert values[0] == 1.0
    assert RescaleFactors(values).monotone


def test_without_a_head_the_tail_is_the_vector() -> None:
    assert len(ntk_head(2.0, 0)) == 0
    np.testing.assert_array_equal(assemble(0, [1.0, 2.0, 3.0]), [1, 2, 3])


def test_values_are_a_read_only_copy() -> None:
    mine = np.array([1.0, 2.0])
    factors = RescaleFactors(mine)
    mine[0] = 9
    assert factors.values[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        factors.values[0] = 9


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_an_entry_that_is_not_finite_and_positive_is_named_by_index(bad: float) -> None:
    with pytest.raises(
        ValueError,
        match=r"^factors: expected finite positive numbers, got .* at index 1 \(and 1 more\)",
    ):
        RescaleFactors(np.array([1.0, bad, bad]))


@pytest.mark.parametrize("values", [np.ones((2, 2)), np.ones(0), np.float64(1.0)])
def test_a_vector_that_is_not_flat_is_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"^factors: expected a flat list of numbers"):
        RescaleFactors(values)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_an_impossible_attention_factor_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"^attention_factor: expected a finite positive number"):
        RescaleFactors(np.ones(2), attention_factor=bad)


def test_a_falling_entry_makes_a_vector_not_monotone_but_valid() -> None:
    assert RescaleFactors(np.array([1.0, 1.0, 2.0])).monotone
    assert not RescaleFactors(np.array([1.0, 2.0, 1.9])).monotone


def test_the_wrong_length_is_refused_with_both_lengths() -> None:
    factors = RescaleFactors(np.ones(3))
    assert factors.require_length(3) is factors
    with pytest.raises(
        ValueError,
        match=r"^factors: expected 4 numbers, one per cosine dimension of this model, got 3$",
    ):
        factors.require_length(4)


@pytest.mark.parametrize(
    ("text", "attention", "critical_dim"),
    [
        ("[1, 2.5]", 1.0, None),
        (
            '{"factors": [1, 2.5], "attention_factor": 1.25, "critical_dim": 1, "start_tokens": 0}',
            1.25,
            1,
        ),
        (
            '{"rope_scaling": {"rope_type": "longrope", "long_factor": [1, 2.5], '
            '"short_factor": [1, 1]}}',
            1.0,
            None,
        ),
        (
            '{"rope_scaling": null, '
            '"rope_parameters": {"long_factor": [1, 2.5], "attention_factor": 1.5}}',
            1.5,
            None,
        ),
        ('{"rope_parameters": {"long_factor": [1, 2.5], "attention_factor": null}}', 1.0, None),
    ],
    ids=["plain list", "winner.json", "rope_scaling", "rope_parameters", "attention factor null"],
)
def test_every_kind_of_file_gives_the_vector(
    text: str, attention: float, critical_dim: int | None
) -> None:
    factors = factors_from_json(text, "file.json")
    assert factors.values.tolist() == [1.0, 2.5]
    assert (factors.attention_factor, factors.critical_dim, factors.source) == (
        attention,
        critical_dim,
        "file.json",
    )


def test_start_tokens_are_read_where_a_file_has_them() -> None:
    assert (
        factors_from_json('{"factors": [1, 2.5], "start_tokens": 8}', "winner.json").start_tokens
        == 8
    )
    assert factors_from_json("[1, 2.5]", "list.json").start_tokens == 0
    with pytest.raises(
        ValueError, match=r"^start_tokens: expected a number of positions, 0 or more, got -1$"
    ):
        RescaleFactors(np.ones(2), start_tokens=-1)


@pytest.mark.parametrize("value", ['"hot"', "[1]", "[1, 2]", "{}"])
def test_a_number_beside_the_vector_that_is_none_is_named(value: str) -> None:
    with pytest.raises(
        ValueError, match=r"^--factors: expected a number as attention_factor in file.json, got "
    ):
        factors_from_json(f'{{"factors": [1, 2.5], "attention_factor": {value}}}', "file.json")
    with pytest.raises(
        ValueError, match=r"^--factors: expected a whole number as start_tokens in file.json, got "
    ):
        factors_from_json(f'{{"factors": [1, 2.5], "start_tokens": {value}}}', "file.json")
    for part in ("2.5", "NaN", "Infinity"):
        with pytest.raises(
            ValueError, match=f"a whole number as start_tokens in file.json, got {part[:3].lower()}"
        ):
            factors_from_json(f'{{"factors": [1, 2.5], "start_tokens": {part}}}', "file.json")


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=128))
def test_a_written_vector_is_read_back_bit_by_bit(values: list[float]) -> None:
    assert factors_from_json(json.dumps(values), "x").values.tolist() == values


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2",
        "3",
        '"text"',
        "{}",
        '{"rope_scaling": {"factor": 8}}',
        '[1, "a"]',
        '{"factors": {"a": 1}}',
        "[null]",
    ],
)
def test_a_file_without_a_vector_is_one_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="factors: expected") as caught:
        factors_from_json(text, "file.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[1, NaN]", "[1, Infinity]", "[1, -2]", "[]", "[[1, 2]]"])
def test_a_file_with_an_impossible_vector_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^factors: expected"):
        factors_from_json(text, "file.json")


def test_pickled_factors_are_the_same_and_stay_read_only() -> None:
    factors = RescaleFactors(np.linspace(1, 4, 8) ** 1.1, 1.2, 3, "test", 5)
    for again in (pickle.loads(pickle.dumps(factors)), copy.deepcopy(factors)):
        assert again.values.tobytes() == factors.values.tobytes()
        assert (again.attention_factor, again.critical_dim) == (1.2, 3)
        assert (again.source, again.start_tokens) == ("test", 5)
        with pytest.raises(ValueError, match="read-only"):
            again.values[0] = 2.0
