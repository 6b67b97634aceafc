"""Files below a local directory or an fsspec URL, written whole or not at all.

Every JSON file carries a checksum of its content, and a torn or corrupt file is refused when read.
Locally a file is written beside its place, synced and moved there; an object store gets one PUT.
Storage that fails or is full is tried again (``storage.retries``).
"""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from upath import UPath

from longrope2_ray.errors import CorruptFileError, RunDirError
from longrope2_ray.storage.retries import retrying
from longrope2_ray.storage.urls import refuse_credentials

SCHEMA_VERSION = 2
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
log = logging.getLogger("longrope2")
T = TypeVar("T")


class Files:
    """The files below one directory or URL such as ``s3://bucket/run``.

    Args:
        url: the directory.
        patience_seconds: how long a call tries again when storage fails or is full.

    Raises:
        RunDirError: if the URL carries a secret or is of an unknown kind.
    """

    def __init__(self, url: str, patience_seconds: float = 0.0):
        try:
            self.url = refuse_credentials(url)
        except ValueError as error:
            raise RunDirError(f"--run-dir: {error}") from None
        self.patience_seconds = patience_seconds
        try:
            self.path = UPath(url)
        except ValueError as error:
            raise RunDirError(
                f"--run-dir: expected a directory or a URL of a known kind, got {url!r}: {error}"
            ) from error
        self.local = self.path.protocol in ("", "file", "local")
        # Without a cache of listings, since others write here too; open() knows no file:// URL.
        self.path = UPath(self.path.path) if self.local else UPath(url, use_listings_cache=False)
        self._corrupt: set[str] = set()

    @property
    def absolute_url(self) -> str:
        """The URL as every process of a cluster may use it."""
        return str(Path(str(self.path)).absolute()) if self.local else self.url

    def create(self) -> None:
        """Make the directory and prove that it can be written to.

        Raises:
            RunDirError: if it cannot.
        """
        try:
            # Object stores have no folders: making one would make the bucket of a mistyped URL.
            if self.path.protocol not in OBJECT_STORES:
                self.path.mkdir(parents=True, exist_ok=True)
            self.write_bytes(".probe", b"x")
            self.remove(".probe")
        except (OSError, ImportError, NotImplementedError) as error:
            raise RunDirError(
                f"--run-dir: expected a directory that can be written, got {self.url}: "
                f"{str(error) or 'this kind of storage cannot'}"
            ) from error

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a whole file or none of it.

        Raises:
            RunDirError: if there is no space or no permission.
        """
        target = self.path / name
        try:
            self._retrying(lambda: self._write_once(target, data), f"write {target}")
        except OSError as error:
            raise RunDirError(
                f"--run-dir: cannot write {target}: {error}; set another --run-dir"
            ) from error

    def write_json(self, name: str, payload: Mapping[str, Any], indent: int | None = 1) -> None:
        """Write ``payload`` with schema version and checksum.

        Args:
            indent: None writes one line, several times as fast.
        """
        body = {"schema_version": SCHEMA_VERSION, **payload}
        whole = {**body, "sha256": checksum(body)}
        text = json.dumps(whole, indent=indent, sort_keys=True, allow_nan=False)
        self.write_bytes(name, text.encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read the content of a file; None if there is none.

        Raises:
            CorruptFileError: if it is not what was written.
            RunDirError: if another version of this tool wrote it.
        """
        path = self.path / name
        try:
            data = self._retrying(path.read_bytes, f"read {path}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            body = json.loads(data)
        except ValueError as error:
            raise CorruptFileError(f"{path} is torn or corrupt: {error}") from error
        if not isinstance(body, dict) or body.pop("sha256", None) != checksum(body):
            raise CorruptFileError(
                f"{path} is torn or corrupt: its checksum does not match its content"
            )
        if body.pop("schema_version") != SCHEMA_VERSION:
            raise other_version(path)
        return body

    def read_or_skip(self, name: str) -> dict[str, Any] | None:
        """Read as ``read_json`` does, but report a corrupt file once and return None for it."""
        try:
            return self.read_json(name)
        except CorruptFileError as error:
            if name not in self._corrupt:
                log.warning("%s; skipped, what it held is computed again", error)
            self._corrupt.add(name)
            return None

    def is_known_corrupt(self, name: str) -> bool:
        """Tell whether ``read_or_skip`` has met this file and found it corrupt."""
        return name in self._corrupt

    def remove(self, name: str) -> None:
        """Remove a file, if another process has not removed it already."""
        path = self.path / name
        self._retrying(partial(path.unlink, missing_ok=True), f"remove {path}")

    def names(self, folder: str) -> list[str]:
        """List the JSON files of a folder as they are now, sorted, as ``folder/name``."""
        path = self.path / folder

        def look() -> list[str]:
            try:
                if self.local:
                    found = os.listdir(str(path))
                else:
                    path.fs.invalidate_cache(path.path)
                    listing = path.fs.ls(path.path, detail=False)
                    found = [str(entry).rsplit("/", 1)[-1] for entry in listing]
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted(f"{folder}/{name}" for name in found if name.endswith(".json"))

        return self._retrying(look, f"list {path}")

    def sync_folder(self, folder: str) -> None:
        """Wait until a local folder's entries are on disk; an object store needs no such wait."""
        if self.local:
            handle = os.open(str(self.path / folder), os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)

    def _retrying(self, action: Callable[[], T], what: str) -> T:
        return retrying(action, what, self.patience_seconds)

    def _write_once(self, target: UPath, data: bytes) -> None:
        if not self.local:
            target.write_bytes(data)
            return
        place = str(target)
        beside = f"{place}.{uuid.uuid4().hex[:8]}.tmp"
        os.makedirs(os.path.dirname(place), exist_ok=True)
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


def other_version(path: object) -> RunDirError:
    """Return the error for a file that another version of this tool wrote."""
    return RunDirError(f"{path} was written by another version of this tool; set another --run-dir")


def checksum(payload: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()
