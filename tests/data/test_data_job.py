"""The data pipeline on a real Ray, with tiny texts.

The segments are the same from any files, and after the loss of any of them.
"""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longrope2_ray.cli import main
from longrope2_ray.data.job import Progress, build_data, finished
from longrope2_ray.data.manifest import Manifest
from longrope2_ray.data.plan import prepare_data
from longrope2_ray.data.shards import SegmentReader
from longrope2_ray.data.tokenizing import TOKENS, token_shard
from longrope2_ray.errors import RunDirError
from longrope2_ray.recipe.recipe import Recipe

WORDS = [
    "and",
    "the",
    "of",
    "light",
    "river",
    "stone",
    "seven",
    "mountain",
    "people",
    "went",
    "unto",
    "before",
    "great",
    "among",
]


def texts_of(count: int, num_words: tuple[int, int], seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(*num_words))) for _ in range(count)]


SHORT, LONG = texts_of(60, (5, 40), 0), texts_of(8, (200, 600), 1)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Short documents as JSON lines with an empty and a doubled one, long ones as parquet."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [{"text": text, "n": 1} for text in [*SHORT, "", SHORT[7]]]
    (folder / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.table({"body": LONG}), folder / "long.parquet")
    return folder


def recipe_of(folder: Path, short_tokens: int = 1200, long_tokens: int = 1500, **changes) -> Recipe:
    sources = [
        {"name": "short", "path": [str(folder / "short*.jsonl*")]},
        {"name": "long", "path": [str(folder / "long*.parquet")], "field": "body"},
    ]
    bands = [
        {"max_tokens": 128, "tokens": short_tokens, "sources": ["short"]},
        {"max_tokens": 4096, "tokens": long_tokens, "sources": ["long"]},
    ]
    section = {"sources": sources, "bands": bands, "num_shards": 2, **changes}
    model = {"path": "bundled:reference", "original_length": 128}
    return Recipe(name="tiny", model=model, search={"target_length": 256}, data=section)


def made(recipe: Recipe, run_dir: Path, progress: Progress | None = None) -> Manifest:
    plan = prepare_data(recipe, str(run_dir))
    return finished(plan) or build_data(plan, progress)


def hashes(run_dir: Path) -> dict[str, int]:
    return {
        file.name: hash(file.read_bytes()) for file in sorted((run_dir / "data").glob("segments*"))
    }


def test_counts_add_up_and_other_files_or_a_resume_give_the_same_segments(
    ray_on_this_machine, corpus, tmp_path
):
    run = tmp_path / "run"
    told: list[tuple[str, int, int]] = []
    manifest = made(recipe_of(corpus), run, lambda *arguments: told.append(arguments))
    assert told == [(kind, done, 2) for kind in ("tokens", "segments") for done in range(3)]
    assert manifest.documents_read == 60 + 2 + 8
    chosen = sum(row.documents for row in manifest.bands)
    assert chosen + sum(n for counts in manifest.dropped.values() for n in counts.values()) == 70
    assert manifest.dropped["empty"] == manifest.dropped["duplicate"] == {"short": 1}
    assert all(row.tokens >= row.quota and row.missing == 0 for row in manifest.bands)
    assert [row.window for row in manifest.bands] == ["short", "long"]
    tokens = manifest.tokens
    assert tokens.chosen == tokens.packed + tokens.truncated + tokens.left_over
    assert tokens.chosen == sum(row.tokens for row in manifest.bands)

    reader = SegmentReader(str(run))
    assert reader.manifest == manifest
    assert {w: reader.windows.count(w) for w in ("short", "long")} == manifest.num_segments
    assert min(manifest.num_segments.values()) > 0
    for index in range(len(reader)):
        segment = reader[index]
        assert (len(segment.input_ids), segment.cu_seqlens[-1]) == (256, 256)
        if segment.window == "short":
            assert (segment.input_ids[segment.cu_seqlens[:-1]] == 0).all()  # BOS
            assert (segment.input_ids[segment.cu_seqlens[1:-1] - 1] == 1).all()  # EOS
            assert np.diff(segment.cu_seqlens).max() <= 128

    # the same documents in other files, another order, another compression
    rows = [json.dumps({"text": text}) for text in [*SHORT[::-1], SHORT[3], " "]]
    (corpus / "short.jsonl").unlink()
    for part in range(3):
        with gzip.open(corpus / f"short{part}.jsonl.gz", "wt") as file:
            file.write("\n\n".join(rows[part::3]))
    other = made(recipe_of(corpus), tmp_path / "other")
    assert other.fingerprint == manifest.fingerprint
    parquet = [name for name in hashes(run) if name.endswith(".parquet")]
    assert [hashes(run)[name] for name in parquet] == [
        hashes(tmp_path / "other")[name] for name in parquet
    ]

    # a run that lost some files, and has some torn, ends in the same bytes
    run, before = tmp_path / "other", hashes(tmp_path / "other")
    manifest_bytes = (run / "data" / "manifest.json").read_bytes()
    kept = (run / "data" / "tokens-00001.parquet").stat().st_mtime_ns
    for name in ("tokens-00000.json", "segments-00000.parquet", "manifest.json"):
        (run / "data" / name).unlink()
    torn = (run / "data" / "segments-00001.parquet").read_bytes()
    (run / "data" / "segments-00001.parquet").write_bytes(torn[:-9])
    assert made(recipe_of(corpus), run) == other
    assert hashes(run) == before
    assert (run / "data" / "manifest.json").read_bytes() == manifest_bytes
    assert (run / "data" / "tokens-00001.parquet").stat().st_mtime_ns == kept

    # other settings are refused once it is whole
    with pytest.raises(RunDirError, match=r"belongs to another run: data\.bands is"):
        prepare_data(recipe_of(corpus, short_tokens=1000), str(run))
    with pytest.raises(RunDirError, match=r"another run: data\.seed is 0 there and 5 now; set"):
        prepare_data(recipe_of(corpus, seed=5), str(run))


