"""Trying again while storage is away or full."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from longrope2_ray.errors import RunDirError

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = (
    0.25,
    15.0,
)  # between two tries to reach a storage that is away


STORAGE_CLIENTS = (
    "botocore",
    "aiobotocore",
    "aiohttp",
    "gcsfs",
    "google",
    "azure",
)  # with errors that are no OSError


log = logging.getLogger("longrope2")


T = TypeVar("T")


def patiently(action: Callable[[], T], what: str, patience_seconds: float) -> T:
    """Do it; while storage is away or full, again and again until patience is over.

    Raises:
        FileNotFoundError, FileExistsError, NotADirectoryError: if that is the answer.
        RunDirError: if it cannot be done.
    """
    began, pause = time.monotonic(), FIRST_PAUSE_SECONDS
    while True:
        try:
            return action()
        except (FileNotFoundError, FileExistsError, NotADirectoryError):
            raise
        except Exception as error:
            if (
                not isinstance(error, (OSError, ImportError, NotImplementedError))
                and type(error).__module__.split(".")[0] not in STORAGE_CLIENTS
            ):
                raise
            # ImportError: the client of such URLs is not installed; NotImplementedError: it cannot do that
            mends = not isinstance(
                error, (PermissionError, IsADirectoryError, ImportError, NotImplementedError)
            )
            if not mends or time.monotonic() - began + pause > patience_seconds:
                raise RunDirError(
                    f"--run-dir: cannot {what}: {error}; mend it, make room or set another --run-dir, then run "
                    f"again to resume"
                ) from error
            if pause == FIRST_PAUSE_SECONDS:
                log.warning(
                    "cannot %s: %s; trying for %g s (storage.patience_seconds)",
                    what,
                    error,
                    patience_seconds,
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
