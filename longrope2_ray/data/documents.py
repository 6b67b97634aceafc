"""Documents of a source: from JSON lines, parquet, text, a data set of the hub, or a generator.

Files may be compressed, and lie on this machine, behind a URL or in the package.
"""

import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from longrope2_ray.recipe.training import SourceSection
from longrope2_ray.storage.assets import BUNDLED_PREFIX, bundled_name, bundled_texts
from longrope2_ray.tasks.books import resolve_text_paths
from longrope2_ray.tasks.retrieval import GENERATED_PREFIX, RETRIEVAL, retrieval_documents

_GENERATORS: dict[str, Callable[[], Iterator[str]]] = {RETRIEVAL: retrieval_documents}

_JSON = (".jsonl", ".ndjson", ".json")
_PARQUET = ".parquet"
# What is taken from a directory; any other file that a source names is read as text.
_KNOWN = (*_JSON, _PARQUET, ".txt", ".md")
_COMPRESSED = (".gz", ".xz", ".bz2", ".zst")

# A data set, which huggingface datasets reads; and a file in one, which fsspec reads.
_HUB = "hf://"
_HUB_FILES = "hf://datasets/"


class FoundFile(NamedTuple):
    """One file of a source.

    Attributes:
        url: its address, or the name of a bundled text, a data set of the hub or a generator.
        num_bytes: its size; 0 for what is no file.
    """

    url: str
    num_bytes: int


def find_files(source: SourceSection) -> list[FoundFile]:
    """Find every file of a source.

    Raises:
        ValueError: naming ``path``, if one cannot be read or matches nothing.
    """
    field = f"data.sources.{source.name}.path"
    found: list[FoundFile] = []
    for path in source.path:
        if path.startswith(GENERATED_PREFIX):
            if path not in _GENERATORS:
                raise ValueError(f"{field}: expected {', '.join(_GENERATORS)}, got {path!r}")
            found.append(FoundFile(path, 0))
        elif _is_hub_dataset(path):
            _import_datasets(source.name, path)
            found.append(FoundFile(path, 0))
        elif path.startswith(BUNDLED_PREFIX):
            texts = resolve_text_paths([path], field)
            found += [FoundFile(bundled_name(text), text.stat().st_size) for text in texts]
        else:
            found += _list_files(path, field)
    return found


def _list_files(path: str, field: str) -> list[FoundFile]:
    """List the files behind a path, a directory, a glob or a URL."""
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
        if filesystem.isfile(root):
            infos = {root: filesystem.info(root)}
        elif filesystem.isdir(root):
            inside = filesystem.find(root, detail=True)
            infos = {name: info for name, info in inside.items() if _suffix(name) in _KNOWN}
        else:
            infos = filesystem.glob(root, detail=True)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{field}: cannot read {path!r}: {error}") from error
    found = [
        FoundFile(filesystem.unstrip_protocol(name), info["size"])
        for name, info in sorted(infos.items())
        if info["type"] == "file"
    ]
    if not found:
        where = "" if "://" in path else f" from {Path.cwd()}"
        raise ValueError(
            f"{field}: expected a file, a directory, a glob, a URL, hf://<dataset id>, "
            f"bundled:<texts> or {RETRIEVAL}, got {path!r}, which matches nothing{where}"
        )
    return found


def _suffix(url: str) -> str:
    """Return the suffix that says what is inside a file, not how it is compressed."""
    path = Path(url)
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def _is_hub_dataset(path: str) -> bool:
    return path.startswith(_HUB) and not path.startswith(_HUB_FILES)


def _import_datasets(source: str, path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"data.sources.{source}.path: expected the package datasets for {path!r}, got none; "
            f"pip install datasets"
        ) from error
    return datasets


def read_documents(source: SourceSection, url: str) -> Iterator[str]:
    """Stream the texts of one file, data set (its training split) or generator.

    Raises:
        ValueError: if it cannot be read or lacks the source's field.
    """
    if url in _GENERATORS:
        yield from _GENERATORS[url]()
        return
    if _is_hub_dataset(url):
        read = _read_hub_dataset
    elif _suffix(url) == _PARQUET:
        read = _read_parquet
    elif _suffix(url) in _JSON:
        read = _read_json_lines
    else:
        read = _read_text
    try:
        # The package may lie elsewhere on a worker's machine, so its texts travel by name.
        bundled = bundled_texts(url) if url.startswith(BUNDLED_PREFIX) else []
        yield from read(source, bundled[0].as_uri() if bundled else url)
    except (OSError, EOFError, ValueError, ImportError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"data.sources.{source.name}: cannot read {url}: {error}") from error


def _read_hub_dataset(source: SourceSection, url: str) -> Iterator[str]:
    datasets = _import_datasets(source.name, url)
    rows = datasets.load_dataset(url.removeprefix(_HUB), split="train", streaming=True)
    yield from (_text_of(row, source, number) for number, row in enumerate(rows, 1))


def _read_parquet(source: SourceSection, url: str) -> Iterator[str]:
    import pyarrow.parquet as pq

    with fsspec.open(url, "rb") as file:
        parquet = pq.ParquetFile(file)
        # A column that is not there is told as a missing field, not in Arrow's words.
        _text_of(dict.fromkeys(parquet.schema_arrow.names, ""), source, 0)
        for batch in parquet.iter_batches(batch_size=64, columns=[source.field]):
            yield from (_text_of(row, source, 0) for row in batch.to_pylist())


def _read_json_lines(source: SourceSection, url: str) -> Iterator[str]:
    with fsspec.open(url, "rt", encoding="utf-8", compression="infer") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _text_of(json.loads(line), source, number)


def _read_text(source: SourceSection, url: str) -> Iterator[str]:
    with fsspec.open(url, "rt", encoding="utf-8", compression="infer") as file:
        yield from _split(file, source.split)


def _text_of(row: Any, source: SourceSection, number: int) -> str:
    """Return the text of a row, empty if it is null; ``number`` is the row's for messages."""
    if not isinstance(row, dict) or source.field not in row:
        names = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"field: expected {source.field!r} in row {number}, got {names}")
    text = row[source.field]
    if not isinstance(text, str | None):
        raise ValueError(
            f"field: expected text in {source.field!r} of row {number}, got {type(text).__name__}"
        )
    # JSON may hold halves of a character, which tokenizers refuse.
    return (text or "").encode("utf-8", "replace").decode()


def _split(lines: Iterable[str], split: str) -> Iterator[str]:
    """Split a text file into documents, as ``data.sources.split`` says."""
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
