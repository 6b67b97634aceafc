from typing import Any

import pytest

from longrope2_ray.model.costs import (
    ACCELERATORS,
    num_parameters,
    pass_flops,
    scorer_memory_bytes,
    step_flops,
    training_memory_bytes,
)
from longrope2_ray.plan import SAVED_BY_RACING, format_plan, plan
from longrope2_ray.recipe.loading import load_recipe
from longrope2_ray.recipe.model import ModelShape
from longrope2_ray.recipe.recipe import Recipe

SHAPE = ModelShape(
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rotary_dim=16,
    rope_base=10_000.0,
    original_length=256,
    vocab_size=100,
)


def recipe(search: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    small = {
        "target_length": 1024,
        "preset": "paper",
        "population_size": 16,
        "iterations": 3,
        "num_offspring": 8,
        "top_k": 4,
    }
    return Recipe(
        name="x",
        model={"path": "x", "shape": SHAPE},
        search={**small, **(search or {})},
        **sections,
    )


def test_parameters_are_counted_by_hand() -> None:
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128  # q, k and v, o, gated MLP
    assert num_parameters(SHAPE) == 2 * layer + 2 * 100 * 64
    tied = SHAPE.model_copy(update={"tie_word_embeddings": True})
    assert num_parameters(SHAPE) - num_parameters(tied) == 100 * 64


def test_parameters_equal_those_of_the_model_but_for_the_norms() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=100, tie_word_embeddings=False,
    )  # fmt: skip
    weights = dict(LlamaForCausalLM(config).named_parameters())
    assert num_parameters(SHAPE) == sum(
        w.numel() for name, w in weights.items() if "norm" not in name
    )


def test_linear_flops_grow_with_the_length_and_attention_with_its_square() -> None:
    one, two = pass_flops(SHAPE, 1000), pass_flops(SHAPE, 2000)
    assert two["linear"] == 2 * one["linear"]
    assert two["attention"] == 4 * one["attention"]
    assert one["total"] == one["linear"] + one["attention"]


def test_units_are_candidates_times_samples_and_passes_add_the_report() -> None:
    cost = plan(
        recipe(
            needles={"num_samples": 5}, report={"num_samples": 4, "methods": ["pi", "longrope2"]}
        ),
        SHAPE,
        "h100",
    )
    assert cost.candidates == 16 + 3 * 8
    assert cost.units == 40 * 5
    assert cost.passes_most == 200 + 2 * 4
    assert cost.passes_likely == round(200 * (1 - SAVED_BY_RACING)) + 2 * 4
    assert cost.gpu_hours_likely < cost.gpu_hours_most


def test_report_lengths_and_attention_factors_multiply_the_report() -> None:
    sections = {
        "num_samples": 4,
        "methods": ["pi"],
        "lengths": [512, 1024],
        "attention_factors": [1.0, "su", "yarn"],
    }
    cost = plan(recipe(report=sections), SHAPE, "h100")
    assert cost.passes_most - cost.units == 2 * 3 * 4


def test_gpu_hours_are_flops_over_the_reached_share_of_the_peak() -> None:
    cost = plan(recipe(), SHAPE, "a100-80gb", utilization=0.5)
    seconds = (
        cost.passes_most
        * cost.pass_pflop["total"]
        * 1e15
        / (ACCELERATORS["a100-80gb"].tflops * 1e12 * 0.5)
    )
    assert cost.gpu_hours_most == pytest.approx(seconds / 3600)


def test_flops_of_the_run_are_those_of_every_pass() -> None:
    cost = plan(
        recipe(report={"lengths": [512, 2048], "methods": ["pi"]}),
        SHAPE,
        "h100",
    )
    one = cost.pass_pflop["total"]
    report = [pass_flops(SHAPE, length)["total"] / 1e15 for length in (512, 2048)]
    each = (cost.passes_most - cost.units) / 2
    assert cost.pflop_most == pytest.approx(cost.units * one + each * sum(report))
    saved = cost.passes_most - cost.passes_likely
    assert cost.pflop_most - cost.pflop_likely == pytest.approx(saved * one)
    said = f"FLOPs            {cost.pflop_most:.4g} PFLOP at most, about {cost.pflop_likely:.4g}"
    assert said in format_plan(cost).splitlines()


