import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from longrope2_ray.rope.geometry import RopeGeometry

geometries = st.builds(
    lambda half, spare, base, length: RopeGeometry(2 * half + spare, 2 * half, base, length),
    half=st.integers(1, 128),
    spare=st.integers(0, 64),
    base=st.floats(2.0, 1e7),
    length=st.integers(7, 1_000_000),
)


def test_angles_and_periods_follow_equations_5_and_6() -> None:
    geometry = RopeGeometry(8, 8, 10_000.0, 2048)
    np.testing.assert_allclose(geometry.angles, [1, 1e-1, 1e-2, 1e-3])
    np.testing.assert_allclose(geometry.periods_tokens, 2 * math.pi * np.array([1, 10, 100, 1000]))
    assert geometry.angles.dtype == np.float64


def test_partial_rotary_dimensions_decide_the_angles_not_the_head() -> None:
    partial, whole = RopeGeometry(128, 96, 1e4, 4096), RopeGeometry(96, 96, 1e4, 4096)
    assert partial.num_cosines == 48
    np.testing.assert_array_equal(partial.angles, whole.angles)
    assert partial.theoretical_critical_dim == whole.theoretical_critical_dim


@settings(deadline=None)
@given(geometry=geometries, num_periods=st.floats(0.5, 100))
def test_a_dim_with_periods_is_the_first_that_turns_less_often(
    geometry: RopeGeometry, num_periods: float
) -> None:
    turns = geometry.original_length / geometry.periods_tokens
    # Exactly on the border either side is right.
    assume(np.all(np.abs(turns / num_periods - 1) > 1e-9))
    fewer = np.flatnonzero(turns < num_periods)
    assert geometry.dim_with_periods(num_periods) == (
        fewer[0] if len(fewer) else geometry.num_cosines - 1
    )


@settings(deadline=None)
@given(geometry=geometries)
def test_the_ten_period_dim_never_lies_above_the_critical_one(geometry: RopeGeometry) -> None:
    assert 0 <= geometry.ten_period_dim <= geometry.theoretical_critical_dim < geometry.num_cosines


@settings(deadline=None)
@given(geometry=geometries, factor=st.integers(2, 64))
def test_a_longer_window_moves_the_critical_dim_up(geometry: RopeGeometry, factor: int) -> None:
    longer = geometry.dim_with_periods(1, geometry.original_length * factor)
    assert longer >= geometry.theoretical_critical_dim


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ((64, 0, 1e4, 2048), "rotary_dim"),
        ((64, 63, 1e4, 2048), "rotary_dim"),
        ((64, 66, 1e4, 2048), "rotary_dim"),
        ((64, 64, 1.0, 2048), "base"),
        ((64, 64, math.nan, 2048), "base"),
        ((64, 64, math.inf, 2048), "base"),
        ((64, 64, 1e4, 6), "original_length"),
    ],
)
def test_an_impossible_geometry_is_refused_by_field(
    arguments: tuple[int, int, float, int], field: str
) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        RopeGeometry(*arguments)
