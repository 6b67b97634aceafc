"""A file, a class and a function of the package can be read in one go."""

import ast

import pytest
from package_files import PACKAGE, Module, find_modules

MODULES = find_modules().values()

MAX_LINES = {"file": 400, "class": 200, "function": 60}
MAX_COLUMNS = 100


def lengths(module: Module) -> list[tuple[str, str, int]]:
    """Kind, place and number of lines of a file and of each class and function in it."""
    path = module.path.relative_to(PACKAGE.parent)
    found = [("file", str(path), len(module.lines))]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            found.append((kind, f"{path}:{node.lineno} {node.name}", lines))
    return found


@pytest.mark.parametrize("kind", MAX_LINES)
def test_nothing_is_too_long(kind: str) -> None:
    sizes = [size for module in MODULES for size in lengths(module) if size[0] == kind]
    assert not [f"{place}: {lines}" for _, place, lines in sizes if lines > MAX_LINES[kind]]


def test_lines_fit_the_width() -> None:
    assert not [
        f"{module.path.relative_to(PACKAGE.parent)}:{number}"
        for module in MODULES
        for number, line in enumerate(module.lines, 1)
        if len(line) > MAX_COLUMNS
    ]
