"""Reading a checkpoint as data: no code that it names is run.

torch unpickles a checkpoint's ``.metadata`` and whatever is no tensor, and so would run the code
that a forged checkpoint names.
"""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint

# What a checkpoint's metadata may name beside dtypes, and what is made of it. Its path is not
# needed; Python 3.11.2 pickles an enum as a getattr.
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


def read_checkpoint(folder: str, state: dict[str, Any]) -> None:
    """Fill a state's tensors, in place, from a distributed checkpoint of any number of ranks.

    Args:
        folder: the local folder of the checkpoint.
        state: nested dictionaries of tensors; every rank calls with its own shards.

    Raises:
        ValueError: if the checkpoint holds anything that could run code.
    """
    # built outside the try: torch would go on without the metadata that this refuses
    reader = _DataReader(folder)
    try:
        load_checkpoint(state, storage_reader=reader, planner=_TensorPlanner())
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, pickle.UnpicklingError):
                raise _refused(folder, failure) from error
        raise


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles metadata and refuses every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        found = _METADATA_CLASSES.get((module, name))
        if found is None and module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            found = vars(torch)[name]
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return found


class _DataReader(FileSystemReader):
    """Reads a checkpoint's metadata as data, where torch's own reader unpickles anything.

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
    # torch's message has many lines; the name that it refused says most, else its first line
    named = re.search(r"GLOBAL (\S+)", str(what)) or re.search("(.+)", str(what))
    return ValueError(
        f"{place} is no checkpoint of a training, it holds something else "
        f"({named[1] if named else 'nothing'}), and none of it was run; find out who wrote it, "
        f"remove the checkpoint and run again to go on from an older one"
    )
