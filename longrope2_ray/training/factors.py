"""The rescale factors that a recipe's ``train.factors`` names."""

from upath import UPath

from longrope2_ray.recipe.model import ModelShape
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.rope.baselines import METHODS, baseline
from longrope2_ray.rope.factors import RescaleFactors, factors_from_json
from longrope2_ray.search.space import attention_factor
from longrope2_ray.search.winner import read_winner
from longrope2_ray.storage.digests import digest
from longrope2_ray.storage.rundir import RunDir


def find_factors(recipe: Recipe, shape: ModelShape, run_dir: RunDir) -> RescaleFactors:
    """Return the rescale factors that ``train.factors`` names.

    Raises:
        ValueError: if the search is not finished or there is no such file; if the factors do not
            fit the model, or keep the original RoPE at the start of the context, which no config
            of transformers can say.
    """
    name = recipe.train.factors
    if name in METHODS and name != "longrope2":
        return _baseline_factors(name, recipe, shape)
    factors = _winner_factors(run_dir) if name == "winner" else _file_factors(name)
    if factors.start_tokens:
        raise ValueError(
            f"train.factors: expected a vector for every position, which is all that transformers' "
            f"longrope can say, got one that keeps the original RoPE at the first "
            f"{factors.start_tokens} positions; search with search.start_tokens = [0]"
        )
    return factors.require_length(shape.geometry.num_cosines)


def factors_fingerprint(factors: RescaleFactors) -> str:
    """Return the source of the factors, and twelve hex digits that change with any of them."""
    content = digest([factors.values.tolist(), factors.attention_factor])
    return f"{factors.source} {content[:12]}"


def _baseline_factors(name: str, recipe: Recipe, shape: ModelShape) -> RescaleFactors:
    search, geometry = recipe.search, shape.geometry
    scale = search.target_length / geometry.original_length
    number = attention_factor(search.attention_factor, scale, geometry.original_length)
    return baseline(name, geometry, search.target_length, attention_factor=number or 1.0)


def _winner_factors(run_dir: RunDir) -> RescaleFactors:
    winner = read_winner(run_dir)
    if winner is None:
        raise ValueError(
            f"train.factors: expected the winner of a finished search in {run_dir.url}, got none; "
            f"run longrope2 search first, or name a baseline method or a file"
        )
    return winner.factors


def _file_factors(name: str) -> RescaleFactors:
    try:
        text = UPath(name).read_text(encoding="utf-8")
    except Exception as error:  # each storage client has errors of its own
        methods = ", ".join(sorted(set(METHODS) - {"longrope2"}))
        raise ValueError(
            f"train.factors: expected winner, a baseline method ({methods}), a file or a URL, "
            f"got {name!r}: {error}"
        ) from error
    return factors_from_json(text, name)
