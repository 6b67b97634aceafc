"""The connection of a command to Ray: to a running cluster, or to one on this machine."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from urllib.parse import urlparse

CONNECT_SECONDS = 60.0
DEFAULT_PORT = 6379
log = logging.getLogger("longrope2")


@contextmanager
def ray_session(dashboard: bool = False) -> Iterator[None]:
    """Connect to the cluster at ``RAY_ADDRESS``, or start one on this machine, for a block.

    SIGTERM raises KeyboardInterrupt in the block as Ctrl-C does, so that ``ray job stop`` leaves a
    run that can be resumed. In a process that is connected already the block uses that connection.

    Raises:
        ValueError: if the address cannot be reached.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _require_cluster(address)
    else:
        # A plain init would leave a token behind that later starts on this machine trip over.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else dashboard,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(
            f"RAY_ADDRESS: expected a Ray cluster at {address or 'this machine'}, got: {error}"
        ) from error
    # Ray installs handlers of its own: ours come after them.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        ray.shutdown()


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, as Ctrl-C does, and ignore SIGTERM during the brief end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _require_cluster(address: str) -> None:
    """Refuse an address that no Ray cluster answers at.

    Ray itself would wait for minutes, without reacting to signals, if something else listens there.

    Raises:
        ValueError: naming the address.
    """
    if address in ("auto", "local"):
        return
    parsed = urlparse(address if "://" in address else f"ray-gcs://{address}")
    try:
        place = parsed.hostname or "", parsed.port or DEFAULT_PORT
        socket.create_connection(place, timeout=10).close()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"RAY_ADDRESS: expected a reachable Ray cluster at {address!r}, got: {error}; "
            f"unset RAY_ADDRESS to run on this machine"
        ) from error
    if parsed.scheme != "ray" and not _is_healthy(f"{place[0]}:{place[1]}"):
        raise ValueError(
            f"RAY_ADDRESS: expected a Ray cluster at {address!r}, got no answer of one in "
            f"{CONNECT_SECONDS:g} s; give the head's address with its own port ({DEFAULT_PORT} "
            f"unless set), or unset RAY_ADDRESS to run on this machine"
        )


def _is_healthy(address: str) -> bool:
    """Tell whether Ray's own health check finds a cluster; that takes a second if there is one."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = shutil.which("ray", path=path)
    if command is None:
        return True
    check = [command, "health-check", "--address", address]
    try:
        return not subprocess.run(
            check, timeout=CONNECT_SECONDS, capture_output=True, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        return False
