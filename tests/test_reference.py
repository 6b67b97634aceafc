"""The reference model shows the effect that comparisons rest on (held-out text, unseen keys)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "jobs" / "reference_model"))

from check import DEPTHS, Check


@pytest.fixture(scope="module")
def check() -> Check:
    return Check("bundled:reference")


@pytest.mark.parametrize("depth", DEPTHS)
def test_needles_are_found_inside_the_window_at_every_depth(check, depth):
    assert check.score("unscaled", check.shape.original_length, depth, 100)[1] >= 0.95


def test_unscaled_it_fails_at_eight_windows(check):
    assert check.score("unscaled", 8 * check.shape.original_length, 0.0, 16)[1] < 0.10


@pytest.mark.parametrize(("ratio", "method"), [(4, "yarn"), (8, "ntk")])
def test_good_factors_without_tuning_lower_needle_perplexity_fivefold(check, ratio, method):
    length = ratio * check.shape.original_length
    unscaled, _ = check.score("unscaled", length, 0.0, 12)
    rescaled, _ = check.score(method, length, 0.0, 12)
    assert unscaled / rescaled >= 5


def test_the_bundled_model_is_small_and_has_enough_cosine_dimensions(check):
    folder = Path(__file__).parent.parent / "longrope2_ray" / "assets" / "reference"
    assert (folder / "model.safetensors").stat().st_size <= 16 * 2**20
    assert check.shape.geometry.num_cosines >= 32
    assert check.shape.original_length in (256, 512)
    assert check.shape.rope_base == 10000.0
