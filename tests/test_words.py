"""The project's English: US spelling, and the field's words rather than words of our own."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Word, as a regular expression -> what to write instead.
INSTEAD = {
    r"tokenis": "tokeniz",
    r"utilis": "utiliz",
    r"recognis": "recogniz",
    r"colour": "color",
    r"neighbour": "neighbor",
    r"\bgrey": "gray",
    r"(?<![\"'])temperature(?![\"'])": "attention factor",  # in quotes it is a key of a config
    r"(?<![\"'_])mscale": "attention factor",  # short_mscale is a key of a transformers config
    r"\brac(ed|ing|es) out|raced_out": "eliminated",
    r"\bdoubter": "what it does, such as second opinion",
    r"\bblameless": "what it means, such as not counted as an attempt",
    r"\bpatient(ly)?\b": "retrying",
    r"\beyes\b": "reader",
    r"\bwho(so)?ever\b": "the thing's name",
}

FILES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "docs/**/*.py", "jobs/*.py", "jobs/recipes/*.toml",
                    "cluster/**/*.md", "longrope2_ray/**/*.py")
    for path in ROOT.glob(pattern)
)  # fmt: skip


@pytest.mark.parametrize("word", INSTEAD)
def test_word_is_not_used(word: str) -> None:
    pattern = re.compile(word, re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"write {INSTEAD[word]!r}:\n" + "\n".join(found)
