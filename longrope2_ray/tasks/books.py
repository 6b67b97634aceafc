"""Books: plain text from files, for needle documents and training."""

import glob
import gzip
import lzma
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope2_ray.storage.assets import BUNDLED_PREFIX, bundled_folders, bundled_texts

_OPENERS = {".xz": lzma.open, ".gz": gzip.open}


@dataclass(frozen=True)
class Book:
    """One real document.

    Attributes:
        name: its file's name without suffixes, for provenance and messages.
        text: all of it.
    """

    name: str
    text: str


def resolve_text_paths(sources: Sequence[str], field: str = "text") -> list[Path]:
    """Find the files behind ``sources``: files, directories, globs or bundled texts.

    Args:
        sources: each a path, a pattern, or a bundled text such as ``bundled:search``.
        field: the recipe field that a message names.

    Raises:
        ValueError: if a source matches no file.
    """
    paths: list[Path] = []
    for source in sources:
        if source.startswith(BUNDLED_PREFIX):
            found = bundled_texts(source)
        elif Path(source).is_dir():
            found = sorted(p for p in Path(source).iterdir() if ".txt" in p.suffixes)
        elif Path(source).is_file():
            found = [Path(source)]
        else:
            found = [Path(p) for p in sorted(glob.glob(source))]
        if not found:
            raise ValueError(
                f"{field}: expected a text file, a directory of .txt files, a glob, "
                f"{', '.join(bundled_folders())}, got {source!r}, which matches nothing"
            )
        paths += found
    return paths


def load_books(sources: Sequence[str], field: str = "text") -> list[Book]:
    """Read every file behind ``sources`` as one book each, in a fixed order.

    Args:
        sources: as in ``resolve_text_paths``; a file may end in ``.xz`` or ``.gz``.
        field: the recipe field that a message names.

    Raises:
        ValueError: if a source matches nothing or a file is not UTF-8 text.
    """
    books = []
    for path in resolve_text_paths(sources, field):
        opener: Any = _OPENERS.get(path.suffix, open)
        try:
            with opener(path, "rt", encoding="utf-8") as file:
                books.append(Book(path.name.split(".txt")[0], file.read()))
        except (UnicodeDecodeError, lzma.LZMAError, OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{field}: expected UTF-8 text in {path}, got {error}") from error
    return books
