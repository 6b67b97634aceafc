"""Units of work of a search, and their scores.

A unit is one needle sample under one factor vector. Scores are keyed by content, the vector's and
the sample's: another report on the same run costs only what it asks anew.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.storage.ledger import Ledger
from longrope2_ray.storage.rundir import SCORES_FOLDER, RunDir
from longrope2_ray.workers.done import Done

SEARCH_SET = "search"
SKIPPED_SET = "skipped"
WIDE_SET = "skipped-wide"
MAX_MEAN_NLL = 700.0  # its exponential is still a finite float
MAX_DEPTHS = 8  # more depths than these are summed up by quarters of the document


def descent_set(step: int, wide: bool = False) -> str:
    """Return the name of the needle set whose gradient a step of the descent follows."""
    return f"descent-wide@{step}" if wide else f"descent@{step}"


def is_descent(needle_set: str) -> bool:
    """Tell whether a needle set is one of the descent, whose units ask for a gradient."""
    return needle_set.startswith(("descent@", "descent-wide@"))


def report_set(length: int) -> str:
    """Return the name of the held-out needle set of a length."""
    return f"report@{length}"


def is_report(needle_set: str) -> bool:
    """Tell whether a needle set is held out for the tables."""
    return needle_set.startswith("report@")


@dataclass(frozen=True)
class NeedleSet:
    """A set of needle samples as the search sees it: without the tokens, which scorers hold.

    Attributes:
        name: ``search``; ``skipped`` and ``descent@<step>`` for documents with skipped positions,
            ``skipped-wide`` and ``descent-wide@<step>`` for those with twice the tokens;
            ``report@<length>`` for held-out samples.
        sample_ids: id of each sample's content (``NeedleSample.id``).
        num_tokens: number of answer tokens of each sample.
        depths: where each sample's needle stands, 0 the document's start, 1 its end.
        equivalents: cost of one of its units in passes of the target length, by FLOPs.
    """

    name: str
    sample_ids: tuple[str, ...]
    num_tokens: tuple[int, ...]
    depths: tuple[float, ...]
    equivalents: float = 1.0

    def __len__(self) -> int:
        return len(self.sample_ids)


@dataclass(frozen=True, eq=False)
class Unit:
    """A unit of work: one sample that is to be scored under one factor vector.

    Attributes:
        vector_id: id of the vector's content.
        needle_set: name of the needle set.
        sample: index of the sample in the needle set.
        sample_id: id of the sample's content.
        factors: the vector.
    """

    vector_id: str
    needle_set: str
    sample: int
    sample_id: str
    factors: RescaleFactors

    @property
    def key(self) -> tuple[str, str]:
        """The key under which its score is committed."""
        return self.vector_id, self.sample_id

    def __str__(self) -> str:
        return f"scoring sample {self.sample} of {self.needle_set} under {self.vector_id}"


@dataclass(frozen=True)
class UnitScore:
    """A scorer's answer to a unit of work.

    Attributes:
        nll_sum: summed negative log-likelihood of the answer's tokens, in nats; NaN and infinity
            are kept as they come.
        num_tokens: number of tokens of the answer.
        correct: whether greedy decoding gives exactly the answer. It does if and only if the
            teacher-forced argmax is right at every answer position: greedy decoding sees the
            prompt and its own choices so far, which is the teacher-forced context for as long as
            all of them were right, and the first wrong one decides.
        seconds: wall clock time.
        gradient: the NLL's gradient in the logarithms of the factors, where it was asked for.
    """

    nll_sum: float
    num_tokens: int
    correct: bool
    seconds: float
    gradient: tuple[float, ...] = ()

    @property
    def is_finite(self) -> bool:
        """Whether the score is finite; if it is not, another scorer gives a second opinion."""
        return all(map(math.isfinite, (self.nll_sum, *self.gradient)))


@dataclass(frozen=True)
class Score:
    """One row of the ledger: the score of one sample under one factor vector.

    Attributes:
        vector_id: id of the candidate's or baseline's content.
        sample_id: id of the needle sample's content.
        needle_set: name of the needle set that the sample was scored for.
        sample: index of the sample in that set.
        nll_sum: summed NLL of the answer's tokens, in nats; None if it was not finite.
        num_tokens: number of tokens of the answer.
        correct: whether greedy decoding gives exactly the answer.
        seconds: wall clock time of the unit; not part of any result.
        scorer: name of the scorer; not part of any result.
        started: Unix time at which it was handed out; not part of any result.
        gradient: the NLL's gradient in the logarithms of the factors, where it was asked for.
    """

    vector_id: str
    sample_id: str
    needle_set: str
    sample: int
    nll_sum: float | None
    num_tokens: int
    correct: bool
    seconds: float = 0.0
    scorer: str = ""
    started: float = 0.0
    gradient: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "gradient", tuple(self.gradient))  # a list in JSON

    @classmethod
    def of(cls, done: Done[Unit, UnitScore]) -> "Score":
        """Return the row of a unit that was done."""
        unit, result = done.work, done.result
        return cls(
            vector_id=unit.vector_id,
            sample_id=unit.sample_id,
            needle_set=unit.needle_set,
            sample=unit.sample,
            nll_sum=result.nll_sum if result.is_finite else None,
            num_tokens=result.num_tokens,
            correct=result.correct,
            seconds=round(result.seconds, 4),
            scorer=done.worker,
            started=done.started,
            gradient=result.gradient if result.is_finite else (),
        )

    @property
    def key(self) -> tuple[str, str]:
        """The ids of vector and sample; rows with the same key hold the same score."""
        return self.vector_id, self.sample_id

    @property
    def nll(self) -> float:
        """The summed NLL; infinity, a penalty, where it was not finite."""
        return math.inf if self.nll_sum is None else self.nll_sum


def scores_of(run_dir: RunDir) -> Ledger[Score]:
    """Return the ledger of a run's scores, of which nothing has been read yet."""
    return Ledger(run_dir, SCORES_FOLDER, Score)


