"""Ray for the time of a command."""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from urllib.parse import urlparse

CONNECT_SECONDS = 60.0


@contextmanager
def ray_session(dashboard: bool = False) -> Iterator[None]:
    """Ray for the time of a command: the cluster at ``RAY_ADDRESS``, else one on this machine.

    SIGTERM ends the command as Ctrl-C does, so that ``ray job stop`` leaves a resumable run.

    Raises:
        ValueError: if the address cannot be reached.
    """
    address = os.environ.get("RAY_ADDRESS")
    deadline = None
    if address:
        _require_reachable(address)
        deadline = threading.Timer(CONNECT_SECONDS, _give_up, [address])
        deadline.daemon = True
        deadline.start()
    else:
        os.environ.setdefault(
            "RAY_AUTH_MODE", "disabled"
        )  # plain init would leave a token that later starts trip over
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    try:
        ray.init(
            address=address or "local",
            include_dashboard=dashboard if not address else None,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(
            f"RAY_ADDRESS: expected a Ray cluster at {address or 'this machine'}, got: {error}"
        ) from error
    finally:
        if deadline is not None:
            deadline.cancel()

    def stop(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; what follows is brief
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)  # after init, which installs its own
    try:
        yield
    finally:
        ray.shutdown()


def _give_up(address: str) -> None:
    """Ray waits for minutes, deaf to signals, for whatever else may listen at the address."""
    print(
        f"error: RAY_ADDRESS: expected a Ray cluster at {address!r}, got no answer of one in {CONNECT_SECONDS:g} s; give the "
        f"head's address with its own port (6379 unless set), or unset RAY_ADDRESS to run on this machine",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def _require_reachable(address: str) -> None:
    """Ray itself waits long and retries; a closed port shows at once."""
    if address in ("auto", "local"):
        return
    parsed = urlparse(address if "://" in address else f"ray-gcs://{address}")
    try:
        with socket.create_connection((parsed.hostname or "", parsed.port or 6379), timeout=10):
            pass
    except (OSError, ValueError) as error:
        raise ValueError(
            f"RAY_ADDRESS: expected a reachable Ray cluster at {address!r}, got: {error}; "
            f"unset RAY_ADDRESS to run on this machine"
        ) from error
