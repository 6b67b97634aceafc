"""Mixed context window training as a Ray Train job: what is checked first, what the driver does.

    job = prepare(recipe, run_dir)                        # every check that needs no Ray
    train_dir = training_dir(recipe, run_dir)
    resumed = open_training(job, train_dir)               # its folder, begun or found again
    result = run_training(job, train_dir, observe)        # on the Ray that is there

``train`` does all of it. What a worker does is in ``worker``, the step in ``step``.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from longrope2_ray.data.shards import SegmentReader
from longrope2_ray.errors import StoppedError
from longrope2_ray.recipe.identity import identity
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.training.batches import check_parallel, require_epoch
from longrope2_ray.training.checkpoints import KEPT, CheckpointStore
from longrope2_ray.training.factors import factors_fingerprint, find_factors
from longrope2_ray.training.records import (
    MODEL_FOLDER,
    LoggedStep,
    Trained,
    TrainingJob,
    TrainingResult,
    read_result,
    read_step,
    stop_message,
    training_dir,
    write_result,
)
from longrope2_ray.training.watching import watching

if TYPE_CHECKING:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer


def train(
    recipe: Recipe,
    run_dir: str | None = None,
    observe: Callable[[LoggedStep], None] | None = None,
) -> Trained:
    """Train a model under the mixed context window, from the start or from its last checkpoint.

    Runs on the Ray that the process is connected to; else on the cluster at ``RAY_ADDRESS``, or
    on this machine, until it returns. A finished training is only read.

    Args:
        recipe: the recipe.
        run_dir: directory or URL with the training data, and with the search's winner where
            ``train.factors`` is ``winner``; ``runs/<recipe name>`` unless given.
        observe: called with each logged step, from a thread.

    Raises:
        ValueError: if the recipe, the run directory and the cluster do not fit together; the
            message names the field to change.
        FencedError: if a newer command takes the training over.
        StoppedError: if training cannot go on.
    """
    from longrope2_ray.workers.connection import ray_session

    files = RunDir(run_dir or str(Path("runs") / recipe.name))
    job = prepare(recipe, files)
    train_dir = training_dir(recipe, files)
    open_training(job, train_dir)
    result = read_result(train_dir)
    if result is None:
        with ray_session():
            result = run_training(job, train_dir, observe or (lambda step: None))
    return Trained(str(train_dir.path / MODEL_FOLDER), result)


def prepare(recipe: Recipe, run_dir: RunDir) -> TrainingJob:
    """Check all that can be checked without Ray and weights.

    Args:
        recipe: the recipe.
        run_dir: the run directory, with training data.

    Raises:
        ValueError: with one clear message, before anything expensive.
    """
    from longrope2_ray.model.fingerprint import model_fingerprint
    from longrope2_ray.model.loading import check_attention
    from longrope2_ray.model.spec import read_shape, require_window_reaches

    model, settings, target = recipe.model, recipe.train, recipe.search.target_length
    check_attention(model)
    if model.attention == "flash_attention_2" and settings.dtype == "float32":
        raise ValueError(
            "train.dtype: expected 'bfloat16' with model.attention = 'flash_attention_2', "
            "got 'float32'"
        )
    shape = read_shape(model)
    require_window_reaches(shape, model.path, target)
    reader = SegmentReader(run_dir)
    epoch = require_epoch(recipe, len(reader), reader.manifest.target_length)
    factors = find_factors(recipe, shape, run_dir)
    return TrainingJob(
        recipe=recipe,
        shape=shape,
        factors=factors,
        num_steps=settings.max_steps or epoch,
        num_segments=len(reader),
        fingerprints={
            "model": model_fingerprint(model),
            "data": reader.fingerprint,
            "factors": factors_fingerprint(factors),
        },
        url=run_dir.absolute_url,
    )


def open_training(job: TrainingJob, train_dir: RunDir) -> bool:
    """Begin or resume the training in ``train_dir``; True if it was there.

    Raises:
        RunDirError: if another training lives there.
    """
    return train_dir.open(
        kind="training",
        identity=identity(job.recipe, "training"),
        fingerprints=job.fingerprints,
        recipe=job.recipe.model_dump(mode="json"),
        facts={"num_segments": job.num_segments, "source": job.factors.source},
        folders=("steps",),
    )


def run_training(
    job: TrainingJob, train_dir: RunDir, observe: Callable[[LoggedStep], None]
) -> TrainingResult:
    """Train on the Ray that is there, from the last checkpoint if there is one.

    Args:
        job: the prepared training.
        train_dir: its opened folder.
        observe: called with each logged step, from a thread.

    Raises:
        ValueError: if the cluster has no room for the workers, or they do not come out even.
        FencedError: if a newer command takes the training over.
        StoppedError: if training cannot go on.
    """
    import ray
    from ray.train.v2.api.exceptions import TrainingFailedError

    scaling = _scaling(job, ray.cluster_resources())
    # from here on something could be lost
    train_dir.patience_seconds = job.recipe.storage.patience_seconds
    train_dir.take_over()
    trainer = _trainer(replace(job, claim=train_dir.claim), train_dir, scaling)
    try:
        with watching(train_dir, observe):
            trainer.fit()
    except TrainingFailedError as error:
        train_dir.require_ownership()
        raise StoppedError(
            f"training failed more than {job.recipe.train.max_failures} times "
            f"(train.max_failures): {error}"
        ) from error
    train_dir.require_ownership()
    message = stop_message(train_dir)
    if message is not None:
        raise StoppedError(message)
    last = read_step(train_dir, job.num_steps)
    if last is None:
        raise StoppedError(
            f"training ended without its last step in {train_dir.url}; run again to resume"
        )
    result = TrainingResult.of(job, last)
    write_result(train_dir, result)
    return result


def _scaling(job: TrainingJob, cluster: Mapping[str, float]) -> "ScalingConfig":
    """Return how many workers a cluster is asked for, and what each takes of it.

    Raises:
        ValueError: if this machine has no room for them, or they do not come out even.
    """
    from ray.train import ScalingConfig

    from longrope2_ray.workers.resources import use_gpu

    settings = job.recipe.train
    gpu = use_gpu(job.recipe.model.device, cluster)
    workers = settings.num_workers or (int(cluster.get("GPU", 0)) if gpu else 1)
    kind, each = ("GPU", 1.0) if gpu else ("CPU", settings.cpus_per_worker)
    room = cluster.get(kind, 0)
    if workers * each > room and not os.environ.get("RAY_ADDRESS"):
        raise ValueError(
            f"train.num_workers: expected room for {workers} workers of {each:g} {kind} each, "
            f"this machine has {room:g} {kind}"
        )
    check_parallel(workers, job.shape.num_kv_heads, settings)
    resources = {"CPU": settings.cpus_per_worker} | ({"GPU": 1} if gpu else {})
    return ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker=resources)


def _trainer(job: TrainingJob, train_dir: RunDir, scaling: "ScalingConfig") -> "TorchTrainer":
    """Return Ray Train's trainer of a job; removes checkpoints that no resume needs."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    store = CheckpointStore(f"{job.url}/{job.folder}", train_dir.patience_seconds)
    store.prune()
    return TorchTrainer(
        cast(Any, _run_worker),
        train_loop_config=cast(Any, job),
        scaling_config=scaling,
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        run_config=RunConfig(
            name=Path(str(job.claim)).stem,
            storage_path=store.path,
            storage_filesystem=store.filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT),
            failure_config=FailureConfig(max_failures=job.recipe.train.max_failures),
        ),
    )


def _run_worker(job: TrainingJob) -> None:
    """Run one worker's part of a job; Ray Train calls it again after each death in the group."""
    from ray.train import Checkpoint, get_context, report
    from ray.train.torch import get_device

    from longrope2_ray.training.worker import Worker, train_worker

    def report_checkpoint(folder: str, metrics: dict[str, float]) -> None:
        report(dict(metrics), checkpoint=Checkpoint.from_directory(folder))

    worker = Worker(
        rank=get_context().get_world_rank(),
        world_size=get_context().get_world_size(),
        device="cpu" if job.recipe.model.device == "cpu" else str(get_device()),
        report=report_checkpoint,
        download=lambda path, filesystem: Checkpoint(path, filesystem).as_directory(),
    )
    train_worker(job, worker)
