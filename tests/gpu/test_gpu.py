"""Scores and gradients on a GPU: against transformers' own forward, the CPU and themselves.

Each input goes over the CPU too, in the default run.
"""

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from ray.exceptions import RayTaskError
from reference_inputs import (
    DEVICES,
    reference_factors,
    reference_sample,
    reference_scorer,
)
from tiny_models import random_sample, shape_of, some_factors, tiny_config, tiny_model

from longrope2_ray.search.job import MEMORY_ADVICE
from longrope2_ray.search.scorer import NeedleScorer, plain_loss
from longrope2_ray.tasks.needle import NeedleSample
from longrope2_ray.workers.failures import Decision, Failure, Limits, decide

LENGTH = 1024
MIB = 1 << 20
SAMPLES = {"full": (LENGTH, None), "skipped": (LENGTH, 400)}


def own_loss(scorer: NeedleScorer, sample: NeedleSample) -> float:
    """Mean NLL of the answer by the family's own forward; a mask lets positions jump."""
    if sample.position_ids is None:
        return plain_loss(scorer.model, sample)
    device = scorer.model.device
    ids, positions = (
        torch.tensor(values, device=device)[None]
        for values in (sample.input_ids, sample.position_ids)
    )
    start, stop = sample.answer_span
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        logits = scorer.model(input_ids=ids, position_ids=positions, attention_mask=mask).logits
        nll = torch.nn.functional.cross_entropy(
            logits[0, start - 1 : stop - 1].float(), ids[0, start:stop]
        )
    return float(nll)


# Logits of 8 to 16 lie 1/16 apart in bfloat16, and kernels round differently before: a token's NLL
# moves by about that, its mean by less.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_score_equals_the_models_own_forward(
    device: str, kind: str, dtype: str, tolerance: float
) -> None:
    scorer, sample = reference_scorer(device, dtype), reference_sample(*SAMPLES[kind])
    assert scorer.trimmed
    factors = reference_factors()
    score = scorer.score(sample, factors)
    with scorer._rope.pinned(factors):
        expected = own_loss(scorer, sample)
    assert score.nll_sum / score.num_tokens == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("device", DEVICES)
def test_score_and_gradient_equal_those_of_the_cpu(device: str, kind: str) -> None:
    assert torch.get_float32_matmul_precision() == "highest", "TF32 would round to 10 bits"
    sample, factors = reference_sample(*SAMPLES[kind]), replace(reference_factors(), start_tokens=4)
    here, there = reference_scorer("cpu"), reference_scorer(device)
    expected, found = here.score(sample, factors), there.score(sample, factors)
    assert found.nll_sum / found.num_tokens == pytest.approx(
        expected.nll_sum / expected.num_tokens, abs=1e-4
    )
    assert found.correct == expected.correct
    expected, found = here.gradient(sample, factors), there.gradient(sample, factors)
    wanted = np.array(expected.gradient)
    assert np.linalg.norm(np.array(found.gradient) - wanted) <= 1e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("family", ["llama", "mistral_windowed", "gemma3", "phi3_partial"])
@pytest.mark.parametrize("device", DEVICES)
def test_families_score_alike_on_every_device(device: str, family: str) -> None:
    """Grouped queries, sliding windows, head sizes that are no power of two, partial RoPE."""
    sample = random_sample(200)
    model = tiny_model(tiny_config(family))
    shape = shape_of(model)
    factors = some_factors(shape, 1.17, 6)
    here = NeedleScorer(model, shape).score(sample, factors)
    scorer = NeedleScorer(tiny_model(tiny_config(family)).to(device), shape)
    assert scorer.trimmed
    there = scorer.score(sample, factors)
    assert there.nll_sum / 7 == pytest.approx(here.nll_sum / 7, abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_repeated_score_is_the_same_bits(device: str, kind: str, dtype: str) -> None:
    sample, factors = reference_sample(*SAMPLES[kind]), reference_factors()
    scorer = reference_scorer(device, dtype)
    first = scorer.score(sample, factors).nll_sum
    assert scorer.score(sample, factors).nll_sum == first
    assert reference_scorer(device, dtype).score(sample, factors).nll_sum == first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_repeated_gradient_is_the_same_bits(device: str, dtype: str) -> None:
    sample, factors = reference_sample(LENGTH if device == "cuda" else 300), reference_factors()
    scorer = reference_scorer(device, dtype)
    first = scorer.gradient(sample, factors).gradient
    assert all(scorer.gradient(sample, factors).gradient == first for _ in range(2))


# ------------------------------------------------------------------------------------------- memory


def memory_scorer(kind: str, device: str) -> NeedleScorer:
    """``reference`` has a key head for each query head; the tiny families share key heads."""
    if kind == "reference":
        return reference_scorer(device)
    model = tiny_model(tiny_config(kind)).to(device)
    return NeedleScorer(model, shape_of(model), mlp_chunk_tokens=300)


def added_peak(scorer: NeedleScorer, length: int, whole: bool, gradient: bool) -> int:
    """Bytes that a score adds at its peak to what is there; 0 on a CPU, which keeps no count."""
    sample = random_sample(length)
    sample = sample.scored_whole() if whole else sample
    factors = some_factors(scorer.shape, 1.1)
    compute = scorer.gradient if gradient else scorer.score
    on_gpu, before = scorer.model.device.type == "cuda", 0
    if on_gpu:
        compute(random_sample(64), factors)  # kernels' workspaces come with the first call
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    assert math.isfinite(compute(sample, factors).nll_sum)
    return torch.cuda.max_memory_allocated() - before if on_gpu else 0


@pytest.mark.parametrize(
    ("whole", "gradient"), [(False, False), (True, False), (False, True)], ids=str
)
@pytest.mark.parametrize("kind", ["reference", "llama", "mistral_windowed"])
@pytest.mark.parametrize(
    ("device", "length"), [("cpu", 128), pytest.param("cuda", 8192, marks=pytest.mark.gpu)]
)
def test_memory_is_linear_in_the_length(
    device: str, length: int, kind: str, whole: bool, gradient: bool
) -> None:
    scorer = memory_scorer(kind, device)
    short, long = (added_peak(scorer, n, whole, gradient) for n in (length, 2 * length))
    assert long <= 2.6 * short


@contextmanager
def little_memory(scorer: NeedleScorer) -> Iterator[None]:
    """Leave a scorer's device no memory; on a CPU one layer says so."""
    if scorer.model.device.type == "cpu":

        def refuse(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        hook = scorer.model.get_decoder().layers[-1].mlp.register_forward_pre_hook(refuse)
        try:
            yield
        finally:
            hook.remove()
        return
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 4 * MIB) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("device", "length"), [("cpu", 300), pytest.param("cuda", 32768, marks=pytest.mark.gpu)]
)
def test_too_little_memory_is_recognized_and_leaves_the_scorer_whole(
    device: str, length: int, gradient: bool
) -> None:
    scorer, factors, small = reference_scorer(device), reference_factors(), random_sample(300)
    before = scorer.score(small, factors).nll_sum
    compute = scorer.gradient if gradient else scorer.score
    with little_memory(scorer), pytest.raises(torch.OutOfMemoryError) as raised:
        compute(random_sample(length), factors)
    failure = Failure.of(RayTaskError("work", "", raised.value))
    assert decide(failure, 1, Limits(memory_advice=MEMORY_ADVICE)) == (Decision.STOP, MEMORY_ADVICE)
    del raised
    assert scorer.score(small, factors).nll_sum == before
    assert math.isfinite(compute(random_sample(length), factors).nll_sum)
