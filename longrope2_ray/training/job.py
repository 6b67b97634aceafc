"""Mixed context window training as a Ray Train job: workers, checkpoints, what others see. The maths is in ``training``.

State is derived: a checkpoint holds weights, optimizer and step, and the step alone says which segments come next, so a
worker killed at any moment costs the steps since the last checkpoint and no segment is trained twice or skipped.
"""

import hashlib
import json
import logging
import math
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from upath import UPath

from longrope2_ray.data.shards import SegmentReader
from longrope2_ray.errors import FencedError, RunDirError, StoppedError
from longrope2_ray.model.costs import step_flops
from longrope2_ray.recipe.fields import TRAIN_FREE_FIELDS, flatten
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.rope.baselines import METHODS, baseline
from longrope2_ray.rope.factors import RescaleFactors, factors_from_json
from longrope2_ray.search.space import attention_factor
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.training.batches import check_parallel
from longrope2_ray.training.checkpoints import KEPT, Snapshots, is_whole, seal

log = logging.getLogger("longrope2")


MODEL_FOLDER = "model"


POLL_SECONDS = 2.0


Row = Mapping[str, Any]  # one logged step: a StepResult, with what it took


@dataclass(frozen=True)
class TrainJob:
    """All that a worker needs; small, and the same for every one.

    Attributes:
        recipe: the run's.
        spec: of the model.
        factors: of the long window.
        num_steps: optimizer steps in all.
        url: of the run directory, absolute.
        attempt: of one command; what stopped a former one does not stop this one.
        claim: of the command on the training's folder; a newer one ends its workers.
    """

    recipe: Recipe
    spec: Any
    factors: RescaleFactors
    num_steps: int
    url: str
    attempt: str
    claim: str | None = None

    @property
    def folder(self) -> str:
        """Of this training in the run directory."""
        return self.recipe.train.name


def prepare_training(recipe: Recipe, run_dir: RunDir) -> tuple[TrainJob, RunDir, bool]:
    """Check all that can be checked without Ray and weights, and begin or resume its folder in the run directory.

    Returns:
        The job, its opened folder, and whether it was there.

    Raises:
        ValueError: with one clear message, before anything expensive.
    """
    from longrope2_ray.model.fingerprint import model_fingerprint
    from longrope2_ray.model.loading import check_attention
    from longrope2_ray.model.spec import read_spec, require_sight
    from longrope2_ray.training.batches import steps_per_epoch

    model, settings, target = recipe.model, recipe.train, recipe.search.target_length
    check_attention(model.attention, model.device)
    if model.attention == "flash_attention_2" and settings.dtype == "float32":
        raise ValueError(
            "train.dtype: expected 'bfloat16' with model.attention = 'flash_attention_2', got 'float32'"
        )
    spec = read_spec(model.path, original_length=model.original_length, **model.reading)
    require_sight(spec, model.path, target)
    reader = SegmentReader(run_dir)
    if reader.manifest["target_length"] != target:
        raise ValueError(
            f"search.target_length: expected {reader.manifest['target_length']}, for which the data of {run_dir.url} "
            f"was packed, got {target}; run longrope2 data again"
        )
    if target % settings.sequence_parallel:
        raise ValueError(
            f"train.sequence_parallel: expected a divisor of the target length {target}, "
            f"got {settings.sequence_parallel}"
        )
    epoch = steps_per_epoch(len(reader), settings)
    if not epoch:
        raise ValueError(
            f"train.global_batch_size: expected at most the {len(reader)} segments of the data, "
            f"got {settings.global_batch_size}; lower it or raise data.bands.tokens"
        )
    factors = find_factors(recipe, spec, run_dir)
    flat = {
        name: value
        for name, value in flatten(recipe).items()
        if name == "model.sliding_window"
        or (name.startswith("train.") and not name.startswith(TRAIN_FREE_FIELDS))
    }
    prints = {
        "model": model_fingerprint(model.path, **model.files),
        "data": reader.fingerprint,
        "factors": f"{factors.source} {_digest([factors.values.tolist(), factors.attention_factor])}",
    }
    train_dir = RunDir(str(run_dir.path / settings.name), folders=("steps",))
    facts = {"num_segments": len(reader), "source": factors.source}
    resumed = train_dir.open(flat, prints, recipe.model_dump(mode="json"), facts)
    url = str(run_dir.path.absolute()) if run_dir.local else run_dir.url
    return (
        TrainJob(recipe, spec, factors, settings.max_steps or epoch, url, uuid.uuid4().hex),
        train_dir,
        resumed,
    )


