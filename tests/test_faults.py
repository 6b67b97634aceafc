"""What a run must survive, on real Ray processes: every test ends in the bytes of a run that
nobody disturbed.

    python -m pytest -m "long or not long" tests/test_faults.py tests/workers

Those of a single scorer stand in tests/workers, those of single files and object storage in
tests/storage; tests/soak.py mixes all of them at random.
"""

import os
import random
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from chaos import (
    BIN,
    ENVIRONMENT,
    GRACE_SECONDS,
    LINGERS,
    ROOT,
    SCORER_FAULTS,
    STORAGE_FAULTS,
    Chaos,
    Cluster,
    claims,
    committed,
    damage,
    faults,
    kill_tree,
    outcome,
    scored_by,
    start_driver,
    stop,
    wait_until,
)

RECIPE = ["debug", "--scorer.stall-seconds", "15", "--storage.patience-seconds", "120"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(nodes=2)
    yield cluster
    cluster.close()


class Run:
    """One search in a directory of its own, started as often as it takes, on the Ray at an
    address."""

    def __init__(self, folder: Path, address: str):
        self.folder, self.address, self.place = folder, address, folder / "run"
        folder.mkdir(exist_ok=True)
        self.chaos, self.log = Chaos(folder / "chaos"), folder / "log"
        self.drivers: list[subprocess.Popen[bytes]] = []

    def start(self, **settings: Any) -> subprocess.Popen[bytes]:
        driver = start_driver(self.place, RECIPE, self.address, self.chaos, self.log, **settings)
        self.drivers.append(driver)
        return driver

    def close(self) -> None:
        """Leave no driver behind that a failed test did not wait for."""
        for driver in self.drivers:
            driver.kill()
            driver.wait()

    def wait_for_scores(self, count: int) -> None:
        wait_until(
            lambda: len(committed(self.place)) >= count,
            f"{count} scores are committed in {self.place}",
        )

    @property
    def ended(self) -> bool:
        return (self.place / "winner.json").exists()

    def finish(self, driver: Any = None, **settings: Any) -> dict[str, bytes]:
        driver = driver or self.start(**settings)
        assert driver.wait(timeout=290) == 0, self.log.read_text()[-3000:]
        return outcome(self.place)


@pytest.fixture(scope="module")
def undisturbed(finished_debug_run: Path) -> dict[str, bytes]:
    """What every run ends in: where it runs, and with what patience, is no part of a result."""
    return outcome(finished_debug_run)


@pytest.fixture
def local_run(tmp_path: Path, ray_on_this_machine: None) -> Iterator[Run]:
    """A search on the Ray of the whole suite, of which no part may be killed."""
    run = Run(tmp_path, ray.get_runtime_context().gcs_address)
    yield run
    run.close()


class ClusterRun(Run):
    """A search on a cluster of its own."""

    def __init__(self, folder: Path, cluster: Cluster):
        super().__init__(folder, cluster.address)
        self.cluster = cluster


@pytest.fixture
def run(tmp_path: Path, cluster: Cluster) -> Iterator[ClusterRun]:
    run = ClusterRun(tmp_path, cluster)
    yield run
    run.close()
    while len(cluster.nodes) < 2:
        cluster.add_node()


@pytest.mark.long
def test_sigterm_ends_the_driver_cleanly_and_what_was_scored_is_kept(
    local_run: Run, undisturbed: dict[str, bytes]
) -> None:
    run = local_run
    driver = run.start()
    run.wait_for_scores(8)
    before = committed(run.place)
    assert stop(driver, signal.SIGTERM, GRACE_SECONDS) == 130
    log = run.log.read_text()
    assert "run the same command again to resume" in log
    assert "Traceback" not in log
    kept = committed(run.place)
    assert not before - kept
    assert run.finish() == undisturbed
    assert max(committed(run.place).values()) == 1


@pytest.mark.long
def test_of_two_drivers_on_one_directory_the_older_one_stops_and_says_so(
    local_run: Run, undisturbed: dict[str, bytes]
) -> None:
    run = local_run
    older = run.start()
    run.wait_for_scores(8)
    older.send_signal(signal.SIGSTOP)  # taken for dead, and back when another one is at work
    newer = run.start()
    wait_until(
        lambda: len(list((run.place / "drivers").iterdir())) == 2, "the newer driver has taken over"
    )
    older.send_signal(signal.SIGCONT)
    assert older.wait(timeout=200) == 3
    (said,) = [
        line
        for line in run.log.read_text().splitlines()
        if line.startswith("stopped: a newer driver")
    ]
    assert f"process {newer.pid} on" in said
    assert run.finish(newer) == undisturbed
    assert max(committed(run.place).values()) == 1, "a unit was committed twice"


@pytest.mark.long
@pytest.mark.parametrize("fault", SCORER_FAULTS)
def test_a_scorer_that_misbehaves_once_changes_nothing(
    run: ClusterRun, undisturbed: dict[str, bytes], fault: str
) -> None:
    if fault == "load-fails":
        run.chaos.order(fault)
    driver = run.start()
    if fault != "load-fails":
        run.wait_for_scores(6)
        run.chaos.order(fault)
    assert run.finish(driver) == undisturbed
    assert run.chaos.taken()[fault] == 1, "the fault never happened"


@pytest.mark.long
@pytest.mark.parametrize("fault", STORAGE_FAULTS)
def test_a_storage_that_misbehaves_for_a_while_changes_nothing(
    run: ClusterRun, undisturbed: dict[str, bytes], fault: str
) -> None:
    driver = run.start()
    run.wait_for_scores(6)
    run.chaos.begin(fault)
    wait_until(
        lambda: run.chaos.taken()[fault] >= 4,
        "several writes have been refused or slow",
        seconds=100,
    )
    assert not run.ended
    run.chaos.end(fault)
    assert run.finish(driver) == undisturbed
    assert max(committed(run.place).values()) == 1, "a unit was committed twice"


@pytest.mark.long
@pytest.mark.parametrize("notice", [True, False], ids=["with drain notice", "without notice"])
def test_a_node_is_lost_and_another_joins_late(
    run: ClusterRun, undisturbed: dict[str, bytes], notice: bool
) -> None:
    run.chaos.begin(LINGERS)
    driver = run.start()
    wait_until(lambda: len(scored_by(run.place)) == 2, "both nodes score")
    run.cluster.lose_node(0, notice)
    assert not run.ended, "the node was lost too late to matter"
    run.cluster.add_node(wait=False)
    # With notice a scorer may leave between two units, which requeues none.
    costs = ["preemptions"] if notice else ["deaths", "requeued"]
    wait_until(lambda: faults(run.place)[costs[0]] > 0, "the driver has seen it", seconds=100)
    run.chaos.end(LINGERS)
    assert run.finish(driver) == undisturbed
    assert min(faults(run.place)[cost] for cost in costs) >= 1, faults(run.place)


@pytest.mark.long
def test_a_node_that_joins_a_running_search_takes_part(
    run: ClusterRun, undisturbed: dict[str, bytes]
) -> None:
    run.cluster.lose_node(0)
    wait_until(lambda: len(run.cluster.alive()) == 2, "the head and one node are left")
    run.chaos.begin(LINGERS)
    driver = run.start()
    run.wait_for_scores(3)
    before = scored_by(run.place)
    assert len(before) == 1
    run.cluster.add_node(wait=False)
    wait_until(lambda: bool(scored_by(run.place) - before), "a new scorer stands in the ledger")
    assert not run.ended
    run.chaos.end(LINGERS)
    assert run.finish(driver) == undisturbed
    assert not faults(run.place).total(), "it is in another one's place"


@pytest.mark.long
def test_every_scorer_is_gone_for_a_while(run: ClusterRun, undisturbed: dict[str, bytes]) -> None:
    driver = run.start()
    run.wait_for_scores(6)
    run.cluster.lose_node(0)
    run.cluster.lose_node(0)
    with pytest.raises(AssertionError):
        wait_until(lambda: driver.poll() is not None, "the driver gave up", seconds=20)
    run.cluster.add_node(wait=False)
    assert run.finish(driver) == undisturbed


@pytest.mark.long
def test_the_head_is_restarted(run: ClusterRun, undisturbed: dict[str, bytes]) -> None:
    driver = run.start()
    run.wait_for_scores(6)
    run.cluster.restart_head(nodes=2)
    assert driver.wait(timeout=200) != 0, "the driver outlived its cluster"
    assert run.finish() == undisturbed


@pytest.mark.long
def test_a_driver_is_killed_at_random_points(
    run: ClusterRun, undisturbed: dict[str, bytes]
) -> None:
    rng = random.Random(0)
    for goal in sorted(rng.sample(range(1, 40), 3)):
        driver = run.start()
        run.wait_for_scores(goal)
        stop(driver)
    assert run.finish() == undisturbed
    assert max(committed(run.place).values()) == 1, "a unit was committed twice"


@pytest.mark.long
def test_clocks_that_are_off_by_days_change_nothing(
    run: ClusterRun, undisturbed: dict[str, bytes]
) -> None:
    driver = run.start(clock_seconds=3 * 86400.0)
    run.wait_for_scores(10)
    stop(driver)
    assert run.finish(clock_seconds=86400.0) == undisturbed
    for (name, claim), days in zip(claims(run.place).items(), (3, 1), strict=True):
        off = abs(claim["started"] - (run.place / name).stat().st_mtime)
        assert 60 < off < (days + 0.1) * 86400, "the driver's clock was right"


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_files_that_are_torn_flipped_or_missing_are_made_again(
    run: ClusterRun, undisturbed: dict[str, bytes], seed: int
) -> None:
    rng = random.Random(seed)
    driver = run.start()
    run.wait_for_scores(20)
    stop(driver)
    done = [damage(run.place, rng) for _ in range(4)]
    assert run.finish() == undisturbed, done


# --- what the manifests tell a pod to do before it goes


def pre_stop(kind: str) -> str:
    """The shell's line of the ``head`` or a ``worker``, the same in every manifest."""
    lines = set()
    for path in (ROOT / "cluster/kuberay").iterdir():
        spec = yaml.safe_load(path.read_text())["spec"]
        cluster = spec.get("rayClusterSpec", spec)
        for group in [cluster["headGroupSpec"]] if kind == "head" else cluster["workerGroupSpecs"]:
            (container,) = group["template"]["spec"]["containers"]
            shell, option, line = container["lifecycle"]["preStop"]["exec"]["command"]
            assert (shell, option) == ("/bin/sh", "-c")
            lines.add(line)
    (only,) = lines
    return str(only)


def as_in_a_pod(line: str, folder: Path, address: str, **narrower: str) -> subprocess.Popen[bytes]:
    """Run a line where it sees what a pod sees: ``narrower`` are options, by command, that
    leave the rest of this machine out."""
    for name, options in narrower.items():
        real = shutil.which(name, path=f"{BIN}:{os.environ['PATH']}")
        (folder / name).write_text(f'#!/bin/sh\nexec {real} "$@" {options}\n')
        (folder / name).chmod(0o755)
    environment = {
        **ENVIRONMENT,
        "RAY_ADDRESS": address,
        "PATH": f"{folder}:{BIN}:{os.environ['PATH']}",
    }
    return subprocess.Popen(["/bin/sh", "-c", line], env=environment)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("pkill") is None, reason="pkill (procps) is not installed")
