"""Files that the package ships: texts and the reference model."""

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED_PREFIX = "bundled:"
_TEXTS = ASSETS / "text"


def bundled_texts(source: str) -> list[Path]:
    """Find the text files behind ``bundled:FOLDER`` or ``bundled:FOLDER/NAME``, in order of name.

    No file is no error here: callers name the recipe field, and ``bundled_folders`` what there is.
    """
    name = source.removeprefix(BUNDLED_PREFIX)
    pattern = f"{name}.txt.xz" if "/" in name else f"{name}/*.txt.xz"
    return sorted(_TEXTS.glob(pattern))


def bundled_folders() -> list[str]:
    """Name every folder of texts as a source writes it: ``bundled:report`` and so on."""
    return sorted(BUNDLED_PREFIX + folder.name for folder in _TEXTS.iterdir())


def bundled_name(path: Path) -> str:
    """Name one bundled text file as a source writes it: ``bundled:FOLDER/NAME``."""
    return f"{BUNDLED_PREFIX}{path.parent.name}/{path.name.removesuffix('.txt.xz')}"
