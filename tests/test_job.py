"""``ray job submit`` on a real Ray head with its dashboard: the same search, the same bytes, the log readable.

python -m pytest -m long tests/test_job.py
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
ENVIRONMENT = {**{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, "RAY_AUTH_MODE": "disabled"}


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
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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


@pytest.mark.long
def test_a_submitted_job_gives_the_same_winner_as_the_command(head, tmp_path):
    job = subprocess.run(
        [str(BIN / "ray"), "job", "submit", "--address", head, "--working-dir", str(ROOT), "--",
         str(BIN / "python"), "jobs/search.py", "debug", "--run-dir", str(tmp_path / "job")],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-3000:]
    generations = [json.loads(line) for line in job.stdout.splitlines() if line.startswith('{"event"')]
    assert [g["generation"] for g in generations if g["event"] == "generation"] == [0, 1, 2]
    assert "needle perplexity" in job.stdout
    command = subprocess.run(
        [str(BIN / "longrope2"), "search", "debug", "--run-dir", str(tmp_path / "command")],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert command.returncode == 0, command.stderr[-3000:]
    assert (tmp_path / "job" / "winner.json").read_bytes() == (tmp_path / "command" / "winner.json").read_bytes()
