"""Books: plain text from files, for needle documents and training."""

import glob
import gzip
import lzma
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope2_ray.storage.assets import ASSETS, BUNDLED_PREFIX

_OPENERS = {".xz": lzma.open, ".gz": gzip.open}


@dataclass(frozen=True)
class Book:
    """One real document: ``name`` for provenance and messages, ``text`` whole."""

    name: str
    text: str


def resolve_text_paths(sources: Sequence[str], field: str = "text") -> list[Path]:
    """Files behind ``sources``: a file, a directory, a glob pattern, or ``bundled:search`` / ``bundled:report``.

    Raises:
        ValueError: if a source matches no file; the message names it.
    """
    paths: list[Path] = []
    for source in sources:
        if source.startswith(BUNDLED_PREFIX):
            folder = ASSETS / "text" / source.removeprefix(BUNDLED_PREFIX)
            found = sorted(folder.glob("*.txt.xz"))
        elif Path(source).is_dir():
            found = sorted(p for p in Path(source).iterdir() if ".txt" in p.suffixes)
        elif Path(source).is_file():
            found = [Path(source)]
        else:
            found = [Path(p) for p in sorted(glob.glob(source))]
        if not found:
            raise ValueError(
                f"{field}: expected a text file, a directory of .txt files, a glob, 'bundled:search' or 'bundled:report', "
                f"got {source!r}, which matches nothing"
            )
        paths += found
    return paths


def load_books(sources: Sequence[str], field: str = "text") -> list[Book]:
    """Read every file behind ``sources`` (``.txt``, also ``.xz`` or ``.gz``) as one book each, in a fixed order; ``field`` is what a message names.

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
