"""Documents from files: JSON lines, parquet or text, compressed or not, local, behind a URL, or a data set of the hub."""

import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec

from longrope2_ray.recipe.training import SourceSection
from longrope2_ray.storage.assets import BUNDLED_PREFIX
from longrope2_ray.tasks.books import resolve_text_paths

_JSON, _PARQUET = (".jsonl", ".ndjson", ".json"), ".parquet"


_KNOWN = (
    *_JSON,
    _PARQUET,
    ".txt",
    ".md",
)  # what is taken from a directory; any other file named is text


_COMPRESSED = (".gz", ".xz", ".bz2", ".zst")


_HUB, _HUB_FILES = (
    "hf://",
    "hf://datasets/",
)  # a data set, read by huggingface datasets; a file in one, by fsspec


def find_files(source: SourceSection) -> list[tuple[str, int]]:
    """URL and size in bytes of every file of a source; a hub data set has size 0."""
    found: list[tuple[str, int]] = []
    for path in source.path:
        if path.startswith(_HUB) and not path.startswith(_HUB_FILES):
            _hub_datasets(source.name, path)
            found.append((path, 0))
            continue
        try:
            if path.startswith(BUNDLED_PREFIX):
                infos: Any = {
                    f.as_uri(): {"type": "file", "size": f.stat().st_size}
                    for f in resolve_text_paths([path])
                }
                filesystem: Any = fsspec.filesystem("file")
            else:
                filesystem, root = fsspec.core.url_to_fs(path)
                if filesystem.isfile(root):
                    infos = {root: filesystem.info(root)}
                elif filesystem.isdir(root):
                    infos = {
                        f: i
                        for f, i in filesystem.find(root, detail=True).items()
                        if _suffix(f) in _KNOWN
                    }
                else:
                    infos = filesystem.glob(root, detail=True)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"data.sources.{source.name}.path: cannot read {path!r}: {error}"
            ) from error
        infos = {
            filesystem.unstrip_protocol(f): i["size"]
            for f, i in sorted(infos.items())
            if i["type"] == "file"
        }
        if not infos:
            raise ValueError(
                f"data.sources.{source.name}.path: expected a file, a directory, a glob, a URL or hf://<dataset id>, "
                f"got {path!r}, which matches nothing{'' if '://' in path else f' from {Path.cwd()}'}"
            )
        found += infos.items()
    return found


def _suffix(url: str) -> str:
    """The last suffix that says what is inside, not how it is compressed."""
    path = Path(url)
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def _hub_datasets(source: str, path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"data.sources.{source}.path: expected the package datasets for {path!r}, got none; pip install datasets"
        ) from error
    return datasets


def read_documents(source: SourceSection, url: str) -> Iterator[str]:
    """The texts of one file, or of the training split of ``hf://<dataset id>``; streamed.

    Raises:
        ValueError: if it cannot be read or lacks the source's field.
    """
    try:
        if url.startswith(_HUB) and not url.startswith(_HUB_FILES):
            name = url.removeprefix(_HUB)
            rows = _hub_datasets(source.name, url).load_dataset(name, split="train", streaming=True)
            yield from (_field(row, source, n) for n, row in enumerate(rows, 1))
        elif _suffix(url) == _PARQUET:
            import pyarrow.parquet as pq

            with fsspec.open(url, "rb") as file:
                parquet = pq.ParquetFile(file)
                _field(dict.fromkeys(parquet.schema_arrow.names, ""), source, 0)
                for batch in parquet.iter_batches(batch_size=64, columns=[source.field]):
                    yield from (_field(row, source, 0) for row in batch.to_pylist())
        else:
            with fsspec.open(url, "rt", encoding="utf-8", compression="infer") as file:
                if _suffix(url) in _JSON:
                    yield from (
                        _field(json.loads(line), source, n)
                        for n, line in enumerate(file, 1)
                        if line.strip()
                    )
                else:
                    yield from _split(file, source.split)
    except (OSError, EOFError, ValueError, ImportError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"data.sources.{source.name}: cannot read {url}: {error}") from error


def _field(row: Any, source: SourceSection, number: int) -> str:
    if not isinstance(row, dict) or source.field not in row:
        names = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"field: expected {source.field!r} in row {number}, got {names}")
    text = row[source.field]
    if not isinstance(text, str | None):
        raise ValueError(
            f"field: expected text in {source.field!r} of row {number}, got {type(text).__name__}"
        )
    return (
        (text or "").encode("utf-8", "replace").decode()
    )  # JSON may hold halves of a character, tokenizers refuse


def _split(lines: Iterable[str], split: str) -> Iterator[str]:
    if split == "file":
        yield "".join(lines)
        return
    paragraph: list[str] = []
    for line in chain(lines, [""]):
        if line.strip() and split == "blank_line":
            paragraph.append(line)
        elif text := "".join([*paragraph, line]).strip():
            yield text
            paragraph = []
