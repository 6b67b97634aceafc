"""The search for rescale factors.

The package can be called: ``longrope2_ray.search(recipe)`` calls ``search.job.search(recipe)``.
Python makes every subpackage an attribute of its parent, so a function of the same name would be
replaced by the package as soon as one of the package's modules is imported.
"""

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longrope2_ray.recipe.recipe import Recipe
    from longrope2_ray.search.status import Observer
    from longrope2_ray.search.winner import Winner


class _CallablePackage(ModuleType):
    def __call__(
        self, recipe: "Recipe", run_dir: str | None = None, observers: "Sequence[Observer]" = ()
    ) -> "Winner":
        """Search, as ``longrope2_ray.search.job.search`` does."""
        from longrope2_ray.search.job import search

        return search(recipe, run_dir, observers)


sys.modules[__name__].__class__ = _CallablePackage
