"""SHA-256 digests of JSON values and of files."""

import hashlib
import json
from pathlib import Path


def digest(value: object) -> str:
    """Return the 64 hex digits of the SHA-256 of a value's JSON text with sorted keys.

    Raises:
        TypeError: if JSON cannot hold the value.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the 64 hex digits of the SHA-256 of a file's content.

    Raises:
        OSError: if the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
