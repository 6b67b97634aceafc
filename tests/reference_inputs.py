"""The bundled reference model and needle documents for it, on the CPU and on a GPU."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from tiny_models import section, some_factors

from longrope2_ray.model.loading import load_model, load_tokenizer
from longrope2_ray.model.spec import read_shape
from longrope2_ray.recipe.model import ModelShape
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.search.scorer import NeedleScorer
from longrope2_ray.tasks.needle import NeedleSample, build_sample

REFERENCE = "bundled:reference"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@cache
def reference_shape() -> ModelShape:
    return read_shape(section(REFERENCE))


def reference_factors() -> RescaleFactors:
    return some_factors(reference_shape(), 1.1)


def reference_scorer(device: str, dtype: str = "float32", **changes: Any) -> NeedleScorer:
    """A scorer of the reference model, loaded anew; its MLP goes through in several chunks."""
    model = load_model(section(REFERENCE, device=device, dtype=dtype))
    return NeedleScorer(model, reference_shape(), **{"mlp_chunk_tokens": 300, **changes})


@cache
def reference_sample(length: int, num_tokens: int | None = None) -> NeedleSample:
    """A needle in random tokens; ``num_tokens`` of them are kept, all unless given."""
    document = np.random.default_rng(0).integers(3, reference_shape().vocab_size, length)
    return build_sample(
        load_tokenizer(section(REFERENCE)),
        document.tolist(),
        length=length,
        key="numerous-kite",
        value="3141592",
        depth=0.3,
        num_tokens=num_tokens,
    )
