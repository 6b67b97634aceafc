"""The proof that nothing is lost: demo-size searches under random faults, each compared with an
undisturbed one.

    python tests/soak.py --searches 50 --seed 0 --log runs/soak.jsonl python tests/soak.py
    --searches 10 --seed 0 --log runs/soak_s3.jsonl --s3     # run directories in a bucket (moto)

Every search meets two to four faults at random moments. It is started again whenever its driver is
gone, and in the end its winner and every generation must be the same bytes, no unit may stand in
the ledger twice, and none that was ever seen there may be missing unless its file was damaged on
purpose. A driver that is terminated must say so by its exit code, and in time. Run again with the
same log, it goes on.
"""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import s3fs
from chaos import (
    GRACE_SECONDS,
    SCORER_FAULTS,
    STORAGE_FAULTS,
    Chaos,
    Cluster,
    Units,
    claims,
    committed,
    damage,
    outcome,
    s3_server,
    start_driver,
    wait_until,
)

# The paper's search in the demo's size; of its tables one row of each kind, since a fault in 441
# units of a table is no other fault.
RECIPE = [
    "demo",
    "--search.preset",
    "paper",
    "--search.population-size",
    "32",
    "--search.top-k",
    "4",
    "--search.num-offspring",
    "16",
    "--search.iterations",
    "12",
    "--needles.num-samples",
    "8",
    "--needles.depth",
    "start",
    "--report.methods",
    '["yarn", "longrope2"]',
    "--report.num-samples",
    "4",
    "--report.attention-factors",
    "[1.0]",
    "--scorer.stall-seconds",
    "20",
    "--storage.patience-seconds",
    "300",
]
BUCKET = "soak"
PATIENCE_SECONDS = 1800.0  # for one search


class Search:
    """One search in its directory, whatever happens to it."""

    def __init__(
        self, folder: Path, cluster: Cluster, rng: random.Random, server: psutil.Process | None
    ):
        self.folder, self.cluster, self.rng, self.server = folder, cluster, rng, server
        self.place = f"s3://{BUCKET}/{folder.name}" if server else str(folder / "run")
        self.known: dict[str, Units] = {}
        self.chaos, self.log = Chaos(folder / "chaos"), folder / "log"
        self.seen: Counter[tuple[str, str]] = Counter()
        self.damaged: list[str] = []
        self.wrong_ends: list[str] = []  # of terminated drivers: exit code and what they said
        self.starts = 0
        self.clock_seconds = 0.0
        self.driver = self.start()

    def start(self) -> Any:
        self.starts += 1
        return start_driver(
            self.place, RECIPE, self.cluster.address, self.chaos, self.log, self.clock_seconds
        )

    def look(self) -> int:
        """Units in the ledger now; whatever was there once is remembered."""
        units = committed(self.place, self.known)
        self.seen |= units
        return len(units)

    def stop(self, number: int) -> int:
        self.driver.send_signal(number)
        return int(self.driver.wait(timeout=300))

    def follow(self, done: Callable[[int], bool]) -> bool:
        """Until ``done(units)``, starting the driver again when it is gone; False if the
        search has ended before."""
        began = time.monotonic()
        while not done(self.look()):
            if self.driver.poll() == 0:
                return False
            if self.driver.poll() is not None:
                self.driver = self.start()
            self.cluster.mend()
            assert time.monotonic() - began < PATIENCE_SECONDS, f"no end in sight, see {self.log}"
            time.sleep(0.3)
        return True

    # --- faults

    def scorer_is_killed(self) -> str:
        scorers = self.cluster.scorers()
        if scorers:
            os.kill(self.rng.choice(scorers).pid, signal.SIGKILL)
        return f"one of {len(scorers)}"

    def scorer_misbehaves(self) -> str:
        fault = self.rng.choice(SCORER_FAULTS)
        self.chaos.order(fault)
        if fault == "load-fails":
            self.scorer_is_killed()  # so that another one has to load
        return fault

    def storage_misbehaves(self) -> str:
        fault = self.rng.choice(STORAGE_FAULTS)
        for _ in range(self.rng.randint(1, 4)):
            self.chaos.order(fault)
            time.sleep(1.0)
        return fault

    def storage_stalls(self) -> str:
        """Connections hang; on this machine's own disk nothing does."""
        seconds = self.rng.uniform(5, 20)
        if self.server:
            self.server.suspend()
            time.sleep(seconds)
            self.server.resume()
        return f"for {seconds:.0f} s" if self.server else "not on a disk"

    def node_is_lost(self) -> str:
        notice = self.rng.random() < 0.5
        self.cluster.lose_node(self.rng.randrange(len(self.cluster.nodes)), notice)
        time.sleep(self.rng.uniform(0, 10))
        self.cluster.add_node(wait=False)
        return "with notice" if notice else "without notice"

    def node_joins(self) -> str:
        self.cluster.add_node(wait=False)
        return ""

    def all_nodes_are_lost(self) -> str:
        count = len(self.cluster.nodes)
        for _ in range(count):
            self.cluster.lose_node(0)
        time.sleep(self.rng.uniform(5, 15))
        for _ in range(2):
            self.cluster.add_node(wait=False)
        return f"{count} nodes"

    def driver_is_killed(self) -> str:
        return f"exit code {self.stop(signal.SIGKILL)}"

    def driver_is_terminated(self) -> str:
        process = self.driver.pid
        wait_until(
            lambda: (
                self.driver.poll() is not None
                or any(claim["process"] == process for claim in claims(self.place).values())
            ),
            "it is at work",
        )
        if self.driver.poll() is not None:
            return f"it had ended with {self.driver.poll()}"
        self.driver.send_signal(signal.SIGTERM)
        try:
            end = f"exit code {self.driver.wait(timeout=GRACE_SECONDS)}"
        except subprocess.TimeoutExpired:
            self.stop(signal.SIGKILL)
            end = f"no exit within {GRACE_SECONDS:g} s"
        if end != "exit code 130":
            self.wrong_ends.append(f"{end}: {self.log.read_text()[-3000:]}")
        return end

    def second_driver_starts(self) -> str:
        older, self.driver = self.driver, self.start()
        code = older.wait(timeout=600)
        said = "a newer driver" in self.log.read_text()
        assert (code == 3 and said) or code == 0, (
            f"the older driver ended with {code} and did not say why"
        )
        return f"the older one ended with {code}"

    def head_is_restarted(self) -> str:
        self.cluster.restart_head(nodes=2)
        return f"the driver ended with {self.driver.wait(timeout=600)}"

    def clock_is_off(self) -> str:
        self.stop(signal.SIGKILL)
        self.clock_seconds = 86400.0
        return "by up to a day from now on"

    def files_are_damaged(self) -> str:
        self.stop(signal.SIGKILL)
        self.look()
        done = [damage(self.place, self.rng) for _ in range(3)]
        self.damaged += done
        self.known.clear()
        self.seen = committed(self.place, self.known)  # what was lost on purpose is not missing
        return ", ".join(done)


