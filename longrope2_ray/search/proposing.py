"""[ours] The first generation by descent: a start, the steps from it, and the finalists."""

import math
from collections.abc import Callable, Mapping, Sequence

from longrope2_ray.errors import StoppedError
from longrope2_ray.model.costs import GRADIENT_PASSES, full_equivalents
from longrope2_ray.recipe.model import ModelShape
from longrope2_ray.recipe.search import SearchSection
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.rope.geometry import RopeGeometry
from longrope2_ray.search.descent import Descent
from longrope2_ray.search.racing import Race, race_of_all
from longrope2_ray.search.scores import SEARCH_SET, SKIPPED_SET, Score, descent_set
from longrope2_ray.search.space import Candidate, SearchSpace, attention_factor
from longrope2_ray.search.starts import (
    NUM_ATTENTION_FACTORS,
    finalists,
    num_kept_dims,
    published,
    starts,
)

# Tokens of a skipped document, as a share of the target length.
SKIPPED_SHARE = 3 / 16
# Size of the first step, in units of a factor's logarithm.
RATE = 0.015
# Starts that the skipped documents leave to a race at full length, whose best one is taken.
NUM_STARTS_RACED = 6

# (race, id -> vector, needle set) -> each vector's scores, by sample; those of eliminated ones
# have gaps.
Run = Callable[[Race, Mapping[str, RescaleFactors], str], Mapping[str, Sequence[Score | None]]]


def proposal_equivalents(search: SearchSection, shape: ModelShape, num_starts: int) -> float:
    """Return what a proposal costs at most, in passes of the target length by FLOPs."""
    passes = search.skipped_needles * (num_starts + search.descent_steps * GRADIENT_PASSES)
    return passes * full_equivalents(shape, num_skipped_tokens(search), search.target_length)


def num_raced(geometry: RopeGeometry, space: SearchSpace, target_length: int) -> int:
    """Return how many candidates are raced at full length at most."""
    factors = 1 if space.fixed_attention else NUM_ATTENTION_FACTORS
    return factors + NUM_STARTS_RACED + len(published(geometry, target_length, 1.0))


def num_skipped_tokens(search: SearchSection) -> int:
    """Return how many tokens a skipped document has."""
    return search.skipped_tokens or round(SKIPPED_SHARE * search.target_length)


class Proposer:
    """Descends from the best start on skipped documents, and proposes the first generation.

    Args:
        space: the bounds of the candidates.
        search: the recipe's search section.
        num_samples: needles of the full-length race.
        run: runs a race to its end.
        on_step: called after each step with its number and the scores of its documents.
    """

    def __init__(
        self,
        geometry: RopeGeometry,
        space: SearchSpace,
        search: SearchSection,
        num_samples: int,
        run: Run,
        on_step: Callable[[int, Candidate, Sequence[Score]], None],
    ):
        self._geometry = geometry
        self._space = space
        self._search = search
        self._num_samples = num_samples
        self._run = run
        self._on_step = on_step
        self._ratio = search.target_length / geometry.original_length
        # A skipped document has less to dilute the attention: it may not choose this factor.
        low, high = space.attention_bounds
        su = attention_factor("su", self._ratio, geometry.original_length) or low
        self._attention = low if low == high else min(max(su, low), high)

    def propose(self) -> tuple[Candidate, ...]:
        """Return the first generation.

        Raises:
            StoppedError: if scorers cannot go on, or no score is finite.
        """
        target, size = self._search.target_length, self._search.skipped_needles
        candidates = starts(self._geometry, self._space, target, self._attention)
        best = self._best(candidates, NUM_STARTS_RACED, SKIPPED_SET, size)
        # Skipped documents only hint at a good start, so full length decides; the published methods
        # are raced in any case, so that the winner is never worse than the best of them at this
        # attention factor.
        methods = published(self._geometry, target, self._attention)
        raced = {candidate.id: candidate for candidate in (*best, *methods)}
        (start,) = self._best(list(raced.values()), 1, SEARCH_SET, self._num_samples)
        descended = self._descend(start)
        return tuple(finalists(descended, [start], self._space, self._ratio))

    def _best(
        self, candidates: Sequence[Candidate], top_k: int, needle_set: str, num_samples: int
    ) -> list[Candidate]:
        """Race candidates on a needle set, and return the best, best first.

        Raises:
            StoppedError: if no score is finite.
        """
        by_id = {candidate.id: candidate for candidate in candidates}
        race = Race(list(by_id), {}, num_samples, top_k)
        self._run(race, {id: c.factors for id, c in by_id.items()}, needle_set)
        totals = {id: total for id, total in race.totals.items() if math.isfinite(total)}
        if not totals:
            raise StoppedError(
                "no candidate has a finite score: the model returns NaN or infinity; "
                "try model.dtype = 'float32'"
            )
        ranked = sorted(totals, key=lambda id: (totals[id], id))
        return [by_id[id] for id in ranked[:top_k]]

    def _descend(self, start: Candidate) -> Candidate:
        low, high = 1.0, self._space.tail_bounds[1]
        descent = Descent(
            start.factors.values,
            low=low,
            high=high,
            num_steps=self._search.descent_steps,
            rate=RATE,
            num_kept=num_kept_dims(self._geometry),
        )
        candidate = start
        while not descent.finished:
            race = race_of_all([candidate.id], self._search.skipped_needles)
            name = descent_set(descent.step)
            scores = self._run(race, {candidate.id: candidate.factors}, name)[candidate.id]
            known = [score for score in scores if score is not None]
            num_tokens = sum(score.num_tokens for score in known if score.gradient)
            descent.tell([score.gradient for score in known], num_tokens)
            self._on_step(descent.step, candidate, known)
            candidate = Candidate.of_vector(
                descent.ask(), self._ratio, self._attention, candidate.id, "descent"
            )
        return candidate
