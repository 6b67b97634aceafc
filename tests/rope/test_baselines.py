import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope2_ray.rope import baselines
from longrope2_ray.rope.baselines import METHODS, WITH_CRITICAL_DIM, baseline
from longrope2_ray.rope.factors import factors_from_json
from longrope2_ray.rope.geometry import RopeGeometry

# (geometry, target length): Llama-3, Phi-3, Llama-2, SmolLM2, a partial rotary one, a tiny one,
# a long window on a low base
GEOMETRIES = [
    (RopeGeometry(128, 128, 500_000.0, 8192), 131_072),
    (RopeGeometry(96, 96, 10_000.0, 2048), 131_072),
    (RopeGeometry(128, 128, 10_000.0, 4096), 32_768),
    (RopeGeometry(64, 64, 100_000.0, 8192), 12_288),
    (RopeGeometry(128, 96, 10_000.0, 4096), 131_072),
    (RopeGeometry(16, 16, 10_000.0, 256), 1024),
    (RopeGeometry(64, 64, 10_000.0, 131_072), 1_048_576),
]
ids = [f"d{g.rotary_dim}-base{g.base:g}-{g.original_length}to{n}" for g, n in GEOMETRIES]
cases = pytest.mark.parametrize(("geometry", "target"), GEOMETRIES, ids=ids)


def transformers_factors(kind: str, geometry: RopeGeometry, target: int) -> np.ndarray:
    """Default inverse frequencies over scaled ones, both by transformers' own functions."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": kind,
        "rope_theta": geometry.base,
        "factor": target / geometry.original_length,
        "original_max_position_embeddings": geometry.original_length,
        "partial_rotary_factor": geometry.rotary_dim / geometry.head_dim,
    }
    if kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        hidden_size=2 * geometry.head_dim,
        num_attention_heads=2,
        head_dim=geometry.head_dim,
        max_position_embeddings=target,
        rope_parameters=parameters,
    )
    inv_freq, _ = ROPE_INIT_FUNCTIONS[kind](config, device=None)
    default = geometry.base ** (-2 * np.arange(geometry.num_cosines) / geometry.rotary_dim)
    return default / inv_freq.double().numpy()


@cases
@pytest.mark.parametrize(
    ("ours", "theirs"), [("pi", "linear"), ("yarn", "yarn"), ("llama3", "llama3")]
)
def test_the_vector_equals_that_of_transformers(
    ours: str, theirs: str, geometry: RopeGeometry, target: int
) -> None:
    factors = baseline(ours, geometry, target).values
    np.testing.assert_allclose(factors, transformers_factors(theirs, geometry, target), rtol=2e-6)


@cases
def test_abf_is_the_base_of_xiong_et_al_for_their_ratio(
    geometry: RopeGeometry, target: int
) -> None:
    longer = RopeGeometry(
        geometry.head_dim, geometry.rotary_dim, 50 * geometry.base, geometry.original_length
    )
    np.testing.assert_allclose(
        baseline("abf", geometry, 8 * geometry.original_length).values,
        geometry.angles / longer.angles,
        rtol=1e-9,
    )
    np.testing.assert_allclose(baseline("abf", geometry, geometry.original_length).values, 1.0)
    assert np.all(
        baseline("abf", geometry, target).values[1:]
        > baseline("ntk-aware", geometry, target).values[1:]
    )


def test_cope_fades_the_last_twenty_frequencies_of_llama3() -> None:
    """By the formula of the authors' code, on float32 frequencies, as transformers reads them."""
    import torch

    geometry, target = GEOMETRIES[0]
    inverse = 1 / (500_000.0 ** (torch.arange(0, 128, 2).float() / 128))
    theirs = inverse.clone()
    theirs[-20:] *= 0.5 * (1.0 + torch.cos(torch.linspace(0.0, torch.pi, 20)))
    for method, last in (("cope", 1), ("cope-hard", 20)):
        factors = torch.tensor(baseline(method, geometry, target).values, dtype=torch.float32)
        ours = inverse / factors
        torch.testing.assert_close(ours[:44], inverse[:44])
        if method == "cope":
            torch.testing.assert_close(ours[:-last], theirs[:-last], rtol=1e-5, atol=0)
        # What is cut to zero stands still over the target length.
        assert 0 < ours[-last:].max() * target <= 1.0001e-3


@cases
@pytest.mark.parametrize("method", ["cope", "cope-hard"])
def test_cope_keeps_what_turned_once_in_the_window(
    method: str, geometry: RopeGeometry, target: int
) -> None:
    vector = baseline(method, geometry, target)
    turned = geometry.periods_tokens <= geometry.original_length
    np.testing.assert_array_equal(vector.values[turned], 1.0)
    changed = int(np.sum(vector.values > 1))
    assert changed <= 20
    never = int(np.sum(~turned))
    # The first of the soft ones is multiplied by 1.
    assert changed == max(min(never, 20) - (method == "cope"), 0)
    angles = geometry.angles / np.float32(vector.values)
    assert np.isfinite(angles).all()
    assert np.all(angles > 0)
    assert vector.values.max() < 1e7
    again = factors_from_json(json.dumps(vector.values.tolist()), "here")
    np.testing.assert_array_equal(again.values, vector.values)


@cases
def test_ntk_aware_runs_from_one_to_the_ratio(geometry: RopeGeometry, target: int) -> None:
    factors, ratio = (
        baseline("ntk-aware", geometry, target).values,
        target / geometry.original_length,
    )
    i, d = np.arange(geometry.num_cosines), geometry.rotary_dim
    np.testing.assert_allclose(factors, ratio ** (2 * i / (d - 2)), rtol=1e-12)
    assert (factors[0], factors[-1]) == (1.0, pytest.approx(ratio))


