"""The parquet shards that segments lie in."""

import hashlib
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from longrope2_ray.data.packing import Segment, Window
from longrope2_ray.storage.retries import patiently
from longrope2_ray.storage.rundir import RunDir

MANIFEST = "data/manifest.json"


_GROUP_TOKENS = 65536  # of a parquet row group, what one random access reads; a longer segment is a group of its own


def shard_name(kind: Literal["tokens", "segments"], index: int) -> str:
    """Name of a shard within the run directory, without its suffix."""
    return f"data/{kind}-{index:05d}"


def rows_per_group(length: int) -> int:
    """Segments in one parquet row group."""
    return max(1, _GROUP_TOKENS // length)


def segments_to_parquet(segments: Sequence[Segment], length: int) -> bytes:
    """A shard file: one row a segment, row groups small enough for random access, pages with checksums."""
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
    """Hex digest of segments in their order, whatever file format they lie in."""
    digest = hashlib.sha256()
    for segment in segments:
        digest.update(segment.window.encode())
        digest.update(segment.cu_seqlens.astype("<i4").tobytes())
        digest.update(segment.input_ids.astype("<i8").tobytes())
    return digest.hexdigest()


class SegmentReader:
    """The segments of a run by index: shards in order, within a shard short segments first.

    Args:
        run: directory or URL of the run.

    Attributes:
        manifest: what ``data/manifest.json`` says.
        fingerprint: changes with any token of any segment.
        windows: window of each segment.

    Raises:
        ValueError: if the run has no data yet.
    """

    def __init__(self, run: RunDir | str):
        run_dir = run if isinstance(run, RunDir) else RunDir(run)
        manifest = run_dir.read_json(MANIFEST)
        if manifest is None:
            raise ValueError(
                f"--run-dir: expected training data in {run_dir.url}, got none; run longrope2 data first"
            )
        self.manifest: dict[str, Any] = manifest
        self.fingerprint: str = manifest["fingerprint"]
        kinds: tuple[Window, ...] = ("short", "long")
        self.windows: list[Window] = [
            window for shard in manifest["shards"] for window in kinds for _ in range(shard[window])
        ]
        self._run_dir = run_dir
        self._ends = np.cumsum([shard["rows"] for shard in manifest["shards"]])
        self._footers: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Segment:
        """Read one segment, and no more of its shard than one row group.

        Raises:
            IndexError: beyond the last segment.
            ValueError: if its shard is gone or corrupt, or storage fails for longer than the run directory is patient.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"segment: expected 0 ... {len(self) - 1}, got {index}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[shard - 1]) if shard else 0)
        group, within = divmod(row, self.manifest["rows_per_group"])
        path = self._run_dir.path / f"{self.manifest['shards'][shard]['name']}.parquet"
        read = partial(self._read, path, shard, group, within)
        input_ids, cu_seqlens = patiently(read, f"read {path}", self._run_dir.patience_seconds)
        return Segment(input_ids.astype(np.int64), cu_seqlens.astype(np.int32), self.windows[index])

    def _read(
        self, path: Any, shard: int, group: int, within: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(T,) ids and the bounds of their documents: one row of one row group."""
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
            away = isinstance(error, (ConnectionError, TimeoutError)) or getattr(
                error, "errno", None
            )
            if away and not isinstance(error, FileNotFoundError):
                raise  # no fault of the shard: what Arrow finds in it has no number
            raise ValueError(
                f"{path}: expected a whole shard, got: {error}; run longrope2 data again"
            ) from error
        input_ids, cu_seqlens = (
            found[name].combine_chunks().flatten().to_numpy()
            for name in ("input_ids", "cu_seqlens")
        )
        return input_ids, cu_seqlens
