"""What a run will cost, from shapes alone: no weights, no GPU."""

from typing import Any

from longrope2_ray.data.quotas import check_bands
from longrope2_ray.model.costs import (
    ACCELERATORS,
    Shape,
    gpu_memory_bytes,
    num_parameters,
    pass_flops,
    scorer_memory_bytes,
    step_flops,
    training_memory_bytes,
)
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.rope.baselines import require_methods
from longrope2_ray.rope.geometry import RopeGeometry
from longrope2_ray.search.comparison import report_units
from longrope2_ray.search.evolution import Evolution
from longrope2_ray.search.space import SearchSpace
from longrope2_ray.training.batches import check_parallel

UTILISATION = 0.4  # share of the peak that long prefill reaches with flash attention; --utilisation sets another


RACED_OUT = 0.2  # share of units that exact racing saves, on the cautious side: the demo saved 0.59 (jobs/LOG.md)


def plan_training(
    recipe: Recipe, shape: Shape, accelerator: str, utilisation: float
) -> dict[str, Any] | None:
    """Tokens, steps, FLOPs, GPU-hours and memory of the training; None without a ``[data]`` section.

    Raises:
        ValueError: if ``longrope2 data`` or ``longrope2 train`` would refuse the recipe.
    """
    if recipe.data is None:
        return None
    device, settings, length = ACCELERATORS[accelerator], recipe.train, recipe.search.target_length
    original = recipe.model.original_length or shape.original_length
    workers = settings.num_workers or settings.sequence_parallel
    check_bands(recipe.data, length, original)
    check_parallel(workers, shape.num_kv_heads, settings)
    segments = sum(band.tokens // length for band in recipe.data.bands)
    steps = settings.max_steps or segments // settings.global_batch_size
    if not steps or not segments:
        raise ValueError(
            f"train.global_batch_size: expected at most the {segments} segments that data.bands make, "
            f"got {settings.global_batch_size}"
        )
    share = steps * settings.global_batch_size / segments  # of an epoch
    # short documents are at most as long as their band allows, long segments are one range
    pairs = [band.tokens * min(band.max_tokens if band.max_tokens <= original else length, length) / 2
             for band in recipe.data.bands]  # fmt: skip
    flops = step_flops(shape, steps * settings.global_batch_size * length, share * sum(pairs))
    memory = training_memory_bytes(shape, recipe, workers)
    return {
        "tokens": sum(band.tokens for band in recipe.data.bands),
        "segments": segments,
        "steps": steps,
        "trained_tokens": steps * settings.global_batch_size * length,
        "pflop": flops / 1e15,
        "gpu_hours": flops / (device.tflops * 1e12 * utilisation) / 3600,
        "num_workers": workers,
        "sequence_parallel": settings.sequence_parallel,
        "memory_gib": {k: v / 2**30 for k, v in memory.items()},
        "fits": memory["total"] / 2**30 <= device.memory_gib,
        "first_host_gib": 4 * num_parameters(shape) / 2**30,
        "checkpoint_gib": 12 * num_parameters(shape) / 2**30,
    }


def plan(
    recipe: Recipe, shape: Shape, accelerator: str, utilisation: float = UTILISATION
) -> dict[str, Any]:
    """Candidates, units, passes, FLOPs, GPU-hours and memory of a run.

    Raises:
        ValueError: if the accelerator is unknown or the recipe does not fit the shape.
    """
    if accelerator not in ACCELERATORS:
        raise ValueError(
            f"--accelerator: expected one of {', '.join(ACCELERATORS)}, got {accelerator!r}"
        )
    if not 0 < utilisation <= 1:
        raise ValueError(f"--utilisation: expected a share in 0 ... 1, got {utilisation}")
    require_methods(recipe.report.methods)
    device = ACCELERATORS[accelerator]
    search, report = recipe.search, recipe.report
    geometry = RopeGeometry(
        shape.head_dim,
        shape.rotary_dim,
        shape.rope_base,
        recipe.model.original_length or shape.original_length,
    )
    space = SearchSpace.from_recipe(geometry, search)
    Evolution(space, search)  # refuses what the search would refuse
    candidates = search.population_size + search.iterations * search.num_children
    most = candidates * recipe.needles.num_samples
    likely = most if search.racing == "off" else round(most * (1 - RACED_OUT))
    lengths = report.lengths or [search.target_length]
    report_passes = report_units(recipe)
    flops = pass_flops(shape, search.target_length)
    report_flops = (
        sum(pass_flops(shape, length)["total"] for length in lengths) * report_passes / len(lengths)
    )
    memory = scorer_memory_bytes(shape, recipe)
    gpus = recipe.scorer.gpus_per_scorer
    spread = max(1.0, gpus)  # layers go to one GPU after another, which wait for each other

    def pflop(passes: int) -> float:
        return (passes * flops["total"] + report_flops) / 1e15

    def gpu_hours(passes: int) -> float:
        return spread * pflop(passes) * 1e3 / (device.tflops * utilisation) / 3600

    return {
        "recipe": recipe.name,
        "original_length": geometry.original_length,
        "target_length": search.target_length,
        "critical_dims": [space.critical_dims[0], space.critical_dims[-1]],
        "tail_bounds": list(space.tail_bounds),
        "num_parameters": num_parameters(shape),
        "candidates": candidates,
        "units": most,
        "passes_most": most + report_passes,
        "passes_likely": likely + report_passes,
        "pass_pflop": {k: v / 1e15 for k, v in flops.items()},
        "pflop_most": pflop(most),
        "pflop_likely": pflop(likely),
        "accelerator": accelerator,
        "utilisation": utilisation,
        "gpu_hours_most": gpu_hours(most),
        "gpu_hours_likely": gpu_hours(likely),
        "scorer_memory_gib": {k: v / 2**30 for k, v in memory.items()},
        "gpus_per_scorer": gpus,
        "fits": gpu_memory_bytes(shape, recipe) / 2**30
        <= device.memory_gib * min(gpus or 1.0, 1.0),
        "training": plan_training(recipe, shape, accelerator, utilisation),
    }


def format_plan(cost: dict[str, Any]) -> str:
    """The plan as text for a person."""
    flops, memory = cost["pass_pflop"], cost["scorer_memory_gib"]
    lines = [
        f"{cost['recipe']}: {cost['original_length']} -> {cost['target_length']} tokens, "
        f"critical dimensions {cost['critical_dims'][0]} ... {cost['critical_dims'][1]}, "
        f"tail in [{cost['tail_bounds'][0]:g}, {cost['tail_bounds'][1]:g}]",
        f"model            {cost['num_parameters'] / 1e9:.3f} B parameters",
        f"candidates       {cost['candidates']}",
        f"units            {cost['units']} at most",
        f"forward passes   {cost['passes_most']} at most, about {cost['passes_likely']} with racing, report included",
        f"one pass         {flops['total']:.4g} PFLOP (linear {flops['linear']:.4g}, attention {flops['attention']:.4g})",
        f"FLOPs            {cost['pflop_most']:.4g} PFLOP at most, about {cost['pflop_likely']:.4g}",
        f"GPU-hours        {cost['gpu_hours_most']:.4g} at most, about {cost['gpu_hours_likely']:.4g}, "
        f"on {cost['accelerator']} at {cost['utilisation']:.0%} of its peak",
        "memory of one scorer",
    ]
    lines += [f"  {part:<22} {gib:9.3f} GiB" for part, gib in memory.items()]
    verdict = (
        "fits"
        if cost["fits"]
        else "DOES NOT FIT: raise scorer.gpus_per_scorer or take a larger accelerator"
    )
    lines.append(f"{verdict} ({cost['gpus_per_scorer']:g} x {cost['accelerator']} per scorer)")
    if train := cost["training"]:
        lines += [
            "",
            f"training         {train['steps']} steps, {train['trained_tokens'] / 1e9:.4g} B tokens of "
            f"{train['tokens'] / 1e9:.4g} B in {train['segments']} segments",
            f"FLOPs            {train['pflop']:.4g} PFLOP, recomputation not counted",
            f"GPU-hours        {train['gpu_hours']:.4g} on {cost['accelerator']} at {cost['utilisation']:.0%} of its peak",
            f"memory of one of {train['num_workers']} workers, {train['sequence_parallel']} on each segment",
        ]
        lines += [f"  {part:<25} {gib:6.2f} GiB" for part, gib in train["memory_gib"].items()]
        lines.append(
            "fits"
            if train["fits"]
            else "DOES NOT FIT: raise train.num_workers or train.sequence_parallel"
        )
        lines.append(f"the first worker's host holds the whole model: {train['first_host_gib']:.1f} GiB; a checkpoint takes "
                     f"{train['checkpoint_gib']:.1f} GiB, two are kept")  # fmt: skip
    return "\n".join(lines)
