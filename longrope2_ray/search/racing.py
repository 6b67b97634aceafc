"""Exact racing: which (candidate, sample) to score next, and which candidates are eliminated.

NLL is never negative, so the sum over the samples seen so far bounds a candidate's total from
below. A candidate whose bound is above the k-th best complete total cannot survive and is
eliminated; survivors are those of the full evaluation, whatever the order of completion. Always
taking up the candidate with the lowest bound completes candidates in the order of their totals, so
that with one scorer no unit is spent on a candidate whose bound is above the k-th best.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence

Scores = Mapping[int, float]  # sample -> NLL sum of its answer


class Race:
    """The race of one generation.

    Args:
        newcomers: ids that have to be scored, in order.
        incumbents: id -> (sample -> NLL) of the survivors so far, complete (estimated where the
            race is one of the lookahead).
        num_samples: samples of a complete score.
        top_k: survivors of the generation; None scores everything, whatever the scores.
    """

    def __init__(
        self,
        newcomers: Sequence[str],
        incumbents: Mapping[str, Scores],
        num_samples: int,
        top_k: int | None,
    ):
        self.incumbents = incumbents
        self._top_k = top_k
        self._num_samples = num_samples
        # Hard samples raise the bound of a poor candidate fastest, so they come first.
        self._order = hardest_first(incumbents.values(), num_samples)
        self._scores: dict[str, dict[int, float]] = {id: {} for id in newcomers}
        self._bounds = dict.fromkeys(newcomers, 0.0)
        self._pending: dict[str, set[int]] = {id: set() for id in newcomers}
        self._rank = {id: rank for rank, id in enumerate(newcomers)}
        self._totals = {id: math.fsum(scores.values()) for id, scores in incumbents.items()}
        # Complete totals, ascending.
        self._ranked = sorted(self._totals.values())
        self._eliminated: set[str] = set()
        self._open: set[str] = set(newcomers)
        # A heap of turns; those that are out of date stay in it until they come up.
        self._turns = [self._turn(id) for id in newcomers]

    def next_unit(self) -> tuple[str, int] | None:
        """Return the next (candidate, sample), marked as pending; None if there is none now."""
        while self._turns:
            turn = heapq.heappop(self._turns)
            id = turn[-1]
            # A later turn of the same candidate is in the heap, unless it is closed.
            if id not in self._open or turn != self._turn(id):
                continue
            scores, pending = self._scores[id], self._pending[id]
            left = (s for s in self._order if s not in scores and s not in pending)
            sample = next(left, None)
            if sample is not None:
                pending.add(sample)
                heapq.heappush(self._turns, self._turn(id))
                return id, sample
        return None

    def add(self, id: str, sample: int, nll: float) -> None:
        """Count one score; a second score of the same unit is ignored.

        An infinite NLL, which is a penalty, eliminates the candidate.
        """
        if id not in self._scores:
            return
        self._pending[id].discard(sample)
        self._scores[id].setdefault(sample, nll)
        # fsum rounds once, so that a part never exceeds the whole.
        self._bounds[id] = math.fsum(self._scores[id].values())
        if id not in self._open:
            return
        heapq.heappush(self._turns, self._turn(id))
        if self._top_k is not None and not math.isfinite(nll):
            self._eliminate(id)
        elif len(self._scores[id]) == self._num_samples:
            self._complete(id)
        elif not self._can_survive(id):
            self._eliminate(id)

    @property
    def finished(self) -> bool:
        """Whether every candidate is complete or eliminated; pending units do not matter then."""
        return not self._open

    @property
    def totals(self) -> dict[str, float]:
        """Id -> summed NLL of the complete newcomers; infinity for one with a penalty."""
        return {id: self._totals[id] for id in self._scores if id in self._totals}

    @property
    def num_units_saved(self) -> int:
        """Number of units never handed out because their candidate was eliminated."""
        return sum(
            self._num_samples - len(self._scores[id]) - len(self._pending[id])
            for id in self._eliminated
        )

    @property
    def num_units_left(self) -> int:
        """Number of units still needed if no other candidate is eliminated."""
        return sum(self._num_samples - len(self._scores[id]) for id in self._open)

    def lower_bound(self, id: str) -> float:
        """Return the lower bound of a candidate's total, the sum of its scores so far."""
        return self._bounds[id]

    def estimates(self) -> dict[str, dict[int, float]]:
        """Return id -> (sample -> NLL) of the newcomers that may survive, guesses in the gaps.

        A gap is the sample's mean over the complete candidates, times how much worse than their
        mean the newcomer is on the samples that it has; one more average sample keeps the ratio
        near 1 where little is known. A newcomer without any sample has no row.
        """
        complete = {
            id: scores
            for id, scores in self._scores.items()
            if math.isfinite(self._totals.get(id, math.inf))
        }
        # The first generation has no incumbents: until one candidate is complete, all that is known
        # has to do.
        known = [*self.incumbents.values(), *complete.values()] or list(self._scores.values())
        means = [
            _finite_mean(row[s] for row in known if s in row) for s in range(self._num_samples)
        ]
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
        """Return the key that orders candidates: fewest pending units, lowest bound, first come.

        Where nothing is eliminated: one candidate after the other, so that most totals are known
        early.
        """
        if self._top_k is None:
            return 0, 0.0, self._rank[id], id
        return len(self._pending[id]), self._bounds[id], self._rank[id], id

    def _complete(self, id: str) -> None:
        """Rank a candidate whose samples are all scored, and eliminate those it leaves no place."""
        self._totals[id] = self.lower_bound(id)
        insort(self._ranked, self._totals[id])
        self._open.discard(id)
        # A new complete total can lower the k-th best, the bar that the others have to pass.
        for other in [other for other in self._open if not self._can_survive(other)]:
            self._eliminate(other)

    def _eliminate(self, id: str) -> None:
        self._open.discard(id)
        self._eliminated.add(id)

    def _can_survive(self, id: str) -> bool:
        """Tell whether the top k still have a place for a candidate's lower bound."""
        # Only strictly better totals count: a tie may still be won by id.
        return self._top_k is None or bisect_left(self._ranked, self._bounds[id]) < self._top_k


def race_of_all(ids: Sequence[str], num_samples: int) -> Race:
    """Return a race that scores all samples of all ids, whatever their scores."""
    return Race(ids, {}, num_samples, None)


def hardest_first(known: Iterable[Scores], num_samples: int) -> list[int]:
    """Return samples by falling mean NLL of the present survivors; in order where none is known."""
    rows = list(known)
    hardness = [math.fsum(row[s] for row in rows) if rows else 0.0 for s in range(num_samples)]
    return sorted(range(num_samples), key=lambda s: (-hardness[s], s))


def _finite_mean(numbers: Iterable[float]) -> float:
    """Return the mean of the finite numbers, 0 if there is none."""
    finite = [number for number in numbers if math.isfinite(number)]
    return math.fsum(finite) / len(finite) if finite else 0.0
