"""Packing without Ray: no token is lost unseen, segments are exact, quotas are met in key order."""

import errno
import itertools
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_data import manifest_of

from longrope2_ray.data.manifest import MANIFEST
from longrope2_ray.data.packing import Segment, pack
from longrope2_ray.data.quotas import band_of, fill_quotas, quotas_of, windows_of
from longrope2_ray.data.shards import (
    SegmentReader,
    content_digest,
    rows_per_group,
    segments_to_parquet,
)
from longrope2_ray.errors import RunDirError
from longrope2_ray.recipe.training import BandSection, SourceSection
from longrope2_ray.storage.rundir import RunDir

LENGTH, ORIGINAL = 32, 8


def documents_of(lengths: list[int]) -> list[np.ndarray]:
    """Every token is another number, so that none can hide."""
    ends = np.cumsum([0, *lengths])
    return [np.arange(low, high, dtype=np.int32) for low, high in itertools.pairwise(ends)]


def assert_valid(segment: Segment, window: str) -> None:
    assert segment.window == window
    assert (segment.input_ids.shape, segment.input_ids.dtype) == ((LENGTH,), np.int64)
    assert segment.cu_seqlens.dtype == np.int32
    assert (segment.cu_seqlens[0], segment.cu_seqlens[-1]) == (0, LENGTH)
    assert (np.diff(segment.cu_seqlens) > 0).all()


@given(st.lists(st.integers(1, ORIGINAL), max_size=60))
def test_short_segments_hold_documents_from_their_start(lengths):
    documents = documents_of(lengths)
    packed = pack(documents, "short", LENGTH, ORIGINAL)
    assert len(packed.segments) * LENGTH + packed.truncated_tokens + packed.left_over_tokens == sum(
        lengths
    )
    assert packed.left_over_tokens < LENGTH
    starts = {int(document[0]) for document in documents}
    for segment in packed.segments:
        assert_valid(segment, "short")
        begins = segment.cu_seqlens[:-1]
        assert set(segment.input_ids[begins].tolist()) <= starts
        inside = np.setdiff1d(np.arange(1, LENGTH), begins)
        assert (segment.input_ids[inside] == segment.input_ids[inside - 1] + 1).all()


@given(st.lists(st.integers(ORIGINAL + 1, 4 * LENGTH), max_size=20))
def test_long_segments_go_on_with_a_rest_that_is_long(lengths):
    documents = documents_of(lengths)
    packed = pack(documents, "long", LENGTH, ORIGINAL)
    assert len(packed.segments) * LENGTH + packed.truncated_tokens + packed.left_over_tokens == sum(
        lengths
    )
    assert packed.truncated_tokens <= ORIGINAL * len(lengths)
    tokens = np.concatenate(
        [np.empty(0, np.int64), *(segment.input_ids for segment in packed.segments)]
    )
    assert (np.diff(tokens) > 0).all()  # in order, none twice
    for segment in packed.segments:
        assert_valid(segment, "long")


def test_a_cut_document_by_hand():
    long = pack(documents_of([20, 30, 30]), "long", LENGTH, ORIGINAL)
    assert [s.cu_seqlens.tolist() for s in long.segments] == [[0, 20, 32], [0, 18, 32]]
    assert [int(s.input_ids[0]) for s in long.segments] == [0, 32]
    assert (long.truncated_tokens, long.left_over_tokens) == (0, 16)
    cut = pack(documents_of([20, 20, 40]), "long", LENGTH, ORIGINAL)
    assert [s.cu_seqlens.tolist() for s in cut.segments] == [[0, 20, 32], [0, 32]]
    assert (cut.truncated_tokens, cut.left_over_tokens) == (16, 0)
    short = pack(documents_of([7, 7, 7, 7, 7, 5]), "short", LENGTH, ORIGINAL)
    assert short.segments[0].cu_seqlens.tolist() == [0, 7, 14, 21, 28, 32]
    assert (short.truncated_tokens, short.left_over_tokens) == (3, 5)


@pytest.mark.parametrize(("window", "length"), [("short", 9), ("long", 8)])
def test_a_document_of_the_other_window_is_refused(window, length):
    with pytest.raises(ValueError, match=f"{window} window, got one of {length} tokens"):
        pack(documents_of([length]), window, LENGTH, ORIGINAL)


def test_windows_follow_from_the_original_length():
    bands = [BandSection(max_tokens=n, tokens=1) for n in (4, 8, 32)]
    assert windows_of(bands, 8) == ["short", "short", "long"]
    assert band_of(np.array([1, 4, 5, 8, 9, 32, 33]), bands).tolist() == [0, 0, 1, 1, 2, 2, 3]
    with pytest.raises(ValueError, match=r"data\.bands: .*original length 6, got one from 5 to 8"):
        windows_of(bands, 6)


