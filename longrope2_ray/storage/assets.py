"""Files that the package ships: texts and the reference model."""

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"


BUNDLED_PREFIX = "bundled:"
