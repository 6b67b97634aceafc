"""The commands before a run: ``recipe`` and ``plan``."""

import argparse
import json
from typing import TYPE_CHECKING

from longrope2_ray.cli.arguments import add_command, add_recipe
from longrope2_ray.recipe.loading import load_recipe

if TYPE_CHECKING:
    from longrope2_ray.cli.arguments import Commands
    from longrope2_ray.recipe.model import ModelShape
    from longrope2_ray.recipe.recipe import Recipe


def add_commands(commands: "Commands") -> None:
    """Declare ``recipe`` and ``plan``."""
    add_command(
        commands,
        "recipe",
        recipe_command,
        "Print every field of a recipe with its default and meaning.",
        example="",
    )
    plan = add_command(
        commands,
        "plan",
        plan_command,
        "Estimate what a recipe's search and training cost.",
        details="The estimate counts forward passes, FLOPs, GPU-hours and memory from the shape of "
        "the model; it loads no weights and needs no GPU.",
        example="demo\nllama3_8b_128k --accelerator a100-80gb",
    )
    add_recipe(plan)
    plan.add_argument(
        "--accelerator",
        default="h100",
        help="GPU to estimate for (default: %(default)s); a wrong name lists them",
    )
    plan.add_argument(
        "--utilization",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="share of the GPU's peak FLOPs that is reached (default: %(default)s)",
    )
    plan.add_argument("--json", action="store_true", help="print the estimate as JSON")


def recipe_command(arguments: argparse.Namespace) -> int:
    """Print the recipe reference."""
    from longrope2_ray.recipe.fields import reference

    print(reference())
    return 0


def plan_command(arguments: argparse.Namespace) -> int:
    """Print the estimated cost of a recipe."""
    from longrope2_ray.plan import format_plan, plan

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    cost = plan(recipe, _shape(recipe), arguments.accelerator, arguments.utilization)
    print(json.dumps(cost.to_json(), indent=1) if arguments.json else format_plan(cost))
    return 0


def _shape(recipe: "Recipe") -> "ModelShape":
    """The shape in the recipe, else the one in the model's configuration."""
    if recipe.model.shape is not None:
        return recipe.model.shape
    from longrope2_ray.model.spec import read_shape

    return read_shape(recipe.model)