def test_memory_is_the_sum_of_its_parts_without_the_logits_that_are_avoided() -> None:
    memory = scorer_memory_bytes(SHAPE, recipe())
    parts = [gib for part, gib in memory.items() if part not in ("total", "full logits (avoided)")]
    assert memory["total"] == sum(parts)
    assert memory["weights"] == 2 * num_parameters(SHAPE)


def test_memory_is_that_of_the_longest_length_reported() -> None:
    longer = scorer_memory_bytes(SHAPE, recipe(report={"lengths": [4096]}))
    assert longer["activations"] == 4 * scorer_memory_bytes(SHAPE, recipe())["activations"]


def test_a_smaller_mlp_chunk_takes_less_memory() -> None:
    whole, chunked = (
        scorer_memory_bytes(SHAPE, recipe(scorer={"mlp_chunk_tokens": n})) for n in (1024, 256)
    )
    assert whole["mlp chunk"] == 4 * chunked["mlp chunk"]


def test_a_model_that_is_too_large_does_not_fit_until_it_is_spread() -> None:
    big = SHAPE.model_copy(
        update={"hidden_size": 8192, "intermediate_size": 28672, "num_layers": 80}
    )
    alone = plan(recipe(), big, "h100")
    assert not alone.fits
    assert "DOES NOT FIT" in format_plan(alone)
    spread = plan(recipe(scorer={"gpus_per_scorer": 4}), big, "h100")
    assert spread.fits
    # Three GPUs wait while one works.
    assert spread.gpu_hours_most == pytest.approx(4 * alone.gpu_hours_most)


def test_activations_are_not_spread_over_gpus_nor_is_a_gpu_whole_for_each_that_shares_it() -> None:
    long = recipe({"target_length": 2**22}, scorer={"mlp_chunk_tokens": 4096})
    wide = SHAPE.model_copy(update={"hidden_size": 8192, "num_layers": 1})
    need = scorer_memory_bytes(wide, long)
    assert need["weights"] < need["activations"] / 10
    eight = plan(
        recipe({"target_length": 2**22}, scorer={"mlp_chunk_tokens": 4096, "gpus_per_scorer": 8}),
        wide,
        "h100",
    )
    assert need["total"] / 8 / 2**30 < ACCELERATORS["h100"].memory_gib < need["activations"] / 2**30
    assert not eight.fits
    shared = SHAPE.model_copy(update={"num_parameters": 12 * 2**30})  # 24 GiB of weights on 74
    assert plan(recipe(scorer={"gpus_per_scorer": 0.5}), shared, "h100").fits
    assert not plan(recipe(scorer={"gpus_per_scorer": 0.25}), shared, "h100").fits


def test_weights_that_are_known_are_not_estimated() -> None:
    experts = SHAPE.model_copy(update={"num_parameters": 10 * num_parameters(SHAPE)})
    assert num_parameters(experts) == 10 * num_parameters(SHAPE)
    assert (
        scorer_memory_bytes(experts, recipe())["weights"]
        == 10 * scorer_memory_bytes(SHAPE, recipe())["weights"]
    )


def test_llama3_8b_by_its_shape() -> None:
    shape = load_recipe("llama3_8b_128k").model.shape
    assert shape is not None
    assert num_parameters(shape) == pytest.approx(8_030_261_248, rel=1e-3)


def test_the_text_names_the_numbers() -> None:
    cost = plan(recipe(), SHAPE, "h100")
    text = format_plan(cost)
    for number in (cost.candidates, cost.units, cost.passes_most, cost.passes_likely):
        assert str(number) in text
    for part in cost.scorer_memory_gib:
        assert part in text


