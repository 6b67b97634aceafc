"""What a run will cost, from shapes alone: no weights, no GPU."""

from dataclasses import dataclass
from typing import Any, Protocol

from longrope2_ray.baselines import require_methods
from longrope2_ray.evolution import Evolution, SearchSpace
from longrope2_ray.packing import check_bands
from longrope2_ray.recipe import Recipe, TrainSection
from longrope2_ray.rope import RopeGeometry
from longrope2_ray.search import report_units


class Shape(Protocol):
    """The numbers of a model that cost depends on: a ``ModelSpec``, or ``model.shape`` of a recipe."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rotary_dim(self) -> int: ...
    @property
    def rope_base(self) -> float: ...
    @property
    def original_length(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def num_parameters(self) -> int | None: ...


@dataclass(frozen=True)
class Accelerator:
    """Dense bf16 peak in TFLOP/s and memory in GiB, from the vendors' data sheets."""

    tflops: float
    memory_gib: float


ACCELERATORS = {
    "h200": Accelerator(989, 131),
    "h100": Accelerator(989, 74),
    "a100-80gb": Accelerator(312, 74),
    "a100-40gb": Accelerator(312, 37),
    "l40s": Accelerator(362, 45),
    "rtx4090": Accelerator(165, 22),
}
RAY_ACCELERATORS = {  # Ray's names for them, those that say a memory size
    "H200": "h200", "H100": "h100", "A100-80G": "a100-80gb", "A100-40G": "a100-40gb", "L40S": "l40s", "GeForce-RTX-4090": "rtx4090",
}  # fmt: skip
UTILISATION = 0.4  # share of the peak that long prefill reaches with flash attention; --utilisation sets another
RACED_OUT = 0.2  # share of units that exact racing saves, on the cautious side: the demo saved 0.59 (jobs/LOG.md)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ANSWER_TOKENS = 16  # at most: seven digits as one to eight tokens, with room


def layer_parameters(shape: Shape) -> int:
    """Weights of one decoder layer that a token passes: attention projections and a gated MLP, or its experts."""
    attention = shape.hidden_size * shape.head_dim * (2 * shape.num_heads + 2 * shape.num_kv_heads)
    return attention + 3 * shape.hidden_size * shape.intermediate_size


def num_parameters(shape: Shape) -> int:
    """Weights of the whole model, embeddings included: as counted or given, else those of gated MLPs."""
    if shape.num_parameters:
        return shape.num_parameters
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    return shape.num_layers * layer_parameters(shape) + embeddings


def step_flops(shape: Shape, num_positions: int, num_pairs: float) -> float:
    """Model FLOPs of a training step, forward and backward (twice the forward), recomputation not counted.

    Args:
        num_positions: tokens of the global batch.
        num_pairs: (query, key) pairs of its causal attention, half the square of every range.
    """
    weights = shape.num_layers * layer_parameters(shape) + shape.vocab_size * shape.hidden_size
    attention = 4.0 * shape.num_layers * shape.num_heads * shape.head_dim * num_pairs
    return 3 * (2.0 * weights * num_positions + attention)


def pass_flops(shape: Shape, length: int) -> dict[str, float]:
    """FLOPs of one forward pass over ``length`` tokens without full logits: linear layers, and causal attention."""
    linear = 2.0 * shape.num_layers * layer_parameters(shape) * length
    # scores and weighted values, 2 FLOPs a multiply-add, half of the square is causal
    attention = 2.0 * shape.num_layers * shape.num_heads * shape.head_dim * length**2
    return {"linear": linear, "attention": attention, "total": linear + attention}


def scorer_memory_bytes(shape: Shape, recipe: Recipe) -> dict[str, float]:
    """Memory of one scorer by part at the longest length it sees.

    Activations are the residual stream with three copies of it (norm, attention output, sum), queries, keys and values
    before and after rotation, and one chunk of the MLP; logits are those of the answer, in fp32.
    """
    size = DTYPE_BYTES[recipe.model.dtype]
    length = max([recipe.search.target_length, *recipe.report.lengths])
    chunk = min(length, recipe.scorer.mlp_chunk_tokens)
    heads = shape.head_dim * (shape.num_heads + 2 * shape.num_kv_heads)
    parts = {
        "weights": float(num_parameters(shape) * size),
        "activations": float(size * (4 * length * shape.hidden_size + 2 * length * heads)),
        "mlp chunk": float(size * 3 * chunk * shape.intermediate_size),
        "logits": float(4 * ANSWER_TOKENS * shape.vocab_size),
    }
    return {**parts, "total": sum(parts.values()), "full logits (avoided)": float(size) * length * shape.vocab_size}


