"""Faults for tests: a small real Ray cluster whose parts can be killed, and the real command with
faults on demand in it.

As a script it is ``longrope2`` itself, with scorers and storage that misbehave when a file in
``$CHAOS_DIR`` says so:

    CHAOS_DIR=/tmp/c python tests/chaos.py search debug --run-dir /tmp/run
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "CHAOS_DIR", "CHAOS_CLOCK")},
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # a lost node is noticed within seconds instead of half a minute
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
}
SCORER_FAULTS = ("hangs", "raises", "out-of-memory", "nan", "load-fails")
STORAGE_FAULTS = ("slow", "away", "full")
LINGERS = "lingers"  # no fault: a unit takes a second longer, so that there is time for one
GRACE_SECONDS = 30.0  # that the manifests leave a driver after SIGTERM (RAY_JOB_STOP_WAIT_TIME_S)


# --------------------------------------------------------------------------------------- inside
# driver and scorers


def take(folder: str, fault: str) -> bool:
    """Whether somebody ordered this fault; one order is one fault, however many could take it,
    unless it lasts."""
    order, taken = Path(folder) / fault, Path(folder) / f"{fault}.{uuid.uuid4().hex[:8]}.taken"
    if Path(f"{order}.lasts").exists():
        taken.touch()
        return True
    try:
        order.rename(taken)
    except OSError:
        return False
    return True


def misbehaving(folder: str) -> None:
    """Put scorers and storage that misbehave on order in place of the real ones, which they
    otherwise are."""
    import ray

    from longrope2_ray.search import job
    from longrope2_ray.search.job import ScorerSetup
    from longrope2_ray.storage.files import Files

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers import no tests
    write_once: Any = Files._write_once
    away = {"away": ConnectionError("no route to storage"), "full": OSError(28, "no space")}

    def misbehaving_write(self: Any, target: Any, data: bytes) -> None:
        if take(folder, "slow"):
            time.sleep(3)
        for fault, error in away.items():
            if take(folder, fault):
                raise error
        write_once(self, target, data)

    Files._write_once = misbehaving_write  # type: ignore[method-assign]
    real: Any = job
    real.ScorerSetup = lambda *arguments: MisbehavingSetup(folder, ScorerSetup(*arguments))


class MisbehavingSetup:
    """Sets up a scorer that misbehaves on order."""

    def __init__(self, folder: str, setup: Any):
        self._folder, self._setup = folder, setup

    def __call__(self, num_gpus: int) -> Callable[[Any], Any]:
        folder = self._folder
        if take(folder, "load-fails"):
            raise OSError("a disk that cannot be read")
        score = self._setup(num_gpus)

        def misbehaving(unit: Any) -> Any:
            if take(folder, LINGERS):
                time.sleep(1)
            if take(folder, "hangs"):
                time.sleep(1e6)
            if take(folder, "raises"):
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            if take(folder, "out-of-memory"):
                raise RuntimeError("CUDA out of memory. Tried to allocate 31 GiB")
            result = score(unit)
            return replace(result, nll_sum=float("nan")) if take(folder, "nan") else result

        return misbehaving


def skew_clock(seconds: float) -> None:
    """A wall clock that is off by up to so much, each time it is read another way."""
    real, rng = time.time, random.Random(0)
    time.time = lambda: real() + rng.uniform(-seconds, seconds)


# -------------------------------------------------------------------------------------------------
# from outside


class Chaos:
    """Orders faults from a driver and its scorers."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def order(self, fault: str) -> None:
        """Once."""
        (self.folder / fault).touch()

    def begin(self, fault: str) -> None:
        """Every time, until it ends."""
        (self.folder / f"{fault}.lasts").touch()

    def end(self, fault: str) -> None:
        (self.folder / f"{fault}.lasts").unlink()

    def taken(self) -> Counter[str]:
        return Counter(path.name.split(".")[0] for path in self.folder.glob("*.taken"))


