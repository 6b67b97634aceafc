"""The examples of the documentation run as they stand."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


@pytest.mark.usefixtures("ray_on_this_machine")
def test_a_search_from_python_finds_the_winner_of_its_run_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["search.py", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "search.py"), run_name="__main__")
    said = capsys.readouterr().out
    winner = json.loads((tmp_path / "winner.json").read_text())
    assert f"critical dimension {winner['critical_dim']}\n" in said
    assert str([round(factor, 3) for factor in winner["factors"]]) in said


def test_a_rescaled_model_answers_beyond_its_window(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "rescale.py"), run_name="__main__")
    said = capsys.readouterr().out
    asked, original, rescaled = re.findall(r"'(.*)'$", said, re.MULTILINE)
    assert rescaled == asked
    assert original != asked
