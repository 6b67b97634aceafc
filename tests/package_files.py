"""The modules of the package and what each imports, read from the files without importing them."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "longrope2_ray"


@dataclass(frozen=True)
class Module:
    """One file of the package.

    Attributes:
        name: dotted name without ``longrope2_ray``; an ``__init__`` has the name of its package,
            the top one "".
        path: the file.
    """

    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def imports(self) -> set[str]:
        """Full names of all that the file imports, in functions and under TYPE_CHECKING too."""
        return {name for node in ast.walk(self.tree) for name in self._imported(node)}

    def _imported(self, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{self.path}: expected absolute imports"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"

    def libraries(self) -> set[str]:
        """Names of the libraries that the file imports, such as ``torch``."""
        return {name.partition(".")[0] for name in self.imports()}


def find_modules(package: Path = PACKAGE) -> dict[str, Module]:
    """Name -> module, for every file of the package."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = list(path.relative_to(package).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        name = ".".join(parts)
        modules[name] = Module(name, path)
    return modules


def layer_of(name: str) -> str:
    """The package or top-level module that a module belongs to; "" for the top ``__init__``."""
    return name.partition(".")[0]


def import_graph(modules: dict[str, Module]) -> dict[str, set[str]]:
    """Name of a module -> names of the package's modules that it imports."""
    graph: dict[str, set[str]] = {}
    for name, module in modules.items():
        inside = {full.partition(".")[2] for full in module.imports() if _is_own(full)}
        graph[name] = {_module_of(inner, modules) for inner in inside} - {name}
    return graph


def _is_own(full_name: str) -> bool:
    return full_name.partition(".")[0] == "longrope2_ray"


def _module_of(name: str, modules: dict[str, Module]) -> str:
    """The module that ``name`` is or, if it is a function or class, that defines it."""
    return name if name in modules else name.rpartition(".")[0]


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, the first again at the end; empty without one."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph.get(name, ())):
            if cycle := visit(target, [*way, name]):
                return cycle
        done.add(name)
        return []

    for name in sorted(graph):
        if cycle := visit(name, []):
            return cycle
    return []
