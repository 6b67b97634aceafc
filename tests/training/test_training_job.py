"""Training as a user runs it, on a real Ray with gloo workers: kills, resumes, refusals."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fsspec.core
import psutil
import pytest
import ray
import tomli_w
import torch
import transformers
from fsspec.implementations.local import LocalFileSystem
from tiny_models import save_tiny, section
from tiny_training import (
    LENGTH,
    prepared_dir,
    recipe_of,
    training_workers,
    without_times,
    write_data,
)

from longrope2_ray.cli import main
from longrope2_ray.errors import FencedError, RunDirError, StoppedError
from longrope2_ray.model.loading import load_model
from longrope2_ray.model.spec import read_shape
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.training.checkpoints import CheckpointStore, is_whole, seal
from longrope2_ray.training.factors import find_factors
from longrope2_ray.training.job import open_training, prepare, run_training, train
from longrope2_ray.training.records import (
    LoggedStep,
    TrainingJob,
    read_result,
    stop_message,
    training_dir,
)

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {"max_steps": 30, "checkpoint_steps": 4}


class Whole(NamedTuple):
    """A training that ended: its recipe and run directory, the logged steps, the weights."""

    recipe: Recipe
    folder: Path
    rows: list[Mapping[str, Any]]
    weights: dict[str, torch.Tensor]


def opened(recipe: Recipe, folder: Path) -> tuple[TrainingJob, RunDir, bool]:
    """The prepared training, its folder, and whether it was there."""
    run_dir = RunDir(str(folder))
    job = prepare(recipe, run_dir)
    train_dir = training_dir(recipe, run_dir)
    return job, train_dir, open_training(job, train_dir)


def trained(
    recipe: Recipe, folder: Path, observe: Callable[[LoggedStep], None] | None = None
) -> tuple[list[Mapping[str, Any]], dict[str, torch.Tensor]]:
    """Train to the end; the steps as their files tell them, and the model's weights."""
    done = train(recipe, str(folder), observe)
    train_dir = training_dir(recipe, RunDir(str(folder)))
    rows = [train_dir.read_json(name) for name in train_dir.names("steps")]
    weights = load_model(section(done.model)).state_dict()
    return rows, {name: tensor.clone() for name, tensor in weights.items()}


@pytest.fixture(scope="module")
def whole(
    ray_on_this_machine: None, model_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> Whole:
    """A training that nothing disturbed."""
    recipe = recipe_of(model_dir, **SETTINGS)
    folder = prepared_dir(tmp_path_factory.mktemp("whole"))
    return Whole(recipe, folder, *trained(recipe, folder))


@pytest.mark.timeout(900)  # Ray Train starts slowly where others are at work
def test_a_training_lowers_the_loss_and_its_model_loads_everywhere(
    tmp_path: Path, whole: Whole, model_dir: str
) -> None:
    rows = whole.rows
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(row["tokens_per_second"] > 0 and row["model_tflops_per_second"] > 0 for row in rows)
    place = str(whole.folder / "train" / "model")
    assert (
        read_shape(section(place)).geometry == read_shape(section(model_dir)).geometry
    )  # as the base model, both windows pinned from there
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place)
    rope = theirs.config.rope_parameters
    yarn = find_factors(whole.recipe, read_shape(section(model_dir)), RunDir(str(tmp_path)))
    assert rope["rope_type"] == "longrope"
    assert rope["long_factor"] == yarn.values.tolist()
    assert set(rope["short_factor"]) == {1.0}
    assert theirs.config.max_position_embeddings == LENGTH
    ids = torch.arange(3, 43)[None]
    base = load_model(section(place))
    assert torch.allclose(theirs(ids).logits, base(ids).logits, atol=1e-5)
    untrained = load_model(section(model_dir))
    assert not torch.allclose(base(ids).logits, untrained(ids).logits, atol=1e-3)


