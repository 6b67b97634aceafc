"""The commands of training: ``data`` and ``train``."""

import argparse
import sys
from typing import TYPE_CHECKING

from longrope2_ray.cli.arguments import add_command, add_recipe, add_run_dir, run_dir_of
from longrope2_ray.recipe.loading import load_recipe

if TYPE_CHECKING:
    from longrope2_ray.cli.arguments import Commands


def add_commands(commands: "Commands") -> None:
    """Declare ``data`` and ``train``."""
    data = add_command(
        commands,
        "data",
        data_command,
        "Tokenize, choose and pack documents for training.",
        details="The recipe's [data] section names the sources and the quotas. The same command "
        "resumes work that was interrupted.",
        example="my.toml\nmy.toml --run-dir s3://my-bucket/runs/my",
        resumable=True,
    )
    add_recipe(data)
    add_run_dir(data)

    train = add_command(
        commands,
        "train",
        train_command,
        "Train with mixed context windows from the factors found.",
        details="The run directory holds the search's winner and the training data. The same "
        "command resumes a training that was interrupted.",
        example="my.toml\nmy.toml --train.factors yarn --train.name from-yarn",
        resumable=True,
    )
    add_recipe(train)
    add_run_dir(train)
    train.add_argument(
        "--dashboard", action="store_true", help="start Ray's dashboard on this machine"
    )


def data_command(arguments: argparse.Namespace) -> int:
    """Make the training data, or print the summary of finished data."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from longrope2_ray.cli.progress import ProgressLine
    from longrope2_ray.data.job import build_data, finished
    from longrope2_ray.data.manifest import MANIFEST, format_manifest
    from longrope2_ray.data.plan import prepare_data
    from longrope2_ray.workers.connection import ray_session

    plan = prepare_data(recipe, run_dir_of(arguments, recipe))
    manifest = finished(plan)
    if manifest is None:
        with ray_session(), ProgressLine() as line:
            manifest = build_data(
                plan,
                lambda kind, done, total: line.show(f"{kind}:", f"{done} of {total} shards"),
            )
    print(format_manifest(manifest))
    print(plan.run_dir.path / MANIFEST)
    return 0


def train_command(arguments: argparse.Namespace) -> int:
    """Train, or resume, or print what a finished training reached."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from longrope2_ray.report.metrics import TrainingMetrics
    from longrope2_ray.report.page import ReportWriter
    from longrope2_ray.report.training_observer import TrainObserver
    from longrope2_ray.storage.rundir import RunDir
    from longrope2_ray.training.job import open_training, prepare, run_training
    from longrope2_ray.training.records import MODEL_FOLDER, read_result, training_dir
    from longrope2_ray.workers.connection import ray_session

    run_dir = RunDir(run_dir_of(arguments, recipe))
    job, train_dir = prepare(recipe, run_dir), training_dir(recipe, run_dir)
    resumed = open_training(job, train_dir)
    model_dir = train_dir.path / MODEL_FOLDER
    result = read_result(train_dir)
    if result is not None:
        print(f"{model_dir}: trained for {result.step} steps, loss {result.loss:.4f}")
        print(f"{train_dir.url} holds this finished training; nothing was changed")
        return 0
    if resumed:
        print(f"resuming {train_dir.url}", file=sys.stderr)
    with ray_session(arguments.dashboard):
        metrics = TrainingMetrics(recipe.name, recipe.train.checkpoint_steps)
        observer = TrainObserver(metrics)
        try:
            result = run_training(job, train_dir, observer)
        finally:
            observer.stop()
    ReportWriter(run_dir).finish()
    print(f"trained for {result.step} steps, loss {result.loss:.4f}")
    print(model_dir)
    print(run_dir.path / "report.html")
    return 0
