"""Files that the package ships: texts and the reference model."""

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED_PREFIX = "bundled:"
_TEXTS = ASSETS / "text"


def bundled_texts(source: str) -> list[Path]:
    """Return the text files behind ``bundled:FOLDER`` or ``bundled:FOLDER/NAME``, in order of name.

    Where there is none the list is empty: the caller's message names the recipe field.
    """
    name = source.removeprefix(BUNDLED_PREFIX)
    pattern = f"{name}.txt.xz" if "/" in name else f"{name}/*.txt.xz"
    return sorted(_TEXTS.glob(pattern))


def bundled_folders() -> list[str]:
    """Return the name of every folder of texts, as a source gives it: ``bundled:report`` etc."""
    return sorted(BUNDLED_PREFIX + folder.name for folder in _TEXTS.iterdir())


def bundled_name(path: Path) -> str:
    """Return the name of a bundled text file, as a source gives it: ``bundled:FOLDER/NAME``."""
    return f"{BUNDLED_PREFIX}{path.parent.name}/{path.name.removesuffix('.txt.xz')}"
