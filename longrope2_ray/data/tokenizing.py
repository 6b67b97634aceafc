"""Tokenized documents: from texts to the rows of a shard, without Ray.

A document's key and shard are hashes of its text, so that the rows of a shard depend on no order
of files, blocks or workers.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longrope2_ray.data.manifest import TokenShard
from longrope2_ray.recipe.model import ModelSection
from longrope2_ray.storage.digests import digest

TOKENS = pa.schema(
    {
        "shard": pa.int32(),
        "key": pa.uint64(),
        "source": pa.string(),
        "num_tokens": pa.int32(),
        "ids": pa.list_(pa.int32()),
    }
)

_CHUNK_CHARACTERS = 1 << 20
# The offsets of an Arrow list are 32-bit.
_MAX_SHARD_TOKENS = 2**31 - 1


@lru_cache(maxsize=1)
def worker_tokenizer(model: ModelSection) -> Any:
    """Return the model's tokenizer, loaded once in a worker process."""
    from longrope2_ray.model.loading import load_tokenizer

    return load_tokenizer(model)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return sixteen hex digits that change with what a tokenizer makes of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inner = backend.to_str() if backend is not None else tokenizer.get_vocab()
    return digest([inner, tokenizer.bos_token_id, tokenizer.eos_token_id])[:16]


def tokenize(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    source: str,
    seed: int,
    num_shards: int,
    wanted: Set[int],
    piece_tokens: int | None,
) -> Iterator[pa.Table]:
    """Yield tables of the documents in wanted shards, one for each megabyte or so of text.

    Args:
        texts: of one source.
        tokenizer: a transformers tokenizer.
        source: its name, part of a document's key.
        seed: part of a document's key.
        num_shards: shards that the documents are spread over.
        wanted: shards that are made now.
        piece_tokens: most tokens of a document, BOS and EOS included; a longer text becomes several
            documents. None for no limit.
    """
    bos, eos = ([] if t is None else [t] for t in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    for chunk in _chunks(texts):
        hashed = [(text, _hash(seed, source, text)) for text in chunk]
        chosen = [(text, number) for text, number in hashed if number % num_shards in wanted]
        if not chosen:
            continue
        encoded = tokenizer(
            [text for text, _ in chosen],
            add_special_tokens=False,
            split_special_tokens=True,
            verbose=False,
        )
        rows = []
        for (text, number), ids in zip(chosen, encoded["input_ids"], strict=True):
            step = piece_tokens - len(bos) - len(eos) if piece_tokens else max(len(ids), 1)
            for index, begin in enumerate(range(0, max(len(ids), 1), step)):
                piece = ids[begin : begin + step] if text.strip() else []
                document = [*bos, *piece, *eos] if piece else []
                key = _hash(number, index)
                rows.append((number % num_shards, key, source, len(document), document))
        yield pa.table([list(column) for column in zip(*rows, strict=True)], schema=TOKENS)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group texts so that each group but the last has about a megabyte."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text) + 100
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    yield chunk


def _hash(*parts: object) -> int:
    """Hash the parts to 64 bits."""
    text = json.dumps([str(part) for part in parts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def token_shard(rows: pa.Table, shard: int, made_from: str) -> tuple[bytes, TokenShard]:
    """Make one whole shard of tokens: its documents by key, without empty and duplicate ones.

    Args:
        rows: every document of the shard, in any order, as ``TOKENS`` says.
        shard: its number, for messages.
        made_from: digest of what the shard depends on.

    Returns:
        The parquet file and its record.

    Raises:
        ValueError: if it is larger than an Arrow list can be.
    """
    num_tokens = pc.sum(rows["num_tokens"]).as_py() or 0
    if num_tokens > _MAX_SHARD_TOKENS:
        raise ValueError(
            f"data.num_shards: expected at most {_MAX_SHARD_TOKENS} tokens in a shard, got "
            f"{num_tokens} in shard {shard}; raise it, or name fewer files in data.sources.path: "
            f"every document is tokenized before the quotas choose"
        )
    full = rows.filter(pc.greater(rows["num_tokens"], 0)).drop_columns(["shard"]).sort_by("key")
    keys = full["key"].to_numpy()
    is_first = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
    table = full.filter(pa.array(is_first))
    read, not_empty, kept = (Counter(part["source"].to_pylist()) for part in (rows, full, table))
    arrays = (
        table["key"].to_numpy(),
        table["num_tokens"].to_numpy(),
        table["ids"].combine_chunks().flatten().to_numpy(),
    )
    hashes = [hashlib.sha256(array.tobytes()).hexdigest() for array in arrays]
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = bytes(sink.getvalue())
    record = TokenShard(
        made_from=made_from,
        content=digest([table["source"].to_pylist(), *hashes]),
        rows=len(table),
        dropped={"empty": read - not_empty, "duplicate": not_empty - kept},
        checksum=hashlib.sha256(content).hexdigest(),
    )
    return content, record
