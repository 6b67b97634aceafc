"""The rows of the tables: winner and baselines on held-out needles, to be scored by the loop."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.rope.baselines import WITH_CRITICAL_DIM, baseline
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.rope.geometry import RopeGeometry
from longrope2_ray.search.scores import NeedleSummary, report_set
from longrope2_ray.search.space import Candidate, attention_factor, content_id
from longrope2_ray.search.winner import ComparisonRow


@dataclass(frozen=True)
class Comparison:
    """A row of the tables that has to be scored.

    Attributes:
        length: tokens of the held-out needle documents.
        compared_at: attention factor of the table that the row stands in.
        method: name of the method, ``longrope2`` for the winner.
        factors: the factor vector of the method.
    """

    length: int
    compared_at: float
    method: str
    factors: RescaleFactors

    @property
    def vector_id(self) -> str:
        """The vector's id, under which its scores are committed."""
        return content_id(self.factors)

    @property
    def needle_set(self) -> str:
        """The name of the needle set that it is scored on."""
        return report_set(self.length)

    def row(self, needles: NeedleSummary) -> ComparisonRow:
        """Return the row of the tables, given its scores."""
        return ComparisonRow(
            length=self.length,
            method=self.method,
            attention_factor=self.factors.attention_factor,
            compared_at=self.compared_at,
            critical_dim=self.factors.critical_dim,
            needles=needles,
        )


def comparisons(
    recipe: Recipe, geometry: RopeGeometry, winner: Candidate | None, fixed: float | None
) -> Iterator[Comparison]:
    """Yield the rows of every table of a recipe.

    Args:
        winner: the best candidate; None for only the rows that do not depend on it.
        fixed: attention factor of every candidate; None if it is searched.
    """
    report, target = recipe.report, recipe.search.target_length
    ratio, original = target / geometry.original_length, geometry.original_length
    own = winner.attention_factor if winner else fixed
    settings = report.attention_factors or ["search"]
    numbers = [attention_factor(setting, ratio, original) for setting in settings]
    compared_at = dict.fromkeys(own if number is None else number for number in numbers)
    for length in report.lengths or [target]:
        for number in compared_at:
            for method in report.methods:
                if number is None or (winner is None and method in WITH_CRITICAL_DIM):
                    continue
                if winner and method == "longrope2":
                    source = f"winner {winner.id}"
                    factors = replace(winner.factors, attention_factor=number, source=source)
                else:
                    rescaled = rescaled_length(length, target, original)
                    factors = _baseline(method, geometry, rescaled, winner, number)
                yield Comparison(length, number, method, factors)


def _baseline(
    method: str,
    geometry: RopeGeometry,
    length: int,
    winner: Candidate | None,
    attention: float,
) -> RescaleFactors:
    """Return a baseline for a table; the unscaled model keeps its own attention factor, 1."""
    found = (winner and winner.critical_dim) or None
    return baseline(
        method,
        geometry,
        length,
        critical_dim=found if method in WITH_CRITICAL_DIM else None,
        attention_factor=1.0 if method == "unscaled" else attention,
    )


def rescaled_length(length: int, target_length: int, original_length: int) -> int:
    """Return the length that a baseline is made for where it is reported at ``length``.

    It is at least the target's, which is what would be served.
    """
    return max(length, target_length, original_length)


def num_report_units(recipe: Recipe) -> int:
    """Return how many units the tables take at most."""
    report = recipe.report
    tables = max(1, len(report.lengths)) * max(1, len(report.attention_factors))
    return tables * len(report.methods) * report.num_samples
