"""Progress on a terminal and in the job's log."""

import json
import logging
import sys
from dataclasses import asdict
from typing import Any

from longrope2_ray.search.status import Status

log = logging.getLogger("longrope2")


def log_generation(status: Status, event: str) -> None:
    """One JSON line a generation in the job's log; a terminal has the bar, and status.json the same."""
    if event != "units" and not sys.stderr.isatty():
        print(json.dumps({"event": event, **_rounded(asdict(status))}), file=sys.stderr, flush=True)


def progress_bar() -> tuple[Any, Any]:
    """A bar on a terminal, silent elsewhere, and its one task; fields ``best`` and ``eta``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[best]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[eta]}"),
        console=Console(stderr=True),
    )
    task = progress.add_task("starting", total=None, best="", eta="")
    if sys.stderr.isatty():
        progress.start()
    return progress, task


class ProgressBar:
    """Generations, units, the best so far and the ETA of a search."""

    def __init__(self) -> None:
        self._progress, self._task = progress_bar()

    def __call__(self, status: Status, event: str) -> None:
        best = (
            f"best {status.best_ppl:.4g} at d_rcd {status.best_critical_dim}"
            if status.best_ppl
            else ""
        )
        eta = f"ETA {format_seconds(status.eta_seconds)}" if status.eta_seconds else ""
        self._progress.update(
            self._task,
            description=f"{status.state}, {status.units_done} units",
            completed=status.generation,
            total=status.iterations,
            best=best,
            eta=eta,
        )

    def stop(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()


def format_seconds(seconds: float | None) -> str:
    """``1:02:03`` or ``2:03``."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
