"""Training data on Ray Data: documents -> tokens-*.parquet -> segments-*.parquet and a manifest in ``RUN_DIR/data``.

A document's key and shard are hashes of its text, so the result depends on no order of files, blocks or workers. First
every document is tokenised into its shard, sorted by key; then quotas choose by key over all shards; then each shard is
packed. A shard that is whole is never made again; one that is torn, or of other settings, is.
"""

import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from ray.data.context import ShuffleStrategy
from ray.exceptions import RayError

from longrope2_ray.data.documents import find_files, read_documents
from longrope2_ray.data.packing import Packed, Segment, pack
from longrope2_ray.data.quotas import Taken, band_of, check_bands, quotas_of, select, windows_of
from longrope2_ray.data.shards import (
    MANIFEST,
    content_digest,
    rows_per_group,
    segments_to_parquet,
    shard_name,
)
from longrope2_ray.errors import RunDirError
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.recipe.sections import ModelSection
from longrope2_ray.recipe.training import DataSection
from longrope2_ray.storage.rundir import RunDir

SETTINGS = "data/settings.json"


_CHUNK_CHARACTERS = 1 << 20


_FEW_FILES = (
    64  # up to so many, a shuffle in tasks beats Ray Data's hash shuffle, which takes 15 s to start
)


_TOKENS = pa.schema(
    {"shard": pa.int32(), "key": pa.uint64(), "source": pa.string(), "num_tokens": pa.int32(), "ids": pa.list_(pa.int32())}
)  # fmt: skip


_INTERNAL = "ray.data._internal"


_RAY_LOGS = {  # its progress is told here in a line, a mistake in a document once and without a stack trace
    "ray.data": logging.WARNING,
    "ray.data.exceptions": logging.CRITICAL,
    f"{_INTERNAL}.progress": logging.CRITICAL,
    f"{_INTERNAL}.execution.streaming_executor_state": logging.CRITICAL,
}


Kind = Literal["tokens", "segments"]


_MOST_TOKENS = 2**31 - 1  # of an Arrow list's offsets


@dataclass(frozen=True)
class DataPlan:
    """What the workers need to know.

    Attributes:
        files: source -> URLs of its files.
        settings: what the documents' tokens depend on, ``field`` -> value.
        packing: what the segments depend on beside these.
        patience_seconds: how long a storage that fails is waited for.
    """

    run_url: str
    data: DataSection
    model: ModelSection
    length: int
    original_length: int
    files: dict[str, list[str]]
    settings: dict[str, Any]
    packing: dict[str, Any]
    patience_seconds: float

    @property
    def run_dir(self) -> RunDir:
        return RunDir(self.run_url, folders=["data"], patience_seconds=self.patience_seconds)


def prepare_data(recipe: Recipe, run_url: str) -> DataPlan:
    """Check everything that is cheap, and read one document of each source.

    Raises:
        ValueError: with one clear message, also if the directory holds data of other settings.
    """
    from longrope2_ray.model.loading import load_tokenizer
    from longrope2_ray.model.spec import read_spec  # torch: not for the workers that only pack

    data, model, length = recipe.data, recipe.model, recipe.search.target_length
    if data is None:
        raise ValueError("data: missing; add a [data] section with sources and bands")
    original = read_spec(
        model.path, original_length=model.original_length, **model.reading
    ).original_length
    if length <= original:
        raise ValueError(
            f"search.target_length: expected more than the original length {original}, got {length}"
        )
    check_bands(data, length, original)
    found = {source.name: find_files(source) for source in data.sources}
    settings: dict[str, Any] = {"data.seed": data.seed, "data.num_shards": data.num_shards}
    packing: dict[str, Any] = {"search.target_length": length, "model.original_length": original}
    for source in data.sources:
        next(read_documents(source, found[source.name][0][0]), None)
        names = sorted(
            [url.rsplit("/", 1)[-1] if size else url, size] for url, size in found[source.name]
        )
        settings[f"data.sources.{source.name}.path"] = names
        settings |= {
            f"data.sources.{source.name}.{f}": getattr(source, f)
            for f in ("field", "split", "piece_tokens")
        }
        packing[f"data.sources.{source.name}.weight"] = source.weight
    packing["data.bands"] = [band.model_dump() for band in data.bands]
    settings["tokenizer of model.path"] = _tokenizer_fingerprint(
        load_tokenizer(model.path, **model.files)
    )
    if "://" not in run_url:
        run_url = str(Path(run_url).resolve())  # workers may stand elsewhere
    files = {name: [url for url, _ in pairs] for name, pairs in found.items()}
    patience = recipe.storage.patience_seconds
    plan = DataPlan(run_url, data, model, length, original, files, settings, packing, patience)
    _refuse_others(plan)
    return plan


