"""FLOPs and memory of a model from its shape alone."""

from dataclasses import dataclass

from longrope2_ray.recipe.model import ModelShape
from longrope2_ray.recipe.recipe import Recipe


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


# Ray's names for them, where the name says a memory size.
RAY_ACCELERATORS = {
    "H200": "h200",
    "H100": "h100",
    "A100-80G": "a100-80gb",
    "A100-40G": "a100-40gb",
    "L40S": "l40s",
    "GeForce-RTX-4090": "rtx4090",
}


# Bytes of one number of each ``dtype`` that a recipe may say.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


# Tokens of an answer at most: seven digits as one to eight tokens, with room.
ANSWER_TOKENS = 16


# Tokens of a document whose logits exist at once, where more than the answer is scored.
LOGITS_CHUNK_TOKENS = 512


def layer_parameters(shape: ModelShape) -> int:
    """Weights of one decoder layer that a token passes.

    They are the attention's projections, and a gated MLP or the experts of a mixture that the
    token is sent to.
    """
    attention = shape.hidden_size * shape.head_dim * (2 * shape.num_heads + 2 * shape.num_kv_heads)
    return attention + 3 * shape.hidden_size * shape.intermediate_size


def embedding_parameters(shape: ModelShape) -> int:
    """Weights of the input and output embeddings, counted once where they are tied."""
    return shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)


def num_parameters(shape: ModelShape) -> int:
    """Weights of the whole model: the number in the shape, else that of gated MLPs throughout."""
    if shape.num_parameters:
        return shape.num_parameters
    return shape.num_layers * layer_parameters(shape) + embedding_parameters(shape)


def step_flops(shape: ModelShape, num_positions: int, num_pairs: float) -> float:
    """Model FLOPs of a training step: forward and backward (twice the forward).

    What activation checkpointing computes again is not counted.

    Args:
        shape: the model's shape.
        num_positions: tokens of the global batch.
        num_pairs: (query, key) pairs of its causal attention, half the square of every range.
    """
    weights = shape.num_layers * layer_parameters(shape) + shape.vocab_size * shape.hidden_size
    attention = 4.0 * shape.num_layers * shape.num_heads * shape.head_dim * num_pairs
    return 3 * (2.0 * weights * num_positions + attention)


def pass_flops(shape: ModelShape, length: int) -> dict[str, float]:
    """FLOPs of a forward pass over ``length`` tokens without logits: linear layers, attention."""
    linear = 2.0 * shape.num_layers * layer_parameters(shape) * length
    # Scores and weighted values, 2 FLOPs a multiply-add; half of the square is causal.
    attention = 2.0 * shape.num_layers * shape.num_heads * shape.head_dim * length**2
    return {"linear": linear, "attention": attention, "total": linear + attention}


# Forward passes that a gradient in the factors costs: one forward, one that is computed again on
# the way back, and two for the way back itself; weights have no gradient.
GRADIENT_PASSES = 4.0


def full_equivalents(shape: ModelShape, num_tokens: int, length: int) -> float:
    """Cost of a forward pass over ``num_tokens`` in passes over ``length`` tokens, by FLOPs."""
    return pass_flops(shape, num_tokens)["total"] / pass_flops(shape, length)["total"]


def scorer_memory_bytes(shape: ModelShape, recipe: Recipe) -> dict[str, float]:
    """Memory of one scorer by part, in bytes, at the longest length that it scores.

    Activations are the residual stream with three copies of it (norm, attention output, sum),
    queries, keys and values before and after rotation, and one chunk of the MLP; logits are those
    of the answer, or of a chunk of the document, in float32.
    """
    size = DTYPE_BYTES[recipe.model.dtype]
    length = max([recipe.search.target_length, *recipe.report.lengths])
    chunk = min(length, recipe.scorer.mlp_chunk_tokens)
    heads = shape.head_dim * (shape.num_heads + 2 * shape.num_kv_heads)
    whole = recipe.needles.objective == "document"
    logits_tokens = min(LOGITS_CHUNK_TOKENS, length) if whole else ANSWER_TOKENS
    parts = {
        "weights": float(num_parameters(shape) * size),
        "activations": float(size * (4 * length * shape.hidden_size + 2 * length * heads)),
        "mlp chunk": float(size * 3 * chunk * shape.intermediate_size),
        "logits": float(4 * logits_tokens * shape.vocab_size),
    }
    return {
        **parts,
        "total": sum(parts.values()),
        "full logits (avoided)": float(size) * length * shape.vocab_size,
    }


def gpu_memory_bytes(shape: ModelShape, recipe: Recipe) -> float:
    """Memory of one scorer on one GPU: several share the weights, each holds all activations."""
    memory = scorer_memory_bytes(shape, recipe)
    num_gpus = max(1.0, recipe.scorer.gpus_per_scorer)
    return memory["total"] - memory["weights"] * (1 - 1 / num_gpus)


def training_memory_bytes(shape: ModelShape, recipe: Recipe, num_workers: int) -> dict[str, float]:
    """Memory of one training process by part, in bytes.

    FSDP2 shards over all processes, and ``train.sequence_parallel`` of them share one segment.
    Activations are the layers' inputs with activation checkpointing, all that a backward pass
    needs without; "one layer" is what stands while one layer is computed or recomputed.
    """
    settings = recipe.train
    size = DTYPE_BYTES[settings.dtype]
    tokens = recipe.search.target_length / settings.sequence_parallel
    heads = shape.head_dim * (2 * shape.num_heads + 2 * shape.num_kv_heads)
    layer = size * tokens * (6 * shape.hidden_size + 2 * heads + 3 * shape.intermediate_size)
    saved = size * tokens * shape.hidden_size if settings.activation_checkpointing else layer
    embeddings = embedding_parameters(shape)
    # One layer's weights, with all experts of a mixture.
    one = (num_parameters(shape) - embeddings) / shape.num_layers
    # This layer, the next one, and what stays gathered; then their gradients in float32 before
    # they are reduced.
    gathered = 2 * one + embeddings
    logits_tokens = min(tokens, settings.loss_chunk_tokens)
    parts = {
        "weights, gradients, AdamW": 16.0 * num_parameters(shape) / num_workers,
        "gathered weights": float((size + 4) * gathered),
        "activations": float(saved * shape.num_layers),
        "one layer": float(layer),
        "logits": float((size + 2 * 4) * logits_tokens * shape.vocab_size),
    }
    return {**parts, "total": sum(parts.values())}