def test_weights_share_a_band_among_its_sources():
    sources = [
        SourceSection(name=n, path=["x"], weight=w) for n, w in (("a", 1), ("b", 3), ("c", 9))
    ]
    bands = [
        BandSection(max_tokens=8, tokens=100, sources=["a", "b"]),
        BandSection(max_tokens=32, tokens=130),
    ]
    assert quotas_of(bands, sources) == {(0, 0): 25, (0, 1): 75, (1, 0): 10, (1, 1): 30, (1, 2): 90}


@given(st.data())
def test_quotas_take_the_least_keys_whatever_the_order(data):
    count = data.draw(st.integers(0, 40))
    keys = np.array(data.draw(st.permutations(range(count))), dtype=np.uint64) + np.uint64(2**63)
    tokens = np.array(
        data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count)), dtype=np.int32
    )
    sources = np.array(
        data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)), dtype=np.int32
    )
    quotas = {(0, 0): data.draw(st.integers(0, 60)), (0, 1): 7, (1, 0): 5}
    taken = fill_quotas(keys, tokens, np.zeros(count, dtype=int), sources, quotas)
    order = np.random.default_rng(0).permutation(count)
    assert (
        fill_quotas(keys[order], tokens[order], np.zeros(count, dtype=int), sources[order], quotas)
        == taken
    )
    for (band, source), its in taken.items():
        mine = (sources == source) & (band == 0)
        chosen = (
            mine & (keys <= np.uint64(its.last_key))
            if its.last_key is not None
            else np.zeros(count, dtype=bool)
        )
        assert (chosen.sum(), tokens[chosen].sum()) == (its.documents, its.tokens)
        if its.missing:
            assert its.tokens == tokens[mine].sum() == its.quota - its.missing
        elif its.documents:
            assert its.tokens - tokens[keys == its.last_key].item() < its.quota <= its.tokens


def test_the_reader_gives_back_what_was_written(tmp_path, monkeypatch):
    run, length = RunDir(str(tmp_path)), 16384
    rng = np.random.default_rng(0)
    shards = [
        [
            Segment(rng.integers(0, 9, length), np.array([0, n, length], np.int32), w)
            for n, w in enumerate(windows, 1)
        ]
        for windows in (["short", "short", "long", "long", "long"], [], ["long"])
    ]
    (tmp_path / "data").mkdir()
    facts = []
    for index, shard in enumerate(shards):
        run.write_bytes(f"data/s{index}.parquet", segments_to_parquet(shard, length))
        short = sum(s.window == "short" for s in shard)
        facts.append((f"data/s{index}", short, len(shard) - short))
    with pytest.raises(ValueError, match="run longrope2 data first"):
        SegmentReader(run)
    manifest = manifest_of(facts, "f", length)
    run.write_json(MANIFEST, manifest.to_json())
    reader = SegmentReader(str(tmp_path))
    written = [segment for shard in shards for segment in shard]
    assert rows_per_group(length) == 4
    assert (len(reader), reader.fingerprint, reader.manifest) == (6, "f", manifest)
    assert reader.windows == [segment.window for segment in written]
    for index in (5, 0, 4, 2):
        assert content_digest([reader[index]]) == content_digest([written[index]])
    assert (reader[0].input_ids.dtype, reader[0].cu_seqlens.dtype) == (np.int64, np.int32)
    with pytest.raises(IndexError):
        reader[6]
    away = iter([TimeoutError("no answer"), OSError(errno.EIO, "Input/output error")])
    whole = pq.ParquetFile

    def hesitating(*arguments: Any, **options: Any) -> pq.ParquetFile:
        for error in away:
            raise error
        return whole(*arguments, **options)

    monkeypatch.setattr(pq, "ParquetFile", hesitating)
    with pytest.raises(RunDirError, match="no answer"):
        reader[0]
    patient = SegmentReader(RunDir(str(tmp_path), patience_seconds=5.0))
    assert content_digest([patient[0]]) == content_digest([written[0]])
    assert next(away, None) is None
    torn = bytearray((tmp_path / "data" / "s0.parquet").read_bytes())
    torn[len(torn) // 3] ^= 1
    (tmp_path / "data" / "s0.parquet").write_bytes(torn)
    with pytest.raises(ValueError, match="run longrope2 data again"):
        [SegmentReader(run)[index] for index in range(5)]
