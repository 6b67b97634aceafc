"""Which (candidate, sample) to score next, and who can no longer survive.

NLL is never negative, so the sum over the samples seen so far bounds a candidate's total from below. Who is already
above the k-th best complete total cannot survive and is stopped; survivors are those of the full evaluation, whatever
the order of completion (*exact racing*). Always taking up the candidate with the lowest bound completes candidates in
the order of their totals, so that with one scorer no unit is spent on a candidate whose bound is above the k-th best.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from longrope2_ray.recipe import SearchSection

Scores = Mapping[int, float]  # sample -> NLL sum of its answer


class Race:
    """One generation's race.

    Args:
        critical_dims: candidate id -> critical dimension, incumbents among them.
        newcomers: ids that have to be scored, in order.
        incumbents: id -> (sample -> NLL) of the survivors so far, complete.
        num_samples: samples of a complete score.
        settings: ``racing``, ``racing_confidence``, ``top_k``, ``niche_size``.
    """

    def __init__(
        self,
        critical_dims: Mapping[str, int],
        newcomers: Sequence[str],
        incumbents: Mapping[str, Scores],
        num_samples: int,
        settings: SearchSection,
    ):
        self._dims, self._settings, self._num_samples = critical_dims, settings, num_samples
        self._order = hardest_first(incumbents.values(), num_samples)
        self._scores: dict[str, dict[int, float]] = {id: {} for id in newcomers}
        self._bounds = dict.fromkeys(newcomers, 0.0)
        self._pending: dict[str, set[int]] = {id: set() for id in newcomers}
        self._rank = {id: rank for rank, id in enumerate(newcomers)}
        self._totals = {id: math.fsum(scores.values()) for id, scores in incumbents.items()}
        self._incumbents = incumbents
        self._lost: set[str] = set()
        self._open: set[str] = set(newcomers)
        self._reference = self._paired_reference()

    def next_unit(self) -> tuple[str, int] | None:
        """The next (candidate, sample), marked as under way; None if nothing is left to hand out now."""
        ready = [id for id in self._open if len(self._scores[id]) + len(self._pending[id]) < self._num_samples]
        if not ready:
            return None
        id = min(ready, key=lambda id: (len(self._pending[id]), self._bounds[id], self._rank[id]))
        sample = next(s for s in self._order if s not in self._scores[id] and s not in self._pending[id])
        self._pending[id].add(sample)
        return id, sample

    def add(self, id: str, sample: int, nll: float) -> None:
        """Commit one score; told twice, it counts once. An infinite NLL (a penalty) loses the race."""
        if id not in self._scores:
            return
        self._pending[id].discard(sample)
        self._scores[id].setdefault(sample, nll)
        self._bounds[id] = math.fsum(self._scores[id].values())  # rounds once, so a part never exceeds the whole
        if id not in self._open:
            return
        racing = self._settings.racing != "off"
        if racing and (not math.isfinite(nll) or self._loses_paired_test(id)):
            self._close(id)
        elif len(self._scores[id]) == self._num_samples:
            self._totals[id] = self.lower_bound(id)
            self._open.discard(id)
            for other in [other for other in self._open if racing and not self._can_survive(other)]:
                self._close(other)
        elif racing and not self._can_survive(id):
            self._close(id)

    @property
    def finished(self) -> bool:
        """Whether every candidate is complete or out; units under way do not matter any more."""
        return not self._open

    @property
    def totals(self) -> dict[str, float]:
        """Id -> summed NLL of the complete newcomers; infinity for one with a penalty."""
        return {id: self._totals[id] for id in self._scores if id in self._totals}

    @property
    def num_units_saved(self) -> int:
        """Units never scored because their candidate was stopped."""
        return sum(self._num_samples - len(self._scores[id]) for id in self._lost)

    @property
    def num_units_left(self) -> int:
        """Units that would still be needed if nobody else dropped out."""
        return sum(self._num_samples - len(self._scores[id]) for id in self._open)

    def lower_bound(self, id: str) -> float:
        """What the candidate's total is at least."""
        return self._bounds[id]

    def _close(self, id: str) -> None:
        self._open.discard(id)
        self._lost.add(id)

    def _can_survive(self, id: str) -> bool:
        """Whether the global top k or the candidate's niche still has a place for its lower bound."""
        bound, dim = self.lower_bound(id), self._dims[id]
        better = [other for other, total in self._totals.items() if total < bound]
        if len(better) < self._settings.top_k:
            return True
        return sum(self._dims[other] == dim for other in better) < self._settings.niche_size

    def _paired_reference(self) -> Scores | None:
        """The worst incumbent: who loses against it, sample by sample, will not survive either."""
        full = len(self._incumbents) >= self._settings.top_k
        if self._settings.racing != "statistical" or not full or self._settings.niche_size:
            return None
        return self._incumbents[max(self._incumbents, key=lambda id: (self._totals[id], id))]

    def _loses_paired_test(self, id: str) -> bool:
        """Statistical racing: one-sided paired test against the worst incumbent on the samples in fixed order.

        Only prefixes of the fixed order count, so the verdict does not depend on the order of completion.
        """
        if self._reference is None:
            return False
        differences: list[float] = []
        for sample in self._order:
            if sample not in self._scores[id]:
                break
            differences.append(self._scores[id][sample] - self._reference[sample])
            n = len(differences)
            if 3 <= n < self._num_samples:
                error = float(np.std(differences, ddof=1)) / math.sqrt(n)
                if math.fsum(differences) / n > self._settings.racing_confidence * error:
                    return True
        return False


def hardest_first(known: Iterable[Scores], num_samples: int) -> list[int]:
    """Samples by falling mean NLL of the present survivors; their own order where nothing is known."""
    rows = list(known)
    hardness = [math.fsum(row[s] for row in rows) if rows else 0.0 for s in range(num_samples)]
    return sorted(range(num_samples), key=lambda s: (-hardness[s], s))
