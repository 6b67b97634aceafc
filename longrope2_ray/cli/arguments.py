"""How a command is declared, and the arguments that several commands share."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longrope2_ray.recipe.recipe import Recipe

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_command(
    commands: "Commands",
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    *,
    details: str = "",
    example: str,
    resumable: bool = False,
) -> argparse.ArgumentParser:
    """Declare a command and return its parser.

    Args:
        run: what the command does with its arguments; returns the exit code.
        summary: one sentence for the list of commands.
        details: more sentences for the command's own help.
        example: lines to type, one a line.
        resumable: whether the same command goes on where an interrupted one stopped.
    """
    lines = [f"  longrope2 {name} {line}".rstrip() for line in example.splitlines() or [""]]
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary} {details}".rstrip(),
        epilog="\n".join(["example:" if len(lines) == 1 else "examples:", *lines]),
        formatter_class=_ExampleFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, resumable=resumable)
    return parser


class _ExampleFormatter(argparse.HelpFormatter):
    """A formatter that wraps sentences and keeps the lines of examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("example"):
            return text
        return super()._fill_text(text, width, indent)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Let the command take a recipe, and options that override the recipe's fields."""
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="recipe file or the name of a shipped recipe; options --section.field VALUE after it "
        "override its fields",
    )
    parser.set_defaults(first="RECIPE")


def add_study(parser: argparse.ArgumentParser) -> None:
    """Let the command take a study, and options that override its trials' recipe fields."""
    parser.add_argument(
        "recipe",
        metavar="STUDY",
        help="study file; options --section.field VALUE after it override the recipe fields of all "
        "its trials",
    )
    parser.set_defaults(first="STUDY")


def add_run_dir(parser: argparse.ArgumentParser) -> None:
    """Let the command take ``--run-dir``."""
    parser.add_argument(
        "--run-dir",
        metavar="DIR_OR_URL",
        help="directory or URL of the run (default: runs/<name of the recipe>)",
    )


def run_dir_of(arguments: argparse.Namespace, recipe: "Recipe") -> str:
    """The directory or URL of the run: as given, else named after the recipe."""
    return str(arguments.run_dir or f"runs/{recipe.name}")
