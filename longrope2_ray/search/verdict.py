"""The verdict of a search: is its winner better than the baselines, on which needles, how surely?

Methods are scored on the same held-out needles, so they are compared needle by needle: a paired
bootstrap over the needles gives the ratio of two perplexities a 95 % interval. Every interval
stands for itself; among many, some miss the truth by chance. Percentile intervals of few needles
are too narrow: four that all differ in the same direction, which chance does one time in eight,
always have an interval on one side of 1.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from longrope2_ray.search.scores import NeedleSummary, depth_groups
from longrope2_ray.search.winner import ComparisonRow, Winner

BETTER = "better"
WORSE = "worse"
NOT_SHOWN = "not shown to differ"
TOO_FEW = "too few needles"
MIN_NEEDLES = 4  # fewer needles than these have no verdict
DRAWS = 10_000


@dataclass(frozen=True)
class Interval:
    """A ratio of perplexities, theirs to ours, with its 95 % interval.

    Attributes:
        ratio: the ratio on all needles compared; above 1 where ours is the lower perplexity.
        low: lower end of the interval.
        high: upper end of the interval.
        num_needles: needles that were compared.
    """

    ratio: float
    low: float
    high: float
    num_needles: int

    @property
    def verdict(self) -> str:
        """What the interval shows: one of the four constants of this module."""
        if self.num_needles < MIN_NEEDLES:
            return TOO_FEW
        if self.low > 1:
            return BETTER
        return WORSE if self.high < 1 else NOT_SHOWN


@dataclass(frozen=True)
class Contrast:
    """Two methods on the same needles: all of them, and each group of depths.

    Attributes:
        overall: the interval over all needles.
        by_depth: label -> interval of each group of depths (``depth_groups``).
    """

    overall: Interval
    by_depth: dict[str, Interval]


@dataclass(frozen=True)
class BaselineContrast:
    """The winner against one baseline on the held-out needles of one length.

    Attributes:
        length: tokens of the needle documents.
        method: name of the baseline.
        our_factor: attention factor of the winner.
        their_factor: attention factor of the baseline.
        own_best: whether each of both has, among those reported, its own best attention factor.
        contrast: the intervals.
    """

    length: int
    method: str
    our_factor: float
    their_factor: float
    own_best: bool
    contrast: Contrast


def compare(
    ours: NeedleSummary, theirs: NeedleSummary, draws: int = DRAWS, seed: int = 0
) -> Contrast:
    """Compare two vectors that were scored on the same needles, in the same order.

    An NLL that is not finite counts as infinite, as in the search: the ratio is infinite where only
    theirs is, 0 where only ours is, and one such needle of each cancel out. A needle that is
    infinite under both says nothing about them and is left out.

    The needles' order does not matter: they are sorted before needles are drawn, so equal needles
    and an equal seed give equal intervals.

    Args:
        draws: resamples of the bootstrap.
        seed: seed of the bootstrap.

    Raises:
        ValueError: if they were scored on different needles.
    """
    same = (
        ours.tokens_per_sample == theirs.tokens_per_sample,
        ours.depth_per_sample == theirs.depth_per_sample,
    )
    if not all(same):
        raise ValueError("compare: expected two summaries of the same needles, got different ones")
    pairs = [
        (_difference(mine, other), num_tokens)
        for mine, other, num_tokens in zip(
            ours.nll_per_sample, theirs.nll_per_sample, ours.tokens_per_sample, strict=True
        )
    ]
    groups = depth_groups(ours.depth_per_sample)
    return Contrast(
        overall=_bootstrap(pairs, draws, seed),
        by_depth={
            label: _bootstrap([pairs[sample] for sample in samples], draws, seed)
            for label, samples in groups.items()
        },
    )


def _difference(ours: float | None, theirs: float | None) -> float:
    """Return by how much our NLL is the lower one; NaN where neither is finite."""
    return (math.inf if theirs is None else theirs) - (math.inf if ours is None else ours)


def _bootstrap(pairs: Sequence[tuple[float, int]], draws: int, seed: int) -> Interval:
    """Return the interval of the needles with these differences of NLL and numbers of tokens."""
    compared = sorted(pair for pair in pairs if not math.isnan(pair[0]))
    if not compared:
        return Interval(1.0, 0.0, math.inf, 0)
    differences, num_tokens = np.array(compared).T
    everything = np.arange(len(compared))[None]
    drawn = np.random.default_rng(seed).integers(len(compared), size=(draws, len(compared)))
    (ratio,) = _ratios(differences, num_tokens, everything)
    ratios = np.sort(_ratios(differences, num_tokens, drawn))
    # Plain order statistics: between a finite and an infinite ratio there is no quantile.
    tail = int(0.025 * draws)
    low, high = ratios[tail], ratios[draws - 1 - tail]
    return Interval(float(ratio), float(low), float(high), len(compared))


def _ratios(differences: np.ndarray, num_tokens: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Return (D,) ratios of perplexity on each draw of needles.

    Args:
        differences: (N,) their NLL less ours, in nats; infinite where one of them is.
        num_tokens: (N,) answer tokens.
        drawn: (D, N) indices of needles.
    """
    infinite = np.isinf(differences)
    finite = np.where(infinite, 0.0, differences)
    balance = np.where(infinite, np.sign(differences), 0.0)[drawn].sum(1)
    logs = finite[drawn].sum(1) / num_tokens[drawn].sum(1)
    logs = np.where(balance == 0, logs, np.copysign(math.inf, balance))
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(logs))


def own_best(rows: Sequence[ComparisonRow]) -> ComparisonRow:
    """Return the row of the lowest perplexity over all needles; the first of equal ones."""
    return min(rows, key=lambda row: math.inf if row.needles.ppl is None else row.needles.ppl)


def contrasts(winner: Winner) -> Iterator[BaselineContrast]:
    """Yield the winner against every baseline of its tables, length by length.

    First those of each table, where both have the table's attention factor (unscaled keeps 1), then
    those where each has its own best attention factor among those reported. That best one is
    chosen on the needles that are reported, for the winner as for the baselines.
    """
    for length in dict.fromkeys(row.length for row in winner.report):
        rows = [row for row in winner.report if row.length == length]
        ours = {row.compared_at: row for row in rows if row.method == "longrope2"}
        if not ours:
            continue
        theirs = [row for row in rows if row.method != "longrope2"]
        for row in theirs:
            yield _against(ours[row.compared_at], row, own_best=False)
        best = own_best(list(ours.values()))
        for method in dict.fromkeys(row.method for row in theirs):
            at_best = own_best([row for row in theirs if row.method == method])
            yield _against(best, at_best, own_best=True)


def _against(ours: ComparisonRow, theirs: ComparisonRow, *, own_best: bool) -> BaselineContrast:
    return BaselineContrast(
        length=ours.length,
        method=theirs.method,
        our_factor=ours.attention_factor,
        their_factor=theirs.attention_factor,
        own_best=own_best,
        contrast=compare(ours.needles, theirs.needles),
    )
