import gzip
import lzma
from pathlib import Path

import pytest

from longrope2_ray.storage.assets import bundled_folders, bundled_name
from longrope2_ray.tasks.books import load_books, resolve_text_paths


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b.txt").write_text("plain ünïcode", encoding="utf-8")
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"squeezed"))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"zipped"))
    (tmp_path / "notes.md").write_text("not a book")
    return tmp_path


def test_a_directory_gives_its_texts_in_order_of_name_whatever_their_compression(
    folder: Path,
) -> None:
    books = load_books([str(folder)])
    assert [(book.name, book.text) for book in books] == [
        ("a", "squeezed"),
        ("b", "plain ünïcode"),
        ("c", "zipped"),
    ]


def test_files_globs_and_directories_can_be_mixed_and_keep_their_order(folder: Path) -> None:
    books = load_books([str(folder / "c.txt.gz"), str(folder / "*.txt"), str(folder / "notes.md")])
    assert [book.text for book in books] == ["zipped", "plain ünïcode", "not a book"]


def test_a_file_whose_name_looks_like_a_pattern_is_found(folder: Path) -> None:
    (folder / "book[1].txt").write_text("bracketed")
    assert [book.text for book in load_books([str(folder / "book[1].txt")])] == ["bracketed"]


@pytest.mark.parametrize("name", ["search", "report", "pretraining"])
def test_bundled_texts_are_there_and_long(name: str) -> None:
    paths = resolve_text_paths([f"bundled:{name}"])
    assert len(paths) >= 2
    assert sum(path.stat().st_size for path in paths) > 100_000


def test_bundled_folders_share_no_book() -> None:
    folders = [load_books([name]) for name in bundled_folders()]
    books = [book for folder in folders for book in folder]
    assert len({book.name for book in books}) == len({book.text for book in books}) == len(books)


def test_one_bundled_text_can_be_named() -> None:
    every = resolve_text_paths(["bundled:pretraining"])
    assert [bundled_name(path) for path in every] == [
        "bundled:pretraining/kjv",
        "bundled:pretraining/sotu_1790_1896",
    ]
    assert resolve_text_paths(["bundled:pretraining/kjv"]) == every[:1]


@pytest.mark.parametrize(
    "source", ["nowhere.txt", "nowhere/*.txt", "bundled:nowhere", "bundled:search/moby_dick"]
)
def test_a_source_that_matches_nothing_is_named(source: str) -> None:
    with pytest.raises(
        ValueError, match=r"^text: expected a text file, .* which matches nothing$"
    ) as caught:
        load_books([source])
    assert repr(source) in str(caught.value)


def test_an_empty_directory_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which matches nothing"):
        load_books([str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("latin.txt", "é".encode("latin-1") + b"x"),
        ("plain.txt.xz", b"this is no xz file"),
        ("plain.txt.gz", b"this is no gz file"),
        ("torn.txt.xz", lzma.compress(b"some text that is long enough" * 99)[:-20]),
        ("torn.txt.gz", gzip.compress(b"some text that is long enough" * 99)[:-20]),
        ("flipped.txt.gz", gzip.compress(bytes(range(100)))[:12] + b"\xff" * 30),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_no_text_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"^text: expected UTF-8 text in .*{name}"):
        load_books([str(tmp_path / name)])