@pytest.mark.parametrize(
    ("changed", "accelerator", "utilization", "field"),
    [
        ({}, "h1000", 0.4, "--accelerator"),
        ({}, "h100", 0.0, "--utilization"),
        ({}, "h100", 1.1, "--utilization"),
        ({"critical_dims": [1, 8]}, "h100", 0.4, "search.critical_dims"),
        ({"population_size": 2, "top_k": 2}, "h100", 0.4, "search.population_size"),
    ],
)
def test_what_a_search_would_refuse_is_refused(
    changed: dict[str, Any], accelerator: str, utilization: float, field: str
) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        plan(recipe(changed), SHAPE, accelerator, utilization)


def test_a_target_not_above_the_models_own_length_is_refused() -> None:
    longer = SHAPE.model_copy(update={"original_length": 1024})
    with pytest.raises(
        ValueError,
        match=r"^search.target_length: expected more than the original length 1024, got 1024",
    ):
        plan(recipe(), longer, "h100")


# ------------------------------------------------------------------------------------- training

DATA = {
    "sources": [{"name": "a", "path": ["x"]}],
    "bands": [{"max_tokens": 256, "tokens": 10_240}, {"max_tokens": 4096, "tokens": 20_480}],
    "num_shards": 4,
}


def test_training_is_planned_where_there_is_data_only() -> None:
    assert plan(recipe(), SHAPE, "h100").training is None
    cost = plan(recipe(data=DATA, train={"global_batch_size": 4}), SHAPE, "h100").training
    assert (cost.segments, cost.steps, cost.trained_tokens) == (30, 7, 7 * 4 * 1024)
    assert cost.tokens == 30_720
    assert "training         7 steps" in format_plan(
        plan(recipe(data=DATA, train={"global_batch_size": 4}), SHAPE, "h100")
    )
    with pytest.raises(
        ValueError, match=r"train\.global_batch_size: expected at most the 30 segments"
    ):
        plan(recipe(data=DATA, train={"global_batch_size": 31}), SHAPE, "h100")


def test_a_training_steps_flops_are_three_forward_passes() -> None:
    forward = pass_flops(SHAPE, 1024)["total"] + 2 * SHAPE.vocab_size * SHAPE.hidden_size * 1024
    assert step_flops(SHAPE, 1024, 1024**2 / 2) == pytest.approx(3 * forward)


@pytest.mark.parametrize(("workers", "degree", "gib"), [(64, 1, 60), (8, 8, 26)])
def test_memory_of_training_8b_at_128k_is_what_others_need(
    workers: int, degree: int, gib: float
) -> None:
    """Measured elsewhere: 60 GB on each of 64 GPUs, 26 GB on each of 8 that share a segment."""
    chosen = load_recipe(
        "llama3_8b_128k", [f"--train.num-workers={workers}", f"--train.sequence-parallel={degree}"]
    )
    assert chosen.model.shape is not None
    total = training_memory_bytes(chosen.model.shape, chosen, workers)["total"] / 2**30
    assert total == pytest.approx(gib, rel=0.3)


def test_the_plan_says_what_the_first_worker_and_a_checkpoint_take() -> None:
    """Llama-3-8B has 8.03 B float32 weights; a checkpoint has both moments of AdamW too."""
    chosen = load_recipe("llama3_8b_128k")
    assert chosen.model.shape is not None
    said = format_plan(plan(chosen, chosen.model.shape, "h100")).splitlines()[-1]
    assert said.startswith(
        "the first worker's host holds the whole model: 29.9 GiB; a checkpoint takes 89.7 GiB"
    )


def test_the_papers_training_is_its_recipe() -> None:
    """64 A100 for 54 hours (Sec. 4.1); activation checkpointing adds a third to the FLOPs."""
    for name, hours in (("llama3_8b_128k", 54), ("phi3_mini_128k", 39)):
        chosen = load_recipe(name)
        assert chosen.model.shape is not None
        cost = plan(chosen, chosen.model.shape, "a100-80gb").training
        assert cost.tokens == 10e9
        assert cost.gpu_hours * 4 / 3 == pytest.approx(64 * hours, rel=0.35)
        assert (chosen.train.global_batch_size, chosen.train.learning_rate, chosen.train.betas) == (
            64,
            2e-5,
            (0.9, 0.95),
        )