@cases
def test_ntk_moves_the_base_as_liu_et_al(geometry: RopeGeometry, target: int) -> None:
    power = math.log(target / (2 * math.pi)) / math.log(geometry.original_length / (2 * math.pi))
    moved = RopeGeometry(
        geometry.head_dim, geometry.rotary_dim, geometry.base**power, geometry.original_length
    )
    np.testing.assert_allclose(
        baseline("ntk", geometry, target).values, geometry.angles / moved.angles, rtol=1e-9
    )


@cases
def test_ntk_reaches_the_ratio_where_one_period_fills_the_window(
    geometry: RopeGeometry, target: int
) -> None:
    exact = (
        geometry.num_cosines
        * math.log(geometry.original_length / (2 * math.pi))
        / math.log(geometry.base)
    )
    ratio = target / geometry.original_length
    expected = ratio ** (np.arange(geometry.num_cosines) / exact)
    np.testing.assert_allclose(baseline("ntk", geometry, target).values, expected, rtol=1e-9)


@cases
def test_ntk_rcd_meets_the_ratio_at_its_critical_dim_and_stays_below_ntk_at_the_theoretical_one(
    geometry: RopeGeometry, target: int
) -> None:
    ratio, theory = target / geometry.original_length, geometry.theoretical_critical_dim
    for dim in range(1, geometry.num_cosines):
        assert baseline("ntk-rcd", geometry, target, critical_dim=dim).values[dim] == pytest.approx(
            ratio
        )
    if (
        geometry.original_length < geometry.periods_tokens[-1]
    ):  # theory is not cut off at the last dimension
        at_theory = baseline("ntk-rcd", geometry, target).values
        ntk = baseline("ntk", geometry, target).values
        assert np.all(at_theory <= ntk * (1 + 1e-12))
        assert ntk[theory - 1] <= ratio <= ntk[theory] * (1 + 1e-12)


@cases
def test_yarn_rcd_at_the_theoretical_dim_is_yarn(geometry: RopeGeometry, target: int) -> None:
    if geometry.original_length > geometry.periods_tokens[-1]:
        pytest.skip(
            "every dimension turns within the window: there is no theoretical critical dimension"
        )
    rcd = baseline(
        "yarn-rcd", geometry, target, critical_dim=geometry.theoretical_critical_dim
    ).values
    np.testing.assert_array_equal(rcd, baseline("yarn", geometry, target).values)


@cases
def test_yarn_rcd_interpolates_fully_from_its_critical_dim_on(
    geometry: RopeGeometry, target: int
) -> None:
    ratio = target / geometry.original_length
    for dim in range(1, geometry.num_cosines):
        factors = baseline("yarn-rcd", geometry, target, critical_dim=dim).values
        np.testing.assert_allclose(factors[dim:], ratio, rtol=1e-12)
        assert factors[0] == 1.0
        assert np.all(factors[:dim] < ratio)


@cases
def test_yarn_keeps_what_turns_often_and_interpolates_what_never_turned(
    geometry: RopeGeometry, target: int
) -> None:
    factors, ratio = baseline("yarn", geometry, target).values, target / geometry.original_length
    turns = geometry.original_length / geometry.periods_tokens
    assert np.all(
        np.abs(factors[turns < 1 / geometry.base ** (2 / geometry.rotary_dim)] - ratio) < 1e-9
    )
    assert np.all(factors[turns > 32 * geometry.base ** (2 / geometry.rotary_dim)] == 1.0)


@cases
def test_llama3_keeps_above_four_turns_and_interpolates_below_one(
    geometry: RopeGeometry, target: int
) -> None:
    factors, ratio = baseline("llama3", geometry, target).values, target / geometry.original_length
    turns = geometry.original_length / geometry.periods_tokens
    np.testing.assert_allclose(factors[turns > 4], 1.0)
    np.testing.assert_allclose(factors[turns < 1], ratio)


@cases
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_rising_vector_of_the_right_length(
    method: str, geometry: RopeGeometry, target: int
) -> None:
    vector = baseline(method, geometry, target, attention_factor=1.25)
    assert vector.require_length(geometry.num_cosines).monotone
    assert vector.values.min() >= 1 - 1e-12
    assert (vector.attention_factor, vector.source) == (1.25, method)
    assert vector.critical_dim == (
        geometry.theoretical_critical_dim if method in WITH_CRITICAL_DIM else None
    )


@settings(deadline=None)
@given(dim=st.integers(1, 63))
def test_longrope2_before_a_search_is_the_ratio_from_the_critical_dim_on(dim: int) -> None:
    geometry, target = GEOMETRIES[0]
    factors = baseline("longrope2", geometry, target, critical_dim=dim).values
    np.testing.assert_array_equal(factors[dim:], 16.0)
    np.testing.assert_allclose(
        factors[:dim], baseline("ntk-rcd", geometry, target, critical_dim=dim).values[:dim]
    )


@pytest.mark.parametrize("dim", [-1, 0, 64, 1000])
def test_a_critical_dim_outside_the_vector_is_refused(dim: int) -> None:
    with pytest.raises(
        ValueError, match=r"^--critical-dim: expected a cosine index in 1 \.\.\. 63"
    ):
        baseline("longrope2", *GEOMETRIES[0], critical_dim=dim)


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"^--method: expected one of unscaled, pi, ntk, .*, got 'yam'$"
    ):
        baseline("yam", *GEOMETRIES[0])


def test_attention_factors_are_one_without_an_extension() -> None:
    assert baselines.su_attention_factor(1.0, 8192) == baselines.yarn_attention_factor(1.0) == 1.0
    assert baselines.yarn_attention_factor(math.e) == pytest.approx(1.1)