@pytest.mark.timeout(900)  # Ray Train starts slowly where others are at work
def test_a_training_whose_worker_is_killed_ends_as_an_undisturbed_one(
    tmp_path: Path, whole: Whole
) -> None:
    """With -9, between two checkpoints; Ray Train starts the group again."""
    folder = prepared_dir(tmp_path / "killed")
    with assassin(folder, step=10) as killed:
        rows, weights = trained(whole.recipe, folder)
    assert killed
    assert_same(whole, rows, weights)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_training_killed_twice_ends_as_an_undisturbed_one(tmp_path: Path, whole: Whole) -> None:
    """First the command is killed with -9, then a worker of the next: each between two checkpoints.

    A bit of the newest checkpoint flips in the meantime, and Ray's own notes are torn.
    """
    folder, recipe = prepared_dir(tmp_path / "killed"), whole.recipe
    (tmp_path / "test.toml").write_text(
        tomli_w.dumps(recipe.model_dump(mode="json", exclude_unset=True))
    )
    command = [
        sys.executable,
        "-m",
        "longrope2_ray",
        "train",
        str(tmp_path / "test.toml"),
        "--run-dir",
        str(folder),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    first = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_step(folder, 10, lambda: first.poll() is None)
    orphans = training_workers(first.pid)
    first.kill()
    first.wait()
    assert not (folder / "train" / "result.json").exists()
    assert orphans
    assert not psutil.wait_procs(orphans, timeout=60)[1], "they go with their Ray"
    newest, older, *_ = CheckpointStore(str(folder / "train"), 0.0).found()
    flip_a_bit(max(Path(newest).glob("*.distcp"), key=lambda path: path.stat().st_size))
    (Path(newest).parent / "checkpoint_manager_snapshot.json").write_text("{")
    steps = [
        json.loads(next(Path(place).glob("whole-*")).read_text())["step"]
        for place in (newest, older)
    ]
    written = {step: written_at(folder, step) for step in steps}
    resumed_with = steps[1] + 1
    # The orphans went on until their Ray was gone: the step may have been there before.
    before = written_at(folder, resumed_with)
    with assassin(folder, resumed_with, after=before) as killed:
        rows, weights = trained(recipe, folder)
    assert killed
    for step in steps:
        assert (written_at(folder, step) == written[step]) is (step == steps[1]), (
            "it did not go on from the older checkpoint"
        )
    assert_same(whole, rows, weights)


def assert_same(
    whole: Whole, rows: list[Mapping[str, Any]], weights: Mapping[str, torch.Tensor]
) -> None:
    """Check that steps and weights are those of the training that nothing disturbed."""
    assert [without_times(row) for row in rows] == [without_times(row) for row in whole.rows]
    assert all(torch.equal(whole.weights[name], weights[name]) for name in whole.weights)


@contextmanager
def assassin(folder: Path, step: int, after: int = 0) -> Iterator[list[int]]:
    """Kill the training's workers once a step is logged, later than ``after``; yield who was."""
    killed: list[int] = []

    def kill() -> None:
        wait_for_step(folder, step, lambda: True, after=after)
        for process in training_workers(os.getpid()):
            process.send_signal(signal.SIGKILL)
            killed.append(process.pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    yield killed
    thread.join(timeout=10)


def written_at(folder: Path, step: int) -> int:
    """When a logged step was written, in nanoseconds; 0 if it was not."""
    path = folder / "train" / "steps" / f"{step:07d}.json"
    return path.stat().st_mtime_ns if path.exists() else 0


def wait_for_step(folder: Path, step: int, alive: Callable[[], bool], after: int = 0) -> None:
    """Wait until a step is logged, and later than ``after`` (nanoseconds)."""
    began = time.monotonic()
    while written_at(folder, step) <= after:
        assert alive(), "the training ended before it could be killed"
        assert time.monotonic() - began < 600, "no steps came"
        time.sleep(0.01)


@pytest.mark.timeout(900)  # Ray Train starts slowly where others are at work
def test_a_finished_or_foreign_training_is_recognized(
    tmp_path: Path, whole: Whole, model_dir: str
) -> None:
    folder, recipe = shutil.copytree(whole.folder, tmp_path / "run"), whole.recipe
    job, train_dir, resumed = opened(recipe, folder)
    assert resumed
    result = read_result(train_dir)
    assert result.step == 30
    assert result.factors.values.tolist() == job.factors.values.tolist()
    written = train_dir.read_json("result.json")
    assert written == json.loads(json.dumps(result.to_json()))
    assert train(recipe, str(folder)).result.loss == result.loss
    for changes, what in (
        ({"learning_rate": 2e-3}, r"train\.learning_rate is 0\.001 there and 0\.002 now"),
        ({"factors": "ntk"}, r"train\.factors|fingerprint of factors"),
    ):
        with pytest.raises(RunDirError, match=what):
            opened(recipe_of(model_dir, **{**SETTINGS, **changes}), folder)
    # A torn run.json: nothing says which run the checkpoints belong to.
    (folder / "train" / "run.json").write_text("{")
    with pytest.raises(RunDirError, match=r"holds steps/.* no readable run\.json"):
        opened(recipe, folder)
    other = recipe_of(model_dir, name="other", factors="ntk")
    assert not opened(other, folder)[2]


def test_a_training_under_another_sliding_window_is_another(tmp_path: Path) -> None:
    model = save_tiny("mistral_windowed", tmp_path / "model")
    folder = prepared_dir(tmp_path / "run")

    def under(window: int) -> Recipe:
        recipe = recipe_of(model)
        return recipe.model_copy(
            update={"model": recipe.model.model_copy(update={"sliding_window": window})}
        )

    assert not opened(under(LENGTH), folder)[2]
    assert opened(under(LENGTH), folder)[2]
    with pytest.raises(RunDirError, match=r"model\.sliding_window is 96 there and 97 now"):
        opened(under(LENGTH + 1), folder)


@pytest.mark.parametrize(
    ("train", "data", "message"),
    [
        ({}, False, "run longrope2 data first"),
        ({"factors": "winner"}, True, r"train\.factors.*longrope2 search first"),
        ({"factors": "nothing.json"}, True, r"train\.factors.*nothing\.json"),
        (
            {"factors": "start.json"},
            True,
            r"train\.factors.*keeps the original RoPE at the first 8 positions",
        ),
        (
            {"global_batch_size": 9},
            True,
            r"train\.global_batch_size: expected at most the 8 segments",
        ),
        ({"sequence_parallel": 5}, True, r"train\.sequence_parallel"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(
    tmp_path: Path, model_dir: str, train: dict[str, Any], data: bool, message: str
) -> None:
    run_dir = RunDir(str(tmp_path))
    if data:
        write_data(run_dir)
    if train.get("factors") == "start.json":
        vector = {
            "factors": [1.0] * read_shape(section(model_dir)).geometry.num_cosines,
            "start_tokens": 8,
        }
        train["factors"] = str(tmp_path / "start.json")
        Path(train["factors"]).write_text(json.dumps(vector))
    with pytest.raises(ValueError, match=message):
        prepare(recipe_of(model_dir, **train), run_dir)
    assert not (tmp_path / "train" / "run.json").exists()


@pytest.mark.timeout(900)  # Ray Train starts slowly where others are at work
@pytest.mark.usefixtures("ray_on_this_machine")
def test_what_will_not_mend_stops_the_command_with_its_reason(
    tmp_path: Path, model_dir: str
) -> None:
    """A worker's error does not start it over and over, and the next command may go on."""
    wild = recipe_of(model_dir, learning_rate=1e30, warmup_steps=0)
    job, train_dir, _ = opened(wild, prepared_dir(tmp_path))
    with pytest.raises(StoppedError, match=r"the loss of step \d is .* lower train\.learning_rate"):
        run_training(job, train_dir, lambda step: None)
    assert train_dir.read_json("stop.json")["claim"] == train_dir.claim
    assert stop_message(train_dir)
    _, train_dir, resumed = opened(wild, tmp_path)
    assert resumed
    train_dir.take_over()
    assert stop_message(train_dir) is None


@pytest.mark.long
@pytest.mark.timeout(900)  # Ray Train starts slowly where others are at work
@pytest.mark.usefixtures("ray_on_this_machine")
def test_a_newer_command_on_the_same_training_fences_the_older_one_off(
    tmp_path: Path, model_dir: str
) -> None:
    """A group of two workers."""
    recipe = recipe_of(model_dir, max_steps=400, num_workers=2)
    job, train_dir, _ = opened(recipe, prepared_dir(tmp_path))
    newer = RunDir(train_dir.url)

    def take_over(step: LoggedStep) -> None:
        if newer.claim is None:
            newer.take_over()

    with pytest.raises(FencedError, match=r"a newer driver .* has taken over"):
        run_training(job, train_dir, take_over)
    assert len(train_dir.names("steps")) < 400
    assert train_dir.read_json("result.json") is None


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def make_checkpoint(place: Path, step: int, world: int = 2) -> Path:
    """Files as two workers leave them, each in a folder of its own until they are uploaded."""
    for rank in range(world):
        own = place.parent / f"own-{rank}"
        own.mkdir(parents=True)
        (own / f"__{rank}_0.distcp").write_bytes(bytes([step, rank]) * 50)
        seal(str(own), step, rank, world)
        place.mkdir(exist_ok=True)
        for path in list(own.iterdir()):
            path.rename(place / path.name)
        own.rmdir()
    return place


def no_download(path: str, filesystem: object) -> Any:
    raise AssertionError("a local checkpoint is read in place")


def test_only_whole_checkpoints_are_resumed_from_the_newest_first(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    assert CheckpointStore(str(tmp_path), 0.0).found() == []
    old = make_checkpoint(place / "000001-a" / "checkpoint_2", 8)
    # Ordered by its step, whatever the clock said.
    new = make_checkpoint(place / "000002-b" / "checkpoint_1", 12)
    oldest = make_checkpoint(place / "000001-a" / "checkpoint_1", 4)
    unfinished = make_checkpoint(place / "000003-c" / "checkpoint_3", 16)
    (unfinished / "whole-00001-of-00002.json").unlink()
    torn = make_checkpoint(place / "000003-c" / "checkpoint_4", 20)
    (torn / "whole-00000-of-00002.json").write_text('{"step": ')
    store = CheckpointStore(str(tmp_path), 0.0)
    assert store.found() == [str(new), str(old), str(oldest)]
    store.prune()
    assert store.found() == [str(new), str(old)]
    assert not (place / "000003-c").exists()
    assert not oldest.exists()
    with store.opened(str(new), no_download) as folder:
        assert all(is_whole(folder, rank, 3) for rank in range(3))
    for damage in (flip_a_bit, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])):
        damaged = make_checkpoint(place / "000004-d" / f"checkpoint_{damage.__name__}", 24)
        damage(damaged / "__1_0.distcp")
        assert not all(is_whole(str(damaged), rank, 3) for rank in range(3))


class FullDisk:
    """This machine's files; a file ``full`` in ``folder`` makes writing fail.

    Each refusal leaves a file ``refused-...`` in ``folder``.
    """

    def __init__(self, folder: str):
        self.folder = folder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(LocalFileSystem(), name)

    def put_file(self, here: str, there: str) -> None:
        if os.path.exists(f"{self.folder}/full"):
            Path(f"{self.folder}/refused-{uuid.uuid4().hex}").touch()
            raise OSError(errno.ENOSPC, "No space left on device")
        LocalFileSystem().put_file(here, there)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a file ``full`` fills the disk that checkpoints go to."""
    # Workers do not import the tests.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    (tmp_path / "disk").mkdir()
    full = FullDisk(str(tmp_path / "disk"))
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **_: (full, url))
    return tmp_path / "disk"


def test_a_checkpoint_file_appears_whole_or_not_at_all(tmp_path: Path, disk: Path) -> None:
    files = pickle.loads(pickle.dumps(CheckpointStore(str(tmp_path), 2.0).filesystem.handler.fs))
    place, run = tmp_path / "run" / "a", tmp_path / "run"
    files.mkdir(str(run))
    with pytest.raises(FileExistsError):
        files.mkdir(str(run))  # by the other worker: an answer, no fault
    stream = files.open(str(place), "wb")
    stream.write(b"half")
    assert not list(run.iterdir())
    stream.write(b" and half")
    (disk / "full").touch()
    threading.Timer(0.5, (disk / "full").unlink).start()
    stream.close()
    assert len(list(disk.glob("refused-*"))) >= 2
    with files.open(str(place), "rb") as stream:
        assert stream.read() == b"half and half"
    (disk / "full").touch()
    stream = files.open(str(place), "wb")
    stream.write(b"other")
    with pytest.raises(RunDirError, match=r"No space left on device; mend it, make room"):
        stream.close()
    assert [path.name for path in run.iterdir()] == ["a"]
    assert place.read_bytes() == b"half and half"
    with pytest.raises(FileNotFoundError):
        files.open(str(run / "b"), "rb")


@pytest.mark.long
@pytest.mark.timeout(900)  # Ray Train starts slowly where others are at work
@pytest.mark.usefixtures("ray_on_this_machine")
def test_a_training_waits_for_room_for_its_checkpoints(
    tmp_path: Path, model_dir: str, disk: Path
) -> None:
    recipe = recipe_of(model_dir, max_steps=12, checkpoint_steps=2, num_workers=2)
    refused: list[int] = []

    def fill(step: LoggedStep) -> None:
        if not refused:
            (disk / "full").touch()
            while (
                len(refused) < 4 and not (tmp_path / "waiting" / "train" / "result.json").exists()
            ):
                refused[:] = [1 for _ in disk.glob("refused-*")]
                time.sleep(0.1)
            (disk / "full").unlink()

    rows, weights = trained(recipe, prepared_dir(tmp_path / "waiting"), fill)
    assert len(refused) >= 4
    again, same = trained(recipe, prepared_dir(tmp_path / "undisturbed"))
    assert [without_times(row) for row in again] == [without_times(row) for row in rows]
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_the_command_says_what_is_missing_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "debug", "--run-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "run longrope2 data first" in error
    assert main(["train", "debug", "--run-dir", str(tmp_path), "--train.name", "scores"]) == 2
    assert "train.name: expected a folder of its own" in capsys.readouterr().err


@pytest.mark.timeout(900)  # Ray Train starts slowly where others are at work
@pytest.mark.usefixtures("ray_on_this_machine")
def test_too_many_workers_and_uneven_splits_are_refused_before_they_start(
    tmp_path: Path, model_dir: str
) -> None:
    for changes, message in (
        ({"num_workers": 64}, r"train\.num_workers"),
        ({"num_workers": 2, "global_batch_size": 3}, r"train\.global_batch_size"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        job, train_dir, _ = opened(recipe_of(model_dir, **changes), prepared_dir(folder))
        with pytest.raises(ValueError, match=message):
            run_training(job, train_dir, print)
    assert ray.is_initialized()
