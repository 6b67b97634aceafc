"""FLOPs and memory of a model from its shape alone."""

from dataclasses import dataclass
from typing import Protocol

from longrope2_ray.recipe.recipe import Recipe


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
    return {
        **parts,
        "total": sum(parts.values()),
        "full logits (avoided)": float(size) * length * shape.vocab_size,
    }


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
        "gathered weights": float(
            (size + 4) * gathered
        ),  # and their gradients in float32 before they are reduced
        "activations": float(saved * shape.num_layers),
        "one layer": float(layer),
        "logits": float(
            (size + 2 * 4) * min(tokens, settings.loss_chunk_tokens) * shape.vocab_size
        ),
    }
    return {**parts, "total": sum(parts.values())}
