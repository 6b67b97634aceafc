"""The cluster on one machine, for real: head, worker nodes, jobs, a stop, the same bytes; and
nothing left behind.

python -m pytest -m long tests/cluster/test_cluster_demo.py
"""

import ctypes
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SET_CHILD_SUBREAPER = 36

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(sys.platform != "linux", reason="prctl"),
]


def children() -> set[psutil.Process]:
    return {
        p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE
    }


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The demo, running, its run directories in ``tmp_path / "runs"``; when it has ended, no
    process of it may be left."""
    # Whatever outlives the demo becomes a child of this process.
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = children()
    # More generations than the recipe has: half of them are still ahead while the stop is on its
    # way.
    command = [sys.executable, "cluster/demo.py", "--recipe", "debug", "--search.iterations", "12"]
    process = subprocess.Popen([*command, "--run-dir", str(tmp_path / "runs")], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    yield process
    if process.poll() is None:  # the test failed on the way
        process.terminate()
        process.communicate()
    left = children() - before
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    assert left == set()


def test_a_search_that_was_stopped_half_way_ends_in_the_bytes_of_the_undisturbed_one(
    demo, tmp_path
):
    output = demo.communicate()[0]
    assert demo.returncode == 0, output[-5000:]
    assert "attempt-1: STOPPED" in output
    assert "attempt-2: SUCCEEDED" in output
    assert "lost or scored again: 0" in output
    winners = [
        (tmp_path / "runs" / name / "winner.json").read_bytes()
        for name in ("undisturbed", "stopped")
    ]
    assert winners[0] == winners[1]


def test_an_interrupted_demo_says_so_and_stops_its_cluster(demo):
    for line in demo.stdout:
        if line.startswith("undisturbed: RUNNING"):
            break
    demo.send_signal(signal.SIGINT)
    output = demo.communicate()[0]
    assert demo.returncode == 130, output[-5000:]
    assert "interrupted" in output
