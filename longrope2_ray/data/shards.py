"""Shards: the parquet files of training data, their records, and reading segments from them."""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np

from longrope2_ray.data.manifest import MANIFEST, Manifest, TokenShard
from longrope2_ray.data.packing import Segment, Window
from longrope2_ray.storage.retries import retrying
from longrope2_ray.storage.rundir import RunDir

Kind = Literal["tokens", "segments"]
AnyShard = TypeVar("AnyShard", bound=TokenShard)

# Tokens of a parquet row group, which is what one random access reads. A segment that is longer is
# a group of its own.
_GROUP_TOKENS = 65536


def shard_name(kind: Kind, index: int) -> str:
    """Name a shard within the run directory, without its suffix."""
    return f"data/{kind}-{index:05d}"


def write_shard(run_dir: RunDir, name: str, content: bytes, record: TokenShard) -> None:
    """Write a shard, then its record: a shard without one is not whole."""
    run_dir.write_bytes(f"{name}.parquet", content)
    run_dir.write_json(f"{name}.json", record.to_json())


def read_record(run_dir: RunDir, name: str, kind: type[AnyShard]) -> AnyShard | None:
    """Read the record of a shard, None if there is none."""
    body = run_dir.read_or_skip(f"{name}.json")
    return None if body is None else kind.from_json(body)


def file_checksum(run_dir: RunDir, name: str) -> str | None:
    """Return the SHA-256 of a shard's file, None if it cannot be read."""
    try:
        with (run_dir.path / f"{name}.parquet").open("rb") as file:
            opened: Any = file
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return None


def rows_per_group(length: int) -> int:
    """Return how many segments one parquet row group has."""
    return max(1, _GROUP_TOKENS // length)


def segments_to_parquet(segments: Sequence[Segment], length: int) -> bytes:
    """Make the file of a shard: a row for each segment, pages with checksums.

    Row groups are small enough for random access.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = pa.list_(pa.int32())
    table = pa.table(
        {
            "window": pa.array([s.window for s in segments], pa.string()),
            "cu_seqlens": pa.array([s.cu_seqlens for s in segments], numbers),
            "input_ids": pa.array([s.input_ids.astype(np.int32) for s in segments], numbers),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=rows_per_group(length),
        compression="zstd",
        write_page_checksum=True,
    )
    return bytes(sink.getvalue())


def content_digest(segments: Iterable[Segment]) -> str:
    """Return a hex digest of segments in their order, whatever file format they lie in."""
    digest = hashlib.sha256()
    for segment in segments:
        digest.update(segment.window.encode())
        digest.update(segment.cu_seqlens.astype("<i4").tobytes())
        digest.update(segment.input_ids.astype("<i8").tobytes())
    return digest.hexdigest()


class SegmentReader:
    """Reads the segments of a run by index: shards in order, in each the short segments first.

    Args:
        run: directory or URL of the run.

    Attributes:
        manifest: what the data is.
        fingerprint: changes with any token of any segment.
        windows: the window of each segment.

    Raises:
        ValueError: if the run has no data yet.
    """

    def __init__(self, run: RunDir | str):
        run_dir = run if isinstance(run, RunDir) else RunDir(run)
        body = run_dir.read_json(MANIFEST)
        if body is None:
            raise ValueError(
                f"--run-dir: expected training data in {run_dir.url}, got none; run longrope2 "
                f"data first"
            )
        self.manifest = Manifest.from_json(body)
        self.fingerprint = self.manifest.fingerprint
        self.windows: list[Window] = []
        for shard in self.manifest.shards:
            self.windows.extend(itertools.repeat("short", shard.short))
            self.windows.extend(itertools.repeat("long", shard.long))
        self._run_dir = run_dir
        self._ends = np.cumsum([shard.rows for shard in self.manifest.shards])
        self._footers: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Segment:
        """Read one segment, and no more of its shard than one row group.

        Raises:
            IndexError: beyond the last segment.
            ValueError: if its shard is gone or corrupt, or storage fails for longer than the run
                directory waits.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"segment: expected 0 ... {len(self) - 1}, got {index}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[shard - 1]) if shard else 0)
        group, within = divmod(row, self.manifest.rows_per_group)
        path = self._run_dir.path / f"{self.manifest.shards[shard].name}.parquet"
        read = partial(self._read, path, shard, group, within)
        input_ids, cu_seqlens = retrying(read, f"read {path}", self._run_dir.patience_seconds)
        return Segment(input_ids.astype(np.int64), cu_seqlens.astype(np.int32), self.windows[index])

    def _read(
        self, path: Any, shard: int, group: int, within: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read one row of a row group: (L,) tokens, and the starts of their documents, then L."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with path.open("rb") as file:
                parquet = pq.ParquetFile(
                    file, metadata=self._footers.get(shard), page_checksum_verification=True
                )
                self._footers[shard] = parquet.metadata
                found = parquet.read_row_group(group).slice(within, 1)
        except (OSError, pa.ArrowInvalid) as error:
            # What Arrow finds wrong in a shard has no number; other errors are the storage's.
            away = isinstance(error, (ConnectionError, TimeoutError)) or getattr(
                error, "errno", None
            )
            if away and not isinstance(error, FileNotFoundError):
                raise
            raise ValueError(
                f"{path}: expected a whole shard, got: {error}; run longrope2 data again"
            ) from error
        input_ids, cu_seqlens = (
            found[name].combine_chunks().flatten().to_numpy()
            for name in ("input_ids", "cu_seqlens")
        )
        return input_ids, cu_seqlens
