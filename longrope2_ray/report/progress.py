"""Progress of a search on a terminal and in the job's log."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from longrope2_ray.search.status import Status

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def log_generation(status: Status, event: str) -> None:
    """Print one JSON line for each generation to stderr, unless that is a terminal with a bar."""
    if event != "units" and not sys.stderr.isatty():
        # The list of all steps so far would grow with every line.
        values = {
            name: _rounded(value)
            for name, value in asdict(status).items()
            if name != "descent_ppls"
        }
        print(json.dumps({"event": event, **values}), file=sys.stderr, flush=True)


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def progress_bar() -> tuple["Progress", "TaskID"]:
    """Return a bar and its one task with fields ``best`` and ``eta``; silent off a terminal."""
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


def stop_bar(progress: "Progress") -> None:
    """Stop a bar; one that was never shown would print an empty line."""
    if progress.live.is_started:
        progress.stop()


class ProgressBar:
    """Observer of a search that shows generations or steps, units, the best one and the ETA."""

    def __init__(self) -> None:
        self._progress, self._task = progress_bar()

    def __call__(self, status: Status, event: str) -> None:
        eta = f"ETA {format_seconds(status.eta_seconds)}" if status.eta_seconds else ""
        self._progress.update(
            self._task,
            description=f"{status.state}, {status.units_done} units",
            completed=status.descent_step if in_steps(status) else status.generation,
            total=status.descent_steps if in_steps(status) else status.iterations,
            best=format_best(status),
            eta=eta,
        )

    def stop(self) -> None:
        """Leave the terminal as it was."""
        stop_bar(self._progress)


def in_steps(status: Status) -> bool:
    """Tell whether progress is counted in a descent's steps: no generation follows, or none yet."""
    return bool(status.descent_steps) and (status.state == "descending" or not status.iterations)


def format_best(status: Status) -> str:
    """Return the best perplexity and where it was found; nothing before the first generation.

    While descending, return the perplexity of the last step.
    """
    if not status.best_ppl:
        return ""
    if status.state == "descending":
        return f"perplexity {status.best_ppl:.4g} on its documents"
    return f"best {status.best_ppl:.4g} at d_rcd {status.best_critical_dim}"


def format_seconds(seconds: float | None) -> str:
    """Return a time as ``1:02:03`` or ``2:03``."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