def test_too_few_documents_are_told_and_a_lower_quota_goes_on(
    ray_on_this_machine, corpus, tmp_path
):
    with pytest.raises(ValueError, match=r"data\.bands: too few documents") as caught:
        made(recipe_of(corpus, short_tokens=90000), tmp_path / "run")
    told = str(caught.value).splitlines()[1:]
    assert len(told) == 1
    assert "up to 128 tokens, short: expected 90000 tokens, got " in told[0]
    tokens = tmp_path / "run" / "data" / "tokens-00000.parquet"
    before = tokens.stat().st_mtime_ns
    assert made(recipe_of(corpus), tmp_path / "run").num_segments["long"] > 0
    assert tokens.stat().st_mtime_ns == before


def test_text_in_pieces_and_a_mistake_in_a_later_file(
    ray_on_this_machine, corpus, tmp_path, capsys
):
    (corpus / "long.txt").write_text("\n".join(LONG) + "\n\n" + LONG[0])
    text = {
        "name": "text",
        "path": [str(corpus / "long.txt")],
        "split": "line",
        "piece_tokens": 100,
    }
    bands = [{"max_tokens": 128, "tokens": 600}]
    manifest = made(recipe_of(corpus, sources=[text], bands=bands, num_shards=1), tmp_path / "run")
    assert manifest.num_segments["long"] == 0
    assert manifest.dropped["duplicate"]["text"] >= 3  # pieces of the doubled line
    reader = SegmentReader(str(tmp_path / "run"))
    assert max(np.diff(reader[i].cu_seqlens).max() for i in range(len(reader))) == 100

    (corpus / "short9.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(
        ValueError, match=r"data\.sources\.short: cannot read .*'text' in row 2, got txt"
    ) as caught:
        made(recipe_of(corpus), tmp_path / "bad")
    assert "\n" not in str(caught.value)

    # whatever a worker cannot write is told as well
    (corpus / "short9.jsonl").unlink()
    for name in ("tokens", "segments"):
        blocked = tmp_path / "blocked" / "data" / f"{name}-00001.parquet"
        blocked.mkdir(parents=True)
        with pytest.raises(
            ValueError, match=rf"--run-dir: cannot write .*{name}-00001\.parquet.* Is a directory"
        ):
            made(recipe_of(corpus), tmp_path / "blocked")
        blocked.rmdir()


def test_mistakes_are_told_before_ray_starts(corpus, tmp_path, capsys):
    def mistake(**changes) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at
            prepare_data(recipe_of(corpus, **changes), str(tmp_path / "run"))
        return str(caught.value)

    assert "got one from 1 to 200 tokens" in mistake(bands=[{"max_tokens": 200, "tokens": 1000}])
    assert "data.num_shards: expected at most 4" in mistake(num_shards=50)
    absent = [{"name": "a", "path": [str(tmp_path / "none.jsonl")]}]
    assert mistake(sources=absent, bands=[{"max_tokens": 128, "tokens": 600}]).startswith(
        "data.sources.a.path: expected"
    )
    hub = [{"name": "a", "path": ["hf://some/where"]}]
    assert "pip install datasets" in mistake(
        sources=hub, bands=[{"max_tokens": 128, "tokens": 600}]
    )
    other = [{"name": "a", "path": ["generated:poems"]}]
    assert mistake(sources=other, bands=[{"max_tokens": 128, "tokens": 600}]) == (
        "data.sources.a.path: expected generated:retrieval, got 'generated:poems'"
    )
    absent = [{"name": "a", "path": ["bundled:poems"]}]
    assert mistake(sources=absent, bands=[{"max_tokens": 128, "tokens": 600}]).startswith(
        "data.sources.a.path: expected a text file"
    )
    field = [{"name": "a", "path": [str(corpus / "long.parquet")]}]
    assert "expected 'text' in row 0, got body" in mistake(
        sources=field, bands=[{"max_tokens": 128, "tokens": 600}]
    )
    assert main(["data", "smollm2_135m", "--run-dir", str(tmp_path / "run")]) == 2
    assert (
        capsys.readouterr().err
        == "error: data: missing; add a [data] section with sources and bands\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_shard_that_arrow_cannot_hold_is_refused_by_name():
    rows = {
        "shard": [0, 0],
        "key": [1, 2],
        "source": ["a", "a"],
        "num_tokens": [2**30, 2**30],
        "ids": [[1], [2]],
    }
    table = pa.table(rows, schema=TOKENS)
    wanted = r"data\.num_shards: expected at most 2147483647 tokens .* got 2147483648 in shard 3"
    with pytest.raises(ValueError, match=wanted):
        token_shard(table, 3, "anything")
