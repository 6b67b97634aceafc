"""What one worker process of a training does: load, resume, train, log, save the model.

State is derived: a checkpoint holds weights, optimizer and step, and the step alone says which
segments come next. A worker that is killed at any moment costs the steps since the last
checkpoint, and no segment is trained twice or left out.
"""

import logging
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from longrope2_ray.data.shards import SegmentReader
from longrope2_ray.errors import FencedError
from longrope2_ray.export.huggingface import write_model
from longrope2_ray.model.costs import ACCELERATORS, step_flops
from longrope2_ray.model.loading import load_model, load_skeleton
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.training.batches import batch_indices
from longrope2_ray.training.checkpoints import CheckpointStore, Download, is_whole, seal
from longrope2_ray.training.records import (
    MODEL_FOLDER,
    LoggedStep,
    StepResult,
    TrainingJob,
    stop_message,
    write_step,
    write_stop,
)
from longrope2_ray.training.step import MixedTrainer

log = logging.getLogger("longrope2")


@dataclass(frozen=True)
class Worker:
    """A worker's place among the workers, and what Ray Train does for it.

    Attributes:
        rank: this worker's number, from 0.
        world_size: workers in all.
        device: the device that it computes on, such as ``cpu`` or ``cuda:0``.
        report: uploads a folder of this machine as this worker's part of a checkpoint; takes the
            folder and metrics, and every worker must call it.
        download: gives a local folder with an uploaded checkpoint's files, one for all workers of
            a machine.
    """

    rank: int
    world_size: int
    device: str
    report: Callable[[str, dict[str, float]], None]
    download: Download


def train_worker(job: TrainingJob, worker: Worker) -> None:
    """Train from the last whole checkpoint to the end; rank 0 logs, and writes the model.

    Ray Train calls this again after each death of a worker. An error that another try will not
    mend (a mistake of the user, too little memory) is written to ``stop.json``: each worker that
    starts later on behalf of the same command ends at once, and the command raises the message.

    Raises:
        ValueError: if a recipe field must be changed.
        FencedError: if a newer command has taken the training over.
        torch.OutOfMemoryError: if the device has too little memory.
    """
    patience_seconds = job.recipe.storage.patience_seconds
    train_dir = RunDir(f"{job.url}/{job.folder}", patience_seconds=patience_seconds)
    train_dir.claim = job.claim
    if stop_message(train_dir) is not None:
        return
    try:
        _train(job, worker, train_dir)
    except (ValueError, FencedError, torch.OutOfMemoryError) as error:
        message = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            message = (
                f"out of memory at {job.recipe.search.target_length} tokens: raise "
                f"train.sequence_parallel or train.num_workers, lower train.loss_chunk_tokens, "
                f"or set train.activation_checkpointing ({message})"
            )
        write_stop(train_dir, message)
        raise


def _train(job: TrainingJob, worker: Worker, train_dir: RunDir) -> None:
    settings = job.recipe.train
    torch.set_num_threads(settings.threads)
    trainer = _make_trainer(job, worker)
    reader = SegmentReader(RunDir(job.url, patience_seconds=train_dir.patience_seconds))
    store = CheckpointStore(train_dir.url, train_dir.patience_seconds)
    step = _resume(store, trainer, worker)
    while step < job.num_steps:
        began = time.perf_counter()
        if worker.rank == 0:
            train_dir.require_ownership()
        indices = trainer.share(batch_indices(step, len(reader), settings))
        result = trainer.step(step, [reader[index] for index in indices])
        _require_finite(result, step)
        step += 1
        last = step == job.num_steps
        if worker.rank == 0 and (step % settings.logging_steps == 0 or last):
            seconds = time.perf_counter() - began
            logged = _logged_step(job, worker.world_size, step, result, seconds)
            write_step(train_dir, logged)
        if step % settings.checkpoint_steps == 0 or last:
            with tempfile.TemporaryDirectory() as folder:
                trainer.save(folder, step)
                seal(folder, step, worker.rank, worker.world_size)
                worker.report(folder, {"step": step, "loss": result.loss})
    weights = trainer.weights()
    if worker.rank == 0:
        write_model(
            train_dir,
            MODEL_FOLDER,
            job.recipe.model,
            job.shape,
            job.factors,
            weights,
            target_length=job.recipe.search.target_length,
            mixed=settings.mixed,
            default_dtype=settings.dtype,
        )


def _make_trainer(job: TrainingJob, worker: Worker) -> MixedTrainer:
    """Load the model, on rank 0 with its weights, and shard it over the workers."""
    model = job.recipe.model
    # Master weights are float32 on the first rank's CPU; training brings its own attention.
    master = model.model_copy(update={"dtype": "float32", "attention": "sdpa", "device": "cpu"})
    loaded = load_skeleton(master) if worker.rank else load_model(master)
    return MixedTrainer(
        loaded,
        job.shape,
        job.factors,
        job.recipe.train,
        job.num_steps,
        kernel=model.attention,
        device=torch.device(worker.device),
    )


def _resume(store: CheckpointStore, trainer: MixedTrainer, worker: Worker) -> int:
    """Load the newest whole checkpoint and return its step; 0 if there is none."""
    for path in store.found():
        with store.opened(path, worker.download) as folder:
            if trainer.agree(is_whole(folder, worker.rank, worker.world_size)):
                return trainer.load(folder)
        log.warning("the checkpoint %s is damaged; an older one is taken", path)
    return 0


def _require_finite(result: StepResult, step: int) -> None:
    if not math.isfinite(result.loss + result.grad_norm):
        raise ValueError(
            f"the loss of step {step + 1} is {result.loss}, its gradient norm {result.grad_norm}: "
            f"lower train.learning_rate or raise train.warmup_steps, then run again to go on from "
            f"the last checkpoint"
        )


def _logged_step(
    job: TrainingJob, world_size: int, step: int, result: StepResult, seconds: float
) -> LoggedStep:
    flops = step_flops(job.shape, result.num_positions, result.num_pairs)
    peak = _peak_flops(torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    return LoggedStep(
        **asdict(result),
        step=step,
        num_steps=job.num_steps,
        seconds=seconds,
        tokens_per_second=result.num_positions / seconds,
        model_tflops_per_second=flops / seconds / 1e12,
        model_flops_utilization=flops / seconds / (peak * world_size) if peak else None,
    )


def _peak_flops(device_name: str) -> float | None:
    """Return the dense bfloat16 FLOPs per second of a GPU by its name, None if it is not known."""
    name = device_name.lower().replace(" ", "").replace("-", "")
    known = [
        device.tflops * 1e12 for key, device in ACCELERATORS.items() if key.split("-")[0] in name
    ]
    return known[0] if known else None
