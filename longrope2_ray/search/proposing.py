"""[ours] The first generation by descent: a start, the steps from it, and the finalists."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

from longrope2_ray.errors import StoppedError
from longrope2_ray.model.costs import GRADIENT_PASSES, full_equivalents
from longrope2_ray.recipe.model import ModelShape
from longrope2_ray.recipe.search import SearchSection
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.rope.geometry import RopeGeometry
from longrope2_ray.search.cascade import rank_correlation
from longrope2_ray.search.descent import Descent
from longrope2_ray.search.racing import Race, race_of_all
from longrope2_ray.search.scores import SEARCH_SET, SKIPPED_SET, WIDE_SET, Score, descent_set
from longrope2_ray.search.space import Candidate, SearchSpace, attention_factor
from longrope2_ray.search.starts import (
    NUM_ATTENTION_FACTORS,
    PUBLISHED,
    finalists,
    mean_of,
    num_kept_dims,
    published,
    shapes,
    starts,
)

log = logging.getLogger(__name__)

# Tokens of a skipped document, as a share of the target length.
SKIPPED_SHARE = 1 / 8
# Size of the first step, in units of a factor's logarithm.
RATE = 0.015
# The descent starts from the mean of so many of the best starts.
NUM_PARENTS = 2
# So many full-length needles say how well the skipped documents rank. Below such a rank
# correlation, or where no candidate is right on them, these get twice the tokens and half the
# dilution, and there are more shapes to start from.
NUM_CHECKED_NEEDLES = 2
MIN_CORRELATION = 0.5

# (race, id -> vector, needle set) -> each vector's scores, by sample; those of eliminated ones
# have gaps.
Run = Callable[[Race, Mapping[str, RescaleFactors], str], Mapping[str, Sequence[Score | None]]]


def proposal_equivalents(
    search: SearchSection, shape: ModelShape, geometry: RopeGeometry, space: SearchSpace
) -> tuple[float, float]:
    """Return what a proposal costs in passes of the target length by FLOPs, its race aside.

    Returns:
        the cost with documents as the recipe says, and the highest one, where they are widened.
    """
    inputs = geometry, space, search.target_length, 1.0
    num_starts, num_shapes = len(starts(*inputs)), len(shapes(*inputs))
    of_steps = search.descent_steps * GRADIENT_PASSES
    lengths = [num_skipped_tokens(search, wide) for wide in widths(search)]
    each = [full_equivalents(shape, length, search.target_length) for length in lengths]
    narrow, *wide = (search.skipped_needles * cost for cost in each)
    likely = narrow * (num_starts + of_steps)
    if not wide:
        return likely, likely
    return likely, narrow * num_starts + wide[0] * (num_starts + num_shapes + of_steps)


def num_raced(space: SearchSpace) -> int:
    """Return how many candidates are raced at full length at most."""
    factors = 1 if space.fixed_attention else NUM_ATTENTION_FACTORS
    return factors + 1 + NUM_PARENTS + len(PUBLISHED)


def num_skipped_tokens(search: SearchSection, wide: bool = False) -> int:
    """Return how many tokens a skipped document has."""
    tokens = search.skipped_tokens or round(SKIPPED_SHARE * search.target_length)
    return tokens * 2 if wide else tokens


def widths(search: SearchSection) -> tuple[bool, ...]:
    """Return whether skipped documents are wide, for each width that they may have."""
    can_widen = num_skipped_tokens(search, wide=True) < search.target_length
    return (False, True) if can_widen else (False,)


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
        ranked, foretold = self._ranked(wide=False)
        wide = not foretold and True in widths(self._search)
        if wide:
            ranked, _ = self._ranked(wide=True)
        start = mean_of(ranked[:NUM_PARENTS], self._ratio, self._space.tail_bounds[1])
        descended = self._descend(start, wide)
        return tuple(finalists(descended, [start, *ranked], self._space, self._ratio))

    def _ranked(self, wide: bool) -> tuple[list[Candidate], bool]:
        """Return the starts, best first on skipped documents, and whether to trust these.

        Ranked are the best starts and the published methods. Skipped documents are trusted if some
        of the ranked gives a right answer at full length, and the rank correlation with their
        scores there is not low.
        """
        target, size = self._search.target_length, self._search.skipped_needles
        cheap_set = WIDE_SET if wide else SKIPPED_SET
        inputs = self._geometry, self._space, target, self._attention
        candidates = [*starts(*inputs), *(shapes(*inputs) if wide else ())]
        best = self._best(candidates, NUM_PARENTS, cheap_set, size)
        methods = published(self._geometry, target, self._attention)
        known = list({c.id: c for c in (*best, *methods)}.values())
        # Both scores on the same needles for all of them, whatever a race would have spared, so
        # that the correlation does not depend on the order in which scores come in.
        cheap, _ = self._totals(known, cheap_set, size)
        num_checked = max(1, min(NUM_CHECKED_NEEDLES, self._num_samples // 4))
        full, num_right = self._totals(known, SEARCH_SET, num_checked)
        correlation = rank_correlation(cheap, full)
        trusted = num_right > 0 and (correlation is None or correlation >= MIN_CORRELATION)
        if not trusted and not wide:
            log.info(
                "skipped documents are widened: %d answers right at full length, rank correlation "
                "%.2f",
                num_right, math.nan if correlation is None else correlation,
            )  # fmt: skip
        order = sorted(range(len(known)), key=lambda i: (cheap[i], known[i].id))
        return [known[i] for i in order], trusted

    def _totals(
        self, candidates: Sequence[Candidate], needle_set: str, num_samples: int
    ) -> tuple[list[float], int]:
        """Return each candidate's summed NLL over a set's first samples, and the right answers."""
        ids = [candidate.id for candidate in candidates]
        race = race_of_all(ids, num_samples)
        rows = self._run(race, {c.id: c.factors for c in candidates}, needle_set)
        first = [score for row in rows.values() for score in row[:num_samples]]
        num_right = sum(score is not None and score.correct for score in first)
        return [race.totals[id] for id in ids], num_right

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

    def _descend(self, start: Candidate, wide: bool) -> Candidate:
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
            name = descent_set(descent.step, wide)
            scores = self._run(race, {candidate.id: candidate.factors}, name)[candidate.id]
            known = [score for score in scores if score is not None]
            num_tokens = sum(score.num_tokens for score in known if score.gradient)
            descent.tell([score.gradient for score in known], num_tokens)
            self._on_step(descent.step, candidate, known)
            candidate = Candidate.of_vector(
                descent.ask(), self._ratio, self._attention, candidate.id, "descent"
            )
        return candidate
