"""Units of work and their scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longrope2_ray.rope.factors import RescaleFactors


@dataclass(frozen=True)
class Score:
    """One row of the ledger: the score of one sample under one factor vector.

    Attributes:
        vector_id: content hash of the candidate or baseline.
        needle_set: which needle set, ``search`` or ``report@<length>``.
        sample: index in the set.
        nll_sum: summed NLL of the answer's tokens, in nats; None if it was not finite.
        num_tokens: how many tokens that is.
        correct: whether greedy decoding gives the answer exactly.
        seconds: what the unit took; not part of any result.
        scorer: who scored it; not part of any result.
        started: Unix time at which it was handed out; not part of any result.
    """

    vector_id: str
    needle_set: str
    sample: int
    nll_sum: float | None
    num_tokens: int
    correct: bool
    seconds: float = 0.0
    scorer: str = ""
    started: float = 0.0

    @property
    def key(self) -> tuple[str, str, int]:
        """What a row is the score of; a second row with the same key is the same number."""
        return self.vector_id, self.needle_set, self.sample


SEARCH_SET = "search"


def report_set(length: int) -> str:
    """Name of the held-out needle set of a length."""
    return f"report@{length}"


@dataclass(frozen=True, eq=False)
class Unit:
    """What a scorer is asked: one sample under one factor vector."""

    vector_id: str
    needle_set: str
    sample: int
    factors: RescaleFactors

    @property
    def key(self) -> tuple[str, str, int]:
        return self.vector_id, self.needle_set, self.sample


def perplexity(nll_sum: float, num_tokens: int) -> float | None:
    """``exp(mean NLL)``; None if it is not a finite number."""
    mean = nll_sum / num_tokens
    return math.exp(mean) if math.isfinite(mean) and mean < 700 else None


def summarize(scores: Sequence[Score]) -> dict[str, Any]:
    """Needle perplexity, accuracy (greedy, all digits right) and NLL by sample."""
    total, tokens = math.fsum(map(_nll_of, scores)), sum(s.num_tokens for s in scores)
    return {
        "ppl": perplexity(total, tokens),
        "accuracy": sum(s.correct for s in scores) / len(scores),
        "nll_per_sample": [s.nll_sum for s in scores],
        "num_tokens": tokens,
    }


def _nll_of(score: Score) -> float:
    return math.inf if score.nll_sum is None else score.nll_sum
