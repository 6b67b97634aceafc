"""A training's checkpoints on storage: written whole, sealed, and found again after anything has died.

    checkpoints/000002-5c1d.../checkpoint_.../   one folder for each command that trained, as claimed in drivers/
        __0_0.distcp, .metadata                  torch's distributed checkpoint
        whole-00000-of-00002.json                step, and the SHA-256 of every file that this worker wrote

Nothing else says what there is: a checkpoint with the seals of all its workers, whose files match them, is one to resume
from; the newest is that of the highest step. What Ray Train notes about its checkpoints is not read again.
"""

import hashlib
import io
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from longrope2_ray.storage.retries import patiently

KEPT = 2  # the newest, and one to fall back on if it was damaged


def seal(folder: str, step: int, rank: int, world: int) -> None:
    """Say what the files that this worker wrote into ``folder`` must be, for ``is_whole`` to check."""
    sums = {path.name: _digest(path) for path in sorted(Path(folder).iterdir())}
    body = json.dumps({"step": step, "sha256": sums})
    Path(folder, f"whole-{rank:05d}-of-{world:05d}.json").write_text(body)


def is_whole(folder: str, rank: int, world: int) -> bool:
    """Whether the files of a checkpoint are what was written; each of ``world`` workers looks at its share of them."""
    seals = sorted(Path(folder).glob("whole-*.json"))
    try:
        expected = [
            item for path in seals for item in json.loads(path.read_text())["sha256"].items()
        ]
        return bool(seals) and all(
            _digest(Path(folder, name)) == sum for name, sum in expected[rank::world]
        )
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ):  # not there, or no seal any more
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Snapshots:
    """The checkpoints of one training.

    Args:
        url: of its folder in the run directory.
        patience_seconds: how long to try again when storage fails or is full.
    """

    def __init__(self, url: str, patience_seconds: float):
        import pyarrow.fs
        from fsspec.core import url_to_fs

        # Left alone, Ray Train would take pyarrow's client, which finds keys, endpoint and region in another way than
        # fsspec's, through which everything else here goes. Listings are not kept: every worker has a client of its own.
        filesystem, path = url_to_fs(url, use_listings_cache=False)
        self.path = f"{path}/checkpoints"
        self._files = PatientFiles(filesystem, patience_seconds)
        self.filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(self._files))
        self._local = "://" not in url

    def found(self) -> list[str]:
        """Paths of the checkpoints whose workers have all sealed them, that of the highest step first."""
        steps = {path: step for path in self._all() if (step := self._step(path)) is not None}
        return sorted(steps, key=lambda path: (steps[path], path), reverse=True)

    def prune(self) -> None:
        """Remove what no resume needs: all but the newest, and what was not finished."""
        kept = self.found()[:KEPT]
        for command in self._folders(self.path):
            if not any(path.startswith(f"{command}/") for path in kept):
                self._files.rm(command, recursive=True)
        for path in self._all():
            if path not in kept:
                self._files.rm(path, recursive=True)

    @contextmanager
    def opened(self, path: str) -> Iterator[str]:
        """A folder of this machine with a checkpoint's files: a shared one is read in place, by each worker what it needs."""
        from ray.train import Checkpoint

        if self._local:
            yield path
            return
        with Checkpoint(path, self.filesystem).as_directory() as folder:
            yield folder

    def _all(self) -> list[str]:
        return [path for command in self._folders(self.path) for path in self._folders(command)]

    def _folders(self, path: str) -> list[str]:
        return self._names(path, "directory")

    def _names(self, path: str, kind: str) -> list[str]:
        try:
            return sorted(
                entry["name"].rstrip("/")
                for entry in self._files.ls(path, detail=True)
                if entry["type"] == kind
            )
        except FileNotFoundError:
            return []

    def _step(self, path: str) -> int | None:
        """The step of a checkpoint that all of its workers have sealed."""
        seals = [
            name for name in self._names(path, "file") if Path(name).match("whole-*-of-*.json")
        ]
        worlds = [int(name[-10:-5]) for name in seals]
        if not seals or worlds.count(worlds[0]) < worlds[0]:
            return None
        try:
            return int(json.loads(self._files.cat_file(seals[0]))["step"])
        except (ValueError, LookupError, TypeError):
            return None


class PatientFiles:
    """An fsspec filesystem as Ray Train uses it, whose calls are tried again while storage is away or full.

    A file appears whole or not at all: what is written goes to a file of this machine first, what is read comes from one.
    """

    def __init__(self, filesystem: Any, patience_seconds: float):
        self._filesystem, self._patience_seconds = filesystem, patience_seconds

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of an object that is just being unpickled
            raise AttributeError(name)
        attribute = getattr(self._filesystem, name)
        return partial(self._try, attribute) if callable(attribute) else attribute

    def _try(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        what = f"{call.__name__} {arguments[0] if arguments else ''}"
        return patiently(lambda: call(*arguments, **options), what, self._patience_seconds)

    def open(self, path: str, mode: str) -> io.FileIO:
        """A stream to a file that goes to its place when it is closed, or from a copy."""
        if "w" in mode:
            return _Outgoing(partial(self._try, self._put, path))
        with tempfile.NamedTemporaryFile() as copy:
            self.get_file(path, copy.name)
            return io.FileIO(copy.name)

    def _put(self, path: str, copy: str) -> None:
        if "file" not in self._filesystem.protocol:
            self._filesystem.put_file(copy, path)
            return
        beside = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            self._filesystem.put_file(copy, beside)
            os.replace(beside, path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise


class _Outgoing(io.FileIO):
    """A file of this machine that is handed to ``put`` when it is closed, and goes."""

    def __init__(self, put: Callable[[str], None]):
        handle, self._copy = tempfile.mkstemp()
        super().__init__(handle, "w")
        self._put = put

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        try:
            self._put(self._copy)
        finally:
            os.unlink(self._copy)
