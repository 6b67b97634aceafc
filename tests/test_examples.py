"""The examples of the documentation run as they stand."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def run_example(name: str, *arguments: str) -> str:
    """What an example prints."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "PYTHONPATH": str(EXAMPLES.parents[1])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_search_from_python_finds_the_winner_of_its_run_directory(tmp_path: Path) -> None:
    said = run_example("search.py", str(tmp_path))
    winner = json.loads((tmp_path / "winner.json").read_text())
    assert f"critical dimension {winner['critical_dim']}\n" in said
    assert str([round(factor, 3) for factor in winner["factors"]]) in said


def test_a_rescaled_model_answers_beyond_its_window() -> None:
    asked, original, rescaled = re.findall(r"'(.*)'$", run_example("rescale.py"), re.MULTILINE)
    assert rescaled == asked
    assert original != asked
