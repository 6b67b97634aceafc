"""Training data in small, for tests: a manifest of shards that a test has written itself."""

from collections.abc import Sequence

from longrope2_ray.data.manifest import Manifest, ManifestShard, TokenCounts
from longrope2_ray.data.shards import rows_per_group


def manifest_of(
    shards: Sequence[tuple[str, int, int]], fingerprint: str, length: int, original_length: int = 8
) -> Manifest:
    """A manifest of shards given as (name, short segments, long segments)."""
    rows = [
        ManifestShard(name=name, rows=short + long, short=short, long=long, checksum="", content="")
        for name, short, long in shards
    ]
    packed = length * sum(row.rows for row in rows)
    return Manifest(
        settings={},
        settings_fingerprint="",
        fingerprint=fingerprint,
        target_length=length,
        original_length=original_length,
        rows_per_group=rows_per_group(length),
        bands=[],
        dropped={},
        documents_read=0,
        tokens=TokenCounts(chosen=packed, packed=packed, truncated=0, left_over=0),
        num_segments={
            "short": sum(row.short for row in rows),
            "long": sum(row.long for row in rows),
        },
        shards=rows,
    )
