"""The estimated cost of a run, from the shape of the model alone: no weights, no GPU."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from longrope2_ray.data.quotas import check_bands
from longrope2_ray.model.costs import (
    ACCELERATORS,
    Accelerator,
    gpu_memory_bytes,
    num_parameters,
    pass_flops,
    scorer_memory_bytes,
    step_flops,
    training_memory_bytes,
)
from longrope2_ray.recipe.model import ModelShape
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.recipe.training import BandSection
from longrope2_ray.rope.baselines import require_methods
from longrope2_ray.rope.geometry import RopeGeometry
from longrope2_ray.search.comparison import num_report_units
from longrope2_ray.search.evolution import Evolution
from longrope2_ray.search.proposing import num_raced, proposal_equivalents
from longrope2_ray.search.space import SearchSpace
from longrope2_ray.training.batches import check_parallel

# Share of the peak FLOPs that a long prefill reaches with flash attention.
UTILIZATION = 0.4

# Share of the units that exact racing saves, a cautious guess: the demo saved 0.59 (jobs/LOG.md).
SAVED_BY_RACING = 0.2

# Bytes a parameter in float32: a weight, and a weight with both of AdamW's moments.
WEIGHT_BYTES = 4
CHECKPOINT_BYTES = 12


@dataclass(frozen=True)
class TrainingPlan:
    """The estimated cost of a training.

    Attributes:
        tokens: tokens of the data, as its bands name them.
        segments: segments of the target length that the tokens make.
        steps: optimizer steps.
        trained_tokens: tokens that the steps see.
        pflop: FLOPs in units of 1e15; recomputation is not counted.
        gpu_hours: hours times GPUs at the assumed utilization.
        num_workers: training processes.
        sequence_parallel: processes that share one segment.
        memory_gib: memory of one process by part, in GiB, with their ``total``.
        fits: whether that memory fits the accelerator.
        first_host_gib: memory of the host that reads the whole model, in GiB.
        checkpoint_gib: size of a checkpoint, in GiB.
    """

    tokens: int
    segments: int
    steps: int
    trained_tokens: int
    pflop: float
    gpu_hours: float
    num_workers: int
    sequence_parallel: int
    memory_gib: Mapping[str, float]
    fits: bool
    first_host_gib: float
    checkpoint_gib: float


@dataclass(frozen=True)
class Plan:
    """The estimated cost of a search, and of a training if the recipe has data.

    Attributes:
        recipe: name of the recipe.
        original_length: pre-trained window in tokens.
        target_length: extended window in tokens.
        critical_dims: first and last critical dimension of the search space.
        tail_bounds: lowest and highest factor of a tail.
        num_parameters: weights of the model.
        candidates: candidates of all generations.
        units: forward passes of the search if racing saves none, one for each sample and candidate.
        proposing: cost of the descent that the first generation comes from, in such passes.
        proposing_most: the same if its skipped documents are widened.
        passes_most: forward passes, the report's included, if racing saves none; those of the
            descent, which are shorter, stand in ``proposing``.
        passes_likely: the same if racing saves what ``SAVED_BY_RACING`` says.
        pass_pflop: FLOPs of one pass by part, in units of 1e15, with their ``total``.
        pflop_most: FLOPs of ``passes_most``, in units of 1e15.
        pflop_likely: FLOPs of ``passes_likely``, in units of 1e15.
        accelerator: name of the GPU.
        utilization: share of its peak FLOPs that is assumed.
        gpu_hours_most: hours times GPUs for ``passes_most``.
        gpu_hours_likely: hours times GPUs for ``passes_likely``.
        scorer_memory_gib: memory of one scorer by part, in GiB, with their ``total``.
        gpus_per_scorer: GPUs of one scorer.
        fits: whether a scorer's memory fits its GPUs.
        training: the cost of the training; None for a recipe without a ``[data]`` section.
    """

    recipe: str
    original_length: int
    target_length: int
    critical_dims: tuple[int, int]
    tail_bounds: tuple[float, float]
    num_parameters: int
    candidates: int
    units: int
    proposing: float
    proposing_most: float
    passes_most: int
    passes_likely: int
    pass_pflop: Mapping[str, float]
    pflop_most: float
    pflop_likely: float
    accelerator: str
    utilization: float
    gpu_hours_most: float
    gpu_hours_likely: float
    scorer_memory_gib: Mapping[str, float]
    gpus_per_scorer: float
    fits: bool
    training: TrainingPlan | None

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values, the attributes' names as keys."""
        return asdict(self)


