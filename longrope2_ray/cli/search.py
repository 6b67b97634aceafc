"""The commands of a search: ``search``, ``monitor`` and ``report``."""

import argparse
import sys
from typing import TYPE_CHECKING

from longrope2_ray.cli.arguments import add_command, add_recipe, add_run_dir, run_dir_of
from longrope2_ray.cli.exit_codes import INTERRUPTED
from longrope2_ray.recipe.loading import load_recipe

if TYPE_CHECKING:
    from longrope2_ray.cli.arguments import Commands
    from longrope2_ray.search.winner import Winner
    from longrope2_ray.storage.rundir import RunDir


def add_commands(commands: "Commands") -> None:
    """Declare ``search``, ``monitor`` and ``report``."""
    search = add_command(
        commands,
        "search",
        search_command,
        "Search for the rescale factors that extend the model's window.",
        details="The search runs on the Ray cluster at RAY_ADDRESS, else on this machine. The same "
        "command resumes a search that was interrupted.",
        example="demo\ndemo --search.descent-steps 8 --run-dir runs/small",
        resumable=True,
    )
    add_recipe(search)
    add_run_dir(search)
    search.add_argument(
        "--dashboard", action="store_true", help="start Ray's dashboard on this machine"
    )

    monitor = add_command(
        commands,
        "monitor",
        monitor_command,
        "Show the progress of a run until it is finished.",
        details="Everything shown is read from the run directory, so any machine that reaches the "
        "directory can show it.",
        example="runs/demo\ns3://my-bucket/runs/demo --once",
    )
    monitor.add_argument("run_dir", metavar="DIR_OR_URL", help="directory or URL of the run")
    monitor.add_argument("--once", action="store_true", help="print the progress once and end")
    monitor.add_argument(
        "--every",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="seconds between two readings (default: %(default)g)",
    )

    report = add_command(
        commands,
        "report",
        report_command,
        "Write report.html and figures from a run directory.",
        example="runs/demo",
    )
    report.add_argument("run_dir", metavar="DIR_OR_URL", help="directory or URL of the run")


def search_command(arguments: argparse.Namespace) -> int:
    """Search, or resume, or print what a finished search found."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from longrope2_ray.report.metrics import SearchMetrics
    from longrope2_ray.report.page import ReportWriter
    from longrope2_ray.report.progress import ProgressBar, log_generation
    from longrope2_ray.report.tables import format_table
    from longrope2_ray.search.job import run_search
    from longrope2_ray.search.preparation import finished_winner, open_run, prepare
    from longrope2_ray.search.status import Observer
    from longrope2_ray.storage.rundir import RunDir
    from longrope2_ray.workers.connection import ray_session

    run_dir = RunDir(run_dir_of(arguments, recipe))
    prepared = prepare(recipe)
    resumed = open_run(prepared, run_dir)
    winner = finished_winner(prepared, run_dir)
    if winner is not None:
        return _print_finished(run_dir, winner)
    if resumed:
        print(f"resuming {run_dir.url}", file=sys.stderr)
    bar = ProgressBar()
    writer = ReportWriter(run_dir)
    try:
        with ray_session(arguments.dashboard):
            observers: list[Observer] = [bar, log_generation, SearchMetrics(recipe.name), writer]
            winner = run_search(prepared, run_dir, observers)
    finally:
        bar.stop()
    writer.finish()
    print(format_table(winner))
    _print_effort(run_dir)
    _print_places(run_dir)
    return 0


def _print_finished(run_dir: "RunDir", winner: "Winner") -> int:
    """Print the result of a finished search; write its report if the driver died before it did."""
    from longrope2_ray.report.page import ReportWriter, is_final
    from longrope2_ray.report.tables import format_table

    print(format_table(winner))
    if not is_final(run_dir):
        ReportWriter(run_dir).finish()
    print(f"\n{run_dir.url} holds this finished run; nothing was changed")
    _print_places(run_dir)
    return 0


def _print_effort(run_dir: "RunDir") -> None:
    from longrope2_ray.report.progress import format_seconds
    from longrope2_ray.search.status import read_status

    status = read_status(run_dir)
    if status is not None:
        elapsed = format_seconds(status.elapsed_seconds)
        print(
            f"\n{status.units_done} units scored, {status.units_eliminated} spared by racing, "
            f"in {elapsed}; the search cost {status.equivalents:.0f} full-length equivalents"
        )


def _print_places(run_dir: "RunDir") -> None:
    for name in ("winner.json", "report.html"):
        print(run_dir.path / name)


def monitor_command(arguments: argparse.Namespace) -> int:
    """Show a run's progress; Ctrl-C ends the display and interrupts nothing else."""
    from longrope2_ray.report.monitor import monitor

    if arguments.every <= 0:
        raise ValueError(f"--every: expected seconds above 0, got {arguments.every:g}")
    try:
        monitor(arguments.run_dir, arguments.once, arguments.every)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def report_command(arguments: argparse.Namespace) -> int:
    """Write the report of a run and print the files' places."""
    from longrope2_ray.report.page import write_report
    from longrope2_ray.storage.rundir import RunDir

    run_dir = RunDir(arguments.run_dir)
    if run_dir.read_json("run.json") is None:
        raise ValueError(
            f"RUN_DIR: expected the directory of a run, got {arguments.run_dir!r}, "
            f"which has no run.json"
        )
    for path in write_report(run_dir):
        print(path)
    return 0
