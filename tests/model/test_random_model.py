"""The benchmark's models of random weights have the shape that they were asked for."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, random_sample, section, shape_of, some_factors, tiny_config
from tiny_models import tiny_model as built

from longrope2_ray.model.spec import shape_of as found_shape
from longrope2_ray.search.scorer import NeedleScorer

PATH = Path(__file__).parents[1] / "benchmarks" / "bench_scorer.py"
spec = importlib.util.spec_from_file_location("bench_scorer", PATH)
assert spec
assert spec.loader
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3_partial"])
def test_a_random_model_has_the_shape_and_is_scored(family: str, dtype: str) -> None:
    assert family in FAMILIES
    own = built(tiny_config(family))
    shape = shape_of(own)
    model = bench.random_model(shape, section("random", dtype=dtype), torch.device("cpu"))
    assert model.dtype == getattr(torch, dtype)
    counted = sum(parameter.numel() for parameter in own.parameters())
    whole = shape.model_copy(update={"num_parameters": counted})
    assert found_shape(model, model.config, "random") == whole
    scorer = NeedleScorer(model, shape)
    assert scorer.trimmed
    assert scorer.score(random_sample(64), some_factors(shape)).is_finite
    # All families here have heads of 16 or 24, which torch's kernels take.
    with bench.preferring("flash", model, shape) as taken:
        assert taken
