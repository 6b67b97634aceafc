"""Which package may import which, and where torch, transformers and Ray may be imported."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from package_files import PACKAGE, Module, find_cycle, find_modules, import_graph, layer_of

MODULES = find_modules()
GRAPH = import_graph(MODULES)

# A package imports itself and what stands before it.
ORDER = (
    "errors", "storage", "rope", "recipe", "tasks", "workers", "model", "data", "search", "export",
    "training", "evaluation", "report", "study", "plan", "cli",
)  # fmt: skip

# The front door imports anything, and nothing imports it.
FRONT_DOOR = ("", "__main__")

TORCH_LAYERS = ("model", "export", "training", "evaluation")


def is_job(name: str) -> bool:
    return name.endswith(".job")


def may_import_ray(name: str) -> bool:
    return layer_of(name) == "workers" or is_job(name) or name == "report.metrics"


def may_import_torch(name: str) -> bool:
    in_layer = layer_of(name) in TORCH_LAYERS and not is_job(name)
    return in_layer or name == "search.scorer"


def is_pure(name: str) -> bool:
    """Whether a module must start without torch, transformers and Ray."""
    return not may_import_ray(name) and not may_import_torch(name) and name != "__main__"


def importers(library: str, allowed: Callable[[str], bool]) -> list[str]:
    """Modules that import the library although they may not."""
    return [n for n, module in MODULES.items() if library in module.libraries() and not allowed(n)]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process where torch, transformers and Ray cannot be imported."""
    block = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'ray')))\n"
    return subprocess.run(
        [sys.executable, "-c", block + code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_module_has_a_place_in_the_order() -> None:
    homeless = [name for name in MODULES if layer_of(name) not in (*ORDER, *FRONT_DOOR)]
    assert not homeless, "give the package a place in ORDER"


def test_a_package_imports_only_what_stands_before_it() -> None:
    upward = []
    for name in MODULES.keys() - FRONT_DOOR:
        allowed = ORDER[: ORDER.index(layer_of(name)) + 1]
        for target in GRAPH[name]:
            if layer_of(target) not in allowed:
                upward.append(f"{name} imports {target or 'longrope2_ray itself'}")
    assert not upward


def test_no_modules_import_each_other_in_a_ring() -> None:
    assert not find_cycle(GRAPH)


def test_ray_is_imported_where_it_lives_only() -> None:
    assert not importers("ray", may_import_ray)


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_torch_and_transformers_are_imported_where_they_live_only(library: str) -> None:
    assert not importers(library, may_import_torch)


def test_every_other_module_starts_without_torch_transformers_and_ray() -> None:
    pure = [f"longrope2_ray.{name}".rstrip(".") for name in MODULES if is_pure(name)]
    code = "import importlib\n"
    code += "".join(f"importlib.import_module({name!r})\nprint({name!r})\n" for name in pure)
    done = run_python(code)
    assert done.stdout.split() == pure, done.stderr
    assert done.returncode == 0


def test_the_command_line_answers_without_torch_transformers_and_ray() -> None:
    done = run_python(
        "from longrope2_ray.cli import main\n"
        "sys.exit(main('factors --method pi --head-dim 8 --base 1e4 --original-length 256'\n"
        "              ' --target-length 1024'.split()))"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("pi: ")


def test_packages_have_an_empty_init() -> None:
    """To import one module of a package imports no other; the exceptions say why they are."""
    filled = [n for n, m in MODULES.items() if m.path.name == "__init__.py" and m.text]
    assert filled == ["", "cli", "search"]


# ------------------------------------------------------------------------ how the files are read


@pytest.fixture
def modules(tmp_path: Path) -> dict[str, Module]:
    """Two modules that import each other, one in a function and one for types only."""
    folder = tmp_path / "rope"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "a.py").write_text("def f():\n    import torch.nn\n    import longrope2_ray.rope.b\n")
    (folder / "b.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from longrope2_ray.rope import a\n"
    )
    return find_modules(tmp_path)


def test_imports_in_functions_and_for_types_count(modules: dict[str, Module]) -> None:
    assert import_graph(modules) == {"rope": set(), "rope.a": {"rope.b"}, "rope.b": {"rope.a"}}
    assert modules["rope.a"].libraries() == {"torch", "longrope2_ray"}


def test_a_ring_of_imports_is_found(modules: dict[str, Module]) -> None:
    assert find_cycle(import_graph(modules)) == ["rope.a", "rope.b", "rope.a"]
    assert not find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()})