def _digest(numbers: list[Any]) -> str:
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:12]


def find_factors(recipe: Recipe, spec: Any, run_dir: RunDir) -> RescaleFactors:
    """The vector that ``train.factors`` names.

    Raises:
        ValueError: if the search is not finished, there is no such file, the vector does not fit the model, or keeps the
            original RoPE at the start, which no config of transformers can say.
    """
    name, search, geometry = recipe.train.factors, recipe.search, spec.geometry
    if name in METHODS and name != "longrope2":
        number = attention_factor(search.attention_factor, search.target_length / geometry.original_length,
                                  geometry.original_length)  # fmt: skip
        return baseline(name, geometry, search.target_length, attention_factor=number or 1.0)
    if name == "winner":
        winner = run_dir.winner()
        if winner is None:
            raise ValueError(
                f"train.factors: expected the winner of a finished search in {run_dir.url}, got none; run longrope2 "
                f"search first, or name a baseline method or a file"
            )
        vector = factors_from_json(json.dumps(winner), "winner")
    else:
        try:
            text = UPath(name).read_text(encoding="utf-8")
        except Exception as error:  # each storage client has errors of its own
            raise ValueError(
                f"train.factors: expected winner, a baseline method ({', '.join(sorted(set(METHODS) - {'longrope2'}))}), "
                f"a file or a URL, got {name!r}: "
                f"{error}"
            ) from error
        vector = factors_from_json(text, name)
    if vector.start_tokens:
        raise ValueError(
            f"train.factors: expected a vector for every position, which is all that transformers' longrope can say, got "
            f"one that keeps the original RoPE at the first {vector.start_tokens} positions; search with search.start_tokens = [0]"
        )
    return vector.require_length(geometry.num_cosines)


def train_worker(job: TrainJob) -> None:
    """What every worker runs, again after each death in its group.

    What will not mend by trying again (a mistake of the user, too little memory) is written down, so that the next
    start ends at once and the command can say it.
    """
    import torch

    run_dir = RunDir(job.url, patience_seconds=job.recipe.storage.patience_seconds)
    stop = run_dir.read_or_skip(f"{job.folder}/stop.json")
    if stop and stop["attempt"] == job.attempt:
        return
    try:
        _train(job, run_dir)
    except (ValueError, FencedError, torch.OutOfMemoryError) as error:
        message = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            message = (
                f"out of memory at {job.recipe.search.target_length} tokens: raise train.sequence_parallel or "
                f"train.num_workers, lower train.loss_chunk_tokens, or set train.activation_checkpointing ({message})"
            )
        run_dir.write_json(f"{job.folder}/stop.json", {"attempt": job.attempt, "message": message})
        raise


