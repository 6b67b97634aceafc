"""Object storage for real: run directory, model, data, search and training against an S3 server of
their own (moto).

The server listens on this machine and keeps everything in memory. ``test_rundir.py`` holds the
same contract for local paths and ``memory://``; here is what an object store adds.

python -m pytest -m long tests/storage
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
import ray
import s3fs
import tomli_w
import torch
from chaos import s3_server
from tiny_models import WINDOW, section
from tiny_training import LENGTH, recipe_of, training_workers, without_times, write_data
from tokenizers import Tokenizer, pre_tokenizers
from toy import ledger_of

from longrope2_ray.cli import main
from longrope2_ray.data.shards import SegmentReader
from longrope2_ray.errors import CorruptFileError, RunDirError
from longrope2_ray.model.fingerprint import model_fingerprint
from longrope2_ray.model.loading import load_model, load_tokenizer
from longrope2_ray.model.source import find_model
from longrope2_ray.model.spec import read_shape
from longrope2_ray.recipe.loading import load_recipe
from longrope2_ray.search.job import search
from longrope2_ray.search.scores import Score, scores_of
from longrope2_ray.storage.assets import ASSETS
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.training.job import open_training, prepare, run_training
from longrope2_ray.training.records import training_dir
from longrope2_ray.workers.connection import ray_session

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SMALL = [
    "--search.critical-dims",
    "[10, 11]",
    "--search.population-size",
    "4",
    "--search.num-offspring",
    "2",
    "--search.top-k",
    "2",
    "--needles.num-samples",
    "2",
    "--report.num-samples",
    "1",
    "--report.depth",
    "start",
    "--scorer.num-scorers",
    "1",
]
MOST_SECONDS = 900  # for what waits: the machine may be slow and others at work on it


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[psutil.Process]:
    """An S3 server, and the environment in which every client, in workers too, finds it and
    nothing else."""
    with s3_server() as process, pytest.MonkeyPatch.context() as environment:
        environment.setenv("LONGROPE2_CACHE", str(tmp_path_factory.mktemp("cache")))
        environment.delenv("RAY_ADDRESS", raising=False)
        s3fs.S3FileSystem.clear_instance_cache()
        yield process
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(server: psutil.Process) -> str:
    # The last test may have left clients that look elsewhere.
    s3fs.S3FileSystem.clear_instance_cache()
    name = uuid.uuid4().hex
    another_client().mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="module")
def ray_beside_the_server(no_ray: None, server: psutil.Process) -> Iterator[None]:
    """A Ray whose workers find the S3 server: they have the environment in which it starts."""
    with ray_session():
        yield


def another_client() -> s3fs.S3FileSystem:
    """What another process would be: it shares no cache with anyone."""
    return s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)


def wait_until(condition: Callable[[], Any]) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < MOST_SECONDS, "it did not come"
        time.sleep(0.1)


def files(url: str, client: s3fs.S3FileSystem | None = None) -> list[str]:
    """What lies there, as a client of its own sees it; one is handed in to look often."""
    return sorted(
        str(path).removeprefix(url.removeprefix("s3://") + "/")
        for path in (client or another_client()).find(url)
    )


# --- the run directory


def score(sample: int) -> Score:
    return Score("v", f"id-{sample}", "search", sample, 1.5, 7, True, 0.5, "scorer-00", 12.0)


def opened(url: str, seed: int = 0) -> RunDir:
    run_dir = RunDir(url)
    recipe = {"search": {"seed": seed}}
    run_dir.open("search", {"search.seed": seed}, {"model": "abc"}, recipe, {}, ["scores"])
    run_dir.take_over()
    return run_dir


def test_a_run_directory_in_a_bucket_is_resumed_compacted_and_refused_to_another_recipe(
    bucket: str,
) -> None:
    run_dir = opened(f"{bucket}/deep/run")
    for sample in range(3):
        scores_of(run_dir).commit([score(sample)])
    again = opened(run_dir.url)
    ledger = scores_of(again).load()
    assert dict(ledger) == {score(i).key: score(i) for i in range(3)}
    with pytest.raises(RunDirError, match=r"search\.seed is 0 there and 1 now"):
        opened(run_dir.url, seed=1)
    ledger.compact()
    held = files(run_dir.url)
    assert [name.split("/")[0] for name in held] == [
        "drivers",
        "drivers",
        "recipe.toml",
        "run.json",
        "scores",
    ]
    assert dict(ledger_of(run_dir)) == dict(ledger)


@pytest.mark.parametrize("how", ["torn", "a bit flipped"])
def test_a_spoiled_object_is_skipped_and_the_rest_is_used(bucket: str, how: str) -> None:
    run_dir = opened(f"{bucket}/run")
    for sample in range(3):
        scores_of(run_dir).commit([score(sample)])
    victim = run_dir.names("scores")[1]
    whole = (run_dir.path / victim).read_bytes()
    held = json.loads(whole)["rows"][0]["sample"]
    flipped = bytearray(whole)
    flipped[whole.index(b"1.5")] ^= 1
    another_client().pipe_file(
        f"{run_dir.url}/{victim}", whole[:-30] if how == "torn" else bytes(flipped)
    )
    fresh = RunDir(run_dir.url)
    rest = scores_of(fresh).load()
    assert {row.sample for row in rest.values()} == {0, 1, 2} - {held}
    rest.compact()
    assert victim in fresh.names("scores"), "it is left for a person to look at"


def test_what_another_process_writes_is_seen_whole_and_at_once(bucket: str) -> None:
    """A client that remembers a listing would miss new files and read rewritten ones cut to
    their old size."""
    ours, theirs = opened(f"{bucket}/run"), another_client()
    for index in range(2):
        ours.write_json(f"generations/{index:04d}.json", {"candidates": [0.5]})
    assert len(ours.names("generations")) == 2
    longer = RunDir(f"{bucket}/other")
    longer.write_json("longer.json", {"index": 0, "candidates": [1.5] * 1000})
    for index in (1, 2):  # one that was there, one that was not
        theirs.copy(f"{longer.url}/longer.json", f"{ours.url}/generations/{index:04d}.json")
        body = ours.read_json(f"generations/{index:04d}.json")
        assert body is not None, "a new file is not seen"
        assert len(body["candidates"]) == 1000
    theirs.rm(f"{ours.url}/generations/0000.json")
    assert ours.read_json("generations/0000.json") is None
    assert len(ours.names("generations")) == 2


def test_a_bucket_that_does_not_exist_is_told_and_not_made(server: psutil.Process) -> None:
    name = uuid.uuid4().hex
    with pytest.raises(RunDirError, match=r"^--run-dir: "):
        RunDir(f"s3://{name}/run").create()
    assert not another_client().exists(name)


def test_a_url_without_its_client_says_what_to_install() -> None:
    with pytest.raises(RunDirError, match=r"^--run-dir: .*install gcsfs"):
        RunDir("gs://bucket/run").create()


def test_a_server_that_is_gone_is_told_and_no_file_is_taken_for_torn(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = opened(f"{bucket}/run").url
    write_data(RunDir(url))
    reader = SegmentReader(url)
    with socket.socket() as nobody:  # bound, but it does not listen
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        s3fs.S3FileSystem.clear_instance_cache()
        away = RunDir(url)
        with pytest.raises(RunDirError, match="cannot read") as caught:
            away.read_or_skip("run.json")
        assert not isinstance(caught.value, CorruptFileError)
        with pytest.raises(RunDirError, match=r"^--run-dir: cannot write"):
            away.create()
        with pytest.raises(
            ValueError, match=r"expected a readable model at .*, got Could not connect"
        ):
            find_model(section(f"{bucket}/model"))
        reader._run_dir = away
        with pytest.raises(RunDirError, match="Could not connect") as caught_too:
            reader[0]
        assert "longrope2 data" not in str(caught_too.value), "the shard is taken for torn"


# --- the model


def test_a_model_in_a_bucket_is_the_same_model(bucket: str) -> None:
    fsspec.filesystem("s3").put(str(ASSETS / "reference"), f"{bucket}/model", recursive=True)
    url, here = section(f"{bucket}/model"), section("bundled:reference")
    assert read_shape(url) == read_shape(here)
    assert model_fingerprint(url) == model_fingerprint(here)
    text = "The pass key is 4711."
    assert load_tokenizer(url)(text)["input_ids"] == load_tokenizer(here)(text)["input_ids"]
    copied = section(find_model(url).location)
    assert load_model(copied).state_dict().keys() == load_model(here).state_dict().keys()
    with pytest.raises(
        ValueError, match=rf"expected a readable model at '{bucket}/none', got no such file"
    ):
        find_model(section(f"{bucket}/none"))


def test_a_model_without_keys_is_one_clear_message(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(
        ValueError, match=r"expected a readable model at .*, got Unable to locate credentials"
    ):
        find_model(section(f"{bucket}/model"))


# --- a search, as a user runs it


def longrope2(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [BIN / "longrope2", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*arguments: str) -> str:
    """What the command prints; it must succeed."""
    process = longrope2(*arguments)
    output, _ = process.communicate(timeout=MOST_SECONDS)
    assert process.returncode == 0, output[-3000:]
    return output


def kill(process: subprocess.Popen[str]) -> None:
    """With -9, and wait until its Ray is gone as well."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(children, timeout=120)[1], "they go with their driver"


