"""A thread that shows a training's logged steps to an observer while the workers train."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from longrope2_ray.errors import RunDirError
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.training.records import LoggedStep

log = logging.getLogger("longrope2")

POLL_SECONDS = 2.0


@contextmanager
def watching(train_dir: RunDir, observe: Callable[[LoggedStep], None]) -> Iterator[None]:
    """Call ``observe`` from a thread, once for each step that is logged while the block runs.

    Args:
        train_dir: the training's folder.
        observe: the observer of each step.
    """
    ended = threading.Event()
    observed = set(train_dir.names("steps"))
    # without patience: storage that is away must not hold up the end of the training
    reader = RunDir(train_dir.url)

    def observe_new_steps() -> None:
        try:
            for name in reader.names("steps"):
                if name not in observed and (body := reader.read_or_skip(name)):
                    observed.add(name)
                    observe(LoggedStep.from_json(body))
        except RunDirError as error:
            log.warning("cannot read the logged steps: %s", error)

    def poll() -> None:
        while not ended.wait(POLL_SECONDS):
            observe_new_steps()

    thread = threading.Thread(target=poll, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        observe_new_steps()