def _train(job: TrainJob, run_dir: RunDir) -> None:
    import ray.train
    import torch
    from ray.train.torch import get_device

    from longrope2_ray.model.loading import load_model, load_skeleton
    from longrope2_ray.training.batches import batch_indices
    from longrope2_ray.training.step import MixedTrainer

    settings, model = job.recipe.train, job.recipe.model
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    torch.set_num_threads(settings.threads)
    loaded = (
        load_skeleton(model.path, **model.reading)
        if rank
        else load_model(model.path, **model.reading, device="cpu")
    )
    device = torch.device("cpu") if model.device == "cpu" else get_device()
    trainer = MixedTrainer(
        loaded,
        job.spec,
        job.factors,
        settings,
        job.num_steps,
        kernel=model.attention,
        device=device,
    )
    reader = SegmentReader(run_dir)
    train_dir = RunDir(f"{job.url}/{job.folder}", patience_seconds=run_dir.patience_seconds)
    train_dir.claim = job.claim
    step = _resume(Snapshots(train_dir.url, run_dir.patience_seconds), trainer, rank, world)
    while step < job.num_steps:
        began = time.perf_counter()
        if rank == 0:
            train_dir.require_ownership()
        segments = [
            reader[index] for index in trainer.share(batch_indices(step, len(reader), settings))
        ]
        result = trainer.step(step, segments)
        if not math.isfinite(result.loss + result.grad_norm):
            raise ValueError(
                f"the loss of step {step + 1} is {result.loss}, its gradient norm {result.grad_norm}: lower "
                f"train.learning_rate or raise train.warmup_steps, then run again to go on from the last checkpoint"
            )
        step += 1
        if rank == 0 and (step % settings.logging_steps == 0 or step == job.num_steps):
            row = _row(job, step, asdict(result), time.perf_counter() - began)
            run_dir.write_json(f"{job.folder}/steps/{step:07d}.json", row)
        if step % settings.checkpoint_steps == 0 or step == job.num_steps:
            with tempfile.TemporaryDirectory() as folder:
                trainer.save(folder, step)
                seal(folder, step, rank, world)
                ray.train.report(
                    {"step": step, "loss": result.loss},
                    checkpoint=ray.train.Checkpoint.from_directory(folder),
                )
    weights = trainer.weights()
    if rank == 0:
        save_model(job, weights, run_dir)


def _resume(snapshots: Snapshots, trainer: Any, rank: int, world: int) -> int:
    """Take up the newest checkpoint that is whole; its step, 0 if there is none."""
    for path in snapshots.found():
        with snapshots.opened(path) as folder:
            if trainer.agree(is_whole(folder, rank, world)):
                return int(trainer.load(folder))
        log.warning("the checkpoint %s is damaged; an older one is taken", path)
    return 0


