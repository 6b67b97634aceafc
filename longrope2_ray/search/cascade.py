"""[ours] A cascade of scores: how well a cheap score foretells the full-length one.

A cascade scores many candidates cheaply, on documents with skipped positions, and only the best of
them at full length. It is worth what the cheap order says about the full one.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from longrope2_ray.search.scores import SEARCH_SET, SKIPPED_SET, Score

# A rank correlation of fewer points says nothing.
MIN_POINTS = 3

# Powers of ln m / ln L: for skipped documents, and for those that are wider.
DILUTION = 1.0
WIDE_DILUTION = 0.5

# Sample id -> NLL of its answer.
Row = Mapping[str, float]


@dataclass(frozen=True)
class CascadePoint:
    """A candidate that has both scores, each in units of that set's winner.

    Attributes:
        vector_id: id of the vector's content.
        cheap: its NLL on the cheap needles, as a ratio to that of their race's winner.
        full: the same on the full-length needles.
        complete: whether it has every full-length sample; racing eliminated it if not.
    """

    vector_id: str
    cheap: float
    full: float
    complete: bool


@dataclass(frozen=True)
class Cascade:
    """Cheap against full-length scores.

    Attributes:
        points: the candidates that have both, by rising full-length score.
        correlation: Spearman's rank correlation of the two; None for fewer than three points, or
            where one of the scores is the same for all.
    """

    points: tuple[CascadePoint, ...]
    correlation: float | None


def cascade(scores: Iterable[Score], cheap: str = SKIPPED_SET, full: str = SEARCH_SET) -> Cascade:
    """Compare two needle sets' scores of the same candidates.

    Exact racing leaves a candidate that it eliminates with some of the samples only. So a score is
    the candidate's NLL, summed over the samples that it shares with the race's winner, divided by
    the winner's NLL on the same samples; for a complete candidate this is the ratio of their
    totals. The winner of a needle set is the candidate with the lowest total among those that have
    all of its samples and are scored on both sets. Candidates whose score is not finite are left
    out.

    Args:
        scores: rows of the ledger; those of other needle sets are ignored.
        cheap: name of the needle set that is scored first.
        full: name of the needle set that decides.
    """
    rows: dict[str, dict[str, dict[str, float]]] = {cheap: {}, full: {}}
    for score in scores:
        if score.needle_set in rows:
            row = rows[score.needle_set].setdefault(score.vector_id, {})
            row[score.sample_id] = score.nll
    sizes = {name: len({s for row in by_id.values() for s in row}) for name, by_id in rows.items()}
    both = sorted(rows[cheap].keys() & rows[full].keys())
    ratios: defaultdict[str, list[float]] = defaultdict(list)
    for name in (cheap, full):
        of_both = {id: rows[name][id] for id in both}
        for id, ratio in _ratios_to_winner(of_both, sizes[name]).items():
            ratios[id].append(ratio)
    points = [
        CascadePoint(id, pair[0], pair[1], len(rows[full][id]) == sizes[full])
        for id, pair in ratios.items()
        if len(pair) == 2 and all(map(math.isfinite, pair))
    ]
    points.sort(key=lambda point: (point.full, point.vector_id))
    correlation = rank_correlation([p.cheap for p in points], [p.full for p in points])
    return Cascade(tuple(points), correlation)


def _ratios_to_winner(rows: Mapping[str, Row], num_samples: int) -> dict[str, float]:
    """Return id -> ratio to the winner; nothing while no candidate has all samples."""
    totals = {id: math.fsum(row.values()) for id, row in rows.items() if len(row) == num_samples}
    if not totals:
        return {}
    winner = rows[min(totals, key=lambda id: (totals[id], id))]
    ratios = {}
    for id, row in rows.items():
        of_winner = math.fsum(winner[sample] for sample in row)
        ratios[id] = math.fsum(row.values()) / of_winner if of_winner else math.inf
    return ratios


def rank_correlation(first: Iterable[float], second: Iterable[float]) -> float | None:
    """Return Spearman's rank correlation of two lists of numbers; equal ones share their rank.

    None for fewer than three pairs, or where one list is constant.
    """
    x, y = (_ranks(np.array(list(values))) for values in (first, second))
    if len(x) < MIN_POINTS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each number, from 1, equal ones at their mean."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    means: np.ndarray = np.cumsum(counts) - (counts - 1) / 2
    return means[places]


def attention_share(num_tokens: int, length: int, dilution: float) -> float:
    """[ours] Return what attention factors are multiplied by on a document with skipped positions.

    The few tokens that are left dilute the attention to the needle less than the whole document
    would, so that nearly every vector finds it. A softmax over n tokens keeps its sharpness where
    the logits grow with ln n, so weaker attention stands for the tokens that were left out:
    ``(ln m / ln L)^dilution`` for m tokens at positions up to L. As logits go with the square of
    the attention factor, 0.5 is what the softmax asks for; the reference model's scores foretell
    full-length ones better at 1, SmolLM2's at 0.5 alone (``jobs/LOG.md``, "Dilution").
    """
    return float((math.log(num_tokens) / math.log(length)) ** dilution)
