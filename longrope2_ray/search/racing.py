"""Which (candidate, sample) to score next, and who can no longer survive.

NLL is never negative, so the sum over the samples seen so far bounds a candidate's total from below. Who is already
above the k-th best complete total cannot survive and is stopped; survivors are those of the full evaluation, whatever
the order of completion (*exact racing*). Always taking up the candidate with the lowest bound completes candidates in
the order of their totals, so that with one scorer no unit is spent on a candidate whose bound is above the k-th best.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from longrope2_ray.recipe.sections import SearchSection

Scores = Mapping[int, float]  # sample -> NLL sum of its answer


class Race:
    """One generation's race.

    Args:
        critical_dims: candidate id -> critical dimension, incumbents among them.
        newcomers: ids that have to be scored, in order.
        incumbents: id -> (sample -> NLL) of the survivors so far, complete (guesses among them to look ahead).
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
        self._ranked: list[float] = []  # complete totals, ascending
        self._ranked_by_dim: dict[int, list[float]] = {dim: [] for dim in critical_dims.values()}
        for id in incumbents:
            self._rank_total(id)
        self.incumbents = incumbents
        self._lost: set[str] = set()
        self._open: set[str] = set(newcomers)
        self._turns = [
            self._turn(id) for id in newcomers
        ]  # a heap; turns that are out of date stay in it
        self._reference = self._paired_reference()

    def next_unit(self) -> tuple[str, int] | None:
        """The next (candidate, sample), marked as under way; None if nothing is left to hand out now."""
        while self._turns:
            turn = heapq.heappop(self._turns)
            id = turn[-1]
            if id not in self._open or turn != self._turn(id):
                continue
            scores, pending = self._scores[id], self._pending[id]
            sample = next((s for s in self._order if s not in scores and s not in pending), None)
            if sample is not None:
                pending.add(sample)
                heapq.heappush(self._turns, self._turn(id))
                return id, sample
        return None

    def add(self, id: str, sample: int, nll: float) -> None:
        """Commit one score; told twice, it counts once. An infinite NLL (a penalty) loses the race."""
        if id not in self._scores:
            return
        self._pending[id].discard(sample)
        self._scores[id].setdefault(sample, nll)
        self._bounds[id] = math.fsum(
            self._scores[id].values()
        )  # rounds once, so a part never exceeds the whole
        if id not in self._open:
            return
        heapq.heappush(self._turns, self._turn(id))
        racing = self._settings.racing != "off"
        if racing and (not math.isfinite(nll) or self._loses_paired_test(id)):
            self._close(id)
        elif len(self._scores[id]) == self._num_samples:
            self._totals[id] = self.lower_bound(id)
            self._rank_total(id)
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
        """Units never handed out because their candidate was stopped."""
        return sum(
            self._num_samples - len(self._scores[id]) - len(self._pending[id]) for id in self._lost
        )

    @property
    def num_units_left(self) -> int:
        """Units that would still be needed if nobody else dropped out."""
        return sum(self._num_samples - len(self._scores[id]) for id in self._open)

    def lower_bound(self, id: str) -> float:
        """What the candidate's total is at least."""
        return self._bounds[id]

    def estimates(self) -> dict[str, dict[int, float]]:
        """Rows of the newcomers that may survive, as far as one can tell from one sample on: finite, gaps filled in.

        A gap is the sample's mean over the complete candidates, times how much worse than their mean the newcomer is on
        the samples that it has; one more average sample keeps the ratio near 1 where little is known.
        """
        complete = {
            id: self._scores[id]
            for id in self._scores
            if math.isfinite(self._totals.get(id, math.inf))
        }
        known = [*self.incumbents.values(), *complete.values()] or list(self._scores.values())
        columns = [
            [row[s] for row in known if s in row and math.isfinite(row[s])]
            for s in range(self._num_samples)
        ]
        means = [math.fsum(column) / len(column) if column else 0.0 for column in columns]
        typical = math.fsum(means) / len(means)
        rows = dict(complete)
        for id in self._open:
            scores, bound = self._scores[id], self._bounds[id]
            expected = typical + math.fsum(means[s] for s in scores)
            if scores and math.isfinite(bound):
                ratio = (typical + bound) / expected if expected else 1.0
                rows[id] = {s: scores.get(s, ratio * means[s]) for s in range(self._num_samples)}
        return rows

    def _turn(self, id: str) -> tuple[int, float, int, str]:
        """Who is next: few units under way first, then the lowest bound, then the order of the newcomers.

        Without racing nobody is stopped: one candidate after the other, so that most totals are known early.
        """
        if self._settings.racing == "off":
            return 0, 0.0, self._rank[id], id
        return len(self._pending[id]), self._bounds[id], self._rank[id], id

    def _rank_total(self, id: str) -> None:
        insort(self._ranked, self._totals[id])
        insort(self._ranked_by_dim[self._dims[id]], self._totals[id])

    def _close(self, id: str) -> None:
        self._open.discard(id)
        self._lost.add(id)

    def _can_survive(self, id: str) -> bool:
        """Whether the global top k or the candidate's niche still has a place for its lower bound."""
        bound = self.lower_bound(id)
        if bisect_left(self._ranked, bound) < self._settings.top_k:
            return True
        return bisect_left(self._ranked_by_dim[self._dims[id]], bound) < self._settings.niche_size

    def _paired_reference(self) -> Scores | None:
        """The worst incumbent: who loses against it, sample by sample, will not survive either."""
        full = len(self.incumbents) >= self._settings.top_k
        if self._settings.racing != "statistical" or not full or self._settings.niche_size:
            return None
        return self.incumbents[max(self.incumbents, key=lambda id: (self._totals[id], id))]

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