def start_driver(
    run_dir: Path | str,
    recipe: Sequence[str],
    address: str,
    chaos: Chaos,
    log: Path,
    clock_seconds: float = 0.0,
) -> subprocess.Popen[bytes]:
    """``longrope2 search`` on the cluster; its output goes to ``log``."""
    command = [sys.executable, str(Path(__file__)), "search", *recipe, "--run-dir", str(run_dir)]
    bucket = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    environment = {
        **ENVIRONMENT,
        **bucket,
        "RAY_ADDRESS": address,
        "CHAOS_DIR": str(chaos.folder),
        "PYTHONPATH": str(ROOT),
    }
    if clock_seconds:
        environment["CHAOS_CLOCK"] = str(clock_seconds)
    with log.open("ab") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and all below it, at once and without a word, as a lost machine goes."""
    with suppress(psutil.NoSuchProcess):
        family = [
            *psutil.Process(process.pid).children(recursive=True),
            psutil.Process(process.pid),
        ]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.suspend()  # so that none sees another die
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


class Cluster:
    """A Ray head without CPUs and nodes of one CPU, every one a process of its own."""

    def __init__(self, nodes: int = 2):
        # A short path: paths of sockets may have 107 bytes.
        self.folder = tempfile.mkdtemp(prefix="c", dir="/tmp")
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.made = 0
        self.port = free_port()
        self.start(nodes)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, nodes: int) -> None:
        """A head, and ``nodes`` nodes that have joined it."""
        self.head = self._ray(
            "--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false"
        )
        self._wait_for(1)
        for _ in range(nodes):
            self.add_node()

    def add_node(self, wait: bool = True) -> None:
        self.nodes.append(self._ray(f"--address={self.address}", "--num-cpus=1"))
        if wait:
            self._wait_for(1 + len(self.nodes))

    def mend(self) -> None:
        """Replace nodes that went by themselves, as an operator does."""
        for node in [node for node in self.nodes if node.poll() is not None]:
            self.nodes.remove(node)
            self.add_node(wait=False)

    def _ray(self, *arguments: str) -> subprocess.Popen[bytes]:
        ports = [
            f"--{name}-port={free_port()}"
            for name in ("node-manager", "object-manager", "dashboard-agent-listen")
        ]
        command = [
            str(BIN / "ray"),
            "start",
            "--block",
            "--disable-usage-stats",
            "--object-store-memory=100000000",
        ]
        self.made += 1
        place = (
            f"--temp-dir={self.folder}/{self.made}"  # nodes that share one get in each other's way
        )
        return subprocess.Popen(
            [*command, *arguments, *ports, place],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def alive(self) -> set[str]:
        """Ids of the nodes that the head takes for alive, its own among them."""
        from ray._raylet import GcsClient

        with suppress(Exception):
            found = GcsClient(address=self.address).get_all_node_info(timeout=5).values()
            return {info.node_id.hex() for info in found if info.state == 0}
        return set()

    def _wait_for(self, nodes: int) -> None:
        began = time.monotonic()
        while len(self.alive()) < nodes:
            assert time.monotonic() - began < 240, f"{len(self.alive())} of {nodes} nodes came up"
            time.sleep(0.5)

    def scorers(self) -> list[psutil.Process]:
        """Processes of scorers on any node."""
        found = []
        for node in self.nodes:
            with suppress(psutil.NoSuchProcess):
                for process in psutil.Process(node.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        if process.cmdline()[:1] and process.cmdline()[0].startswith(
                            ("ray::Scorer", "ray::scorer-")
                        ):
                            found.append(process)
        return found

    def lose_node(self, index: int, notice: bool = False) -> None:
        """A node goes: without a word, or some seconds after its notice."""
        node = self.nodes.pop(index)
        if notice:
            wait_until(
                lambda: node.poll() is not None or self.node_id(node) in self.alive(),
                "the node can be drained",
            )
        if notice and node.poll() is None:  # else it went by itself
            drain = [
                str(BIN / "ray"),
                "drain-node",
                f"--address={self.address}",
                f"--node-id={self.node_id(node)}",
                "--reason=DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message=spot",
                "--deadline-remaining-seconds=5",
            ]
            subprocess.run(
                drain, env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True, timeout=120
            )
            time.sleep(3)
        kill_tree(node)

    def node_id(self, node: subprocess.Popen[bytes]) -> str | None:
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(node.pid).children(recursive=True):
                for argument in process.cmdline():
                    if argument.startswith("--node_id="):
                        return argument.partition("=")[2]
        return None

    def restart_head(self, nodes: int) -> None:
        """The head goes without a word, its nodes after it, and another cluster comes up
        at the same address."""
        kill_tree(self.head)
        for node in self.nodes:
            kill_tree(node)
        self.nodes.clear()
        self.start(nodes)

    def close(self) -> None:
        for process in (*self.nodes, self.head):
            kill_tree(process)
        shutil.rmtree(self.folder, ignore_errors=True)


# -------------------------------------------------------------------------------------------------
# the run directory


def damage(run_dir: Path | str, rng: random.Random) -> str:
    """Tear, flip, truncate, empty or remove one file of a run; what was done."""
    place = run_dir_of(run_dir)
    name = rng.choice(
        [
            n.lstrip("/")
            for folder in ("", "drivers", "generations", "scores")
            for n in place.names(folder)
        ]
    )
    path = place.path / name
    data = path.read_bytes()
    how = rng.choice(["torn", "flipped", "empty", "missing"])
    if how == "missing":
        path.unlink()
    elif how == "flipped" and data:
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
    else:
        path.write_bytes(data[: rng.randrange(len(data)) if how == "torn" and data else 0])
    return f"{name} {how}"


def outcome(run_dir: Path | str) -> dict[str, bytes]:
    """What has to be the same in the end: the winner and every generation, the final
    population among them."""
    place = run_dir_of(run_dir)
    return {
        name: bytes((place.path / name).read_bytes())
        for name in ["winner.json", *place.names("generations")]
    }


Units = list[tuple[str, str]]


def committed(
    run_dir: Path | str, known: dict[str, Units] | None = None
) -> Counter[tuple[str, str]]:
    """How often each unit stands in the ledger's whole segments; those in ``known`` are not
    read again."""
    place, known = run_dir_of(run_dir), {} if known is None else known
    names = place.names("scores")
    for name in names:
        if name not in known and (body := place.read_or_skip(name)):
            known[name] = [(row["vector_id"], row["sample_id"]) for row in body["rows"]]
    return Counter(unit for name in names for unit in known.get(name, []))


def scored_by(run_dir: Path | str) -> set[str]:
    """Scorers that stand in the ledger."""
    place = run_dir_of(run_dir)
    bodies = [place.read_or_skip(name) for name in place.names("scores")]
    return {row["scorer"] for body in bodies if body for row in body["rows"]}


def faults(run_dir: Path | str) -> Counter[str]:
    """What the newest status says was lost and mended."""
    from longrope2_ray.search.status import read_status

    status = read_status(run_dir_of(run_dir))
    return Counter(status.faults if status else {})


def claims(run_dir: Path | str) -> dict[str, dict[str, Any]]:
    """What drivers said when they took the directory over, by file."""
    place = run_dir_of(run_dir)
    return {name: body for name in place.names("drivers") if (body := place.read_or_skip(name))}


def run_dir_of(run_dir: Path | str) -> Any:
    """The files of a run, on this machine or in a bucket."""
    from longrope2_ray.storage.rundir import RunDir

    return RunDir(str(run_dir))


@contextmanager
def s3_server() -> Iterator[psutil.Process]:
    """An S3 server of its own (moto), which every client finds that is started meanwhile."""
    port = free_port()
    process = subprocess.Popen(
        [BIN / "moto_server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def answers() -> bool:
        assert process.poll() is None, "the S3 server ended"
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    found_by = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with mock.patch.dict(os.environ, found_by):
            wait_until(answers, "the S3 server answers")
            yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 300) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"waited {seconds:g} s in vain until {what}"
        time.sleep(0.1)


def stop(
    driver: subprocess.Popen[bytes], number: int = signal.SIGKILL, seconds: float = 300
) -> int:
    """Its exit code, for which it has so long."""
    driver.send_signal(number)
    return driver.wait(timeout=seconds)


def main() -> int:
    from longrope2_ray.cli import main as command

    misbehaving(os.environ["CHAOS_DIR"])
    if "CHAOS_CLOCK" in os.environ:
        skew_clock(float(os.environ["CHAOS_CLOCK"]))
    return command(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