def _row(job: TrainJob, step: int, result: dict[str, Any], seconds: float) -> dict[str, Any]:
    import ray.train
    import torch

    flops = step_flops(job.spec, result["num_positions"], result["num_pairs"])
    world = ray.train.get_context().get_world_size()
    peak = _peak_flops(torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    return {
        "step": step,
        "num_steps": job.num_steps,
        **result,
        "seconds": seconds,
        "tokens_per_second": result["num_positions"] / seconds,
        "model_tflops_per_second": flops / seconds / 1e12,
        "model_flops_utilisation": flops / seconds / (peak * world) if peak else None,
    }


def _peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU by its name, None for one that is not known."""
    from longrope2_ray.model.costs import ACCELERATORS

    name = device_name.lower().replace(" ", "").replace("-", "")
    known = [
        device.tflops * 1e12 for key, device in ACCELERATORS.items() if key.split("-")[0] in name
    ]
    return known[0] if known else None


def save_model(job: TrainJob, weights: dict[str, Any], run_dir: RunDir) -> None:
    """Write ``model/`` and empty ``weights``; its config comes last, since nothing loads a directory without one."""
    from longrope2_ray.export.huggingface import extended_config, save_extended
    from longrope2_ray.model.loading import load_generation_config, load_tokenizer
    from longrope2_ray.model.spec import DTYPES, read_config

    model, target = job.recipe.model, job.recipe.search.target_length
    config = read_config(model.path, **model.reading)
    dtype = DTYPES.get(
        str(getattr(config, "dtype", None)).removeprefix("torch."), DTYPES[job.recipe.train.dtype]
    )
    config = extended_config(config, job.spec, job.factors, target, job.recipe.train.mixed)
    place = run_dir.path / job.folder / MODEL_FOLDER
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(model.path, **model.files)
        generation = load_generation_config(model.path, **model.files)
        save_extended(Path(folder), config, weights, tokenizer, dtype, generation)
        for path in sorted(Path(folder).iterdir(), key=lambda path: path.name == "config.json"):
            run_dir.write_bytes(f"{job.folder}/{MODEL_FOLDER}/{path.name}", path.read_bytes())


@contextmanager
def watching(train_dir: RunDir, observe: Callable[[Row], None]) -> Iterator[None]:
    """Call ``observe`` for every step that is logged while the block runs, from a thread; once a step."""
    done = threading.Event()
    seen = set(train_dir.names("steps"))
    eyes = RunDir(train_dir.url)  # without patience: who only looks on holds nobody up

    def look() -> None:
        try:
            for name in eyes.names("steps"):
                if name not in seen and (row := eyes.read_or_skip(name)):
                    seen.add(name)
                    observe(row)
        except RunDirError as error:
            log.warning("cannot look at the steps: %s", error)

    def loop() -> None:
        while not done.wait(POLL_SECONDS):
            look()

    thread = threading.Thread(target=loop, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        look()


def run_training(
    job: TrainJob, train_dir: RunDir, observe: Callable[[Row], None]
) -> dict[str, Any]:
    """Train on the Ray that is there, from the last checkpoint if there is one; the content of its ``result.json``.

    Raises:
        ValueError: if the cluster has no room for the workers, or they do not come out even.
        FencedError: if a newer command takes the training over.
        StoppedError: if training cannot go on.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    settings, cluster = job.recipe.train, ray.cluster_resources()
    use_gpu = job.recipe.model.device == "cuda" or (
        job.recipe.model.device == "auto" and cluster.get("GPU", 0) > 0
    )
    workers = settings.num_workers or (int(cluster.get("GPU", 0)) if use_gpu else 1)
    kind, each = ("GPU", 1.0) if use_gpu else ("CPU", settings.cpus_per_worker)
    if workers * each > cluster.get(kind, 0) and not os.environ.get("RAY_ADDRESS"):
        raise ValueError(
            f"train.num_workers: expected room for {workers} workers of {each:g} {kind} each, this machine has "
            f"{cluster.get(kind, 0):g} {kind}"
        )
    check_parallel(workers, job.spec.num_kv_heads, settings)
    train_dir.patience_seconds = (
        job.recipe.storage.patience_seconds
    )  # from here on something could be lost
    train_dir.take_over()
    snapshots = Snapshots(f"{job.url}/{job.folder}", train_dir.patience_seconds)
    snapshots.prune()
    trainer = TorchTrainer(
        cast(Any, train_worker),
        train_loop_config=cast(Any, replace(job, claim=train_dir.claim)),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker}
            | ({"GPU": 1} if use_gpu else {}),
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(
            name=Path(str(train_dir.claim)).stem,
            storage_path=snapshots.path,
            storage_filesystem=snapshots.filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT),
            failure_config=FailureConfig(max_failures=settings.max_failures),
        ),
    )
    try:
        with watching(train_dir, observe):
            trainer.fit()
    except TrainingFailedError as error:
        train_dir.require_ownership()
        raise StoppedError(
            f"training failed more than {settings.max_failures} times (train.max_failures): {error}"
        ) from error
    train_dir.require_ownership()
    stop = train_dir.read_or_skip("stop.json")
    if stop and stop["attempt"] == job.attempt:
        raise StoppedError(stop["message"])
    last = train_dir.read_or_skip(f"steps/{job.num_steps:07d}.json")
    if last is None:
        raise StoppedError(
            f"training ended without its last step in {train_dir.url}; run again to resume"
        )
    result = {name: last[name] for name in ("step", "loss", "window_losses", "num_tokens")}
    train_dir.write_json("result.json", {**result, "factors": job.factors.values.tolist(), "source": job.factors.source,
                                         "attention_factor": job.factors.attention_factor, "mixed": settings.mixed})  # fmt: skip
    return result
