"""A run in a terminal, from its directory alone: without Ray and Prometheus, local or in an object store, and writing nothing."""

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from longrope2_ray.errors import CorruptFileError, RunDirError
from longrope2_ray.report.progress import format_seconds
from longrope2_ray.search.status import Status
from longrope2_ray.storage.rundir import RunDir

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

LIFELESS_SECONDS = (
    60.0  # a driver writes its status every two seconds, but may wait for its storage
)


SHOWN = 40  # generations and logged steps in a line


BARS = "▁▂▃▄▅▆▇█"


RESUME = "if it was stopped, run the same command again to resume"


LOSSES = ("requeued", "deaths", "preemptions", "stalls", "disputed")


@dataclass(frozen=True)
class Training:
    """One training of a run: its last logged steps, oldest first; ``stopped`` says why its last attempt ended early."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    age_seconds: float
    finished: bool
    stopped: str | None

    @property
    def lifeless(self) -> bool:
        """Whether a step is long overdue."""
        longest = max((row["seconds"] for row in self.rows), default=0.0)
        return not self.finished and self.age_seconds > max(LIFELESS_SECONDS, 10 * longest)


@dataclass(frozen=True)
class Snapshot:
    """What a run directory shows at one moment.

    Attributes:
        searched: whether a search was begun here.
        status: None before its first.
        age_seconds: since the status was written.
        best: perplexity of the best survivor of the last closed generations, oldest first.
        finished: there is nothing left to wait for.
    """

    name: str
    searched: bool
    status: Status | None
    age_seconds: float
    best: Sequence[float | None]
    trainings: Sequence[Training]
    finished: bool

    @property
    def lifeless(self) -> bool:
        """Whether the search's driver seems to be gone."""
        return (
            self.status is not None
            and self.status.state != "finished"
            and self.age_seconds > LIFELESS_SECONDS
        )


class Monitor:
    """Looks at a run directory again and again; what cannot change is read once.

    Raises:
        ValueError: if there is no run.
    """

    def __init__(self, run_dir: RunDir):
        self._run_dir = run_dir
        self._kept: dict[str, dict[str, Any]] = {}
        self._pulse: dict[str, tuple[Mapping[str, Any], float]] = {}
        self._status: dict[str, Any] | None = None
        facts = run_dir.read_json("run.json")
        if facts and _of_training(facts):
            raise ValueError(
                f"RUN_DIR: {run_dir.url} is the folder of a training; give the run directory around it"
            )
        if facts is None and not self._trainings():
            raise ValueError(
                f"RUN_DIR: expected the directory of a run, got {run_dir.url!r}, which has no run.json"
            )
        self._facts = facts

    def look(self) -> Snapshot:
        """How the run stands now.

        Raises:
            OSError, RunDirError: if the storage is away.
        """
        self._run_dir.path.fs.invalidate_cache()  # object stores remember old listings
        if self._facts:
            self._status = (
                self._read("status.json") or self._status
            )  # one that is being replaced is read next time
        body = self._status
        status = _status(body) if body else None
        if status and status.state == "reporting" and self._read("winner.json"):
            status.state = "finished"  # its driver was killed after its last word but one
        trainings = [self._training(name) for name in self._trainings()]
        searched = self._facts is not None
        best = []
        for name in self._run_dir.names("generations")[-SHOWN:]:
            if generation := self._keep(name):
                best.append(generation["survivors"][0]["ppl"])
        return Snapshot(
            name=status.name if status else str((self._facts or {}).get("recipe", {}).get("name", self._run_dir.path.name)),
            searched=searched,
            status=status,
            age_seconds=self._age("status.json", body) if body else 0.0,
            best=best,
            trainings=trainings,
            finished=(not searched or (status is not None and status.state == "finished"))
            and all(training.finished for training in trainings),
        )  # fmt: skip

    def _read(self, name: str) -> dict[str, Any] | None:
        """A file that is there and whole; the run itself warns of torn ones."""
        try:
            return self._run_dir.read_json(name)
        except CorruptFileError:
            return None

    def _keep(self, name: str) -> dict[str, Any] | None:
        if name not in self._kept and (body := self._read(name)):
            self._kept[name] = body
        return self._kept.get(name)

    def _trainings(self) -> list[str]:
        """Folders that hold a training."""
        folders = sorted(path.parent.name for path in self._run_dir.path.glob("*/run.json"))
        return [f for f in folders if _of_training(self._keep(f"{f}/run.json") or {})]

    def _training(self, folder: str) -> Training:
        names = self._run_dir.names(f"{folder}/steps")[-SHOWN:]
        rows = [row for name in names if (row := self._keep(name))]
        last = names[-1] if names else f"{folder}/run.json"
        stop = self._read(f"{folder}/stop.json")
        age = self._age(last, self._kept.get(last) or {})
        return Training(
            name=folder,
            rows=rows,
            age_seconds=age,
            finished=self._read(f"{folder}/result.json") is not None,
            stopped=str(stop["message"])
            if stop and self._age(f"{folder}/stop.json", stop) <= age
            else None,
        )

    def _age(self, name: str, body: Mapping[str, Any]) -> float:
        """Seconds since a file got its content: by the storage's clock at the first look, by our own from then on."""
        before, now = self._pulse.get(name), time.monotonic()
        if before is None or before[0] != body:
            written = time.time() if before else self._written_at(name)
            self._pulse[name] = body, now - max(time.time() - written, 0.0)
        return now - self._pulse[name][1]

    def _written_at(self, name: str) -> float:
        path = self._run_dir.path / name
        try:
            return float(path.fs.modified(path.path).timestamp())
        except (
            FileNotFoundError,
            NotImplementedError,
        ):  # replaced just now, or a storage without times
            return time.time()


