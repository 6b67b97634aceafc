"""What is known of training data: a record beside each shard, and the manifest of all of it.

Everything in them follows from the documents and the settings: no times, no paths.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, JsonValue

from longrope2_ray.data.packing import Window
from longrope2_ray.data.quotas import Taken, windows_of
from longrope2_ray.recipe.training import DataSection
from longrope2_ray.storage.digests import digest

MANIFEST = "data/manifest.json"

Dropped = dict[str, dict[str, int]]
"""Why documents were dropped -> source -> how many."""


class Record(BaseModel):
    """A JSON file of the data folder, as an object."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Read a file's content.

        Raises:
            ValueError: if a field is missing, unknown or of another type.
        """
        return cls.model_validate(body)

    def to_json(self) -> dict[str, Any]:
        """Return what a file holds."""
        return self.model_dump(mode="json")


class TokenShard(Record):
    """The record of a shard of tokenized documents.

    Attributes:
        made_from: digest of what the shard depends on; one of another digest is made again.
        content: digest of its rows, whatever file format they lie in.
        rows: documents in it.
        dropped: documents left out of it.
        checksum: SHA-256 of its parquet file.
    """

    made_from: str
    content: str
    rows: int
    dropped: Dropped
    checksum: str


class SegmentShard(TokenShard):
    """The record of a shard of segments; ``rows`` are segments.

    Attributes:
        short: segments of the short window.
        long: segments of the long window.
        truncated: tokens cut off at the end of a segment.
        left_over: tokens of the last segments, which were not filled.
    """

    short: int
    long: int
    truncated: int
    left_over: int


class BandCounts(Record):
    """What one band takes from one source.

    Attributes:
        max_tokens: longest document of the band.
        window: the window that the band feeds.
        source: name of the source.
        documents: how many are taken.
        tokens: of these documents.
        quota: tokens asked for.
        missing: tokens that the source does not have.
    """

    max_tokens: int
    window: Window
    source: str
    documents: int
    tokens: int
    quota: int
    missing: int


class TokenCounts(Record):
    """Where the chosen tokens went: ``chosen`` is the sum of the others."""

    chosen: int
    packed: int
    truncated: int
    left_over: int


class ManifestShard(Record):
    """What the manifest says of a shard of segments; ``name`` is its file's without suffix."""

    name: str
    rows: int
    short: int
    long: int
    checksum: str
    content: str


class Manifest(Record):
    """What the data of a run is.

    Attributes:
        settings: recipe field -> value, of all that the segments depend on.
        settings_fingerprint: of these.
        fingerprint: of the segments; changes with any token of any segment.
        target_length: tokens of a segment.
        original_length: pre-trained window, the most tokens of a document in a short segment.
        rows_per_group: segments in one parquet row group.
        bands: what each band takes from each source.
        dropped: documents that are in no segment.
        documents_read: documents of all sources, dropped ones included.
        tokens: where the chosen tokens went.
        num_segments: segments of each window.
        shards: the shards in order.
    """

    settings: dict[str, JsonValue]
    settings_fingerprint: str
    fingerprint: str
    target_length: int
    original_length: int
    rows_per_group: int
    bands: list[BandCounts]
    dropped: Dropped
    documents_read: int
    tokens: TokenCounts
    num_segments: dict[Window, int]
    shards: list[ManifestShard]


def build_manifest(
    data: DataSection,
    settings: Mapping[str, Any],
    taken: Mapping[tuple[int, int], Taken],
    tokens: Iterable[TokenShard],
    segments: Mapping[str, SegmentShard],
    *,
    target_length: int,
    original_length: int,
    rows_per_group: int,
) -> Manifest:
    """Add up what is known of the shards.

    Args:
        data: sources and bands, which ``taken`` counts.
        settings: recipe field -> value.
        taken: (band, source) -> what was taken.
        tokens: records of the shards of tokens.
        segments: name -> record of each shard of segments, in order.
        target_length: tokens of a segment.
        original_length: pre-trained window in tokens.
        rows_per_group: segments in one parquet row group.
    """
    dropped = _sum_dropped([*tokens, *segments.values()])
    num_dropped = sum(sum(by_source.values()) for by_source in dropped.values())
    short, long, rows, truncated, left_over = (
        sum(getattr(shard, field) for shard in segments.values())
        for field in ("short", "long", "rows", "truncated", "left_over")
    )
    entry_fields = set(ManifestShard.model_fields) - {"name"}
    contents = [shard.content for shard in segments.values()]
    return Manifest(
        settings=dict(settings),
        settings_fingerprint=digest(settings)[:16],
        fingerprint=digest([target_length, *contents])[:16],
        target_length=target_length,
        original_length=original_length,
        rows_per_group=rows_per_group,
        bands=_count_bands(data, windows_of(data.bands, original_length), taken),
        dropped=dropped,
        documents_read=sum(its.documents for its in taken.values()) + num_dropped,
        tokens=TokenCounts(
            chosen=sum(its.tokens for its in taken.values()),
            packed=target_length * rows,
            truncated=truncated,
            left_over=left_over,
        ),
        num_segments={"short": short, "long": long},
        shards=[
            ManifestShard(name=name, **shard.model_dump(include=entry_fields))
            for name, shard in segments.items()
        ],
    )


def _count_bands(
    data: DataSection, windows: Sequence[str], taken: Mapping[tuple[int, int], Taken]
) -> list[BandCounts]:
    """Return what each band took from each source."""
    return [
        BandCounts(
            max_tokens=data.bands[band].max_tokens,
            window=windows[band],
            source=data.sources[source].name,
            documents=its.documents,
            tokens=its.tokens,
            quota=its.quota,
            missing=its.missing,
        )
        for (band, source), its in sorted(taken.items())
    ]


def _sum_dropped(shards: Iterable[TokenShard]) -> Dropped:
    """Add up the dropped documents of shards, without reasons that dropped none."""
    total: dict[str, Counter[str]] = {}
    for shard in shards:
        for reason, by_source in shard.dropped.items():
            total.setdefault(reason, Counter()).update(by_source)
    return {reason: dict(by_source) for reason, by_source in sorted(total.items()) if by_source}


def format_manifest(manifest: Manifest) -> str:
    """Format the manifest as a table for a terminal."""
    lines = [
        f"{'up to':>10} {'window':<6} {'source':<20} {'documents':>10} {'tokens':>14} {'quota':>14}"
    ]
    for row in manifest.bands:
        lines.append(
            f"{row.max_tokens:>10} {row.window:<6} {row.source:<20} {row.documents:>10} "
            f"{row.tokens:>14} {row.quota:>14}"
        )
    for reason, by_source in manifest.dropped.items():
        counts = ", ".join(f"{number} of {source}" for source, number in by_source.items())
        lines.append(f"{reason}: {counts}")
    count, tokens = manifest.num_segments, manifest.tokens
    lines.append(
        f"{count['short']} short and {count['long']} long segments of {manifest.target_length} "
        f"tokens; {tokens.truncated} tokens cut off, {tokens.left_over} left over"
    )
    return "\n".join(lines)
