import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PURE = [
    "rope.geometry", "rope.factors", "rope.baselines", "recipe.loading", "recipe.fields", "search.evolution",
    "search.racing", "search.lookahead", "search.loop", "storage.rundir", "tasks.needle", "tasks.books", "plan",
    "data.packing", "data.quotas", "data.shards", "data.documents", "report.page", "report.monitor", "cli.parser",
]  # fmt: skip


@pytest.mark.parametrize("blocked", [("torch", "ray", "transformers")], ids=" ".join)
def test_pure_modules_import_without_torch_ray_and_transformers(blocked: tuple[str, ...]) -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked}))\nimport importlib\n"
    code += "".join(
        f"importlib.import_module('longrope2_ray.{name}')\nprint('{name}')\n" for name in PURE
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == PURE, done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("module", ["model/spec", "model/loading", "search/scorer"])
def test_torch_modules_do_not_import_ray(module: str) -> None:
    assert "import ray" not in (ROOT / "longrope2_ray" / f"{module}.py").read_text()
    assert "from ray" not in (ROOT / "longrope2_ray" / f"{module}.py").read_text()


def test_the_command_line_starts_without_torch_ray_and_transformers() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'ray', 'transformers')))\n"
        "from longrope2_ray.cli import main\n"
        "sys.exit(main(['factors', '--method', 'pi', '--head-dim', '8', '--base', '1e4', '--original-length', '256',"
        " '--target-length', '1024']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("pi: ")
