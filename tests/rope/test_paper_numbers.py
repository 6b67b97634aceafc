"""Numbers of the papers, of published vectors and of arithmetic done by hand.

Dimensions are indices from zero.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope2_ray.plan import Plan, plan
from longrope2_ray.recipe.loading import load_recipe
from longrope2_ray.recipe.model import ModelShape
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.recipe.search import SearchSection
from longrope2_ray.rope.baselines import su_attention_factor, yarn_attention_factor
from longrope2_ray.rope.factors import assemble, factors_from_json
from longrope2_ray.rope.geometry import RopeGeometry
from longrope2_ray.search.space import SearchSpace

PHI3_MINI = RopeGeometry(96, 96, 1e4, 2048)
LLAMA3_8B = RopeGeometry(128, 128, 5e5, 8192)
PHI4_MINI = RopeGeometry(96, 96, 1e4, 4096)

PUBLISHED: dict[str, dict[str, Any]] = {
    vector["id"]: vector
    for vector in json.loads((Path(__file__).parents[1] / "published_factors.json").read_text())[
        "vectors"
    ]
}
LONGROPE_V1 = [id for id, vector in PUBLISHED.items() if vector["kind"] == "LongRoPE v1"]

LLAMA3_8B_SHAPE = load_recipe("llama3_8b_128k").model.shape
PHI3_MINI_SHAPE = load_recipe("phi3_mini_128k").model.shape


def cost_at_128k(shape: ModelShape) -> Plan:
    recipe = Recipe(
        name="x", model={"path": "x", "shape": shape}, search={"target_length": 131_072}
    )
    return plan(recipe, shape, "h100")


@pytest.mark.parametrize(
    ("geometry", "critical", "ten_periods"),
    [(PHI3_MINI, 31, 19), (LLAMA3_8B, 35, 24), (PHI4_MINI, 34, 22)],
    ids=["Phi3-mini", "LLaMA3-8B", "Phi-4-mini"],
)
def test_critical_dims_are_those_of_the_paper(
    geometry: RopeGeometry, critical: int, ten_periods: int
) -> None:
    assert (geometry.theoretical_critical_dim, geometry.ten_period_dim) == (critical, ten_periods)


@pytest.mark.parametrize(
    ("geometry", "printed"), [(PHI3_MINI, 30), (LLAMA3_8B, 34)], ids=["Phi3-mini", "LLaMA3-8B"]
)
def test_the_authors_tool_prints_one_less(geometry: RopeGeometry, printed: int) -> None:
    assert geometry.theoretical_critical_dim - 1 == printed


@pytest.mark.parametrize(("counted_from_one", "period"), [(48, 51_861), (8, 24)])
def test_periods_of_phi3_mini_are_those_of_the_paper(counted_from_one: int, period: int) -> None:
    assert math.floor(PHI3_MINI.periods_tokens[counted_from_one - 1]) == period


def test_the_released_llama3_vector_has_an_ntk_head_and_a_rising_tail_in_the_search_space() -> None:
    released = np.array(PUBLISHED["llama3-8b-longrope2"]["long_factor"])
    dim, tail = 33, released[33:]
    assert (tail[0], tail[-1]) == (21.81, 26.05)
    np.testing.assert_allclose(assemble(dim, tail), released, rtol=4e-10)
    space = SearchSpace.from_recipe(LLAMA3_8B, SearchSection(target_length=131_072))
    assert space.critical_dims == tuple(range(24, 36))
    assert dim in space.critical_dims
    assert space.tail_bounds == (16.0, 32.0)
    assert np.all(np.diff(tail) >= 0)
    assert np.all((tail >= space.tail_bounds[0]) & (tail <= space.tail_bounds[1]))


@pytest.mark.parametrize("id", PUBLISHED)
def test_published_vectors_are_accepted_monotone_or_not(id: str) -> None:
    vector = PUBLISHED[id]
    factors = factors_from_json(
        json.dumps({"rope_scaling": {"long_factor": vector["long_factor"]}}), id
    )
    assert factors.require_length(vector["rope_dim"] // 2).values.tolist() == vector["long_factor"]
    assert factors.monotone == (id != "mistral-7b_256k_on-128k-ft")


def test_su_attention_factor_from_8k_to_128k() -> None:
    assert su_attention_factor(16, 8192) == pytest.approx(
        math.sqrt(1 + math.log(16) / math.log(8192))
    )
    assert f"{su_attention_factor(16, 8192):.4f}" == "1.1435"


def test_attention_factor_of_the_reference_trial_at_8_times_256() -> None:
    assert f"{su_attention_factor(8, 256):.2f}" == "1.17"
    assert f"{yarn_attention_factor(8):.2f}" == "1.21"


@pytest.mark.parametrize(
    ("shape", "linear", "attention"),
    [(LLAMA3_8B_SHAPE, 1.8, 4.5), (PHI3_MINI_SHAPE, 1.0, 3.4)],
    ids=["Llama-3-8B", "Phi-3-mini"],
)
def test_planned_flops_at_128k_agree_with_the_arithmetic(
    shape: ModelShape, linear: float, attention: float
) -> None:
    flops = cost_at_128k(shape).pass_pflop
    assert flops["linear"] == pytest.approx(linear, rel=0.1)
    assert flops["attention"] == pytest.approx(attention, rel=0.1)
    assert flops["total"] == pytest.approx(linear + attention, rel=0.1)


@pytest.mark.parametrize(
    ("shape", "billions"),
    [(LLAMA3_8B_SHAPE, 8.03), (PHI3_MINI_SHAPE, 3.82)],
    ids=["Llama-3-8B", "Phi-3-mini"],
)
def test_planned_parameters_are_those_of_the_model_card(shape: ModelShape, billions: float) -> None:
    assert cost_at_128k(shape).num_parameters / 1e9 == pytest.approx(billions, rel=0.005)


def test_full_logits_of_llama3_at_128k_would_take_31_gib_in_bfloat16() -> None:
    memory = cost_at_128k(LLAMA3_8B_SHAPE).scorer_memory_gib
    assert memory["full logits (avoided)"] == pytest.approx(31, rel=0.02)


@pytest.mark.parametrize(
    "shape", [LLAMA3_8B_SHAPE, PHI3_MINI_SHAPE], ids=["Llama-3-8B", "Phi-3-mini"]
)
def test_either_model_fits_one_40_gb_gpu_at_128k(shape: ModelShape) -> None:
    assert cost_at_128k(shape).scorer_memory_gib["total"] < 40e9 / 2**30
