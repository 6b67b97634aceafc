"""Reading a checkpoint as data: nothing that it names is run."""

import io
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem

if TYPE_CHECKING:
    pass

# What the metadata of a checkpoint may name beside dtypes, and what is made of it. Its path is not needed; Python 3.11.2
# pickles an enum as a getattr.
_METADATA_CLASSES: dict[tuple[str, str], Any] = {
    **{
        (made.__module__, made.__name__): made
        for made in (
            dcp.Metadata,
            dcp.MetadataIndex,
            dcp.StorageMeta,
            dcp.TensorStorageMetadata,
            dcp.BytesStorageMetadata,
            dcp.ChunkStorageMetadata,
            dcp.TensorProperties,
            dcp._MEM_FORMAT_ENCODING,
            _StorageInfo,
        )
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): {"torch.strided": torch.strided}.__getitem__,
    ("pathlib", "PosixPath"): lambda *parts: None,
    ("pathlib._local", "PosixPath"): lambda *parts: None,
    ("builtins", "getattr"): lambda _, name: dcp._MEM_FORMAT_ENCODING[name],
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _METADATA_CLASSES.get((module, name))
        if found is None and module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            found = vars(torch)[name]
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return found


class _DataReader(FileSystemReader):
    """Reads a checkpoint as data: torch's own reader would run the code that a forged ``.metadata`` names.

    Raises:
        ValueError: if ``.metadata`` holds anything but metadata.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        path = Path(folder, ".metadata")
        data = path.read_bytes()
        try:
            self._metadata = _MetadataUnpickler(io.BytesIO(data)).load()
        except Exception as error:  # a forged pickle can fail in any way
            raise _refused(path, error) from error
        if not isinstance(self._metadata, dcp.Metadata):
            raise _refused(path, type(self._metadata).__name__)

    def read_metadata(self, *_: Any, **__: Any) -> dcp.Metadata:
        return self._metadata


class _TensorPlanner(DefaultLoadPlanner):
    """Loads tensors, which torch reads as data; its own planner unpickles anything else."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is no tensor")


def _refused(place: str | Path, what: object) -> ValueError:
    named = re.search(r"GLOBAL (\S+)", str(what)) or re.search(
        "(.+)", str(what)
    )  # torch's message has many lines
    return ValueError(
        f"{place} is no checkpoint of a training, it holds something else ({named[1] if named else 'nothing'}), and "
        f"none of it was run; find out who wrote it, remove the checkpoint and run again to go on from an older one"
    )