def gpu_memory_bytes(shape: Shape, recipe: Recipe) -> float:
    """Of these, what is on one GPU: several share the weights, and each holds all activations."""
    memory, spread = scorer_memory_bytes(shape, recipe), max(1.0, recipe.scorer.gpus_per_scorer)
    return memory["total"] - memory["weights"] * (1 - 1 / spread)


def training_memory_bytes(shape: Shape, recipe: Recipe, num_workers: int) -> dict[str, float]:
    """Memory of one training process by part: FSDP2 over all of them, one segment shared by ``sequence_parallel`` ones.

    Activations are the layers' inputs with activation checkpointing, all that a backward pass needs without; "one layer"
    is what stands while one layer is computed or recomputed.
    """
    settings, size = recipe.train, DTYPE_BYTES[recipe.train.dtype]
    tokens = recipe.search.target_length / settings.sequence_parallel
    heads = shape.head_dim * (2 * shape.num_heads + 2 * shape.num_kv_heads)
    layer = size * tokens * (6 * shape.hidden_size + 2 * heads + 3 * shape.intermediate_size)
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    saved = size * tokens * shape.hidden_size if settings.activation_checkpointing else layer
    one = (num_parameters(shape) - embeddings) / shape.num_layers  # with all experts of a mixture
    gathered = 2 * one + embeddings  # this layer, the next one, and what stays gathered
    parts = {
        "weights, gradients, AdamW": 16.0 * num_parameters(shape) / num_workers,
        "gathered weights": float((size + 4) * gathered),  # and their gradients in float32 before they are reduced
        "activations": float(saved * shape.num_layers),
        "one layer": float(layer),
        "logits": float((size + 2 * 4) * min(tokens, settings.loss_chunk_tokens) * shape.vocab_size),
    }
    return {**parts, "total": sum(parts.values())}


def check_parallel(world: int, num_kv_heads: int, settings: TrainSection) -> None:
    """Refuse a split that does not come out even; cheap, for the driver to call first.

    Raises:
        ValueError: naming the field to change.
    """
    degree, batch = settings.sequence_parallel, settings.global_batch_size
    if num_kv_heads % degree:
        raise ValueError(f"train.sequence_parallel: expected a divisor of {num_kv_heads} KV heads, got {degree}")
    if world % degree:
        raise ValueError(f"train.sequence_parallel: expected a divisor of {world} workers, got {degree}")
    if batch % (world // degree):
        raise ValueError(
            f"train.global_batch_size: expected a multiple of {world // degree} "
            f"({world} workers / sequence_parallel {degree}), got {batch}"
        )


def plan_training(recipe: Recipe, shape: Shape, accelerator: str, utilisation: float) -> dict[str, Any] | None:
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


def plan(recipe: Recipe, shape: Shape, accelerator: str, utilisation: float = UTILISATION) -> dict[str, Any]:
    """Candidates, units, passes, FLOPs, GPU-hours and memory of a run.

    Raises:
        ValueError: if the accelerator is unknown or the recipe does not fit the shape.
    """
    if accelerator not in ACCELERATORS:
        raise ValueError(f"--accelerator: expected one of {', '.join(ACCELERATORS)}, got {accelerator!r}")
    if not 0 < utilisation <= 1:
        raise ValueError(f"--utilisation: expected a share in 0 ... 1, got {utilisation}")
    require_methods(recipe.report.methods)
    device = ACCELERATORS[accelerator]
    search, report = recipe.search, recipe.report
    geometry = RopeGeometry(
        shape.head_dim, shape.rotary_dim, shape.rope_base, recipe.model.original_length or shape.original_length
    )
    space = SearchSpace.from_recipe(geometry, search)
    Evolution(space, search)  # refuses what the search would refuse
    candidates = search.population_size + search.iterations * search.num_children
    most = candidates * recipe.needles.num_samples
    likely = most if search.racing == "off" else round(most * (1 - RACED_OUT))
    lengths = report.lengths or [search.target_length]
    report_passes = report_units(recipe)
    flops = pass_flops(shape, search.target_length)
    report_flops = sum(pass_flops(shape, length)["total"] for length in lengths) * report_passes / len(lengths)
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
        "fits": gpu_memory_bytes(shape, recipe) / 2**30 <= device.memory_gib * min(gpus or 1.0, 1.0),
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
    verdict = "fits" if cost["fits"] else "DOES NOT FIT: raise scorer.gpus_per_scorer or take a larger accelerator"
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
        lines.append("fits" if train["fits"] else "DOES NOT FIT: raise train.num_workers or train.sequence_parallel")
        lines.append(f"the first worker's host holds the whole model: {train['first_host_gib']:.1f} GiB; a checkpoint takes "
                     f"{train['checkpoint_gib']:.1f} GiB, two are kept")  # fmt: skip
    return "\n".join(lines)
