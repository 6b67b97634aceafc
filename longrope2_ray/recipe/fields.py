"""The fields of a recipe: their names and their reference."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from longrope2_ray.recipe.recipe import Recipe


def field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every ``section.field`` of a recipe, and every section."""
    for name, info in model.model_fields.items():
        yield prefix + name
        for inner in (info.annotation, *get_args(info.annotation)):
            if _is_section(inner):
                yield from field_names(inner, f"{prefix}{name}.")


def reference() -> str:
    """Return the recipe reference: every field with its default and meaning."""
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
