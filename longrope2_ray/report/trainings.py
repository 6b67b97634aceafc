"""The trainings of a run directory: which folders hold one, and the steps that they logged."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.training.records import LoggedStep

STEPS_FOLDER = "steps"
# The time of a step is the median of so many logged ones.
RECENT_STEPS = 20


def is_training(facts: Mapping[str, Any]) -> bool:
    """Tell whether the content of a ``run.json`` is a training's."""
    return facts.get("kind") == "training"


def training_folders(run_dir: RunDir, read: Callable[[str], Mapping[str, Any] | None]) -> list[str]:
    """Return the names of the folders of a run directory that hold a training, sorted.

    Args:
        read: reads a file of the run directory; None if it is not there or not whole.
    """
    folders = sorted(path.parent.name for path in run_dir.path.glob("*/run.json"))
    return [folder for folder in folders if is_training(read(f"{folder}/run.json") or {})]


def read_steps(run_dir: RunDir) -> dict[str, Sequence[LoggedStep]]:
    """Read the logged steps of every training that has any: name -> steps, oldest first."""
    found: dict[str, Sequence[LoggedStep]] = {}
    for folder in training_folders(run_dir, run_dir.read_or_skip):
        bodies = map(run_dir.read_or_skip, run_dir.names(f"{folder}/{STEPS_FOLDER}"))
        if steps := [LoggedStep.from_json(body) for body in bodies if body]:
            found[folder] = steps
    return found


def eta_seconds(steps: Iterable[LoggedStep]) -> float:
    """Return the seconds to the end of a training, given its last logged steps, oldest first."""
    recent = list(steps)[-RECENT_STEPS:]
    pace = statistics.median(step.seconds for step in recent)
    return pace * (recent[-1].num_steps - recent[-1].step)
