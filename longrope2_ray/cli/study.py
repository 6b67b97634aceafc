"""The command ``study``."""

import argparse
from typing import TYPE_CHECKING

from longrope2_ray.cli.arguments import add_command, add_study

if TYPE_CHECKING:
    from longrope2_ray.cli.arguments import Commands
    from longrope2_ray.study.progress import StudyStatus


def add_commands(commands: "Commands") -> None:
    """Declare ``study``."""
    study = add_command(
        commands,
        "study",
        study_command,
        "Compare variants of a recipe over several seeds, in one table.",
        details="Each trial is a whole search in its own run directory, on the Ray cluster at "
        "RAY_ADDRESS, else on this machine. A trial that fails ends no other. The same command "
        "resumes a study that was interrupted.",
        example="jobs/studies/search_presets.toml\n"
        "my.toml --search.iterations 4 --run-dir s3://my-bucket/runs/my",
        resumable=True,
    )
    add_study(study)
    study.add_argument(
        "--run-dir",
        metavar="DIR_OR_URL",
        help="directory or URL of the study (default: runs/<name of the study>)",
    )


def study_command(arguments: argparse.Namespace) -> int:
    """Run a study, or resume it, or print the table of a finished one."""
    from longrope2_ray.study.spec import load_study

    study = load_study(arguments.recipe, arguments.overrides)
    from longrope2_ray.cli.progress import ProgressLine
    from longrope2_ray.storage.rundir import RunDir
    from longrope2_ray.study.job import require_whole, run_study
    from longrope2_ray.study.spec import STUDY_JSON, STUDY_MARKDOWN
    from longrope2_ray.study.table import format_text

    run_dir = str(arguments.run_dir or f"runs/{study.spec.name}")
    with ProgressLine() as line:
        table = run_study(study, run_dir, lambda status: line.show("study:", _progress(status)))
    print(format_text(table))
    print()
    for name in (STUDY_JSON, STUDY_MARKDOWN):
        print(RunDir(run_dir).path / name)
    require_whole(table)
    return 0


def _progress(status: "StudyStatus") -> str:
    """Return the status of a study in one line."""
    from longrope2_ray.report.progress import format_seconds

    parts = [f"{status.finished} of {status.total} trials finished"]
    if status.failed:
        parts.append(f"{status.failed} failed")
    parts += status.running
    if status.best_ppl is not None:
        parts.append(f"best {status.best_ppl:.4g} in {status.best_trial}")
    if status.eta_seconds is not None:
        parts.append(f"ETA {format_seconds(status.eta_seconds)}")
    return ", ".join(parts)
