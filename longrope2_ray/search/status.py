"""The status of a search, for the progress bar, the log, ``status.json`` and the metrics."""

import logging
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from longrope2_ray.recipe.search import SearchSection
from longrope2_ray.search.scores import NeedleSet, Score, is_report
from longrope2_ray.search.winner import GenerationRecord
from longrope2_ray.storage.rundir import RunDir

STATUS_FILE = "status.json"
STATUS_SECONDS = 2.0
# States that no driver leaves.
ENDED = ("finished", "interrupted", "stopped")
# The time of a unit is the median of so many.
RECENT_UNITS = 200
log = logging.getLogger("longrope2")


@dataclass
class Status:
    """The status of a search: how far it has come, and what went wrong on the way.

    Attributes:
        state: ``starting``, ``descending``, ``searching``, ``reporting``, ``finished``,
            ``interrupted``, ``stopped``.
        generation: index of the last closed generation.
        best_ppl: needle perplexity of the best survivor, while descending of the last step on its
            documents; ``median_ppl`` and ``worst_ppl`` of the survivors likewise.
        units_done: units scored, in this and former attempts.
        units_eliminated: units never scored because racing eliminated their candidate.
        units_left: units left in this generation at most.
        unit_seconds: median time of a unit.
        scorers: number of scorers by state.
        faults: number of faults by kind; each of them was mended.
        critical_dims: number of survivors by critical dimension.
        units_ahead: units scored for candidates that no generation has asked for yet.
        committed_at: Unix time of the last commit to the ledger.
        descent_step: steps of the descent that were taken.
        descent_steps: steps of the descent in all, 0 without one.
        descent_ppls: needle perplexity of each step so far on its documents.
        equivalents: what the search's own units cost, in passes of the target length by FLOPs.
        equivalents_left: what those cost that are left, as expected from racing so far; None
            before the first estimate.
    """

    name: str
    state: str = "starting"
    generation: int = 0
    iterations: int = 0
    best_ppl: float | None = None
    median_ppl: float | None = None
    best_critical_dim: int | None = None
    units_done: int = 0
    units_eliminated: int = 0
    units_left: int = 0
    unit_seconds: float | None = None
    elapsed_seconds: float = 0.0
    eta_seconds: float | None = None
    scorers: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    worst_ppl: float | None = None
    critical_dims: dict[str, int] = field(default_factory=dict)
    units_ahead: int = 0
    committed_at: float | None = None
    descent_step: int = 0
    descent_steps: int = 0
    descent_ppls: list[float | None] = field(default_factory=list)
    equivalents: float = 0.0
    equivalents_left: float | None = None

    @property
    def ended(self) -> bool:
        """Whether the driver has ended."""
        return self.state in ENDED

    @classmethod
    def of(cls, name: str, search: SearchSection, units_done: int) -> "Status":
        """Return the status of a search of which so many units are in the ledger."""
        return cls(
            name,
            iterations=search.iterations,
            units_done=units_done,
            descent_steps=search.descent_steps,
        )

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Status":
        """Read a status; unknown fields are ignored, missing ones take their defaults."""
        known = {f.name for f in fields(cls)}
        values = {name: value for name, value in body.items() if name in known}
        return cls(**{"name": "run", **values})


Observer = Callable[[Status, str], None]  # (status, "units" | "generation" | "end")


def read_status(run_dir: RunDir) -> Status | None:
    """Read the newest status of a run; None if there is none."""
    body = run_dir.read_or_skip(STATUS_FILE)
    return Status.from_json(body) if body else None