def wait_for_chunks(url: str, count: int, driver: subprocess.Popen[str]) -> None:
    """Wait for so many chunks of scores, or for the driver's end."""
    client = another_client()
    wait_until(
        lambda: (
            driver.poll() is not None
            or sum(name.startswith("scores/") for name in files(url, client)) >= count
        )
    )


@pytest.fixture(scope="module")
def undisturbed(ray_on_this_machine: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small search in a local directory."""
    folder = tmp_path_factory.mktemp("local") / "run"
    search(load_recipe("debug", SMALL), str(folder))
    return folder


@pytest.mark.long
@pytest.mark.timeout(2 * MOST_SECONDS)
def test_a_search_killed_in_a_bucket_ends_in_the_bytes_of_a_local_one(
    bucket: str, undisturbed: Path
) -> None:
    url = f"{bucket}/run"
    command = ("search", "debug", "--run-dir", url, *SMALL)
    first = longrope2(*command)
    wait_for_chunks(url, 3, first)
    assert first.poll() is None, "it ended before it could be killed"
    kill(first)
    assert "winner.json" not in files(url)
    kept = len(ledger_of(RunDir(url)))
    assert kept >= 3
    output = run(*command)
    assert f"resuming {url}" in output
    assert (
        another_client().cat_file(f"{url}/winner.json")
        == (undisturbed / "winner.json").read_bytes()
    )


@pytest.mark.long
@pytest.mark.timeout(2 * MOST_SECONDS)
def test_a_search_waits_for_storage_that_does_not_answer(
    server: psutil.Process, bucket: str, undisturbed: Path
) -> None:
    """The server is stopped, not closed: connections hang. The model lies there too."""
    fsspec.filesystem("s3").put(str(ASSETS / "reference"), f"{bucket}/model", recursive=True)
    url = f"{bucket}/run"
    driver = longrope2(
        "search", "debug", "--run-dir", url, "--model.path", f"{bucket}/model", *SMALL
    )
    wait_for_chunks(url, 2, driver)
    assert driver.poll() is None, "it ended before storage could stall"
    server.suspend()
    try:
        time.sleep(5)
        assert driver.poll() is None, driver.communicate()[0][-3000:]
    finally:
        server.resume()
    output, _ = driver.communicate(timeout=MOST_SECONDS)
    assert driver.returncode == 0, output[-3000:]
    assert (
        another_client().cat_file(f"{url}/winner.json")
        == (undisturbed / "winner.json").read_bytes()
    )
    another_client().rm(f"{url}/report.html")
    assert main(["report", url]) == 0
    assert b"LongRoPE2" in another_client().cat_file(f"{url}/report.html")


# --- training


def train(recipe: Any, url: str) -> tuple[list[dict[str, Any]], Mapping[str, torch.Tensor]]:
    """Logged steps without their times, and the weights."""
    run_dir = RunDir(url)
    run_dir.create()
    write_data(run_dir)
    job = prepare(recipe, run_dir)
    train_dir = training_dir(recipe, run_dir)
    open_training(job, train_dir)
    run_training(job, train_dir, lambda row: None)
    rows = [train_dir.read_json(name) for name in train_dir.names("steps")]
    return [without_times(row) for row in rows if row], load_model(
        section(f"{url}/train/model")
    ).state_dict()


@pytest.mark.long
@pytest.mark.timeout(2 * MOST_SECONDS)
@pytest.mark.usefixtures("ray_beside_the_server")
def test_a_training_whose_worker_is_killed_and_whose_bucket_stalls_ends_in_the_bits_of_a_local_one(
    tmp_path: Path, server: psutil.Process, bucket: str, model_dir: str
) -> None:
    recipe = recipe_of(model_dir, max_steps=6, checkpoint_steps=2)
    rows, weights = train(recipe, str(tmp_path / "run"))
    url, killed = f"{bucket}/run", []

    def kill_a_worker() -> None:
        wait_until(lambda: "train/steps/0000003.json" in files(url))
        for process in training_workers(os.getpid()):
            process.send_signal(signal.SIGKILL)
            killed.append(process.pid)
        server.suspend()
        time.sleep(10)
        server.resume()

    assassin = threading.Thread(target=kill_a_worker, daemon=True)
    assassin.start()
    again, same = train(recipe, url)
    assassin.join(timeout=MOST_SECONDS)
    assert killed
    assert again == rows
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert any(
        name.startswith("train/checkpoints/") and "/checkpoint_" in name for name in files(url)
    )
    assert ray.is_initialized()


@pytest.mark.long
@pytest.mark.timeout(4 * MOST_SECONDS)
def test_data_and_training_in_a_bucket_killed_with_9_give_what_a_local_run_gives(
    tmp_path: Path, bucket: str, model_dir: str
) -> None:
    """Documents, data, checkpoints and both models lie in the bucket."""
    words = [f"w{i}" for i in range(3, 60)]
    texts = [
        " ".join(words[(7 * i + j) % len(words)] for j in range(10 + 11 * (i % 24)))
        for i in range(48)
    ]
    fsspec.filesystem("s3").pipe(
        f"{bucket}/text/a.jsonl",
        "".join(json.dumps({"text": text}) + "\n" for text in texts).encode(),
    )
    folder = shutil.copytree(model_dir, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    fsspec.filesystem("s3").put(str(folder), f"{bucket}/model", recursive=True)
    recipe = recipe_of(f"{bucket}/model", max_steps=6, checkpoint_steps=2).model_dump(
        mode="json", exclude_unset=True
    )
    recipe["data"] = {
        "sources": [{"name": "a", "path": [f"{bucket}/text/*.jsonl"]}],
        "bands": [
            {"max_tokens": WINDOW, "tokens": 2 * LENGTH},
            {"max_tokens": 1024, "tokens": 10 * LENGTH},
        ],
        "num_shards": 1,
    }
    (tmp_path / "test.toml").write_text(tomli_w.dumps(recipe))
    here, url = str(tmp_path / "run"), f"{bucket}/run"
    for place in (here, url):
        run("data", str(tmp_path / "test.toml"), "--run-dir", place)
    assert SegmentReader(url).manifest == SegmentReader(here).manifest
    command = ("train", str(tmp_path / "test.toml"), "--run-dir")
    run(*command, here)
    first = longrope2(*command, url)
    wait_until(lambda: first.poll() is not None or "train/steps/0000003.json" in files(url))
    assert first.poll() is None, "it ended before it could be killed"
    kill(first)
    assert "train/result.json" not in files(url)
    assert "resuming" in run(*command, url)
    for name in ("config.json", "model.safetensors"):
        assert (
            another_client().cat_file(f"{url}/train/model/{name}")
            == Path(here, "train/model", name).read_bytes()
        )
    assert (RunDir(url).read_json("train/result.json")) == RunDir(here).read_json(
        "train/result.json"
    )
