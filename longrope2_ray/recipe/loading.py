"""Loading a recipe: a TOML file, overrides from the command line, and messages for mistakes."""

import difflib
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import (
    CliSettingsSource,
    SettingsError,
)

from longrope2_ray.errors import RecipeError
from longrope2_ray.recipe.fields import field_names
from longrope2_ray.recipe.model import ModelSection
from longrope2_ray.recipe.recipe import Recipe

# Where the shipped recipes lie: in an installed package, and in a checkout.
RECIPE_FOLDERS = (
    Path(__file__).parents[1] / "recipes",
    Path(__file__).parents[2] / "jobs" / "recipes",
)


def find_recipe(name: str) -> Path:
    """Return the path of a recipe, given the path or the name of a recipe that is shipped.

    Raises:
        RecipeError: if there is no such file and no such name.
    """
    for path in (Path(name), *(folder / f"{name}.toml" for folder in RECIPE_FOLDERS)):
        with suppress(OSError):  # the name is too long for a file
            if path.is_file():
                return path
    shipped = sorted(path.stem for folder in RECIPE_FOLDERS for path in folder.glob("*.toml"))
    raise RecipeError(
        f"recipe: expected a TOML file or one of {', '.join(shipped)}, got {name!r}, "
        f"which does not exist"
    )


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe and apply overrides to its fields.

    Args:
        name: a TOML file, or the name of a shipped recipe.
        overrides: words as on the command line, such as ``["--search.seed", "1"]``.

    Raises:
        RecipeError: if the file is missing or not TOML, or any field is unknown or out of range.
    """
    path = find_recipe(str(name))
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        for key in data:
            if key.startswith("_"):  # pydantic-settings would take it as an argument of its own
                raise RecipeError(f"{path}:\n  {key}: unknown recipe field")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"recipe: expected TOML in {path}, got {error}") from error
    try:
        return Recipe(**_merge(data, _overrides(overrides)))
    except ValidationError as error:
        raise RecipeError(
            f"{path}:\n" + "\n".join(f"  {line}" for line in _lines(error))
        ) from error


def model_section(path: str, **fields: Any) -> ModelSection:
    """Return the section of a model that no recipe names, such as a command line's.

    Raises:
        RecipeError: if a field is out of range, or the path carries a secret.
    """
    try:
        return ModelSection(path=path, **fields)
    except ValidationError as error:
        raise RecipeError("\n".join(f"model.{line}" for line in _lines(error))) from error


def _overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the fields that the words set, as nested dictionaries."""
    names = {name.replace("_", "-") for name in field_names(Recipe)}
    # --search.top_k is accepted as --search.top-k
    parts = [argument.partition("=") for argument in arguments]
    arguments = [
        (flag.replace("_", "-") if flag.startswith("--") else flag) + eq + value
        for flag, eq, value in parts
    ]
    for argument in arguments:
        flag = argument.removeprefix("--").split("=")[0]
        if argument.startswith("--") and flag.replace("_", "-") not in names:
            near = difflib.get_close_matches(flag, names, n=1, cutoff=0.5)
            raise RecipeError(
                f"--{flag}: unknown recipe field" + (f"; did you mean --{near[0]}?" if near else "")
            )
    if not arguments:
        return {}
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(
            Recipe, cli_parse_args=list(arguments), cli_exit_on_error=False
        )
        return source()
    except SettingsError as error:
        raise RecipeError(f"command line: {error}") from error


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _lines(error: ValidationError) -> list[str]:
    """Return one line for each wrong field; pydantic has an error for each branch of a union."""
    first: dict[str, str] = {}
    for complaint in error.errors():
        line = _explain(complaint)
        field = line.split(":", 1)[0]
        if line != first.setdefault(field, line):
            first[field] += f", or {line.split(': ', 1)[1]}"
    return list(first.values())


def _explain(error: Any) -> str:
    """Return an error of pydantic as ``section.field: expected ..., got ...``."""
    # Names of a union's branches are no part of the field's name.
    branches = ("float", "literal[")
    location = ".".join(
        part for part in error["loc"] if isinstance(part, str) and not part.startswith(branches)
    )
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location, list(field_names(Recipe)), n=1, cutoff=0.5)
        return f"{location}: unknown recipe field" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "missing" and isinstance(error["loc"][-1], str):
        return f"{location}: missing, and it has no default"
    if error["type"] in ("missing", "too_long"):  # the tuples of a recipe are pairs
        return f"{location}: expected two numbers, got {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if error["type"] == "value_error":
        # The check of a whole section begins its message with the name of the field.
        joint = ": " if message.startswith("expected") else "."
        return f"{location}{joint}{message}" if location else message
    return f"{location}: {message}, got {error['input']!r}"
