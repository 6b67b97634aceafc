"""Where a run stands, read from its directory again and again, without writing anything."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longrope2_ray.errors import CorruptFileError
from longrope2_ray.report.trainings import (
    STEPS_FOLDER,
    is_training,
    training_folders,
)
from longrope2_ray.search.status import STATUS_FILE, Status
from longrope2_ray.search.winner import WINNER_FILE, GenerationRecord
from longrope2_ray.storage.rundir import GENERATIONS_FOLDER, RunDir
from longrope2_ray.training.records import LoggedStep

# A driver writes its status every two seconds, but may wait for its storage.
LIFELESS_SECONDS = 60.0
# So many of the last generations and logged steps are read.
NUM_READ = 40


@dataclass(frozen=True)
class TrainingSnapshot:
    """What one training of a run shows at one moment.

    Attributes:
        steps: its last logged steps, oldest first.
        age_seconds: time since the last one was logged, or since the training began.
        stopped: why its last attempt ended early; None if it did not.
    """

    name: str
    steps: Sequence[LoggedStep]
    age_seconds: float
    finished: bool
    stopped: str | None

    @property
    def lifeless(self) -> bool:
        """Whether a step is long overdue."""
        longest = max((step.seconds for step in self.steps), default=0.0)
        return not self.finished and self.age_seconds > max(LIFELESS_SECONDS, 10 * longest)


@dataclass(frozen=True)
class Snapshot:
    """What a run directory shows at one moment.

    Attributes:
        searched: whether a search was begun here.
        status: the search's status; None before its first.
        age_seconds: time since the status was written.
        best_ppls: perplexity of the best survivor of the last closed generations, oldest first.
        finished: whether there is nothing left to wait for.
    """

    name: str
    searched: bool
    status: Status | None
    age_seconds: float
    best_ppls: Sequence[float | None]
    trainings: Sequence[TrainingSnapshot]
    finished: bool

    @property
    def lifeless(self) -> bool:
        """Whether the search's driver seems to be gone."""
        return (
            self.status is not None
            and self.status.state != "finished"
            and self.age_seconds > LIFELESS_SECONDS
        )


class Monitor:
    """Reads a run directory again and again; files that cannot change are read once.

    Raises:
        ValueError: if there is no run.
    """

    def __init__(self, run_dir: RunDir):
        self._run_dir = run_dir
        self._kept: dict[str, Mapping[str, Any]] = {}
        self._ages = Ages(run_dir)
        self._status: Mapping[str, Any] | None = None
        facts = run_dir.read_json("run.json")
        if facts and is_training(facts):
            raise ValueError(
                f"RUN_DIR: {run_dir.url} is the folder of a training; give the run directory "
                f"around it"
            )
        if facts is None and not training_folders(run_dir, self._keep):
            raise ValueError(
                f"RUN_DIR: expected the directory of a run, got {run_dir.url!r}, which has no "
                f"run.json"
            )
        self._facts = facts

    def look(self) -> Snapshot:
        """Return where the run stands now.

        Raises:
            OSError, RunDirError: if the storage cannot be reached.
        """
        # Object stores remember old listings.
        self._run_dir.path.fs.invalidate_cache()
        searched = self._facts is not None
        status, age = self._search() if searched else (None, 0.0)
        folders = training_folders(self._run_dir, self._keep)
        trainings = [self._training(folder) for folder in folders]
        search_ended = status is not None and status.state == "finished"
        return Snapshot(
            name=status.name if status else self._name(),
            searched=searched,
            status=status,
            age_seconds=age,
            best_ppls=self._best_ppls(),
            trainings=trainings,
            finished=(search_ended or not searched) and all(t.finished for t in trainings),
        )

    def _name(self) -> str:
        return str((self._facts or {}).get("recipe", {}).get("name", self._run_dir.path.name))

    def _search(self) -> tuple[Status | None, float]:
        """Return the search's status and its age in seconds."""
        # A status that is being replaced right now is read next time.
        self._status = self._read(STATUS_FILE) or self._status
        if self._status is None:
            return None, 0.0
        status = Status.from_json(self._status)
        if status.state == "reporting" and self._read(WINNER_FILE):
            # Its driver was killed before it could write its last status.
            status.state = "finished"
        return status, self._ages.age(STATUS_FILE, self._status)

    def _best_ppls(self) -> list[float | None]:
        names = self._run_dir.names(GENERATIONS_FOLDER)[-NUM_READ:]
        records = [GenerationRecord.from_json(body) for body in map(self._keep, names) if body]
        return [record.survivors[0].ppl for record in records]

    def _training(self, folder: str) -> TrainingSnapshot:
        names = self._run_dir.names(f"{folder}/{STEPS_FOLDER}")[-NUM_READ:]
        bodies = [self._keep(name) for name in names]
        last = names[-1] if names else f"{folder}/run.json"
        changed = self._ages.changed(last, self._kept.get(last) or {})
        return TrainingSnapshot(
            name=folder,
            steps=[LoggedStep.from_json(body) for body in bodies if body],
            age_seconds=time.monotonic() - changed,
            finished=self._read(f"{folder}/result.json") is not None,
            stopped=self._stopped(folder, changed),
        )

    def _stopped(self, folder: str, last_step: float) -> str | None:
        """Return why a training stopped; None if it has gone on since, by the last step's time."""
        name = f"{folder}/stop.json"
        stop = self._read(name)
        if stop is None or self._ages.changed(name, stop) < last_step:
            return None
        return str(stop["message"])

    def _read(self, name: str) -> Mapping[str, Any] | None:
        """Read a file that is there and whole; the run itself warns of torn ones."""
        try:
            return self._run_dir.read_json(name)
        except CorruptFileError:
            return None

    def _keep(self, name: str) -> Mapping[str, Any] | None:
        """Read a file that does not change once it is there and whole."""
        if name not in self._kept and (body := self._read(name)):
            self._kept[name] = body
        return self._kept.get(name)


class Ages:
    """How long ago files got the content that they have.

    The storage's clock may differ from this machine's, so it counts only at the first look; changes
    between two looks are timed here.
    """

    def __init__(self, run_dir: RunDir):
        self._run_dir = run_dir
        # File -> its content, and when it got that on this machine's monotonic clock.
        self._changes: dict[str, tuple[Mapping[str, Any], float]] = {}

    def age(self, name: str, body: Mapping[str, Any]) -> float:
        """Return the seconds since the file got this content."""
        return time.monotonic() - self.changed(name, body)

    def changed(self, name: str, body: Mapping[str, Any]) -> float:
        """Return when the file got this content, in seconds of ``time.monotonic``."""
        before = self._changes.get(name)
        if before is None or before[0] != body:
            written = time.time() if before else self._written_at(name)
            self._changes[name] = body, time.monotonic() - max(time.time() - written, 0.0)
        return self._changes[name][1]

    def _written_at(self, name: str) -> float:
        path = self._run_dir.path / name
        try:
            return float(path.fs.modified(path.path).timestamp())
        # The file was replaced just now, or the storage keeps no times.
        except (FileNotFoundError, NotImplementedError):
            return time.time()
