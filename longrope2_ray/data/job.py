"""Training data on Ray Data: documents -> tokens-*.parquet -> segments-*.parquet and a manifest.

All of it lies in ``RUN_DIR/data``. First every document is tokenized into its shard, sorted by key;
then quotas choose by key over all shards; then each shard is packed. A shard that is whole is never
made again; one that is torn, or of other settings, is.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa
import ray.data
from ray.data.context import ShuffleStrategy
from ray.exceptions import RayError

from longrope2_ray.data.documents import read_documents
from longrope2_ray.data.manifest import (
    MANIFEST,
    Manifest,
    SegmentShard,
    TokenShard,
    build_manifest,
)
from longrope2_ray.data.plan import SETTINGS, DataPlan
from longrope2_ray.data.segments import LastKeys, choose_documents, pack_shard
from longrope2_ray.data.shards import (
    AnyShard,
    Kind,
    file_checksum,
    read_record,
    rows_per_group,
    shard_name,
    write_shard,
)
from longrope2_ray.data.tokenizing import (
    TOKENS,
    token_shard,
    tokenize,
    worker_tokenizer,
)
from longrope2_ray.storage.digests import digest

Progress = Callable[[str, int, int], None]
"""Is told the kind of shards being made, how many are made, and how many there are to make."""

Item = TypeVar("Item")
Result = TypeVar("Result")

# Up to so many files, a shuffle in tasks beats Ray Data's hash shuffle, which takes 15 s to start.
_FEW_FILES = 64

# Progress is told by a callback, and a mistake in a document by the error that ends the command.
_INTERNAL = "ray.data._internal"
_RAY_LOG_LEVELS = {
    "ray.data": logging.WARNING,
    "ray.data.exceptions": logging.CRITICAL,
    f"{_INTERNAL}.progress": logging.CRITICAL,
    f"{_INTERNAL}.execution.streaming_executor_state": logging.CRITICAL,
}


def finished(plan: DataPlan) -> Manifest | None:
    """Return the manifest, if it and every shard that it names are whole."""
    run_dir = plan.run_dir
    body = run_dir.read_or_skip(MANIFEST)
    if body is None:
        return None
    manifest = Manifest.from_json(body)
    checksums = _in_threads(lambda shard: file_checksum(run_dir, shard.name), manifest.shards)
    return manifest if checksums == [shard.checksum for shard in manifest.shards] else None


def build_data(plan: DataPlan, progress: Progress | None = None) -> Manifest:
    """Make what is not there yet, inside a Ray session.

    Args:
        plan: from ``prepare_data``.
        progress: is called before and after each shard that is made.

    Raises:
        ValueError: if a document cannot be read, or there are too few for a quota; what is
            tokenized stays.
    """
    _quiet_ray_data()
    run_dir, shards = plan.run_dir, range(plan.data.num_shards)
    run_dir.create()
    run_dir.write_json(SETTINGS, plan.settings)
    make = partial(_make, plan, progress or _no_progress)
    settings_digest = digest(plan.settings)
    tokens = make("tokens", TokenShard, [settings_digest] * len(shards), _tokenize_shards)
    taken = choose_documents(plan)
    last_keys = {pair: its.last_key for pair, its in taken.items()}
    chosen = [[*pair, key] for pair, key in sorted(last_keys.items())]
    made_from = [digest([plan.packing, chosen, shard.content]) for shard in tokens]
    pack_shards = partial(_pack_shards, last_keys=last_keys)
    segments = make("segments", SegmentShard, made_from, pack_shards)
    names = [shard_name("segments", shard) for shard in shards]
    manifest = build_manifest(
        plan.data,
        {**plan.settings, **plan.packing},
        taken,
        tokens,
        dict(zip(names, segments, strict=True)),
        target_length=plan.length,
        original_length=plan.original_length,
        rows_per_group=rows_per_group(plan.length),
    )
    run_dir.write_json(MANIFEST, manifest.to_json())
    return manifest


def _quiet_ray_data() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name, level in _RAY_LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)


def _no_progress(kind: str, done: int, total: int) -> None:
    pass


def _make(
    plan: DataPlan,
    progress: Progress,
    kind: Kind,
    record: type[AnyShard],
    made_from: Sequence[str],
    make_shards: Callable[[DataPlan, dict[int, str]], Iterator[int]],
) -> list[AnyShard]:
    """Make the shards of a kind that are not whole.

    Args:
        made_from: what each shard depends on, as a digest.
        make_shards: makes the shards of a dictionary, shard -> ``made_from``; yields each one made.

    Returns:
        The records of all shards.
    """
    run_dir = plan.run_dir
    names = [shard_name(kind, shard) for shard in range(plan.data.num_shards)]

    def whole(shard: int) -> AnyShard | None:
        found = read_record(run_dir, names[shard], record)
        if found is None or found.made_from != made_from[shard]:
            return None
        return found if file_checksum(run_dir, names[shard]) == found.checksum else None

    found = _in_threads(whole, range(len(names)))
    missing = {shard: made_from[shard] for shard, its in enumerate(found) if its is None}
    if missing:
        progress(kind, 0, len(missing))
        try:
            for done, shard in enumerate(make_shards(plan, missing), 1):
                found[shard] = read_record(run_dir, names[shard], record)
                progress(kind, done, len(missing))
        except RayError as error:
            raise _value_error_within(error) or error from None
    return [its for its in found if its is not None]


def _value_error_within(error: BaseException) -> ValueError | None:
    """Return the ValueError that a worker raised, without what Ray wraps around its message."""
    inner: BaseException | None = error
    while isinstance(inner, RayError):
        inner = getattr(inner, "cause", None) or inner.__cause__
    if not isinstance(inner, ValueError):
        return None
    return ValueError(str(inner).split("\nFailed to apply UDF")[0])


def _in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(function, items))


def _tokenize_shards(plan: DataPlan, made_from: dict[int, str]) -> Iterator[int]:
    """Tokenize the documents of some shards; yields each shard once it is written."""
    files = [{"source": source, "url": url} for source, urls in plan.files.items() for url in urls]
    if len(files) <= _FEW_FILES:
        context = ray.data.DataContext.get_current()
        context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    tokens = ray.data.from_items(files, override_num_blocks=len(files)).map_batches(
        partial(_tokenize_batch, plan=plan, wanted=frozenset(made_from)), batch_size=1
    )
    written = tokens.groupby("shard", num_partitions=len(made_from)).map_groups(
        partial(_write_group, plan=plan, made_from=made_from), batch_format="pyarrow"
    )
    without_documents = set(made_from)
    for row in written.iter_rows():
        without_documents.remove(row["shard"])
        yield row["shard"]
    for shard in without_documents:
        _write_tokens(TOKENS.empty_table(), plan, shard, made_from[shard])
        yield shard


def _tokenize_batch(
    batch: dict[str, Any], plan: DataPlan, wanted: frozenset[int]
) -> Iterator[pa.Table]:
    """Tokenize the documents of some files, those of wanted shards only."""
    tokenizer = worker_tokenizer(plan.model)
    sources = {source.name: source for source in plan.data.sources}
    for name, url in zip(batch["source"], batch["url"], strict=True):
        source = sources[str(name)]
        yield from tokenize(
            read_documents(source, str(url)),
            tokenizer,
            source=source.name,
            seed=plan.data.seed,
            num_shards=plan.data.num_shards,
            wanted=wanted,
            piece_tokens=source.piece_tokens,
        )
    yield TOKENS.empty_table()


def _write_group(group: pa.Table, plan: DataPlan, made_from: dict[int, str]) -> pa.Table:
    shard = group["shard"][0].as_py()
    _write_tokens(group, plan, shard, made_from[shard])
    return pa.table({"shard": [shard]})


def _write_tokens(rows: pa.Table, plan: DataPlan, shard: int, made_from: str) -> None:
    content, record = token_shard(rows, shard, made_from)
    write_shard(plan.run_dir, shard_name("tokens", shard), content, record)


def _pack_shards(plan: DataPlan, made_from: dict[int, str], last_keys: LastKeys) -> Iterator[int]:
    """Pack some shards; yields each one once it is written."""
    jobs = [{"shard": shard, "made_from": its} for shard, its in made_from.items()]
    dataset = ray.data.from_items(jobs, override_num_blocks=len(jobs))
    packed = dataset.map_batches(partial(_pack_batch, plan=plan, last_keys=last_keys), batch_size=1)
    yield from (row["shard"] for row in packed.iter_rows())


def _pack_batch(batch: Any, plan: DataPlan, last_keys: LastKeys) -> Iterator[dict[str, list[int]]]:
    """Pack the shards of a batch.

    A generator, since Ray Data gives back the error of one, and of a plain function only that there
    was one.
    """
    for shard, made_from in zip(batch["shard"].tolist(), batch["made_from"].tolist(), strict=True):
        content, record = pack_shard(plan, shard, made_from, last_keys)
        write_shard(plan.run_dir, shard_name("segments", shard), content, record)
        yield {"shard": [shard]}
