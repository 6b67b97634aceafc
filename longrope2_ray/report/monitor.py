"""Shows a run in a terminal until it is finished, from its directory alone."""

import time

from longrope2_ray.errors import RunDirError
from longrope2_ray.report.snapshot import Monitor
from longrope2_ray.report.terminal import render
from longrope2_ray.storage.rundir import RunDir


def monitor(url: str, once: bool = False, every_seconds: float = 2.0) -> None:
    """Show a run until it is finished: live on a terminal, once elsewhere or if asked to.

    Raises:
        ValueError: if there is no run at ``url``, or it cannot be read.
    """
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    try:
        watched = Monitor(RunDir(url))
        snapshot = watched.look()
    except OSError as error:
        raise ValueError(f"RUN_DIR: cannot read {url}: {error}") from error
    if once or not console.is_terminal:
        console.print(render(snapshot))
        return
    with Live(render(snapshot), console=console, auto_refresh=False) as live:
        while not snapshot.finished:
            time.sleep(every_seconds)
            try:
                snapshot = watched.look()
                live.update(render(snapshot), refresh=True)
            # Storage may be away for a while.
            except (OSError, RunDirError) as error:
                live.update(Text(f"cannot read {url}: {error}", style="red"), refresh=True)