def _refuse_others(plan: DataPlan) -> None:
    run_dir = RunDir(plan.run_url)  # without patience: nothing could be lost yet
    wanted = plan.settings
    found = run_dir.read_or_skip(SETTINGS) or {}
    manifest = run_dir.read_or_skip(MANIFEST)
    if manifest is not None:
        found, wanted = manifest["settings"], {**plan.settings, **plan.packing}
    for field in sorted({*found, *wanted}) if found else ():
        if found.get(field) != wanted.get(field):
            raise RunDirError(
                f"--run-dir: the data in {plan.run_url} is of other settings: {field} is {found.get(field)!r} there and "
                f"{wanted.get(field)!r} now; set another --run-dir, or put the field back"
            )


def finished(plan: DataPlan) -> dict[str, Any] | None:
    """The manifest, if it and every shard that it names are whole."""
    manifest = plan.run_dir.read_or_skip(MANIFEST)
    if manifest is None:
        return None
    checksums = _each(lambda shard: _file_checksum(plan.run_dir, shard["name"]), manifest["shards"])
    return manifest if checksums == [shard["checksum"] for shard in manifest["shards"]] else None


def build_data(plan: DataPlan) -> dict[str, Any]:
    """Make what is not there yet, inside a Ray session; the manifest.

    Raises:
        ValueError: if a document cannot be read, or there are too few for a quota; what is tokenised stays.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    for name, level in _RAY_LOGS.items():
        logging.getLogger(name).setLevel(level)
    run_dir, shards = plan.run_dir, range(plan.data.num_shards)
    run_dir.create()
    run_dir.write_json(SETTINGS, plan.settings)
    digest = _digest(plan.settings)
    tokens = _make("tokens", plan, [digest for _ in shards], partial(_tokenise_all, plan))
    taken = _select(plan)
    last_keys = {pair: t.last_key for pair, t in taken.items()}
    chosen = [[*pair, key] for pair, key in sorted(last_keys.items())]
    made_from = [_digest([plan.packing, chosen, shard["content"]]) for shard in tokens]
    segments = _make("segments", plan, made_from, partial(_pack_all, plan, last_keys, made_from))
    manifest = _manifest(plan, taken, tokens, segments)
    run_dir.write_json(MANIFEST, manifest)
    return manifest


def format_manifest(manifest: dict[str, Any]) -> str:
    """The table for a terminal."""
    lines = [
        f"{'up to':>10} {'window':<6} {'source':<20} {'documents':>10} {'tokens':>14} {'quota':>14}"
    ]
    lines += [
        f"{r['max_tokens']:>10} {r['window']:<6} {r['source']:<20} {r['documents']:>10} {r['tokens']:>14} {r['quota']:>14}"
        for r in manifest["bands"]
    ]
    for reason, by_source in manifest["dropped"].items():
        lines.append(
            f"{reason}: {', '.join(f'{n} of {source}' for source, n in by_source.items())}"
        )
    count, tokens = manifest["num_segments"], manifest["tokens"]
    lines.append(f"{count['short']} short and {count['long']} long segments of {manifest['target_length']} tokens; "
                 f"{tokens['truncated']} tokens cut off, {tokens['left_over']} left over")  # fmt: skip
    return "\n".join(lines)


@lru_cache(maxsize=1)
def _tokenizer(path: str, gguf_file: str | None, revision: str | None) -> Any:
    """Loaded once a worker process."""
    from longrope2_ray.model.loading import load_tokenizer

    return load_tokenizer(path, gguf_file, revision)


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inner = backend.to_str() if backend is not None else tokenizer.get_vocab()
    return _digest([inner, tokenizer.bos_token_id, tokenizer.eos_token_id])[:16]


def _tokenise_all(plan: DataPlan, todo: Sequence[int]) -> Iterator[int]:
    units = [{"source": source, "url": url} for source, urls in plan.files.items() for url in urls]
    if len(units) <= _FEW_FILES:
        ray.data.DataContext.get_current().shuffle_strategy = (
            ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
        )
    tokens = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        partial(_tokenise, plan=plan, todo=frozenset(todo)), batch_size=1
    )
    written = tokens.groupby("shard", num_partitions=len(todo)).map_groups(
        partial(_write_group, plan=plan), batch_format="pyarrow"
    )
    rest = set(todo)
    for row in written.iter_rows():
        rest.remove(row["shard"])
        yield row["shard"]
    for shard in rest:  # without any document
        _write_tokens(_TOKENS.empty_table(), plan, shard)
        yield shard


def _tokenise(batch: dict[str, Any], plan: DataPlan, todo: frozenset[int]) -> Iterator[pa.Table]:
    """Documents of some files, each with its key, those of the wanted shards only."""
    model = plan.model
    tokenizer = _tokenizer(model.path, model.gguf_file, model.revision)
    bos, eos = ([] if t is None else [t] for t in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    sources = {source.name: source for source in plan.data.sources}
    for name, url in zip(batch["source"], batch["url"], strict=True):
        for texts in _chunks(read_documents(sources[str(name)], str(url))):
            hashes = [_hash(plan.data.seed, name, text) for text in texts]
            chosen = [i for i, number in enumerate(hashes) if number % plan.data.num_shards in todo]
            if not chosen:
                continue
            encoded = tokenizer(
                [texts[i] for i in chosen],
                add_special_tokens=False,
                split_special_tokens=True,
                verbose=False,
            )
            rows: dict[str, list[Any]] = {field: [] for field in _TOKENS.names}
            for i, ids in zip(chosen, encoded["input_ids"], strict=True):
                most = sources[str(name)].piece_tokens
                step = most - len(bos) - len(eos) if most else max(len(ids), 1)
                for piece, begin in enumerate(range(0, max(len(ids), 1), step)):
                    document = (
                        [*bos, *ids[begin : begin + step], *eos] if ids and texts[i].strip() else []
                    )
                    values = (
                        hashes[i] % plan.data.num_shards,
                        _hash(hashes[i], piece),
                        name,
                        len(document),
                        document,
                    )
                    for column, value in zip(rows.values(), values, strict=True):
                        column.append(value)
            yield pa.table(rows, schema=_TOKENS)
    yield _TOKENS.empty_table()


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text) + 100
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    yield chunk


def _hash(*parts: Any) -> int:
    return int.from_bytes(
        hashlib.blake2b(json.dumps([str(p) for p in parts]).encode(), digest_size=8).digest(), "big"
    )


def _write_group(group: pa.Table, plan: DataPlan) -> pa.Table:
    shard = group["shard"][0].as_py()
    _write_tokens(group, plan, shard)
    return pa.table({"shard": [shard]})


def _write_tokens(group: pa.Table, plan: DataPlan, shard: int) -> None:
    """Write one whole shard of tokens, without empty and duplicate documents.

    Raises:
        ValueError: if it is larger than an Arrow list can be.
    """
    num_tokens = pc.sum(group["num_tokens"]).as_py() or 0
    if num_tokens > _MOST_TOKENS:
        raise ValueError(
            f"data.num_shards: expected at most {_MOST_TOKENS} tokens in a shard, got {num_tokens} in shard {shard}; raise it, "
            f"or name fewer files in data.sources.path: every document is tokenised before the quotas choose"
        )
    full = group.filter(pc.greater(group["num_tokens"], 0)).drop_columns(["shard"]).sort_by("key")
    keys = full["key"].to_numpy()
    table = full.filter(pa.array(np.append(True, keys[1:] != keys[:-1])[: len(keys)]))
    count = Counter(full["source"].to_pylist())
    dropped = {
        "empty": Counter(group["source"].to_pylist()) - count,
        "duplicate": count - Counter(table["source"].to_pylist()),
    }
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    arrays = (
        table["key"].to_numpy(),
        table["num_tokens"].to_numpy(),
        table["ids"].combine_chunks().flatten().to_numpy(),
    )
    content = _digest(
        [table["source"].to_pylist(), *(hashlib.sha256(a.tobytes()).hexdigest() for a in arrays)]
    )
    body = {
        "made_from": _digest(plan.settings),
        "content": content,
        "rows": len(table),
        "dropped": dropped,
    }
    _write(plan, "tokens", shard, bytes(sink.getvalue()), body)


def _select(plan: DataPlan) -> dict[tuple[int, int], Taken]:
    """What each band takes from each source, from the documents' lengths alone.

    Raises:
        ValueError: if a source has too little for its share of a band.
    """
    columns: list[tuple[np.ndarray, ...]] = []
    for i in range(plan.data.num_shards):
        with (plan.run_dir.path / f"{shard_name('tokens', i)}.parquet").open("rb") as file:
            table = pq.read_table(file, columns=["key", "num_tokens", "source"])
        columns.append((*_labels(table, plan.data), table["num_tokens"].to_numpy()))
    keys, bands, sources, num_tokens = (
        np.concatenate(parts) for parts in zip(*columns, strict=True)
    )
    quotas = quotas_of(plan.data.bands, plan.data.sources)
    taken = select(keys, num_tokens, bands, sources, quotas)
    short = [
        f"\n  up to {plan.data.bands[b].max_tokens} tokens, {plan.data.sources[s].name}: expected {t.quota} tokens, got {t.tokens}, "
        f"{t.missing} missing"
        for (b, s), t in taken.items()
        if t.missing
    ]
    if short:
        raise ValueError("data.bands: too few documents; lower tokens and run again (what is tokenised is kept), "
                         "or add documents in another --run-dir" + "".join(short))  # fmt: skip
    return taken


def _pack_all(
    plan: DataPlan,
    last_keys: dict[tuple[int, int], int | None],
    made_from: Sequence[str],
    todo: Sequence[int],
) -> Iterator[int]:
    jobs = [{"shard": shard, "made_from": made_from[shard]} for shard in todo]
    dataset = ray.data.from_items(jobs, override_num_blocks=len(jobs))
    packed = dataset.map_batches(partial(_pack_batch, plan=plan, last_keys=last_keys), batch_size=1)
    yield from (row["shard"] for row in packed.iter_rows())


def _pack_batch(
    batch: Any, plan: DataPlan, last_keys: dict[tuple[int, int], int | None]
) -> Iterator[Any]:
    """A generator, since Ray Data gives back the error of one, and of a plain function only that there was one."""
    for shard, made_from in zip(batch["shard"].tolist(), batch["made_from"].tolist(), strict=True):
        _pack_shard(shard, made_from, plan, last_keys)
        yield {"shard": [shard]}


def _pack_shard(
    shard: int, made_from: str, plan: DataPlan, last_keys: dict[tuple[int, int], int | None]
) -> None:
    """Pack the chosen documents of one shard of tokens, short segments first."""
    data = plan.data
    with (plan.run_dir.path / f"{shard_name('tokens', shard)}.parquet").open("rb") as file:
        table = pq.read_table(file)
    keys, bands, sources = _labels(table, data)
    ids = table["ids"].combine_chunks()
    offsets, values = ids.offsets.to_numpy(), ids.values.to_numpy()
    windows = np.array([*windows_of(data.bands, plan.original_length), "none"])[bands]
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

    def packed(window: Any) -> Packed:
        documents = (
            values[offsets[i] : offsets[i + 1]]
            for i in np.flatnonzero(chosen & (windows == window))
        )
        return pack(documents, window, plan.length, plan.original_length)

    short, long = packed("short"), packed("long")
    segments: list[Segment] = [*short.segments, *long.segments]
    body = {
        "made_from": made_from,
        "content": content_digest(segments),
        "rows": len(segments),
        "short": len(short.segments),
        "long": len(long.segments),
        "truncated": short.truncated_tokens + long.truncated_tokens,
        "left_over": short.left_over_tokens + long.left_over_tokens,
        "dropped": dropped,
    }
    _write(plan, "segments", shard, segments_to_parquet(segments, plan.length), body)


def _labels(table: pa.Table, data: DataSection) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Key, band and source of every row."""
    sources = pc.index_in(table["source"], pa.array([source.name for source in data.sources]))
    return (
        table["key"].to_numpy(),
        band_of(table["num_tokens"].to_numpy(), data.bands),
        sources.to_numpy(),
    )


