"""A run's snapshot as text for a terminal."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from longrope2_ray.report.progress import format_seconds, in_steps
from longrope2_ray.report.snapshot import Snapshot, TrainingSnapshot
from longrope2_ray.report.trainings import eta_seconds
from longrope2_ray.search.status import Status

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    Row = tuple[str, RenderableType]

# So many of the last steps of a descent have a column.
NUM_STEPS = 40
BARS = "▁▂▃▄▅▆▇█"
RESUME = "if it was stopped, run the same command again to resume"
FAULTS = ("requeued", "deaths", "preemptions", "stalls", "disputed")


def render(snapshot: Snapshot) -> "RenderableType":
    """Return the snapshot as a panel of rich."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.rule import Rule

    parts: list[RenderableType] = []
    if snapshot.searched:
        parts.append(_table(_search_rows(snapshot)))
    for training in snapshot.trainings:
        parts.append(Rule(f"training: {training.name}", style="dim", align="left"))
        parts.append(_table(_training_rows(training)))
    return Panel(Group(*parts), title=snapshot.name, title_align="left", border_style="dim")


def _table(rows: Iterable["Row"]) -> "Table":
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for row in rows:
        grid.add_row(*row)
    return grid


# --- the search


def _search_rows(snapshot: Snapshot) -> Iterator["Row"]:
    from rich.text import Text

    status = snapshot.status
    if status is None:
        yield "state", Text("starting; there is no status yet", style="yellow")
        return
    finished = status.state == "finished"
    at_work = not finished and not snapshot.lifeless
    yield "state", _search_state(snapshot, status)
    yield _progress(status, at_work)
    if status.descent_ppls:
        yield "steps so far", _sparkline(status.descent_ppls[-NUM_STEPS:])
    if status.state != "descending":
        yield "perplexity", _perplexities(status)
    if len(snapshot.best_ppls) > 1:
        yield "best so far", _sparkline(snapshot.best_ppls)
    counts = sorted((int(dim), count) for dim, count in status.critical_dims.items() if dim != "0")
    if counts:
        yield "survivors", _facts(*((f"d_rcd {dim}", str(count)) for dim, count in counts))
    yield "units", _units(status)
    yield "cost", _cost(status)
    if at_work:
        yield "scorers", _scorers(status)
    faults = {**dict.fromkeys(FAULTS, 0), **status.faults}
    yield "faults", _facts(*((name, str(count)) for name, count in faults.items()), alarm=True)
    if status.committed_at is not None and not finished:
        ago = format_seconds(max(time.time() - status.committed_at, 0.0))
        yield "last commit", Text(f"{ago} ago")


def _progress(status: Status, at_work: bool) -> "Row":
    """Return the bar of generations, or of the descent's steps."""
    name, done, total = "generation", status.generation, status.iterations
    if in_steps(status):
        name, done, total = "descent", status.descent_step, status.descent_steps
    line = _bar(1.0 if status.state == "finished" else done / max(total, 1))
    line.append(f"  step {done} of {total}" if name == "descent" else f"  {done} of {total}")
    if at_work:
        line.append(f"   ETA {format_seconds(status.eta_seconds)}", style="bold")
    return name, line


def _cost(status: Status) -> "Text":
    """Return what the search cost and will cost, in passes of the target length."""
    left = status.equivalents_left
    line = _facts(
        ("spent", f"{status.equivalents:,.1f}"), ("left", "?" if left is None else f"{left:,.1f}")
    )
    return line.append("   full-length equivalents", style="dim")


def _search_state(snapshot: Snapshot, status: Status) -> "Text":
    from rich.text import Text

    finished = status.state == "finished"
    state = Text(status.state, style="bold green" if finished else "bold")
    age = format_seconds(snapshot.age_seconds)
    if snapshot.lifeless:
        state.append(f"   no sign of life for {age}", style="bold red")
        return state.append(f"\n{RESUME}", style="red")
    if not finished:
        state.append(f"   seen {age} ago", style="dim")
    return state.append(f"   this attempt {format_seconds(status.elapsed_seconds)}", style="dim")