def plan(
    recipe: Recipe, shape: ModelShape, accelerator: str, utilization: float = UTILIZATION
) -> Plan:
    """Estimate the cost of a recipe's search and training.

    Args:
        accelerator: one of ``model.costs.ACCELERATORS``.
        utilization: share of its peak FLOPs that is reached, in 0 ... 1.

    Raises:
        ValueError: if the accelerator is unknown or the recipe does not fit the shape.
    """
    device = _accelerator(accelerator)
    if not 0 < utilization <= 1:
        raise ValueError(f"--utilization: expected a share in 0 ... 1, got {utilization}")
    require_methods(recipe.report.methods)
    search, scorer = recipe.search, recipe.scorer
    geometry = _geometry(recipe, shape)
    space = SearchSpace.from_recipe(geometry, search)
    Evolution(space, search)  # refuses what the search would refuse
    first, (proposing, proposing_most) = _first_generation(recipe, shape, space, geometry)
    candidates = first + search.iterations * search.num_offspring
    most = candidates * recipe.needles.num_samples
    likely = round(most * (1 - SAVED_BY_RACING))
    flops = pass_flops(shape, search.target_length)
    pflop_most = _search_pflop(recipe, shape, most + proposing_most)
    pflop_likely = _search_pflop(recipe, shape, likely + proposing)
    # The layers of a model on several GPUs go to one GPU after another, which wait for each other.
    spread = max(1.0, scorer.gpus_per_scorer)
    gpu_share = min(scorer.gpus_per_scorer or 1.0, 1.0)
    return Plan(
        recipe=recipe.name,
        original_length=geometry.original_length,
        target_length=search.target_length,
        critical_dims=(space.critical_dims[0], space.critical_dims[-1]),
        tail_bounds=space.tail_bounds,
        num_parameters=num_parameters(shape),
        candidates=candidates,
        units=most,
        proposing=proposing,
        proposing_most=proposing_most,
        passes_most=most + num_report_units(recipe),
        passes_likely=likely + num_report_units(recipe),
        pass_pflop={part: number / 1e15 for part, number in flops.items()},
        pflop_most=pflop_most,
        pflop_likely=pflop_likely,
        accelerator=accelerator,
        utilization=utilization,
        gpu_hours_most=spread * _gpu_hours(pflop_most, device.tflops, utilization),
        gpu_hours_likely=spread * _gpu_hours(pflop_likely, device.tflops, utilization),
        scorer_memory_gib=_gib(scorer_memory_bytes(shape, recipe)),
        gpus_per_scorer=scorer.gpus_per_scorer,
        fits=gpu_memory_bytes(shape, recipe) / 2**30 <= device.memory_gib * gpu_share,
        training=plan_training(recipe, shape, accelerator, utilization),
    )