def _manifest(
    plan: DataPlan,
    taken: dict[tuple[int, int], Taken],
    tokens: list[dict[str, Any]],
    segments: list[dict[str, Any]],
) -> dict[str, Any]:
    """Everything in it follows from the documents and the settings: no times, no paths."""
    windows = windows_of(plan.data.bands, plan.original_length)
    dropped: dict[str, Counter[str]] = {}
    for shard in (*tokens, *segments):
        for reason, by_source in shard["dropped"].items():
            dropped.setdefault(reason, Counter()).update(by_source)
    bands = [
        {"max_tokens": plan.data.bands[b].max_tokens, "window": windows[b], "source": plan.data.sources[s].name,
         "documents": t.documents, "tokens": t.tokens, "quota": t.quota, "missing": t.missing}
        for (b, s), t in sorted(taken.items())
    ]  # fmt: skip
    names = ("rows", "short", "long", "checksum", "content")
    settings = {**plan.settings, **plan.packing}
    return {
        "settings": settings,
        "settings_fingerprint": _digest(settings)[:16],
        "fingerprint": _digest([plan.length, *(shard["content"] for shard in segments)])[:16],
        "target_length": plan.length,
        "original_length": plan.original_length,
        "rows_per_group": rows_per_group(plan.length),
        "bands": bands,
        "dropped": {
            reason: by_source for reason, by_source in sorted(dropped.items()) if by_source
        },
        "documents_read": sum(t.documents for t in taken.values())
        + sum(c.total() for c in dropped.values()),
        "tokens": {
            "chosen": sum(t.tokens for t in taken.values()),
            "packed": plan.length * sum(shard["rows"] for shard in segments),
            "truncated": sum(shard["truncated"] for shard in segments),
            "left_over": sum(shard["left_over"] for shard in segments),
        },
        "num_segments": {
            window: sum(shard[window] for shard in segments) for window in ("short", "long")
        },
        "shards": [
            {"name": shard_name("segments", i), **{name: shard[name] for name in names}}
            for i, shard in enumerate(segments)
        ],
    }