class StatusBoard:
    """The status of a running search, kept up to date and shown to observers.

    An observer that fails is logged once and called again; the search goes on.

    Args:
        status: the status to begin with.
        run_dir: the run directory that ``status.json`` is written to.
        observers: called after commits, every few seconds, and after every generation.
        needle_sets: the needle sets by name, whose units cost something.
    """

    def __init__(
        self,
        status: Status,
        run_dir: RunDir,
        observers: Sequence[Observer],
        needle_sets: Mapping[str, NeedleSet],
    ):
        self._costs = {name: needle_set.equivalents for name, needle_set in needle_sets.items()}
        self._sizes = {name: len(needle_set) for name, needle_set in needle_sets.items()}
        self.status = status
        self._run_dir = run_dir
        self._observers = observers
        self._failed: list[Observer] = []
        self._began = time.monotonic()
        self._shown = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT_UNITS)
        # Cost of what was scored in this attempt, the tables' units included.
        self._cost_here = 0.0
        self._num_found: Counter[str] = Counter()
        self._asked: set[tuple[str, str]] = set()
        self._not_asked: Counter[tuple[str, str]] = Counter()

    def committed(self, scores: Iterable[Score]) -> None:
        """Count scores that are in the ledger now."""
        for score in scores:
            self.status.units_done += 1
            self._recent.append(score.seconds)
            self._cost_here += self._costs.get(score.needle_set, 0.0)
            self.status.committed_at = round(time.time(), 3)
        self.found(scores)

    def found(self, scores: Iterable[Score]) -> None:
        """Count those scores as ahead whose vectors nothing has asked for yet."""
        for score in scores:
            self._num_found[score.needle_set] += 1
            if not is_report(score.needle_set):
                self.status.equivalents += self._costs.get(score.needle_set, 0.0)
            vector = score.vector_id, score.needle_set
            if vector not in self._asked:
                self._not_asked[vector] += 1

    def num_found(self, needle_set: str) -> int:
        """Return how many units of a needle set are in the ledger."""
        return self._num_found[needle_set]

    def asked(self, vectors: Iterable[tuple[str, str]]) -> None:
        """Note that these (vector id, needle set) are needed: their units are no longer ahead."""
        for vector in vectors:
            self._asked.add(vector)
            self._not_asked.pop(vector, None)

    def stepped(self, step: int, critical_dim: int, ppl: float | None) -> None:
        """Note and show a step of the descent: where the vector stands, and on its documents."""
        self.status.descent_step = step
        self.status.descent_ppls.append(ppl)
        self.status.best_critical_dim = critical_dim
        self.status.best_ppl = ppl
        self.show("generation")

    def closed(self, record: GenerationRecord, num_units_saved: int) -> None:
        """Note and show a generation that was closed."""
        status = self.status
        ppls = [survivor.ppl for survivor in record.survivors if survivor.ppl is not None]
        dims = [survivor.candidate.critical_dim for survivor in record.survivors]
        status.generation = record.index
        status.best_critical_dim = dims[0]
        status.best_ppl = ppls[0] if ppls else None
        status.median_ppl = statistics.median(ppls) if ppls else None
        status.worst_ppl = ppls[-1] if ppls else None
        status.critical_dims = {str(dim): dims.count(dim) for dim in sorted(set(dims))}
        status.units_eliminated += num_units_saved
        self.show("generation")

    def finished(self) -> None:
        """Note and show that the search is finished."""
        self.status.state = "finished"
        self.status.eta_seconds = self.status.equivalents_left = 0.0
        self.show("end")

    def refresh(
        self,
        units_left: int,
        left: Mapping[str, int],
        of_tables: Collection[tuple[str, str]],
        scorers: Mapping[str, int],
        faults: Mapping[str, int],
    ) -> None:
        """Bring the status up to date.

        Args:
            units_left: units that the open race needs at most.
            left: needle set -> units of the search itself that are left at most.
            of_tables: (vector id, needle set) of the tables.
            scorers: number of scorers by state.
            faults: number of faults by kind.
        """
        status = self.status
        status.units_ahead = self._not_asked.total()
        status.units_left = units_left
        status.unit_seconds = statistics.median(self._recent) if self._recent else None
        status.elapsed_seconds = time.monotonic() - self._began
        status.scorers = dict(scorers)
        status.faults = dict(faults)
        status.equivalents_left = self._cost(left) * self._share_scored()
        status.eta_seconds = None
        if self._cost_here:
            # Units differ in cost, so time goes by cost.
            wanted = Counter(name for _, name in of_tables)
            tables = {
                name: n * self._sizes[name] - self._num_found[name] for name, n in wanted.items()
            }
            expected = status.equivalents_left + self._cost(tables)
            status.eta_seconds = expected * status.elapsed_seconds / self._cost_here

    def _cost(self, units: Mapping[str, int]) -> float:
        return sum(self._costs[name] * max(count, 0) for name, count in units.items())

    def _share_scored(self) -> float:
        """Return the share of the units so far that had to be scored in spite of racing."""
        status = self.status
        if status.state != "searching":
            return 1.0
        asked = status.units_done - status.units_ahead
        return 1 - status.units_eliminated / max(status.units_eliminated + asked, 1)

    @property
    def is_due(self) -> bool:
        """Whether the status was last shown so long ago that it is time again."""
        return time.monotonic() - self._shown >= STATUS_SECONDS

    def show(self, event: str) -> None:
        """Write the status and call the observers.

        Raises:
            FencedError: if a newer driver owns the run directory.
        """
        self._shown = time.monotonic()
        self._run_dir.require_ownership()
        self._run_dir.write_json(STATUS_FILE, asdict(self.status))
        for observe in self._observers:
            try:
                observe(self.status, event)
            except (Exception, SystemExit) as error:  # rich leaves a closed terminal by SystemExit
                if observe not in self._failed:
                    log.warning("%s: %s; the search goes on", type(error).__name__, error)
                    self._failed.append(observe)
