"""The recipe of a run: one TOML file, every field checked before anything expensive starts.

Field descriptions below are the reference; ``longrope2 recipe`` prints them.
"""

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
from longrope2_ray.recipe.recipe import Recipe

RECIPES = Path(__file__).parents[1] / "recipes"


def find_recipe(name: str) -> Path:
    """A recipe file, or one that the package ships by name.

    Raises:
        RecipeError: if there is neither.
    """
    for path in (
        Path(name),
        RECIPES / f"{name}.toml",
        RECIPES.parent.parent / "jobs" / "recipes" / f"{name}.toml",
    ):
        with suppress(OSError):  # a name that is too long for a file's
            if path.is_file():
                return path
    shipped = sorted(
        p.stem
        for d in (RECIPES, RECIPES.parent.parent / "jobs" / "recipes")
        for p in d.glob("*.toml")
    )
    raise RecipeError(
        f"recipe: expected a TOML file or one of {', '.join(shipped)}, got {name!r}, which does not exist"
    )


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe and lay ``--section.field value`` overrides over it.

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


def _overrides(arguments: Sequence[str]) -> dict[str, Any]:
    names = {name.replace("_", "-") for name in field_names(Recipe)}
    # --search.top_k is --search.top-k
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
    """One line for each wrong field; the branches of a union complain apart."""
    first: dict[str, str] = {}
    for complaint in error.errors():
        line = _explain(complaint)
        field = line.split(":", 1)[0]
        if line != first.setdefault(field, line):
            first[field] += f", or {line.split(': ', 1)[1]}"
    return list(first.values())


def _explain(error: Any) -> str:
    branches = ("float", "literal[")  # of a union: no part of the field's name
    location = ".".join(
        part for part in error["loc"] if isinstance(part, str) and not part.startswith(branches)
    )
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location, list(field_names(Recipe)), n=1, cutoff=0.5)
        return f"{location}: unknown recipe field" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "missing" and isinstance(error["loc"][-1], str):
        return f"{location}: missing, and it has no default"
    if error["type"] in ("missing", "too_long"):  # every tuple of a recipe is a pair
        return f"{location}: expected two numbers, got {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if error["type"] == "value_error":
        joint = (
            ": " if message.startswith("expected") else "."
        )  # a section's own check names its field
        return f"{location}{joint}{message}" if location else message
    return f"{location}: {message}, got {error['input']!r}"
