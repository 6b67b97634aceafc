"""The run directory: whose run it holds, and which driver owns it now.

    recipe.toml            the recipe as resolved
    run.json               the identity of the run, which is only resumed if it matches
    drivers/000003-*.json  a claim of each driver that was started here; the newest one owns it
    scores/*.json          the ledger of scored units, immutable chunks
    generations/0007.json  candidates and survivors of a closed generation
    winner.json            the result of the search, without times
    status.json            where the search stands, for people and dashboards
    report.html, *.png     tables and figures
    data/                  training data
    train/                 a training (``train.name``): steps/, checkpoints/, model/

Chunks and generations name their run, so that it can be recognized without ``run.json``.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import tomli_w

from longrope2_ray.errors import FencedError, RunDirError
from longrope2_ray.storage.files import Files, checksum, other_version

DATA_FOLDER = "data"
DRIVERS_FOLDER = "drivers"
GENERATIONS_FOLDER = "generations"
SCORES_FOLDER = "scores"
EVALUATION_FOLDER = "evaluation"
EXPORT_FOLDER = "export"
RESERVED_FOLDERS = (
    DATA_FOLDER,
    DRIVERS_FOLDER,
    EVALUATION_FOLDER,
    EXPORT_FOLDER,
    GENERATIONS_FOLDER,
    SCORES_FOLDER,
)
_PRINT = "fingerprint of "
_FILE_SUFFIXES = (".json", ".toml", ".html", ".png")


def require_free_name(name: str) -> None:
    """Refuse a folder name that the run directory itself uses.

    Raises:
        ValueError: if the name is taken; the message lists the taken names.
    """
    if name in RESERVED_FOLDERS or name.endswith(_FILE_SUFFIXES):
        raise ValueError(
            f"expected a folder of its own in the run directory, got {name!r}; "
            f"{', '.join(RESERVED_FOLDERS)} and names of files are taken"
        )


def require_same_run(url: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a directory that belongs to another run.

    Args:
        url: the directory.
        found: field -> value of the run that is there.
        wanted: field -> value of the run that was asked for.

    Raises:
        RunDirError: if it does; the message names the first field that differs.
    """
    # A fingerprint may follow from a field: the field, which a person can put back, comes first.
    for field in sorted({*found, *wanted}, key=lambda name: (name.startswith(_PRINT), name)):
        old, new = found.get(field), wanted.get(field)
        if old != new:
            raise RunDirError(
                f"--run-dir: {url} belongs to another run: {field} is {old!r} there and {new!r} "
                f"now; set another --run-dir, or put the field back to resume"
            )


class RunDir(Files):
    """The directory of one run, a search's or a training's.

    Attributes:
        run_id: digest of the run's identity, known once the directory is opened.
        claim: name of this driver's claim, once it has taken the directory over.
    """

    def __init__(self, url: str, patience_seconds: float = 0.0):
        super().__init__(url, patience_seconds)
        self.run_id = ""
        self.claim: str | None = None

    # --- identity

    def open(
        self,
        kind: str,
        identity: Mapping[str, Any],
        fingerprints: Mapping[str, str],
        recipe: Mapping[str, Any],
        facts: Mapping[str, Any],
        folders: Iterable[str] = (),
    ) -> bool:
        """Begin a run here, or resume the one that is here; return True if there was one.

        Args:
            kind: ``search`` or ``training``.
            identity: ``section.field`` -> value of all that the result depends on.
            fingerprints: fingerprints of what fields only name: model, needles, data, factors.
            recipe: the whole recipe by section, for ``recipe.toml``.
            facts: geometry and sizes that a report needs; they follow from recipe and model.
            folders: folders whose files name their run.

        Raises:
            RunDirError: if the directory holds another run.
        """
        self.create()
        wanted = json.loads(
            json.dumps({"recipe": dict(identity), "fingerprints": dict(fingerprints)})
        )
        self.run_id = checksum(wanted)[:16]
        found = self.read_or_skip("run.json")
        held = [name for folder in folders for name in self.names(folder)]
        if found is None:
            self._require_own_files(held)
            text = tomli_w.dumps(_without_none(recipe))
            self.write_bytes("recipe.toml", text.encode())
            self.write_json("run.json", {"kind": kind, **wanted, **facts})
            return bool(held)
        if "kind" not in found:
            raise other_version(self.path / "run.json")
        require_same_run(self.url, _flat_identity(found), _flat_identity(wanted))
        return True

    def _require_own_files(self, names: Iterable[str]) -> None:
        """Refuse files of another run where no ``run.json`` says whose they are.

        Raises:
            RunDirError: if a whole file belongs to another run, or names none.
        """
        for name in names:
            body = self.read_or_skip(name)
            if body is not None and body.get("run") != self.run_id:
                raise RunDirError(
                    f"--run-dir: {self.url} holds {name}, which is of another run or does not say "
                    f"of which, and no readable run.json; set another --run-dir"
                )

    # --- one driver at a time

    def take_over(self) -> None:
        """Claim the directory for this process: older drivers stop at their next write.

        Claims are numbered, not dated: clocks do not matter. Two drivers that take the same number
        are told apart by name.
        """
        claims = self.names(DRIVERS_FOLDER)
        numbers = [int(name.split("/")[1].split("-")[0]) for name in claims]
        number = max(numbers, default=0) + 1
        self.claim = f"{DRIVERS_FOLDER}/{number:06d}-{uuid.uuid4().hex[:8]}.json"
        driver = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": round(time.time(), 3),
        }
        self.write_json(self.claim, driver)

    def require_ownership(self) -> None:
        """Refuse to go on once a newer driver has taken the directory over.

        Raises:
            FencedError: if a newer driver has.
        """
        if self.claim is None:
            return
        newest = max(self.names(DRIVERS_FOLDER), default=self.claim)
        if newest > self.claim:
            other = self.read_or_skip(newest) or {}
            raise FencedError(
                f"a newer driver (process {other.get('process', '?')} on "
                f"{other.get('host', '?')}) has taken over {self.url}; this one has stopped, what "
                f"it committed is kept"
            )


def _flat_identity(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return field -> value of the identity in a ``run.json``, fingerprints among the fields."""
    prints = {f"{_PRINT}{name}": value for name, value in body["fingerprints"].items()}
    return {**body["recipe"], **prints}


def _without_none(value: Any) -> Any:
    """Return a value without the fields that are not set, since TOML has no null."""
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(inner) for inner in value]
    return value
