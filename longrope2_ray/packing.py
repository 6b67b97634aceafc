"""Training data without Ray: quotas by document length, segments of two windows, and the parquet shards they lie in.

A document is a token array ``BOS ... EOS``, or a piece of a longer one; L is the segment's length, L0 the original window.
"""

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from longrope2_ray.recipe import BandSection, DataSection, SourceSection
from longrope2_ray.rundir import RunDir, patiently

Window = Literal["short", "long"]
MANIFEST = "data/manifest.json"
_GROUP_TOKENS = 65536  # of a parquet row group, what one random access reads; a longer segment is a group of its own


@dataclass(frozen=True, eq=False)
class Segment:
    """One training example of exactly L tokens.

    Attributes:
        input_ids: (L,) int64 tokens.
        cu_seqlens: (documents + 1,) int32 starts of the documents, from 0, then L.
        window: ``short`` has original RoPE and attention within a document, ``long`` rescaled RoPE and full attention.
    """

    input_ids: np.ndarray
    cu_seqlens: np.ndarray
    window: Window


# ------------------------------------------------------------------------------------------------------- quotas


def windows_of(bands: Sequence[BandSection], original_length: int) -> list[Window]:
    """The window that each band feeds.

    Raises:
        ValueError: if a band holds documents on both sides of the original length.
    """
    bounds = [0, *(band.max_tokens for band in bands)]
    for low, high in itertools.pairwise(bounds):
        if low < original_length < high:
            raise ValueError(
                f"data.bands: expected a band that ends at the original length {original_length}, got one from "
                f"{low + 1} to {high} tokens; add a band with max_tokens = {original_length}"
            )
    return ["short" if band.max_tokens <= original_length else "long" for band in bands]


def check_bands(data: DataSection, length: int, original_length: int) -> None:
    """Refuse bands that cannot be packed into segments of ``length`` tokens; cheap, for whoever plans to call first.

    Raises:
        ValueError: naming the field to change.
    """
    windows = windows_of(data.bands, original_length)
    for window in dict.fromkeys(windows):
        tokens = sum(band.tokens for band, its in zip(data.bands, windows, strict=True) if its == window)
        if tokens < length * data.num_shards:
            raise ValueError(
                f"data.num_shards: expected at most {tokens // length}, so that each shard holds a segment of {length} "
                f"of the {tokens} tokens in {window} bands, got {data.num_shards}"
            )


def band_of(num_tokens: np.ndarray, bands: Sequence[BandSection]) -> np.ndarray:
    """(N,) band of each document by its length; ``len(bands)`` if it is longer than every band."""
    found: np.ndarray = np.searchsorted([band.max_tokens for band in bands], num_tokens, side="left")
    return found


def quotas_of(bands: Sequence[BandSection], sources: Sequence[SourceSection]) -> dict[tuple[int, int], int]:
    """(band, source) -> tokens to take: the band's tokens, shared by weight among its sources."""
    quotas = {}
    for b, band in enumerate(bands):
        shares = {
            s: source.weight for s, source in enumerate(sources) if not band.sources or source.name in band.sources
        }
        total = math.fsum(shares.values())
        quotas.update({(b, s): round(band.tokens * share / total) for s, share in shares.items()})
    return quotas


@dataclass(frozen=True)
class Taken:
    """What one band takes from one source: every document whose key is at most ``last_key``.

    Attributes:
        documents: how many.
        tokens: of these documents, at least the quota unless the source is too small.
        quota: tokens asked for.
        last_key: None if nothing is taken.
    """

    documents: int
    tokens: int
    quota: int
    last_key: int | None

    @property
    def missing(self) -> int:
        """Tokens that the source does not have."""
        return max(self.quota - self.tokens, 0)


def select(
    keys: np.ndarray,
    num_tokens: np.ndarray,
    bands: np.ndarray,
    sources: np.ndarray,
    quotas: Mapping[tuple[int, int], int],
) -> dict[tuple[int, int], Taken]:
    """For each (band, source) the documents in key order until their tokens reach the quota.

    Args:
        keys: (N,) uint64, unique; whatever order the documents come in, the result is the same.
        num_tokens: (N,) tokens of each document.
        bands: (N,) its band.
        sources: (N,) its source.
    """
    taken = {}
    for (band, source), quota in quotas.items():
        mine = np.flatnonzero((bands == band) & (sources == source))
        mine = mine[np.argsort(keys[mine])]
        tokens = np.cumsum(num_tokens[mine], dtype=np.int64)
        count = min(int(np.searchsorted(tokens, quota, side="left")) + 1, len(mine)) if quota > 0 else 0
        last = int(keys[mine[count - 1]]) if count else None
        taken[band, source] = Taken(count, int(tokens[count - 1]) if count else 0, quota, last)
    return taken


# ------------------------------------------------------------------------------------------------------ packing


@dataclass(frozen=True, eq=False)
class Packed:
    """Segments, and the tokens that are in none: cut off at a segment's end, or left over in the last, unfilled one."""

    segments: list[Segment]
    truncated_tokens: int
    left_over_tokens: int


def pack(documents: Iterable[np.ndarray], window: Window, length: int, original_length: int) -> Packed:
    """Concatenate documents, in their order, into segments of exactly ``length`` tokens.

    A document that crosses a segment's end is cut there. Its rest is dropped, except that in the long window a rest of
    more than ``original_length`` tokens begins the next segment, as a document of its own.

    Raises:
        ValueError: if a document belongs to the other window.
    """
    segments: list[Segment] = []
    parts: list[np.ndarray] = []
    filled = truncated = 0
    for document in documents:
        if (len(document) <= original_length) != (window == "short"):
            raise ValueError(f"documents: expected those of the {window} window, got one of {len(document)} tokens")
        rest = document
        while len(rest):
            part, rest = rest[: length - filled], rest[length - filled :]
            parts.append(part)
            filled += len(part)
            if filled == length:
                starts = np.cumsum([0, *map(len, parts)], dtype=np.int32)
                segments.append(Segment(np.concatenate(parts).astype(np.int64), starts, window))
                parts, filled = [], 0
                if window == "short" or len(rest) <= original_length:
                    truncated += len(rest)
                    break
    return Packed(segments, truncated, filled)


# ------------------------------------------------------------------------------------------------------- shards


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
    pq.write_table(table, sink, row_group_size=rows_per_group(length), compression="zstd", write_page_checksum=True)
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
            raise ValueError(f"--run-dir: expected training data in {run_dir.url}, got none; run longrope2 data first")
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

    def _read(self, path: Any, shard: int, group: int, within: int) -> tuple[np.ndarray, np.ndarray]:
        """(T,) ids and the bounds of their documents: one row of one row group."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with path.open("rb") as file:
                parquet = pq.ParquetFile(file, metadata=self._footers.get(shard), page_checksum_verification=True)
                self._footers[shard] = parquet.metadata
                found = parquet.read_row_group(group).slice(within, 1)
        except (OSError, pa.ArrowInvalid) as error:
            away = isinstance(error, (ConnectionError, TimeoutError)) or getattr(error, "errno", None)
            if away and not isinstance(error, FileNotFoundError):
                raise  # no fault of the shard: what Arrow finds in it has no number
            raise ValueError(f"{path}: expected a whole shard, got: {error}; run longrope2 data again") from error
        input_ids, cu_seqlens = (
            found[name].combine_chunks().flatten().to_numpy() for name in ("input_ids", "cu_seqlens")
        )
        return input_ids, cu_seqlens
