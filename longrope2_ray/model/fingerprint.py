"""A fingerprint that changes with a model's config or weights."""

import hashlib
from pathlib import Path

from longrope2_ray.model.source import resolve_model_path
from longrope2_ray.model.spec import read_config

_MIB = 1 << 20


def model_fingerprint(path: str, gguf_file: str | None = None, revision: str | None = None) -> str:
    """Sixteen hex digits that change with the config or the weights.

    A local model: its config and, of every weight file, name, size, the first and last MiB and 64 blocks of 64 KiB evenly
    between them, so that a file of many GiB costs no full read. A hub id: the id and the commit it resolved to.

    Raises:
        ValueError: if there is no model.
    """
    location, gguf = resolve_model_path(path, gguf_file, revision)
    digest = hashlib.sha256()
    folder = Path(location)
    if folder.is_dir():
        weights = (
            [folder / gguf]
            if gguf
            else sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
        )
        if not gguf:
            digest.update((folder / "config.json").read_bytes())
        for file in weights:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(_MIB))
                for block in range(1, 65):
                    opened.seek(block * size // 65)
                    digest.update(opened.read(_MIB // 16))
                opened.seek(max(size - _MIB, 0))
                digest.update(opened.read(_MIB))
    else:
        config = read_config(path, gguf_file, revision)
        digest.update(f"{path} {gguf} {getattr(config, '_commit_hash', None) or revision}".encode())
    return digest.hexdigest()[:16]