def _make(
    kind: Kind, plan: DataPlan, made_from: Sequence[str], run: Callable[[list[int]], Iterator[int]]
) -> list[Any]:
    """What is known of every shard of a kind, after ``run`` has made those that are not whole."""

    def whole(shard: int) -> dict[str, Any] | None:
        body = plan.run_dir.read_or_skip(f"{shard_name(kind, shard)}.json")
        if body is None or body["made_from"] != made_from[shard]:
            return None
        return (
            body
            if _file_checksum(plan.run_dir, shard_name(kind, shard)) == body["checksum"]
            else None
        )

    shards = range(plan.data.num_shards)
    found = _each(whole, shards)
    todo = [shard for shard in shards if found[shard] is None]
    if todo:
        print(f"{kind}: making {len(todo)} of {len(shards)} shards", file=sys.stderr, flush=True)
        try:
            for done, _ in enumerate(run(todo), 1):
                print(
                    f"\r{kind}: {done} of {len(todo)} shards", end="", file=sys.stderr, flush=True
                )
        except RayError as error:
            raise _users_mistake(error) or error from None
        finally:
            print(file=sys.stderr)
    return [
        found[shard] or plan.run_dir.read_or_skip(f"{shard_name(kind, shard)}.json")
        for shard in shards
    ]


def _users_mistake(error: BaseException) -> ValueError | None:
    """The ValueError that a worker raised, without what Ray wraps around and writes below it."""
    inner: BaseException | None = error
    while isinstance(inner, RayError):
        inner = getattr(inner, "cause", None) or inner.__cause__
    return (
        ValueError(str(inner).split("\nFailed to apply UDF")[0])
        if isinstance(inner, ValueError)
        else None
    )


def _write(plan: DataPlan, kind: Kind, shard: int, content: bytes, body: dict[str, Any]) -> None:
    """The shard first, then what is known of it: a shard without that is not whole."""
    plan.run_dir.write_bytes(f"{shard_name(kind, shard)}.parquet", content)
    checksum = hashlib.sha256(content).hexdigest()
    plan.run_dir.write_json(f"{shard_name(kind, shard)}.json", {**body, "checksum": checksum})


def _file_checksum(run_dir: RunDir, name: str) -> str | None:
    try:
        with (run_dir.path / f"{name}.parquet").open("rb") as file:
            opened: Any = file
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return None


def _each(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(function, items))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
