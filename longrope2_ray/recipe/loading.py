"""Loading a recipe: a TOML file, overrides from the command line, and messages for mistakes."""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
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


def load_recipe(
    name: str | Path,
    overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    origin: str = "",
) -> Recipe:
    """Load a recipe and apply overrides to its fields.

    Args:
        name: a TOML file, or the name of a shipped recipe.
        overrides: words as on the command line, such as ``["--search.seed", "1"]``.
        settings: nested tables of fields, weaker than the overrides, stronger than the file.
        origin: where the settings come from, for the messages.

    Raises:
        RecipeError: if the file is missing or not TOML, or any field is unknown or out of range.
    """
    path = find_recipe(str(name))
    title = f"{path} with {origin}" if origin else str(path)
    data = merge_tables(read_toml(path, "recipe"), settings or {})
    for key in data:
        if key.startswith("_"):  # pydantic-settings would take it as an argument of its own
            raise RecipeError(f"{title}:\n  {key}: unknown recipe field")
    try:
        return Recipe(**merge_tables(data, _overrides(overrides)))
    except ValidationError as error:
        raise RecipeError(mistakes(title, error, Recipe, "recipe")) from error


def read_toml(path: Path, kind: str) -> dict[str, Any]:
    """Return the content of a TOML file.

    Args:
        kind: what the file is, for the message.

    Raises:
        RecipeError: if it cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{kind}: expected TOML in {path}, got {error}") from error


def mistakes(title: str, error: ValidationError, model: type[BaseModel], kind: str) -> str:
    """Return the message for the mistakes in a file: its title, and a line for each wrong field.

    Args:
        model: what the file was validated as; an unknown field gets the nearest of its fields.
        kind: what the file is.
    """
    return f"{title}:\n" + "\n".join(f"  {line}" for line in _lines(error, model, kind))


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


def merge_tables(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested tables of fields, in which the values of ``high`` replace those of ``low``."""
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge_tables(merged[key], value) if both else value
    return merged


def _lines(
    error: ValidationError, model: type[BaseModel] = Recipe, kind: str = "recipe"
) -> list[str]:
    """Return one line for each wrong field; pydantic has an error for each branch of a union."""
    first: dict[str, str] = {}
    for complaint in error.errors():
        line = _explain(complaint, model, kind)
        field = line.split(":", 1)[0]
        if line != first.setdefault(field, line):
            first[field] += f", or {line.split(': ', 1)[1]}"
    return list(first.values())


def _explain(error: Any, model: type[BaseModel], kind: str) -> str:
    """Return an error of pydantic as ``section.field: expected ..., got ...``."""
    # Names of a union's branches are no part of the field's name.
    branches = ("float", "literal[")
    location = ".".join(
        part for part in error["loc"] if isinstance(part, str) and not part.startswith(branches)
    )
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location, list(field_names(model)), n=1, cutoff=0.5)
        return f"{location}: unknown {kind} field" + (f"; did you mean {near[0]}?" if near else "")
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
