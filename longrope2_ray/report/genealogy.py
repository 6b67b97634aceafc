"""Who was bred from whom, and which operator paid, from the generations and the ledger alone."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from longrope2_ray.search.scores import Score, is_descent, perplexity
from longrope2_ray.search.space import Candidate
from longrope2_ray.search.winner import GenerationRecord

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Relative:
    """A candidate that survived its generation, in its place among the others.

    Attributes:
        generation: index of the generation that asked for it first.
        ppl: needle perplexity on the search's needles; None if it is not finite.
    """

    candidate: Candidate
    generation: int
    ppl: float | None


@dataclass(frozen=True)
class DescentStep:
    """One step of a descent, as its units in the ledger tell.

    Attributes:
        step: number of the step, from 0; at step 0 the vector is the start.
        vector_id: id of the vector whose gradient was asked for.
        ppl: its needle perplexity on the step's documents; None if it is not finite.
    """

    step: int
    vector_id: str
    ppl: float | None


def name_of_origin(candidate: Candidate) -> str:
    """Return what made a candidate."""
    return candidate.origin or UNKNOWN


def relatives(generations: Iterable[GenerationRecord]) -> dict[str, Relative]:
    """Return every candidate that ever survived, by id, oldest generation first."""
    found: dict[str, Relative] = {}
    for generation in generations:
        for survivor in generation.survivors:
            id = survivor.candidate.id
            found.setdefault(id, Relative(survivor.candidate, generation.index, survivor.ppl))
    return found


def line_of(id: str, known: Mapping[str, Relative]) -> list[Relative]:
    """Return a candidate and its line of ancestors, oldest first, as far as they are known.

    Parents are survivors, so a line ends at a candidate without a parent, or at one that came from
    a descent, whose steps are in no generation.
    """
    line: list[Relative] = []
    current = known.get(id)
    while current and len(line) < len(known):
        line.append(current)
        current = known.get(current.candidate.parent_id or "")
    return line[::-1]


def operator_rows(generations: Iterable[GenerationRecord]) -> Iterator[tuple[str, ...]]:
    """Yield operator, candidates that it made, those that survived their generation, best ones.

    An operator counts a best one where its candidate became the best of all generations so far.
    """
    made: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    became_best: Counter[str] = Counter()
    for generation in generations:
        kept = {survivor.candidate.id for survivor in generation.survivors}
        best = generation.survivors[0].candidate.id
        for candidate in generation.candidates:
            origin = name_of_origin(candidate)
            made[origin] += 1
            survived[origin] += candidate.id in kept
            became_best[origin] += candidate.id == best
    for origin, count in sorted(made.items(), key=lambda item: (-item[1], item[0])):
        share = f"{survived[origin]} ({survived[origin] / count:.0%})"
        yield origin, str(count), share, str(became_best[origin])


def descent_steps(ledger: Iterable[Score]) -> list[DescentStep]:
    """Return the steps of the descent that were scored completely, in order."""
    scores: defaultdict[tuple[int, str], list[Score]] = defaultdict(list)
    for score in ledger:
        if is_descent(score.needle_set):
            step = int(score.needle_set.partition("@")[2])
            scores[step, score.vector_id].append(score)
    num_samples = max(map(len, scores.values()), default=0)
    return [
        DescentStep(
            step,
            vector_id,
            perplexity(math.fsum(row.nll for row in rows), sum(row.num_tokens for row in rows)),
        )
        for (step, vector_id), rows in sorted(scores.items())
        if len(rows) == num_samples
    ]


def name_of_start(
    steps: Sequence[DescentStep], generations: Iterable[GenerationRecord]
) -> str | None:
    """Return what made the vector that a descent started from; None before it is recorded.

    It is a candidate of the generation that follows the descent.
    """
    candidates = {c.id: c for generation in generations for c in generation.candidates}
    start = candidates.get(steps[0].vector_id) if steps else None
    return name_of_origin(start) if start else None
