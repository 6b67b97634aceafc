"""A training's checkpoints on storage: written whole, sealed, and found again after any fault.

    checkpoints/000002-5c1d.../checkpoint_.../   one folder for each command, named after its claim
        __0_0.distcp, .metadata                  torch's distributed checkpoint
        whole-00000-of-00002.json                a worker's seal: the step, and its files' SHA-256

Training resumes from a checkpoint if all its workers have sealed it and its files match the
seals; of several, from the one with the highest step. What Ray Train notes about its checkpoints
is not read again.
"""

import io
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope2_ray.storage.digests import file_digest
from longrope2_ray.storage.retries import retrying

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from pyarrow.fs import FileSystem

KEPT = 2  # the newest checkpoint, and one to fall back on if that is damaged

# Gives a local folder with the files of a path on a filesystem, for the time of a block.
Download = Callable[[str, "FileSystem"], AbstractContextManager[str]]


def seal(folder: str, step: int, rank: int, world_size: int) -> None:
    """Write the checksums of the files that this worker wrote into ``folder``, for ``is_whole``."""
    sums = {path.name: file_digest(path) for path in sorted(Path(folder).iterdir())}
    body = json.dumps({"step": step, "sha256": sums})
    Path(folder, f"whole-{rank:05d}-of-{world_size:05d}.json").write_text(body)


def is_whole(folder: str, rank: int, world_size: int) -> bool:
    """Whether a checkpoint's files match its seals.

    Each of the ``world_size`` workers that ask checks its own share of the files.
    """
    seals = sorted(Path(folder).glob("whole-*.json"))
    # a damaged seal can fail in any of these ways
    damage = (OSError, ValueError, LookupError, TypeError, AttributeError)
    try:
        expected = [
            item for path in seals for item in json.loads(path.read_text())["sha256"].items()
        ]
        own = expected[rank::world_size]
        return bool(seals) and all(file_digest(Path(folder, name)) == sha for name, sha in own)
    except damage:
        return False


class CheckpointStore:
    """The checkpoints of one training.

    Args:
        url: the training's folder in the run directory.
        patience_seconds: how long to try again when storage fails or is full.

    Attributes:
        path: the folder of all checkpoints, as ``filesystem`` names it.
        filesystem: a pyarrow filesystem through which Ray Train writes checkpoints.
    """

    def __init__(self, url: str, patience_seconds: float):
        import pyarrow.fs
        from fsspec.core import url_to_fs

        # Left alone, Ray Train would take pyarrow's client, which finds keys, endpoint and region
        # in another way than fsspec's, through which everything else here goes. Listings are not
        # kept: every worker has a client of its own.
        filesystem, path = url_to_fs(url, use_listings_cache=False)
        self.path = f"{path}/checkpoints"
        self._files = RetryingFiles(filesystem, patience_seconds)
        self.filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(self._files))
        self._local = "://" not in url

    def found(self) -> list[str]:
        """Return the paths of the checkpoints that are sealed, the highest step first."""
        steps = {path: step for path in self._all() if (step := self._step(path)) is not None}
        return sorted(steps, key=lambda path: (steps[path], path), reverse=True)

    def prune(self) -> None:
        """Remove all checkpoints but the newest ``KEPT``, and those that were not finished."""
        kept = self.found()[:KEPT]
        for command in self._folders(self.path):
            if not any(path.startswith(f"{command}/") for path in kept):
                self._files.rm(command, recursive=True)
        for path in self._all():
            if path not in kept:
                self._files.rm(path, recursive=True)

    @contextmanager
    def opened(self, path: str, download: Download) -> Iterator[str]:
        """Give a local folder with a checkpoint's files for the time of a block.

        On a shared filesystem that is the checkpoint itself: each worker reads what it needs.
        From an object store it is downloaded.
        """
        if self._local:
            yield path
            return
        with download(path, self.filesystem) as folder:
            yield folder

    def _all(self) -> list[str]:
        return [path for command in self._folders(self.path) for path in self._folders(command)]

    def _folders(self, path: str) -> list[str]:
        return self._names(path, "directory")

    def _names(self, path: str, kind: str) -> list[str]:
        try:
            entries = self._files.ls(path, detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/") for entry in entries if entry["type"] == kind)

    def _step(self, path: str) -> int | None:
        """Return the step of a checkpoint, None unless all of its workers have sealed it."""
        seals = [
            name for name in self._names(path, "file") if Path(name).match("whole-*-of-*.json")
        ]
        world_sizes = [int(name[-10:-5]) for name in seals]
        if not seals or world_sizes.count(world_sizes[0]) < world_sizes[0]:
            return None
        try:
            return int(json.loads(self._files.cat_file(seals[0]))["step"])
        except (ValueError, LookupError, TypeError):
            return None


class RetryingFiles:
    """An fsspec filesystem as Ray Train uses it: calls are repeated while storage fails or is full.

    A file appears whole or not at all: a stream writes to a local file, which is copied to its
    place when the stream is closed; and it reads from a local copy.

    Args:
        filesystem: the fsspec filesystem.
        patience_seconds: how long to repeat a call.
    """

    def __init__(self, filesystem: "AbstractFileSystem", patience_seconds: float):
        self._filesystem = filesystem
        self._patience_seconds = patience_seconds

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while an object is unpickled, it has no attributes yet
            raise AttributeError(name)
        attribute = getattr(self._filesystem, name)
        return partial(self._retry, attribute) if callable(attribute) else attribute

    def _retry(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        what = f"{call.__name__} {arguments[0] if arguments else ''}"
        return retrying(lambda: call(*arguments, **options), what, self._patience_seconds)

    def open(self, path: str, mode: str) -> io.FileIO:
        """Open a stream that writes a file whole when it is closed, or reads a copy of it."""
        if "w" in mode:
            return _Upload(partial(self._retry, self._put, path))
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


class _Upload(io.FileIO):
    """A local temporary file; closing it hands its path to ``put`` and removes it."""

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