def test_a_head_that_is_stopped_lets_its_driver_end(
    run: ClusterRun, undisturbed: dict[str, bytes]
) -> None:
    command = shlex.join(["jobs/search.py", *RECIPE, "--run-dir", str(run.place)])
    environment = {
        **ENVIRONMENT,
        "RAY_ADDRESS": run.cluster.address,
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    with run.log.open("ab") as out:  # through a shell, as Ray runs an entrypoint
        driver = subprocess.Popen(
            f"python {command} || exit $?",
            shell=True,
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    run.wait_for_scores(8)
    before = committed(run.place)
    session = f"--session {driver.pid}"
    hook = as_in_a_pod(
        pre_stop("head"), run.folder, run.cluster.address, pkill=session, pgrep=session
    )
    assert hook.wait(timeout=GRACE_SECONDS) == 0, "it is over when the driver is"
    assert driver.wait(timeout=1) == 130, run.log.read_text()[-3000:]
    assert not before - committed(run.place)
    assert not run.ended
    assert run.finish() == undisturbed


@pytest.mark.long
def test_a_worker_that_is_stopped_gives_notice(
    run: ClusterRun, undisturbed: dict[str, bytes]
) -> None:
    run.chaos.begin(LINGERS)
    driver = run.start()
    wait_until(lambda: len(scored_by(run.place)) == 2, "both nodes score")
    node = run.cluster.node_id(run.cluster.nodes[0])
    hook = as_in_a_pod(pre_stop("worker"), run.folder, run.cluster.address, ray=f"--node-id={node}")
    wait_until(
        lambda: faults(run.place)["preemptions"] == 1, "the driver has seen the notice", seconds=60
    )
    assert hook.poll() is None, "the pod waits for what runs in it"
    assert run.cluster.nodes[0].poll() is None
    assert not faults(run.place)["requeued"]
    kill_tree(hook)
    run.cluster.lose_node(0)
    run.chaos.end(LINGERS)
    assert run.finish(driver) == undisturbed
