"""LongRoPE2 on Ray: search the RoPE factors that extend a model's context window.

Importing the package is quick; each name below is imported from its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longrope2_ray.model.pinned_rope import rescale
    from longrope2_ray.recipe.loading import load_recipe
    from longrope2_ray.recipe.recipe import Recipe
    from longrope2_ray.rope.baselines import baseline
    from longrope2_ray.rope.factors import RescaleFactors
    from longrope2_ray.rope.geometry import RopeGeometry
    from longrope2_ray.search.evolution import Evolution
    from longrope2_ray.search.job import search
    from longrope2_ray.search.winner import Winner
    from longrope2_ray.training.job import train

__version__ = "0.1.0"

__all__ = [
    "Evolution",
    "Recipe",
    "RescaleFactors",
    "RopeGeometry",
    "Winner",
    "__version__",
    "baseline",
    "load_recipe",
    "rescale",
    "search",
    "train",
]

_MODULES = {
    "Evolution": "search.evolution",
    "Recipe": "recipe.recipe",
    "RescaleFactors": "rope.factors",
    "RopeGeometry": "rope.geometry",
    "Winner": "search.winner",
    "baseline": "rope.baselines",
    "load_recipe": "recipe.loading",
    "rescale": "model.pinned_rope",
    "train": "training.job",
}


if not TYPE_CHECKING:  # a type checker that saw it would take any name for one of the package

    def __getattr__(name: str) -> object:
        if name == "search":  # the subpackage, which can be called: see search/__init__.py
            return import_module("longrope2_ray.search")
        if name in _MODULES:
            return getattr(import_module(f"longrope2_ray.{_MODULES[name]}"), name)
        raise AttributeError(f"module 'longrope2_ray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
