"""The winner against the baselines."""

from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.search.space import Candidate


def rescaled_length(length: int, target_length: int, original_length: int) -> int:
    """The length that a baseline is made for where it is reported at ``length``: at least the target's, which is what
    would be served."""
    return max(length, target_length, original_length)


def report_units(recipe: Recipe) -> int:
    """How many units the tables take at most."""
    report = recipe.report
    rows = max(1, len(report.lengths)) * len(report.methods) * max(1, len(report.attention_factors))
    return rows * report.num_samples


def content_id(factors: RescaleFactors) -> str:
    """Key of a vector that is no candidate in the ledger: its content, so that equal vectors share their scores."""
    return Candidate(
        0, tuple(factors.values.tolist()), factors.attention_factor, None, factors.start_tokens
    ).id
