"""From shards of tokens to shards of segments: choose documents over all, pack each."""

import hashlib
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longrope2_ray.data.manifest import SegmentShard
from longrope2_ray.data.packing import Packed, Window, pack
from longrope2_ray.data.plan import DataPlan
from longrope2_ray.data.quotas import Taken, band_of, fill_quotas, quotas_of, windows_of
from longrope2_ray.data.shards import content_digest, segments_to_parquet, shard_name
from longrope2_ray.recipe.training import DataSection

LastKeys = Mapping[tuple[int, int], int | None]
"""(band, source) -> the key of the last document taken, None if none is."""


def choose_documents(plan: DataPlan) -> dict[tuple[int, int], Taken]:
    """Choose what each band takes from each source, from the documents' lengths alone.

    Raises:
        ValueError: if a source has too little for its share of a band.
    """
    columns: list[tuple[np.ndarray, ...]] = []
    for shard in range(plan.data.num_shards):
        table = _read_tokens(plan, shard, ["key", "num_tokens", "source"])
        columns.append((*_labels(table, plan.data), table["num_tokens"].to_numpy()))
    keys, bands, sources, num_tokens = (
        np.concatenate(parts) for parts in zip(*columns, strict=True)
    )
    quotas = quotas_of(plan.data.bands, plan.data.sources)
    taken = fill_quotas(keys, num_tokens, bands, sources, quotas)
    short = [
        f"\n  up to {plan.data.bands[band].max_tokens} tokens, {plan.data.sources[source].name}: "
        f"expected {its.quota} tokens, got {its.tokens}, {its.missing} missing"
        for (band, source), its in taken.items()
        if its.missing
    ]
    if short:
        raise ValueError(
            "data.bands: too few documents; lower tokens and run again (what is tokenized is "
            "kept), or add documents in another --run-dir" + "".join(short)
        )
    return taken


def pack_shard(
    plan: DataPlan, shard: int, made_from: str, last_keys: LastKeys
) -> tuple[bytes, SegmentShard]:
    """Pack the chosen documents of one shard of tokens, short segments first.

    Returns:
        The parquet file and its record.
    """
    data = plan.data
    table = _read_tokens(plan, shard)
    keys, bands, sources = _labels(table, data)
    chosen, dropped = _chosen_rows(data, keys, bands, sources, last_keys)
    windows = np.array([*windows_of(data.bands, plan.original_length), "none"])[bands]
    ids = table["ids"].combine_chunks()
    offsets, values = ids.offsets.to_numpy(), ids.values.to_numpy()

    def packed(window: Window) -> Packed:
        rows = np.flatnonzero(chosen & (windows == window))
        documents = (values[offsets[row] : offsets[row + 1]] for row in rows)
        return pack(documents, window, plan.length, plan.original_length)

    short, long = packed("short"), packed("long")
    segments = [*short.segments, *long.segments]
    content = segments_to_parquet(segments, plan.length)
    record = SegmentShard(
        made_from=made_from,
        content=content_digest(segments),
        rows=len(segments),
        short=len(short.segments),
        long=len(long.segments),
        truncated=short.truncated_tokens + long.truncated_tokens,
        left_over=short.left_over_tokens + long.left_over_tokens,
        dropped=dropped,
        checksum=hashlib.sha256(content).hexdigest(),
    )
    return content, record


def _chosen_rows(
    data: DataSection,
    keys: np.ndarray,
    bands: np.ndarray,
    sources: np.ndarray,
    last_keys: LastKeys,
) -> tuple[np.ndarray, dict[str, Counter[str]]]:
    """Find which rows of a shard are taken.

    Returns:
        (N,) bool, and for the rows that are not: reason -> source -> how many.
    """
    chosen = np.zeros(len(keys), dtype=bool)
    reasons = np.where(
        bands == len(data.bands), "longer than every band", "source not in band"
    ).astype(object)
    for (band, source), last in last_keys.items():
        mine = (bands == band) & (sources == source)
        reasons[mine] = "beyond the quota"
        if last is not None:
            chosen |= mine & (keys <= np.uint64(last))
    dropped: dict[str, Counter[str]] = {}
    for reason, source in zip(reasons[~chosen], sources[~chosen], strict=True):
        dropped.setdefault(reason, Counter())[data.sources[source].name] += 1
    return chosen, dropped


def _read_tokens(plan: DataPlan, shard: int, columns: list[str] | None = None) -> pa.Table:
    """Read some columns of a shard of tokens, all unless given."""
    with (plan.run_dir.path / f"{shard_name('tokens', shard)}.parquet").open("rb") as file:
        return pq.read_table(file, columns=columns)


def _labels(table: pa.Table, data: DataSection) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (N,) key, band and source of the rows, the latter two as indices."""
    sources = pc.index_in(table["source"], pa.array([source.name for source in data.sources]))
    return (
        table["key"].to_numpy(),
        band_of(table["num_tokens"].to_numpy(), data.bands),
        sources.to_numpy(),
    )
