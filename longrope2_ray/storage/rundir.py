"""The run directory: the only reader and writer of what a run keeps on disk or in an object store.

    recipe.toml            the recipe as resolved
    run.json               schema version and fingerprints; a run is only resumed if they match
    drivers/000003-*.json  one for each driver that was started here; the newest owns the directory
    scores/*.json          the ledger of scored units, immutable segments
    generations/0007.json  survivors and candidates of a generation
    winner.json            the result, without times
    status.json            for a person or a dashboard
    report.html, *.png     tables and figures

Every JSON file carries a checksum of its content. A file that is torn or corrupt is reported and skipped, never trusted.
Segments and generations name their run, so that it can be recognised without ``run.json``. Locally a file is written
beside its place, synced and moved there; an object store gets one PUT. Storage that is away is waited for.
"""

import hashlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import tomli_w
from upath import UPath

from longrope2_ray.errors import CorruptFileError, FencedError, RunDirError
from longrope2_ray.search.scores import Score
from longrope2_ray.storage.retries import T, patiently
from longrope2_ray.storage.urls import refuse_credentials

SCHEMA_VERSION = 2


OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")


log = logging.getLogger("longrope2")


def _checksum(payload: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()


class RunDir:
    """Files of one run under a local directory or an fsspec URL such as ``s3://bucket/run``.

    Args:
        url: where.
        folders: made with the directory.
        patience_seconds: how long to try again when storage fails or is full, before giving up.

    Raises:
        RunDirError: if the directory cannot be created or written.
    """

    def __init__(
        self,
        url: str,
        folders: Iterable[str] = ("scores", "generations"),
        patience_seconds: float = 0.0,
    ):
        try:
            self.url = refuse_credentials(url)
        except ValueError as error:
            raise RunDirError(f"--run-dir: {error}") from None
        self.patience_seconds = patience_seconds
        self._folders = tuple(folders)
        try:
            self.path = UPath(url)
        except ValueError as error:  # no such kind of storage
            raise RunDirError(
                f"--run-dir: expected a directory or a URL of a known kind, got {url!r}: {error}"
            ) from error
        self.local = self.path.protocol in ("", "file", "local")
        # others write here too; and open() knows no file://
        self.path = UPath(self.path.path) if self.local else UPath(url, use_listings_cache=False)
        self._corrupt: set[str] = set()
        self._segments: set[str] = set()  # of the ledger, read or written here
        self._run = ""  # digest of recipe and fingerprints, known once the directory is opened
        self.claim: str | None = (
            None  # name of the driver's file on whose behalf this object writes
        )

    def create(self) -> None:
        """Make the directory and prove that it can be written to."""
        try:
            for name in ("", *self._folders):
                self._make_folder(name)
            self.write_bytes(".probe", b"x")
            probe = self.path / ".probe"  # which another driver may have removed
            self._patiently(partial(probe.unlink, missing_ok=True), f"write to {self.path}")
        except (OSError, ImportError, NotImplementedError) as error:
            raise RunDirError(
                f"--run-dir: expected a directory that can be written, got {self.url}: "
                f"{str(error) or 'this kind of storage cannot'}"
            ) from error

    def _make_folder(self, name: str) -> None:
        """Object stores have no folders, and to make one would make a mistyped bucket."""
        if self.path.protocol not in OBJECT_STORES:
            (self.path / name if name else self.path).mkdir(parents=True, exist_ok=True)

    # --- files

    def _patiently(self, action: Callable[[], T], what: str) -> T:
        return patiently(action, what, self.patience_seconds)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a whole file or none of it.

        Raises:
            RunDirError: if there is no space or no permission.
        """
        target = self.path / name
        try:
            self._patiently(lambda: self._write_once(target, data), f"write {target}")
        except OSError as error:  # its folder is not there
            raise RunDirError(
                f"--run-dir: cannot write {target}: {error}; set another --run-dir"
            ) from error

    def _write_once(self, target: UPath, data: bytes) -> None:
        if not self.local:
            target.write_bytes(data)
            return
        place = str(target)
        beside = f"{place}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, place)
        except BaseException:
            if os.path.exists(beside):
                os.unlink(beside)
            raise

    def write_json(self, name: str, payload: Mapping[str, Any], indent: int | None = 1) -> None:
        """Write ``payload`` with schema version and checksum; with ``indent`` None on one line, several times as fast."""
        body = {"schema_version": SCHEMA_VERSION, **payload}
        text = json.dumps(
            {**body, "sha256": _checksum(body)}, indent=indent, sort_keys=True, allow_nan=False
        )
        self.write_bytes(name, text.encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content of a file, None if there is none.

        Raises:
            CorruptFileError: if it is not what was written.
            RunDirError: if another version of this tool wrote it.
        """
        path = self.path / name
        try:
            data = self._patiently(path.read_bytes, f"read {path}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            body = json.loads(data)
        except ValueError as error:
            raise CorruptFileError(f"{path} is torn or corrupt: {error}") from error
        if not isinstance(body, dict) or body.pop("sha256", None) != _checksum(body):
            raise CorruptFileError(
                f"{path} is torn or corrupt: its checksum does not match its content"
            )
        if body.pop("schema_version") != SCHEMA_VERSION:
            raise RunDirError(
                f"{path} was written by another version of this tool; set another --run-dir"
            )
        return body

    def read_or_skip(self, name: str) -> dict[str, Any] | None:
        """As ``read_json``, but a corrupt file is reported once and counts as none."""
        try:
            return self.read_json(name)
        except CorruptFileError as error:
            if name not in self._corrupt:
                log.warning("%s; skipped, what it held is computed again", error)
            self._corrupt.add(name)
            return None

    def names(self, folder: str) -> list[str]:
        """JSON files of a folder as they are now, sorted."""
        path = self.path / folder

        def look() -> list[str]:
            try:
                if self.local:
                    found = os.listdir(str(path))
                else:
                    path.fs.invalidate_cache(path.path)  # what others wrote in the meantime counts
                    found = [str(p).rsplit("/", 1)[-1] for p in path.fs.ls(path.path, detail=False)]
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted(f"{folder}/{name}" for name in found if name.endswith(".json"))

        return self._patiently(look, f"list {path}")

    # --- identity

    def open(
        self,
        recipe: Mapping[str, Any],
        fingerprints: Mapping[str, str],
        nested_recipe: Mapping[str, Any],
        facts: Mapping[str, Any],
    ) -> bool:
        """Begin a run here, or resume the one that is here; True if there was one.

        Args:
            recipe: ``section.field`` -> value of all that the result depends on.
            fingerprints: of model, needles and held-out needles, or of model, data and factors.
            nested_recipe: the whole recipe, for ``recipe.toml``.
            facts: geometry and sizes that a report needs; they follow from recipe and model.

        Raises:
            RunDirError: if the directory holds the run of another recipe, model or needle set.
        """
        self.create()
        wanted = json.loads(
            json.dumps({"recipe": dict(recipe), "fingerprints": dict(fingerprints)})
        )
        self._run = _checksum(wanted)[:16]
        found = self.read_or_skip("run.json")
        if found is None:
            self._require_own_files()
        else:
            for kind in ("recipe", "fingerprints"):
                for field in sorted({*found[kind], *wanted[kind]}):
                    old, new = found[kind].get(field), wanted[kind].get(field)
                    if old != new:
                        what = field if kind == "recipe" else f"fingerprint of {field}"
                        raise RunDirError(
                            f"--run-dir: {self.url} belongs to another run: {what} is {old!r} there and {new!r} now; "
                            f"set another --run-dir, or put the field back to resume"
                        )
        held = found is not None or any(map(self.names, self._folders))
        if found is None:
            self.write_bytes("recipe.toml", tomli_w.dumps(_without_none(nested_recipe)).encode())
            self.write_json("run.json", {**wanted, **facts})
        return held

    def _require_own_files(self) -> None:
        """Without a readable ``run.json`` the whole files of the directory must say themselves that they are of this run.

        Raises:
            RunDirError: if one says otherwise, or says nothing.
        """
        for name in [name for folder in self._folders for name in self.names(folder)]:
            body = self.read_or_skip(name)
            if body is not None and body.get("run") != self._run:
                raise RunDirError(
                    f"--run-dir: {self.url} holds {name}, which is of another run or does not say of which, and no "
                    f"readable run.json; set another --run-dir"
                )

    # --- one driver at a time

    def take_over(self) -> None:
        """Claim the directory for this process: the driver with the newest claim owns it, older ones stop at their next write.

        Claims are numbered, not dated: clocks do not matter. Two drivers that take the same number are told apart by name.
        """
        claims = self.names("drivers")
        number = max((int(name.split("/")[1].split("-")[0]) for name in claims), default=0) + 1
        self._make_folder("drivers")
        self.claim = f"drivers/{number:06d}-{uuid.uuid4().hex[:8]}.json"
        me = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": round(time.time(), 3),
        }
        self.write_json(self.claim, me)

    def require_ownership(self) -> None:
        """Nothing, unless a newer driver was started on this directory.

        Raises:
            FencedError: if so.
        """
        if self.claim is None:
            return
        newest = max(self.names("drivers"), default=self.claim)
        if newest > self.claim:
            other = self.read_or_skip(newest) or {}
            raise FencedError(
                f"a newer driver (process {other.get('process', '?')} on {other.get('host', '?')}) has taken over "
                f"{self.url}; this one has stopped, what it committed is kept"
            )

    # --- ledger

    def append_scores(self, scores: Iterable[Score]) -> None:
        """Commit rows as one new immutable segment."""
        rows = [vars(score) for score in scores]
        if rows:
            self.require_ownership()
            name = f"scores/{uuid.uuid4().hex}.json"
            self.write_json(name, {"run": self._run, "rows": rows}, indent=None)
            self._segments.add(name)

    def load_scores(self) -> dict[tuple[str, str, int], Score]:
        """Every committed row by its key; corrupt segments are reported and skipped."""
        while True:
            ledger: dict[tuple[str, str, int], Score] = {}
            names = self.names("scores")
            vanished = False
            for name in names:
                body = self.read_or_skip(name)
                if body is None:
                    vanished |= name not in self._corrupt
                    continue
                self._segments.add(name)
                for row in body["rows"]:
                    score = Score(**row)
                    ledger.setdefault(score.key, score)
            if not vanished or names == self.names("scores"):
                return ledger
            # another driver, not yet fenced off, replaced segments by one while they were read: look again

    def compact_scores(self, ledger: Iterable[Score]) -> None:
        """Replace the segments read or written here by one that holds ``ledger``: it is whole before they go.

        Corrupt segments stay where they are, for a person to look at.
        """
        old = sorted(self._segments)
        if len(old) > 1:
            self.require_ownership()
            self.append_scores(ledger)
            if self.local:  # the new name must be on disk before the old ones go
                folder = os.open(str(self.path / "scores"), os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
            for name in old:
                path = self.path / name
                self._patiently(partial(path.unlink, missing_ok=True), f"remove {path}")
                self._segments.discard(name)

    # --- generations, result, status

    def write_generation(self, index: int, payload: Mapping[str, Any]) -> None:
        """Keep one closed generation; written again after a resume it holds the same bytes."""
        self.require_ownership()
        self.write_json(f"generations/{index:04d}.json", {"run": self._run, **payload})

    def generations(self) -> list[dict[str, Any]]:
        """Every whole generation, oldest first."""
        return [body for name in self.names("generations") if (body := self.read_or_skip(name))]

    def winner(self) -> dict[str, Any] | None:
        """The result, None while the search has not ended."""
        return self.read_or_skip("winner.json")

    def status(self) -> dict[str, Any] | None:
        """The newest status, None if there is none."""
        return self.read_or_skip("status.json")


def _without_none(value: Any) -> Any:
    """TOML has no null: a field that is not set is left out."""
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(inner) for inner in value]
    return value
