"""Check README.md, CONTRIBUTING.md and docs/: their links, paths, command lines and Python."""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from longrope2_ray.cli import main
from longrope2_ray.recipe.fields import field_names
from longrope2_ray.recipe.loading import load_recipe
from longrope2_ray.recipe.recipe import Recipe

ROOT = Path(__file__).parents[1]
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*FRONT, *sorted((ROOT / "cluster").rglob("*.md"))]
OUR_PATH = re.compile(r"(?<![\w/.\-])(?:longrope2_ray|jobs|cluster|docs|tests|\.ci)/[\w./*\-]*")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SHIPPED = {path.stem for path in (ROOT / "jobs/recipes").glob("*.toml")}


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def command_lines() -> Iterator[tuple[str, str]]:
    """Every ``longrope2 ...`` of the pages, in backticks or in an indented block, and its page."""
    for page in FRONT:
        text = FENCE.sub("", page.read_text()).replace("\\\n", " ")
        inline = re.findall(r"`(longrope2 \w+ [^`]+)`", text)
        blocks = re.findall(r"^    (longrope2 .+)$", text, re.MULTILINE)
        for line in (*inline, *blocks):
            yield from ((page_id(page), part.strip()) for part in line.split("&&"))


def test_the_readme_is_one_that_is_read() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_paths_exist(page: Path) -> None:
    text = re.sub(r"\w+://\S+|\]\([^)]+\)", "", page.read_text())
    paths = [path.rstrip(".") for path in OUR_PATH.findall(text)]
    assert [path for path in paths if not list(ROOT.glob(path.rstrip("/")))] == []


class Parsed(Exception):  # noqa: N818 - stops the command after its parser
    """The arguments of a command line that its parser accepts."""


@pytest.mark.parametrize(("page", "line"), sorted(set(command_lines())))
def test_command_lines_parse(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_known_args

    def stop(self: argparse.ArgumentParser, *words: object) -> object:
        parsed = parse(self, *words)  # type: ignore[call-overload]
        if self.prog == "longrope2":
            raise Parsed(*parsed)
        return parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    with pytest.raises(Parsed) as stopped:
        main(shlex.split(line, comments=True)[1:])
    arguments, overrides = stopped.value.args
    recipe = getattr(arguments, "recipe", None)
    assert recipe or not overrides
    if recipe in SHIPPED:
        load_recipe(recipe, overrides)
    flags = {word[2:].split("=")[0] for word in overrides if word.startswith("--")}
    assert flags <= {name.replace("_", "-") for name in field_names(Recipe)}


@pytest.mark.parametrize("page", FRONT, ids=page_id)
def test_python_blocks_compile(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        compile(block, page_id(page), "exec")