def plan_training(
    recipe: Recipe, shape: ModelShape, accelerator: str, utilization: float = UTILIZATION
) -> TrainingPlan | None:
    """Estimate the cost of a recipe's training; None for a recipe without a ``[data]`` section.

    Raises:
        ValueError: if ``longrope2 data`` or ``longrope2 train`` would refuse the recipe.
    """
    if recipe.data is None:
        return None
    device, train, bands = _accelerator(accelerator), recipe.train, recipe.data.bands
    length, original = recipe.search.target_length, _geometry(recipe, shape).original_length
    workers = train.num_workers or train.sequence_parallel
    check_bands(recipe.data, length, original)
    check_parallel(workers, shape.num_kv_heads, train)
    segments = sum(band.tokens // length for band in bands)
    steps = train.max_steps or segments // train.global_batch_size
    if not steps or not segments:
        raise ValueError(
            f"train.global_batch_size: expected at most the {segments} segments that data.bands "
            f"make, got {train.global_batch_size}"
        )
    trained = steps * train.global_batch_size
    pairs = trained / segments * sum(_attention_pairs(band, length, original) for band in bands)
    pflop = step_flops(shape, trained * length, pairs) / 1e15
    memory = _gib(training_memory_bytes(shape, recipe, workers))
    return TrainingPlan(
        tokens=sum(band.tokens for band in bands),
        segments=segments,
        steps=steps,
        trained_tokens=trained * length,
        pflop=pflop,
        gpu_hours=_gpu_hours(pflop, device.tflops, utilization),
        num_workers=workers,
        sequence_parallel=train.sequence_parallel,
        memory_gib=memory,
        fits=memory["total"] <= device.memory_gib,
        first_host_gib=WEIGHT_BYTES * num_parameters(shape) / 2**30,
        checkpoint_gib=CHECKPOINT_BYTES * num_parameters(shape) / 2**30,
    )


def _accelerator(name: str) -> Accelerator:
    if name not in ACCELERATORS:
        raise ValueError(f"--accelerator: expected one of {', '.join(ACCELERATORS)}, got {name!r}")
    return ACCELERATORS[name]


def _geometry(recipe: Recipe, shape: ModelShape) -> RopeGeometry:
    """The geometry of the shape; the recipe's original length takes precedence over the shape's."""
    original = recipe.model.original_length or shape.original_length
    return RopeGeometry(shape.head_dim, shape.rotary_dim, shape.rope_base, original)


def _first_generation(
    recipe: Recipe, shape: ModelShape, space: SearchSpace, geometry: RopeGeometry
) -> tuple[int, tuple[float, float]]:
    """Candidates of the first generation, and what proposing them costs, likely and at most."""
    search = recipe.search
    if not search.descent_steps:
        return search.population_size, (0.0, 0.0)
    return num_raced(space), proposal_equivalents(search, shape, geometry, space)


def _search_pflop(recipe: Recipe, shape: ModelShape, units: float) -> float:
    """FLOPs of the search's ``units`` passes and of the report's passes, in units of 1e15."""
    target = recipe.search.target_length
    lengths = recipe.report.lengths or [target]
    of_report = sum(pass_flops(shape, length)["total"] for length in lengths) / len(lengths)
    of_search = pass_flops(shape, target)["total"]
    return (units * of_search + num_report_units(recipe) * of_report) / 1e15


def _attention_pairs(band: BandSection, length: int, original: int) -> float:
    """(query, key) pairs of causal attention in one epoch of a band.

    A short document attends within itself and is at most as long as its band allows; a long segment
    attends within the whole segment.
    """
    attended = band.max_tokens if band.max_tokens <= original else length
    return band.tokens * min(attended, length) / 2


def _gpu_hours(pflop: float, tflops: float, utilization: float) -> float:
    return pflop * 1e3 / (tflops * utilization) / 3600


def _gib(sizes: Mapping[str, float]) -> dict[str, float]:
    return {part: size / 2**30 for part, size in sizes.items()}


def format_plan(cost: Plan) -> str:
    """The plan as text for a terminal."""
    lines = _search_lines(cost)
    if cost.training is not None:
        lines += ["", *_training_lines(cost.training, cost)]
    return "\n".join(lines)


def _search_lines(cost: Plan) -> list[str]:
    flops = cost.pass_pflop
    fits = "fits"
    if not cost.fits:
        fits = "DOES NOT FIT: raise scorer.gpus_per_scorer or take a larger accelerator"
    descent = (
        f"descent          {cost.proposing_most:.1f} full passes at most, "
        f"about {cost.proposing:.1f} unless its documents are widened"
    )
    return [
        f"{cost.recipe}: {cost.original_length} -> {cost.target_length} tokens, "
        f"critical dimensions {cost.critical_dims[0]} ... {cost.critical_dims[1]}, "
        f"tail in [{cost.tail_bounds[0]:g}, {cost.tail_bounds[1]:g}]",
        f"model            {cost.num_parameters / 1e9:.3f} B parameters",
        f"candidates       {cost.candidates}",
        f"units            {cost.units} at most",
        *([descent] if cost.proposing else []),
        f"forward passes   {cost.passes_most} at most, about {cost.passes_likely} with racing, "
        f"report included",
        f"one pass         {flops['total']:.4g} PFLOP (linear {flops['linear']:.4g}, "
        f"attention {flops['attention']:.4g})",
        f"FLOPs            {cost.pflop_most:.4g} PFLOP at most, about {cost.pflop_likely:.4g}",
        f"GPU-hours        {cost.gpu_hours_most:.4g} at most, about {cost.gpu_hours_likely:.4g}, "
        f"on {cost.accelerator} at {cost.utilization:.0%} of its peak",
        "memory of one scorer",
        *(f"  {part:<22} {gib:9.3f} GiB" for part, gib in cost.scorer_memory_gib.items()),
        f"{fits} ({cost.gpus_per_scorer:g} x {cost.accelerator} per scorer)",
    ]


def _training_lines(train: TrainingPlan, cost: Plan) -> list[str]:
    fits = "fits"
    if not train.fits:
        fits = "DOES NOT FIT: raise train.num_workers or train.sequence_parallel"
    return [
        f"training         {train.steps} steps, {train.trained_tokens / 1e9:.4g} B tokens of "
        f"{train.tokens / 1e9:.4g} B in {train.segments} segments",
        f"FLOPs            {train.pflop:.4g} PFLOP, recomputation not counted",
        f"GPU-hours        {train.gpu_hours:.4g} on {cost.accelerator} "
        f"at {cost.utilization:.0%} of its peak",
        f"memory of one of {train.num_workers} workers, {train.sequence_parallel} on each segment",
        *(f"  {part:<25} {gib:6.2f} GiB" for part, gib in train.memory_gib.items()),
        fits,
        f"the first worker's host holds the whole model: {train.first_host_gib:.1f} GiB; "
        f"a checkpoint takes {train.checkpoint_gib:.1f} GiB, two are kept",
    ]
