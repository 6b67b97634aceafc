"""A toy training for tests: the files of a folder that no training wrote."""

from typing import Any

from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.training.records import LoggedStep


def logged_step(step: int, **values: Any) -> LoggedStep:
    """One logged step of 60; ``values`` override its fields."""
    fields: dict[str, Any] = {
        "step": step,
        "num_steps": 60,
        "loss": 3.0 - step / 100,
        "window_losses": {"short": 2.5, "long": 3.5},
        "num_tokens": 4000,
        "num_positions": 4096,
        "num_pairs": 8.0e6,
        "grad_norm": 1.5,
        "learning_rate": 2e-5,
        "seconds": 2.0,
        "tokens_per_second": 1234.4,
        "model_tflops_per_second": 0.5,
        "model_flops_utilization": 0.42,
    }
    return LoggedStep(**{**fields, **values})


def begin_training(run_dir: RunDir, folder: str = "train") -> None:
    """Write the run.json of a training into a folder of a run directory."""
    RunDir(str(run_dir.path / folder)).create()
    facts = {"kind": "training", "recipe": {}, "fingerprints": {}, "num_segments": 8}
    run_dir.write_json(f"{folder}/run.json", facts)


def write_step(run_dir: RunDir, step: int, folder: str = "train", **values: Any) -> None:
    """Write the file of one logged step."""
    body = logged_step(step, **values).to_json()
    run_dir.write_json(f"{folder}/steps/{step:07d}.json", body)
