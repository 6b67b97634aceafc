"""``ray job submit`` on a real Ray head with its dashboard: the same search and training, the same
bytes, the log readable.

python -m pytest -m long tests/test_jobs.py
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import pytest
import tomli_w

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
    "RAY_AUTH_MODE": "disabled",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head():
    """A Ray head of its own; only its own processes are stopped after."""
    gcs, dashboard, agent = free_port(), free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short: paths of sockets may have 107 bytes
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={gcs}",
        f"--dashboard-port={dashboard}", f"--temp-dir={folder}",
        f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{dashboard}"
    began = time.monotonic()
    while subprocess.run([str(BIN / "ray"), "job", "list", "--address", address], env=ENVIRONMENT,
                         capture_output=True, check=False).returncode:  # fmt: skip
        assert process.poll() is None, "ray start ended"
        assert time.monotonic() - began < 120, "the dashboard did not come up"
        time.sleep(1)
    yield address
    process.terminate()
    process.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def submit(head: str, *entrypoint: str) -> str:
    """The log of a job that went well."""
    job = subprocess.run(
        [str(BIN / "ray"), "job", "submit", "--address", head, "--working-dir", str(ROOT), "--",
         str(BIN / "python"), *entrypoint],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-3000:]
    return job.stdout


def longrope2(*command: str) -> None:
    done = subprocess.run(
        [str(BIN / "longrope2"), *command],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.long
def test_a_submitted_job_gives_the_same_winner_as_the_command(head, tmp_path):
    log = submit(head, "jobs/search.py", "debug", "--run-dir", str(tmp_path / "job"))
    generations = [json.loads(line) for line in log.splitlines() if line.startswith('{"event"')]
    assert [g["generation"] for g in generations if g["event"] == "generation"] == [0, 1, 2]
    assert "needle perplexity" in log
    longrope2("search", "debug", "--run-dir", str(tmp_path / "command"))
    assert (tmp_path / "job" / "winner.json").read_bytes() == (
        tmp_path / "command" / "winner.json"
    ).read_bytes()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_submitted_jobs_pack_the_same_data_and_train_the_same_model_as_the_commands(head, tmp_path):
    recipe = tomllib.loads((ROOT / "jobs" / "recipes" / "demo.toml").read_text())
    recipe["data"]["sources"].pop()  # two sources for two bands
    for band, source in zip(recipe["data"]["bands"], recipe["data"]["sources"], strict=True):
        band.update(tokens=20_000, sources=[source["name"]])
    recipe["train"].update(factors="yarn", max_steps=4, checkpoint_steps=2, global_batch_size=2)
    place = str(tmp_path / "small.toml")
    Path(place).write_text(tomli_w.dumps(recipe))
    for kind in ("data", "train"):
        log = submit(head, f"jobs/{kind}.py", place, "--run-dir", str(tmp_path / "job"))
    steps = [
        json.loads(line)["step"] for line in log.splitlines() if line.startswith('{"event": "step"')
    ]
    assert steps == [1, 2, 3, 4]
    for kind in ("data", "train"):
        longrope2(kind, place, "--run-dir", str(tmp_path / "command"))
    for name in ("model.safetensors", "config.json"):
        ours, theirs = (tmp_path / run / "train" / "model" / name for run in ("job", "command"))
        assert ours.read_bytes() == theirs.read_bytes(), name
