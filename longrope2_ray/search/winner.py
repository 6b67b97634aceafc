"""The results of a search in its run directory: its generations and its winner."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longrope2_ray.errors import RunDirError
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.rope.geometry import RopeGeometry
from longrope2_ray.search.scores import NeedleSummary
from longrope2_ray.search.space import Candidate
from longrope2_ray.storage.rundir import GENERATIONS_FOLDER, RunDir

WINNER_FILE = "winner.json"


@dataclass(frozen=True)
class Survivor:
    """A survivor of a generation with its score on the search's needles.

    Attributes:
        nll_sum: summed NLL over all samples, in nats.
        ppl: needle perplexity; None if it is not finite.
    """

    candidate: Candidate
    nll_sum: float
    ppl: float | None


@dataclass(frozen=True)
class GenerationRecord:
    """A closed generation, as its file holds it.

    Attributes:
        index: 0 for the initial population.
        candidates: the candidates that had to be scored.
        survivors: the best candidates of all generations so far, best first.
    """

    index: int
    candidates: tuple[Candidate, ...]
    survivors: tuple[Survivor, ...]

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "GenerationRecord":
        """Read what ``to_json`` wrote."""
        return cls(
            index=body["index"],
            candidates=tuple(map(Candidate.from_json, body["candidates"])),
            survivors=tuple(
                Survivor(Candidate.from_json(row), row["nll_sum"], row["ppl"])
                for row in body["survivors"]
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object."""
        return {
            "index": self.index,
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "survivors": [
                {**s.candidate.to_json(), "nll_sum": s.nll_sum, "ppl": s.ppl}
                for s in self.survivors
            ],
        }


@dataclass(frozen=True)
class ComparisonRow:
    """One row of the tables: one method on the held-out needles of one length.

    Attributes:
        length: tokens of the needle documents.
        method: name of the method, ``longrope2`` for the winner.
        attention_factor: attention factor that the method was scored with.
        compared_at: attention factor of the table that the row stands in.
        critical_dim: critical dimension, where the method has one.
        needles: NLL, correctness and depth of each sample, and what follows from them.
    """

    length: int
    method: str
    attention_factor: float
    compared_at: float
    critical_dim: int | None
    needles: NeedleSummary

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "ComparisonRow":
        """Read what ``to_json`` wrote."""
        return cls(
            length=body["length"],
            method=body["method"],
            attention_factor=body["attention_factor"],
            compared_at=body["compared_at"],
            critical_dim=body["critical_dim"],
            needles=NeedleSummary.from_json(body),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the row as a JSON object."""
        return {
            "length": self.length,
            "method": self.method,
            "attention_factor": self.attention_factor,
            "compared_at": self.compared_at,
            "critical_dim": self.critical_dim,
            **self.needles.to_json(),
        }


@dataclass(frozen=True)
class Winner:
    """The result of a search; it holds no times, so that equal searches have equal results.

    Attributes:
        name: name of the recipe.
        candidate: the best candidate.
        geometry: RoPE geometry of the model.
        target_length: target window L, in tokens.
        search: the winner's scores on the search's needles.
        report: rows of the tables: winner and baselines on held-out needles.
        fingerprints: fingerprints of the model and the needle sets.
    """

    name: str
    candidate: Candidate
    geometry: RopeGeometry
    target_length: int
    search: NeedleSummary
    report: tuple[ComparisonRow, ...]
    fingerprints: Mapping[str, str]

    @property
    def factors(self) -> RescaleFactors:
        """The rescale factors of the long window."""
        return RescaleFactors(
            self.candidate.factors.values,
            attention_factor=self.candidate.attention_factor,
            critical_dim=self.candidate.critical_dim,
            source="winner",
            start_tokens=self.candidate.start_tokens,
        )

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Winner":
        """Read a winner that ``to_json`` wrote.

        The object does not say how large a head is; the rotary dimensions stand for it.

        Raises:
            KeyError: if a field is missing.
        """
        rotary_dim = body["rotary_dim"]
        base, length = body["rope_base"], body["original_length"]
        return cls(
            name=body["name"],
            candidate=Candidate.from_json(body["candidate"]),
            geometry=RopeGeometry(rotary_dim, rotary_dim, base, length),
            target_length=body["target_length"],
            search=NeedleSummary.from_json(body["search"]),
            report=tuple(map(ComparisonRow.from_json, body["report"])),
            fingerprints=dict(body["fingerprints"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the winner as a JSON object."""
        candidate, geometry = self.candidate, self.geometry
        return {
            "method": "longrope2",
            "name": self.name,
            "factors": candidate.factors.values.tolist(),
            "attention_factor": candidate.attention_factor,
            "start_tokens": candidate.start_tokens,
            "critical_dim": candidate.critical_dim,
            "theoretical_critical_dim": geometry.theoretical_critical_dim,
            "ten_period_dim": geometry.ten_period_dim,
            "original_length": geometry.original_length,
            "target_length": self.target_length,
            "rope_base": geometry.base,
            "rotary_dim": geometry.rotary_dim,
            "candidate": candidate.to_json(),
            "search": self.search.to_json(),
            "report": [row.to_json() for row in self.report],
            "fingerprints": dict(self.fingerprints),
        }


def write_winner(run_dir: RunDir, winner: Winner) -> None:
    """Write the result of a search to ``winner.json``.

    Raises:
        FencedError: if a newer driver owns the run directory.
    """
    run_dir.require_ownership()
    run_dir.write_json(WINNER_FILE, winner.to_json())


def read_winner(run_dir: RunDir) -> Winner | None:
    """Read the result of a search; None if there is none yet, or its file is corrupt.

    Raises:
        RunDirError: if something else wrote the file.
    """
    body = run_dir.read_or_skip(WINNER_FILE)
    if body is None:
        return None
    try:
        return Winner.from_json(body)
    except (KeyError, TypeError, ValueError) as error:
        raise RunDirError(
            f"{run_dir.path / WINNER_FILE} holds no winner of a search ({error!r}); remove it and "
            f"run again to make it anew"
        ) from error


def write_generation(run_dir: RunDir, record: GenerationRecord) -> None:
    """Write one closed generation; after a resume its file holds the same bytes.

    Raises:
        FencedError: if a newer driver owns the run directory.
    """
    run_dir.require_ownership()
    name = f"{GENERATIONS_FOLDER}/{record.index:04d}.json"
    run_dir.write_json(name, {"run": run_dir.run_id, **record.to_json()})


def read_generations(run_dir: RunDir) -> Sequence[GenerationRecord]:
    """Read the closed generations, oldest first; corrupt files are skipped."""
    bodies = (run_dir.read_or_skip(name) for name in run_dir.names(GENERATIONS_FOLDER))
    return [GenerationRecord.from_json(body) for body in bodies if body]