FAULTS = [
    Search.scorer_is_killed,
    Search.scorer_misbehaves,
    Search.storage_misbehaves,
    Search.node_is_lost,
    Search.node_joins,
    Search.all_nodes_are_lost,
    Search.driver_is_killed,
    Search.driver_is_terminated,
    Search.second_driver_starts,
    Search.head_is_restarted,
    Search.clock_is_off,
    Search.files_are_damaged,
]
FAULTS_IN_A_BUCKET = [*FAULTS, Search.storage_stalls, Search.storage_stalls]


def soak(
    index: int,
    seed: int,
    folder: Path,
    cluster: Cluster,
    expected: dict[str, bytes],
    units: int,
    server: psutil.Process | None,
) -> dict[str, Any]:
    """One search under faults; what happened and whether it came out right."""
    rng = random.Random(f"{seed} {index}")
    faults = rng.sample(FAULTS_IN_A_BUCKET if server else FAULTS, rng.randint(2, 4))
    moments = sorted(rng.randint(1, units - 20) for _ in faults)
    began = time.monotonic()
    search = Search(folder, cluster, rng, server)
    happened = []
    for moment, fault in zip(moments, faults, strict=True):
        if not search.follow(lambda seen, moment=moment: seen >= moment):
            break
        happened.append(f"{fault.__name__} at {moment}: {fault(search)}".rstrip(": "))
    search.follow(lambda seen: False)
    search.look()
    final = committed(search.place)  # read again, whole
    while len(cluster.nodes) > 2:
        cluster.lose_node(2)
    while len(cluster.nodes) < 2:
        cluster.add_node()
    found = outcome(search.place)
    return {
        "search": index,
        "same_bytes": found == expected,
        "differs": sorted(
            name for name in {*found, *expected} if found.get(name) != expected.get(name)
        ),
        "units_lost": len(search.seen.keys() - final.keys()),
        "units_committed_twice": sum(count > 1 for count in final.values()),
        "wrong_ends": search.wrong_ends,
        "starts": search.starts,
        "faults": happened,
        "misbehaviour": dict(search.chaos.taken()),
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--searches", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("runs/soak.jsonl"))
    parser.add_argument(
        "--s3", action="store_true", help="run directories in a bucket of an S3 server of its own"
    )
    args = parser.parse_args()
    with s3_server() if args.s3 else nullcontext() as server:
        return run(args, server)


def run(args: argparse.Namespace, server: psutil.Process | None) -> int:
    if server:
        s3fs.S3FileSystem().mkdir(BUCKET)
    # This process only looks on: it need not name each damaged file.
    logging.getLogger("longrope2").setLevel(logging.ERROR)
    rows = (
        [json.loads(line) for line in args.log.read_text().splitlines()]
        if args.log.exists()
        else []
    )
    args.log.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="soak", dir="/tmp"))
    cluster = Cluster(nodes=2)
    try:
        began = time.monotonic()
        calm = Search(work / "undisturbed", cluster, random.Random(0), server)
        calm.follow(lambda seen: False)
        expected, units = outcome(calm.place), len(committed(calm.place))
        print(f"undisturbed: {units} units, {time.monotonic() - began:.0f} s", flush=True)
        for index in range(len(rows), args.searches):
            row = soak(index, args.seed, work / str(index), cluster, expected, units, server)
            rows.append(row)
            with args.log.open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
            if bad(row):
                shutil.copytree(work / str(index), args.log.parent / f"soak-{args.seed}-{index}")
            shutil.rmtree(work / str(index))
    finally:
        cluster.close()
        shutil.rmtree(work, ignore_errors=True)
    right = sum(not bad(row) for row in rows)
    same = sum(row["same_bytes"] for row in rows)
    faults = Counter(fault.split(" ")[0] for row in rows for fault in row["faults"])
    wrong_ends = sum(len(row.get("wrong_ends", [])) for row in rows)
    print(
        f"{same} of {len(rows)} byte-identical, {sum(r['units_lost'] for r in rows)} units lost, "
        f"{sum(r['units_committed_twice'] for r in rows)} committed twice, "
        f"{wrong_ends} wrong exit codes; faults: {dict(faults)}"
    )
    return 0 if right == len(rows) else 1


def bad(row: dict[str, Any]) -> bool:
    lost = row["units_lost"] > 0 or row["units_committed_twice"] > 0
    return not row["same_bytes"] or lost or bool(row.get("wrong_ends"))


if __name__ == "__main__":
    sys.exit(main())
