import pytest

from longrope2_ray.data.documents import find_files, read_documents
from longrope2_ray.recipe.loading import load_recipe
from longrope2_ray.recipe.training import SourceSection


@pytest.mark.parametrize(
    ("split", "documents"),
    [("file", ["a\n b\n\n \nc\n"]), ("blank_line", ["a\n b", "c"]), ("line", ["a", "b", "c"])],
)
def test_what_ends_a_document_in_a_text_file(tmp_path, split, documents):
    (tmp_path / "t.txt").write_text("a\n b\n\n \nc\n")
    assert (
        list(read_documents(SourceSection(name="s", path=["x"], split=split), f"{tmp_path}/t.txt"))
        == documents
    )


def test_a_row_may_hold_half_a_character_or_nothing(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": null}\n')
    assert list(read_documents(SourceSection(name="s", path=["x"]), f"{tmp_path}/t.jsonl")) == [
        "a?b",
        "",
    ]


@pytest.mark.parametrize("name", ["debug", "demo"])
def test_the_small_recipes_need_nothing_but_the_package(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = load_recipe(name).data
    assert data is not None
    for source in data.sources:
        for path in source.path:
            assert path.startswith(("bundled:", "generated:"))
        (file,) = find_files(source)
        assert file.url == source.path[0]  # a name, which means the same on every machine
        assert next(read_documents(source, file.url))