def _perplexities(status: Status) -> "Text":
    dim = str(status.best_critical_dim or "none") if status.best_ppl else "?"
    return _facts(
        ("best", _number(status.best_ppl)),
        ("at d_rcd", dim),
        ("median", _number(status.median_ppl)),
        ("worst", _number(status.worst_ppl)),
    )


def _units(status: Status) -> "Text":
    return _facts(
        ("done", f"{status.units_done:,}"),
        ("eliminated", f"{status.units_eliminated:,}"),
        ("left here", f"{status.units_left:,}"),
        ("ahead", f"{status.units_ahead:,}"),
    )


def _scorers(status: Status) -> "Text":
    line = _facts(*((state, str(count)) for state, count in status.scorers.items()))
    if status.unit_seconds is not None:
        line.append(f"   {status.unit_seconds:.3g} s a unit", style="dim")
    return line


# --- a training


def _training_rows(training: TrainingSnapshot) -> Iterator["Row"]:
    yield "state", _training_state(training)
    if not training.steps:
        return
    last = training.steps[-1]
    line = _bar(last.step / last.num_steps)
    line.append(f"  {last.step:,} of {last.num_steps:,}")
    if not training.finished and not training.lifeless:
        line.append(f"   ETA {format_seconds(eta_seconds(training.steps))}", style="bold")
    yield "step", line
    windows = ((window, _number(loss)) for window, loss in last.window_losses.items())
    yield "loss", _facts(("all", _number(last.loss)), *windows)
    if len(training.steps) > 1:
        yield "", _sparkline([step.loss for step in training.steps])
    utilization = last.model_flops_utilization
    yield (
        "pace",
        _facts(
            ("tokens/s", f"{last.tokens_per_second:,.0f}"),
            ("MFU", "?" if utilization is None else f"{utilization:.0%}"),
            ("learning rate", f"{last.learning_rate:.3g}"),
            ("gradient norm", f"{last.grad_norm:.3g}"),
        ),
    )


def _training_state(training: TrainingSnapshot) -> "Text":
    from rich.text import Text

    if training.finished:
        return Text("finished", style="bold green")
    if training.stopped:
        return Text(f"stopped: {training.stopped}", style="bold red")
    age, state = format_seconds(training.age_seconds), Text("training", style="bold")
    if training.lifeless:
        state.append(f"   no new step for {age}", style="bold red")
        return state.append(f"\n{RESUME}", style="red")
    seen = f"last step {age} ago" if training.steps else f"begun {age} ago, no step yet"
    return state.append(f"   {seen}", style="dim")


# --- pieces


def _facts(*pairs: tuple[str, str], alarm: bool = False) -> "Text":
    """Return ``name value   name value``; with ``alarm``, values that are not 0 stand out."""
    from rich.text import Text

    line = Text()
    for name, value in pairs:
        style = "bold"
        if alarm:
            style = "" if value == "0" else "bold yellow"
        line.append("   " if line else "").append(f"{name} ", style="dim")
        line.append(value, style=style)
    return line


def _bar(share: float, width: int = 30) -> "Text":
    from rich.text import Text

    done = round(width * min(max(share, 0.0), 1.0))
    return Text("━" * done, style="green").append("━" * (width - done), style="bright_black")


def _sparkline(values: Sequence[float | None]) -> "Text":
    """Return a column for each value, then the first and the last of them as numbers."""
    from rich.text import Text

    numbers = [value for value in values if value is not None]
    if not numbers:
        return Text("not finite")
    low, high = min(numbers), max(numbers)
    top = (len(BARS) - 1) / (high - low) if high > low else 0.0
    columns = (" " if value is None else BARS[round((value - low) * top)] for value in values)
    ends = f"  {_number(values[0])} to {_number(values[-1])}"
    return Text("".join(columns), style="cyan").append(ends, style="dim")


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"
