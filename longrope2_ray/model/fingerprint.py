"""A fingerprint that changes with a model's config or weights."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from longrope2_ray.model.config import read_own_config
from longrope2_ray.model.source import find_model
from longrope2_ray.recipe.model import ModelSection

if TYPE_CHECKING:
    from hashlib import _Hash

_MIB = 1 << 20


def model_fingerprint(section: ModelSection) -> str:
    """Sixteen hex digits that change with the config or the weights.

    For a local model they cover its config and its weight files; for a hub id, the id and the
    commit that it resolved to.

    Raises:
        ValueError: if there is no model.
    """
    source = find_model(section)
    digest = hashlib.sha256()
    folder = source.folder
    if folder is None:
        commit = getattr(read_own_config(section), "_commit_hash", None) or source.revision
        digest.update(f"{section.path} {source.gguf_file} {commit}".encode())
    elif source.gguf_file:
        _add_weights(digest, folder / source.gguf_file)
    else:
        digest.update((folder / "config.json").read_bytes())
        for file in sorted(folder.iterdir()):
            if file.suffix in (".safetensors", ".bin"):
                _add_weights(digest, file)
    return digest.hexdigest()[:16]


def _add_weights(digest: "_Hash", file: Path) -> None:
    """Add a file's name, its size, its first and last MiB and 64 blocks of 64 KiB between them.

    The blocks are evenly spread, so that a file of many GiB costs no full read.
    """
    size = file.stat().st_size
    digest.update(f"{file.name} {size}\n".encode())
    with file.open("rb") as opened:
        digest.update(opened.read(_MIB))
        for block in range(1, 65):
            opened.seek(block * size // 65)
            digest.update(opened.read(_MIB // 16))
        opened.seek(max(size - _MIB, 0))
        digest.update(opened.read(_MIB))
