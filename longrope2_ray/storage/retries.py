"""Retrying calls to storage that cannot be reached or is full."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from longrope2_ray.errors import RunDirError

# Between two tries to reach storage that is away; the pause doubles from the first to the longest.
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 15.0
# Packages whose errors mean that storage failed although they are no OSError.
STORAGE_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure")
# What another try cannot change: no permission, a client that is not installed or cannot do this.
_PERMANENT = (PermissionError, IsADirectoryError, ImportError, NotImplementedError)

log = logging.getLogger("longrope2")
T = TypeVar("T")


def retrying(action: Callable[[], T], what: str, patience_seconds: float) -> T:
    """Return the result of ``action``, which is run again while storage fails.

    Args:
        action: the call.
        what: the action in words, such as ``write s3://bucket/run/winner.json``.
        patience_seconds: how long it is tried.

    Raises:
        FileNotFoundError, FileExistsError, NotADirectoryError: as the action raised it.
        RunDirError: if the action still fails at the end, or another try cannot mend it.
    """
    began = time.monotonic()
    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            return action()
        except (FileNotFoundError, FileExistsError, NotADirectoryError):
            raise
        except Exception as error:
            if not _of_storage(error):
                raise
            over = time.monotonic() - began + pause > patience_seconds
            if over or isinstance(error, _PERMANENT):
                raise RunDirError(
                    f"--run-dir: cannot {what}: {error}; mend it, make room or set another "
                    f"--run-dir, then run again to resume"
                ) from error
            if pause == FIRST_PAUSE_SECONDS:
                log.warning(
                    "cannot %s: %s; trying for %g s (storage.patience_seconds)",
                    what, error, patience_seconds,
                )  # fmt: skip
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _of_storage(error: Exception) -> bool:
    """Tell whether an error comes from storage and not from a mistake in the code."""
    known = isinstance(error, (OSError, ImportError, NotImplementedError))
    return known or type(error).__module__.split(".")[0] in STORAGE_CLIENTS
