"""What is known about the recipe's fields: their names, their reference, and what a run's identity is."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from longrope2_ray.recipe.recipe import Recipe

# Fields that do not change a search's result: a run may be resumed with others.
FREE_FIELDS = (
    "data", "train", "storage", "scorer.num_scorers", "scorer.gpus_per_scorer", "scorer.cpus_per_scorer", "scorer.max_attempts",
    "scorer.stall_seconds", "scorer.load_seconds", "scorer.start_seconds", "scorer.look_ahead", "model.device", "model.shape",
)  # fmt: skip


# Fields of training that do not change its result, but for the order of sums.
TRAIN_FREE_FIELDS = (
    "train.name", "train.num_workers", "train.cpus_per_worker", "train.threads", "train.sequence_parallel", "train.checkpoint_steps",
    "train.logging_steps", "train.max_failures", "train.loss_chunk_tokens", "train.activation_checkpointing",
)  # fmt: skip


def field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every ``section.field`` of a recipe, sections too."""
    for name, info in model.model_fields.items():
        yield prefix + name
        for inner in (info.annotation, *get_args(info.annotation)):
            if _is_section(inner):
                yield from field_names(inner, f"{prefix}{name}.")


def flatten(recipe: Recipe) -> dict[str, Any]:
    """``{"section.field": value}`` of a recipe as plain JSON values."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    walk("", recipe.model_dump(mode="json"))
    return flat


def reference() -> str:
    """The recipe reference: every field with its type, default and meaning."""
    lines = []

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, info in model.model_fields.items():
            inner = [t for t in (info.annotation, *get_args(info.annotation)) if _is_section(t)]
            if inner:
                lines.append(f"\n[{prefix}{name}]")
                walk(inner[0], f"{prefix}{name}.")
                continue
            default = "required" if info.is_required() else f"{info.default!r}"
            lines.append(f"{name:<22} {default:<24} {info.description or ''}".rstrip())

    walk(Recipe, "")
    return "\n".join(lines)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
