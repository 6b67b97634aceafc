"""The ledger of results: rows with a key, each committed once, on a disk or an object store.

A commit is one new immutable file, a chunk: object stores can neither append nor rename.
"""

import uuid
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

from longrope2_ray.storage.files import other_version
from longrope2_ray.storage.rundir import RunDir


class Row(Protocol):
    """A row of a ledger: a dataclass of plain JSON values with a key."""

    @property
    def key(self) -> Hashable:
        """The key of the row; rows with the same key hold the same result."""


R = TypeVar("R", bound=Row)


class Ledger(Mapping[Hashable, R], Generic[R]):
    """The committed rows of one folder of a run directory, by key.

    It holds the rows that were loaded or committed through this object.

    Args:
        run_dir: the run directory; only the driver that owns it may commit.
        folder: name of the folder of chunks.
        row_type: the dataclass of the rows.
    """

    def __init__(self, run_dir: RunDir, folder: str, row_type: type[R]):
        self._run_dir = run_dir
        self._folder = folder
        self._row_type = row_type
        self._rows: dict[Hashable, R] = {}
        self._chunks: set[str] = set()

    def __getitem__(self, key: Hashable) -> R:
        return self._rows[key]

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def load(self) -> "Ledger[R]":
        """Read every committed row and return itself; corrupt chunks are reported and skipped."""
        while True:
            names = self._run_dir.names(self._folder)
            vanished = False
            for name in names:
                if name in self._chunks:
                    continue
                body = self._run_dir.read_or_skip(name)
                if body is None:
                    vanished |= not self._run_dir.is_known_corrupt(name)
                    continue
                self._read(name, body["rows"])
            # A driver that is not fenced off yet may compact chunks while they are read: their rows
            # are then in a chunk that the listing did not have.
            if not vanished or names == self._run_dir.names(self._folder):
                return self

    def commit(self, rows: Iterable[R]) -> list[R]:
        """Write the rows that are not there yet as one chunk, and return them.

        Raises:
            FencedError: if a newer driver owns the run directory.
            RunDirError: if storage fails for longer than the run directory waits.
        """
        # A unit may come back twice, such as after a stall: one row counts.
        new = {row.key: row for row in rows if row.key not in self._rows}
        if new:
            chunk = self._write(new.values())
            # In this order: an interruption in between leaves a chunk that ``load`` reads.
            self._rows.update(new)
            self._chunks.add(chunk)
        return list(new.values())

    def compact(self) -> None:
        """Replace the chunks that this object read or wrote by one, which is written first.

        Corrupt chunks stay where they are, for a person to look at.
        """
        old = sorted(self._chunks)
        if len(old) < 2:
            return
        # A crash in between leaves rows twice, which ``load`` counts once.
        self._chunks.add(self._write(self._rows.values()))
        self._run_dir.sync_folder(self._folder)
        for name in old:
            self._run_dir.remove(name)
            self._chunks.discard(name)

    def _read(self, chunk: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add the rows of a chunk, unless their keys are there."""
        self._chunks.add(chunk)
        for fields in rows:
            try:
                row = self._row_type(**fields)
            except TypeError as error:
                raise other_version(self._run_dir.path / chunk) from error
            self._rows.setdefault(row.key, row)

    def _write(self, rows: Iterable[R]) -> str:
        """Write a chunk and return its name."""
        self._run_dir.require_ownership()
        name = f"{self._folder}/{uuid.uuid4().hex}.json"
        body = {"run": self._run_dir.run_id, "rows": [vars(row) for row in rows]}
        self._run_dir.write_json(name, body, indent=None)
        return name