def _of_training(facts: Mapping[str, Any]) -> bool:
    return "num_segments" in facts


def _status(body: Mapping[str, Any]) -> Status:
    """What this version knows of a status; another one may have written more or less."""
    known = {field.name for field in fields(Status)}
    return Status(
        **{"name": "run", **{name: value for name, value in body.items() if name in known}}
    )


def render(snapshot: Snapshot) -> "RenderableType":
    """The snapshot for a terminal."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.rule import Rule
    from rich.table import Table

    def table(rows: Iterable[tuple[str, "RenderableType"]]) -> Table:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column()
        for row in rows:
            grid.add_row(*row)
        return grid

    parts: list[RenderableType] = []
    if snapshot.searched:
        parts.append(table(_search_rows(snapshot)))
    for training in snapshot.trainings:
        parts += [Rule(f"training: {training.name}", style="dim", align="left")]
        parts.append(table(_training_rows(training)))
    return Panel(Group(*parts), title=snapshot.name, title_align="left", border_style="dim")


def _search_rows(snapshot: Snapshot) -> Iterable[tuple[str, "RenderableType"]]:
    from rich.text import Text

    status = snapshot.status
    if status is None:
        yield "state", Text("starting; there is no status yet", style="yellow")
        return
    finished = status.state == "finished"
    state = Text(status.state, style="bold green" if finished else "bold")
    if snapshot.lifeless:
        state.append(
            f"   no sign of life for {format_seconds(snapshot.age_seconds)}", style="bold red"
        )
        state.append(f"\n{RESUME}", style="red")
    elif not finished:
        state.append(f"   seen {format_seconds(snapshot.age_seconds)} ago", style="dim")
    if not snapshot.lifeless:
        state.append(f"   this attempt {format_seconds(status.elapsed_seconds)}", style="dim")
    yield "state", state
    line = _bar(1.0 if finished else status.generation / max(status.iterations, 1))
    line.append(f"  {status.generation} of {status.iterations}")
    if not finished and not snapshot.lifeless:
        line.append(f"   ETA {format_seconds(status.eta_seconds)}", style="bold")
    yield "generation", line
    best, dim = (
        _number(status.best_ppl),
        str(status.best_critical_dim or "none") if status.best_ppl else "?",
    )
    median, worst = _number(status.median_ppl), _number(status.worst_ppl)
    yield (
        "perplexity",
        _facts(("best", best), ("at d_rcd", dim), ("median", median), ("worst", worst)),
    )
    if len(snapshot.best) > 1:
        yield "best so far", _sparkline(snapshot.best)
    if dims := sorted(
        (int(dim), count) for dim, count in status.critical_dims.items() if dim != "0"
    ):
        yield "survivors", _facts(*((f"d_rcd {dim}", str(count)) for dim, count in dims))
    units = {"done": status.units_done, "raced out": status.units_raced_out, "left here": status.units_left,
             "ahead": status.units_ahead}  # fmt: skip
    yield "units", _facts(*((name, f"{count:,}") for name, count in units.items()))
    if not finished and not snapshot.lifeless:
        scorers = _facts(*((state, str(count)) for state, count in status.scorers.items()))
        if status.unit_seconds is not None:
            scorers.append(f"   {status.unit_seconds:.3g} s a unit", style="dim")
        yield "scorers", scorers
    losses = {**dict.fromkeys(LOSSES, 0), **status.losses}
    yield "losses", _facts(*((name, str(count)) for name, count in losses.items()), alarm=True)
    if status.committed_at is not None and not finished:
        yield (
            "last commit",
            Text(f"{format_seconds(max(time.time() - status.committed_at, 0.0))} ago"),
        )


def _training_rows(training: Training) -> Iterable[tuple[str, "RenderableType"]]:
    from rich.text import Text

    age = format_seconds(training.age_seconds)
    state = (
        Text("finished", style="bold green")
        if training.finished
        else Text("training", style="bold")
    )
    if training.stopped and not training.finished:
        state = Text(f"stopped: {training.stopped}", style="bold red")
    elif training.lifeless:
        state.append(f"   no new step for {age}", style="bold red")
        state.append(f"\n{RESUME}", style="red")
    elif not training.finished:
        state.append(
            f"   last step {age} ago" if training.rows else f"   begun {age} ago, no step yet",
            style="dim",
        )
    yield "state", state
    if not training.rows:
        return
    last = training.rows[-1]
    line = _bar(last["step"] / last["num_steps"])
    line.append(f"  {last['step']:,} of {last['num_steps']:,}")
    if not training.finished and not training.lifeless:
        seconds = statistics.median(row["seconds"] for row in training.rows[-20:]) * (
            last["num_steps"] - last["step"]
        )
        line.append(f"   ETA {format_seconds(seconds)}", style="bold")
    yield "step", line
    yield (
        "loss",
        _facts(
            ("all", _number(last["loss"])),
            *((w, _number(v)) for w, v in last["window_losses"].items()),
        ),
    )
    if len(training.rows) > 1:
        yield "", _sparkline([row["loss"] for row in training.rows])
    utilisation = last.get("model_flops_utilisation")
    yield (
        "pace",
        _facts(
            ("tokens/s", f"{last['tokens_per_second']:,.0f}"),
            ("MFU", "?" if utilisation is None else f"{utilisation:.0%}"),
            ("learning rate", f"{last['learning_rate']:.3g}"),
            ("gradient norm", f"{last['grad_norm']:.3g}"),
        ),
    )


def _facts(*pairs: tuple[str, str], alarm: bool = False) -> "Text":
    """``name value   name value``; with ``alarm``, values that are not 0 stand out."""
    from rich.text import Text

    line = Text()
    for name, value in pairs:
        line.append("   " if line else "").append(f"{name} ", style="dim")
        line.append(
            value, style="bold yellow" if alarm and value != "0" else "" if alarm else "bold"
        )
    return line


def _bar(share: float, width: int = 30) -> "Text":
    from rich.text import Text

    done = round(width * min(max(share, 0.0), 1.0))
    return Text("━" * done, style="green").append("━" * (width - done), style="bright_black")


def _sparkline(values: Sequence[float | None]) -> "Text":
    """A column a value between the lowest and the highest of them, then the first and the last as numbers."""
    from rich.text import Text

    numbers = [value for value in values if value is not None]
    if not numbers:
        return Text("not finite")
    low, high = min(numbers), max(numbers)
    top = (len(BARS) - 1) / (high - low) if high > low else 0.0
    columns = "".join(
        " " if value is None else BARS[round((value - low) * top)] for value in values
    )
    return Text(columns, style="cyan").append(
        f"  {_number(values[0])} to {_number(values[-1])}", style="dim"
    )


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


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
            except (OSError, RunDirError) as error:  # a storage that is away for a while
                live.update(Text(f"cannot read {url}: {error}", style="red"), refresh=True)
