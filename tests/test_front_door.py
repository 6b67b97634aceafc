"""``import longrope2_ray`` is quick, and its names work in every order of imports."""

import subprocess
import sys

import pytest
from package_files import PACKAGE, find_modules

import longrope2_ray


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = run_python("import longrope2_ray, sys\nprint(*sys.modules)").split()
    heavy = {"numpy", "pydantic", "torch", "ray", "transformers", "longrope2_ray.search"}
    assert not heavy & set(loaded)


@pytest.mark.parametrize("name", longrope2_ray.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(longrope2_ray, name)
    assert name in dir(longrope2_ray)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="serach"):
        longrope2_ray.serach  # noqa: B018


def test_names_for_factors_need_neither_torch_nor_ray() -> None:
    run_python(
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'ray')))\n"
        "from longrope2_ray import Evolution, RescaleFactors, RopeGeometry, baseline, load_recipe\n"
        "geometry = RopeGeometry(head_dim=64, rotary_dim=64, base=1e4, original_length=256)\n"
        "assert baseline('yarn', geometry, 1024).values.shape == (32,)\n"
        "assert load_recipe('debug').name == 'debug'"
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import longrope2_ray",
        "import longrope2_ray, longrope2_ray.search.evolution",
        "import longrope2_ray.search.job, longrope2_ray",
        "import longrope2_ray\nlongrope2_ray.search\nfrom longrope2_ray.search import job",
        "import longrope2_ray.search.evolution as evolution, longrope2_ray\nevolution.Evolution",
    ],
)
def test_the_package_search_can_be_called_and_imported_from(imports: str) -> None:
    """The function and the subpackage share a name; neither order of imports hides one."""
    run_python(
        f"{imports}\n"
        "from longrope2_ray import Evolution, search\n"
        "assert search is longrope2_ray.search\n"
        "from longrope2_ray.search.evolution import Evolution as same\n"
        "assert Evolution is same is longrope2_ray.search.evolution.Evolution\n"
        "from longrope2_ray.search import job\n"
        "job.search = lambda recipe, run_dir, observers: (recipe, run_dir, observers)\n"
        "assert longrope2_ray.search('recipe', 'place') == ('recipe', 'place', ())"
    )


def test_a_type_checker_sees_the_names_that_there_are() -> None:
    """What is imported for type checkers is what is imported when a name is used."""
    front_door = find_modules()[""]
    own = {name for name in front_door.imports() if name.startswith("longrope2_ray.")}
    lazy = {f"longrope2_ray.{module}.{name}" for name, module in longrope2_ray._MODULES.items()}
    assert own == lazy | {"longrope2_ray.search.job.search"}
    assert sorted({name.rpartition(".")[2] for name in own} | {"__version__"}) == sorted(
        longrope2_ray.__all__
    )
    assert (PACKAGE / "py.typed").exists()