def perplexity(nll_sum: float, num_tokens: int) -> float | None:
    """Return ``exp(mean NLL)``; None if it is not a finite number."""
    mean = nll_sum / num_tokens
    return math.exp(mean) if math.isfinite(mean) and mean < MAX_MEAN_NLL else None


def depth_groups(depths: Sequence[float]) -> dict[str, list[int]]:
    """Return label -> samples of each group of depths, from the start of the document to its end.

    A group is one depth, to three digits, or a quarter of the document where there are more than
    ``MAX_DEPTHS`` of them; the very start stays a group of its own.

    Args:
        depths: depth of each sample.
    """
    labels = {depth: f"{depth:.3g}" for depth in sorted(depths)}
    if len(set(labels.values())) > MAX_DEPTHS:
        labels = {depth: _quarter(depth) for depth in labels}
    groups: dict[str, list[int]] = {label: [] for label in labels.values()}
    for sample, depth in enumerate(depths):
        groups[labels[depth]].append(sample)
    return groups


def _quarter(depth: float) -> str:
    """Return the label of the quarter that a depth lies in."""
    end = math.ceil(4 * depth) / 4
    return f"({end - 0.25:g}, {end:g}]" if depth else "0"


@dataclass(frozen=True)
class NeedleSummary:
    """The scores of one vector on one needle set, sample by sample.

    Attributes:
        nll_per_sample: summed NLL of each answer, in nats; None if it was not finite.
        tokens_per_sample: number of tokens of each answer.
        correct_per_sample: whether greedy decoding gives exactly the answer.
        depth_per_sample: where each needle stands, 0 the document's start, 1 its end.
    """

    nll_per_sample: tuple[float | None, ...]
    tokens_per_sample: tuple[int, ...]
    correct_per_sample: tuple[bool, ...]
    depth_per_sample: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.nll_per_sample)

    @property
    def ppl(self) -> float | None:
        """The needle perplexity over all answer tokens; None if it is not finite."""
        nlls = (math.inf if nll is None else nll for nll in self.nll_per_sample)
        return perplexity(math.fsum(nlls), sum(self.tokens_per_sample))

    @property
    def accuracy(self) -> float:
        """The share of answers whose every digit greedy decoding gets right."""
        return sum(self.correct_per_sample) / len(self)

    @classmethod
    def of(cls, scores: Sequence[Score], needle_set: NeedleSet) -> "NeedleSummary":
        """Return the summary of the scores on a needle set, one for each of its samples."""
        return cls(
            nll_per_sample=tuple(score.nll_sum for score in scores),
            tokens_per_sample=tuple(score.num_tokens for score in scores),
            correct_per_sample=tuple(score.correct for score in scores),
            depth_per_sample=needle_set.depths,
        )

    def of_samples(self, samples: Sequence[int]) -> "NeedleSummary":
        """Return the summary of some of the samples."""
        return NeedleSummary(
            nll_per_sample=tuple(self.nll_per_sample[i] for i in samples),
            tokens_per_sample=tuple(self.tokens_per_sample[i] for i in samples),
            correct_per_sample=tuple(self.correct_per_sample[i] for i in samples),
            depth_per_sample=tuple(self.depth_per_sample[i] for i in samples),
        )

    def by_depth(self) -> dict[str, "NeedleSummary"]:
        """Return label -> summary of each group of depths (``depth_groups``)."""
        groups = depth_groups(self.depth_per_sample)
        return {label: self.of_samples(samples) for label, samples in groups.items()}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "NeedleSummary":
        """Read a summary that ``to_json`` wrote; other keys of the object are ignored.

        Raises:
            KeyError: if a field is missing.
        """
        return cls(
            nll_per_sample=tuple(body["nll_per_sample"]),
            tokens_per_sample=tuple(body["tokens_per_sample"]),
            correct_per_sample=tuple(body["correct_per_sample"]),
            depth_per_sample=tuple(body["depth_per_sample"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the summary as a JSON object, with the perplexity and accuracy of all samples."""
        return {
            "ppl": self.ppl,
            "accuracy": self.accuracy,
            "nll_per_sample": list(self.nll_per_sample),
            "tokens_per_sample": list(self.tokens_per_sample),
            "correct_per_sample": list(self.correct_per_sample),
            "depth_per_sample": list(self.depth_per_sample),
        }
