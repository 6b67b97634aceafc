"""How busy scorers are, how long they idle at the end of a generation, and what the driver costs,
with looking ahead off and on.

    python tests/benchmarks/bench_scheduler.py ray   --scorers 8 64 256
    python tests/benchmarks/bench_scheduler.py model --scorers 8 64 512 4096 --driver-ms 2
    python tests/benchmarks/bench_scheduler.py floor --scorers 64

``ray`` and ``model`` drive the real search: race, evolution, ledger. ``ray`` adds the real pool on
a real Ray, with scorers that sleep: one asynchronous actor stands for all of them, since hundreds
of processes do not fit a small machine. ``model`` replaces the pool and the clock by a heap of
completion times; the driver handles one unit after the other, each for ``--driver-ms``. Unit times
are lognormal with a few stragglers, one attempt in a hundred fails and is made again. The winner
must be the same bytes with looking ahead off and on. ``floor`` measures what Ray alone takes for a
call and its answer.
"""

import argparse
import asyncio
import heapq
import itertools
import math
import os
import statistics
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any
from unittest.mock import patch

import numpy as np

from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.rope.factors import RescaleFactors, assemble
from longrope2_ray.rope.geometry import RopeGeometry
from longrope2_ray.search.loop import SearchLoop
from longrope2_ray.search.scheduling import Scorers
from longrope2_ray.search.scores import (
    SEARCH_SET,
    NeedleSet,
    Unit,
    UnitScore,
    report_set,
    scores_of,
)
from longrope2_ray.search.status import Status
from longrope2_ray.search.winner import read_generations, read_winner
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.workers.done import Done

GEOMETRY = RopeGeometry(128, 128, 5e5, 8192)  # Llama-3-8B
TARGET_LENGTH = 131_072
NUM_SAMPLES = 10
NUM_TOKENS = 8
NEEDLE_SETS = {
    name: NeedleSet(
        name,
        tuple(f"{name}/{i}" for i in range(NUM_SAMPLES)),
        (NUM_TOKENS,) * NUM_SAMPLES,
        (0.0,) * NUM_SAMPLES,
    )
    for name in (SEARCH_SET, report_set(TARGET_LENGTH))
}
SPREAD = 0.25  # standard deviation of the logarithm of a unit's seconds
STRAGGLERS = 0.03  # share of the attempts that take three to five times as long
FAILURES = 0.01  # share of the attempts
IDEAL = assemble(29, np.linspace(18, 26, 64 - 29))

Busy = tuple[float, float, tuple[str, str] | None]
"""Start and end of an attempt, and the key of its unit; None for an attempt that failed."""


# --- what a unit scores and takes: functions of its content alone


def _sample(seed: int) -> tuple[float, np.ndarray]:
    rng = np.random.default_rng(seed)
    return float(rng.lognormal(0, 0.4)), rng.dirichlet(np.ones(len(IDEAL)))


SAMPLES = {
    True: [_sample(s) for s in range(NUM_SAMPLES)],
    False: [_sample(1000 + s) for s in range(NUM_SAMPLES)],
}


def nll(unit: Unit) -> float:
    """Return the distance from an ideal vector, with a hardness and weights for each sample."""
    hardness, weights = SAMPLES[unit.needle_set == SEARCH_SET][unit.sample]
    gaps = np.log(unit.factors.values / IDEAL) ** 2
    return NUM_TOKENS * hardness * (0.02 + 10 * float(weights @ gaps))


def attempt(unit: Unit, number: int, mean_seconds: float) -> tuple[float, bool]:
    """Return how many seconds the ``number``-th attempt at a unit takes, and whether it fails."""
    values = unit.factors.values.tolist()
    content = f"{values} {unit.needle_set} {unit.sample} {number}".encode()
    rng = np.random.default_rng(zlib.crc32(content))
    seconds = rng.lognormal(-(SPREAD**2) / 2, SPREAD)
    if rng.random() < STRAGGLERS:
        seconds *= rng.uniform(3, 5)
    seconds *= mean_seconds / (1 + STRAGGLERS * 3)
    fails = rng.random() < FAILURES
    return float(seconds * rng.random() if fails else seconds), fails


# --- one measured search


@dataclass
class Trace:
    """What happened in a search: when scorers were busy, and when generations were closed."""

    intervals: list[Busy] = field(default_factory=list)
    closed: list[float] = field(default_factory=list)
    ended: float = 0.0
    driver_seconds: float = 0.0


def recipe(args: argparse.Namespace, offspring: int, look_ahead: bool) -> Recipe:
    return Recipe(
        name="bench",
        model={"path": "none"},
        search={
            "target_length": TARGET_LENGTH,
            "preset": "paper",
            "population_size": offspring,
            "num_offspring": offspring,
            "iterations": args.generations - 1,
            "seed": args.seed,
        },
        needles={"num_samples": NUM_SAMPLES},
        report={"num_samples": NUM_SAMPLES},
        scorer={"look_ahead": look_ahead},
    )


def search(
    settings: Recipe, run_dir: RunDir, scorers: Scorers, clock: Callable[[], float]
) -> Trace:
    """Run a search and return its trace, without intervals yet."""
    trace = Trace()

    def observe(status: Status, event: str) -> None:
        if event == "generation":
            trace.closed.append(clock())

    run_dir.create()
    loop = SearchLoop(settings, GEOMETRY, NEEDLE_SETS, run_dir, scorers, {}, [observe])
    began = time.process_time()
    loop.run()
    trace.driver_seconds = time.process_time() - began
    trace.ended = clock()
    return trace


def result_bytes(run_dir: RunDir) -> dict[str, bytes]:
    names = ["winner.json", *run_dir.names("generations")]
    return {name: bytes((run_dir.path / name).read_bytes()) for name in names}


def table_row(trace: Trace, run_dir: RunDir, scorers: int) -> list[str]:
    """Return the row of a search: busy shares, idle time at a generation's end, driver time."""
    ledger = scores_of(run_dir).load()
    asked = {c.id for generation in read_generations(run_dir) for c in generation.candidates}
    winner = read_winner(run_dir)
    assert winner is not None
    rows = {row.needles.nll_per_sample for row in winner.report}
    reported: dict[str, dict[int, float | None]] = {}
    for score in ledger.values():
        if score.needle_set != SEARCH_SET:
            reported.setdefault(score.vector_id, {})[score.sample] = score.nll_sum
    needed = asked | {
        id for id, row in reported.items() if tuple(row[s] for s in sorted(row)) in rows
    }
    began = min(start for start, _, _ in trace.intervals)
    closed = trace.closed

    def busy(since: float, until: float, only_needed: bool = False) -> float:
        return math.fsum(
            max(0.0, min(end, until) - max(start, since))
            for start, end, key in trace.intervals
            if not only_needed or (key and key[0] in needed)
        )

    wall = closed[-1] - began
    mean = statistics.fmean(end - start for start, end, key in trace.intervals if key)
    idle = statistics.median(
        (until - since) - busy(since, until) / scorers
        for since, until in itertools.pairwise([began, *closed])
    )
    units = len(ledger)
    wasted = sum(score.vector_id not in needed for score in ledger.values())
    return [
        f"{busy(began, closed[-1]) / wall / scorers:.1%}",
        f"{busy(began, closed[-1], only_needed=True) / wall / scorers:.1%}",
        f"{idle:.2f} s / {idle / mean:.2f}",
        f"{wall:.1f}",
        f"{trace.ended - began:.1f}",
        f"{units}",
        f"{wasted}",
        f"{units / (trace.ended - began):.1f}",
        f"{1000 * trace.driver_seconds / units:.2f}",
    ]


HEADER = [
    "scorers",
    "offspring",
    "look ahead",
    "busy",
    "useful",
    "idle a generation (s / unit times)",
    "search s",
    "run s",
    "units",
    "wasted",
    "units/s",
    "driver CPU ms/unit",
]


def table(args: argparse.Namespace, one: Callable[[int, Recipe, RunDir], Trace]) -> None:
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER), flush=True)
    for scorers, offspring in itertools.product(args.scorers, args.offspring):
        results = []
        for look_ahead in (False, True):
            with run_directory(args) as run_dir:
                settings = recipe(args, offspring, look_ahead)
                row = table_row(one(scorers, settings, run_dir), run_dir, scorers)
                results.append(result_bytes(run_dir))
            label = [str(scorers), str(offspring), "on" if look_ahead else "off"]
            print("| " + " | ".join([*label, *row]) + " |", flush=True)
        assert results[0] == results[1], "looking ahead changed the result"


@contextmanager
def run_directory(args: argparse.Namespace) -> Iterator[RunDir]:
    if args.kind == "model":
        yield RunDir(f"memory://{uuid.uuid4().hex}/run")
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield RunDir(folder)


# --- on Ray


class SleepingScorers:
    """One actor that stands for many scorers: calls of ``work`` sleep beside each other."""

    def __init__(self, mean_seconds: float):
        self._mean_seconds = mean_seconds
        self._attempts: dict[tuple[str, str], int] = {}
        self._failed: list[tuple[float, float]] = []

    async def place(self) -> tuple[int, str]:
        return os.getpid(), ""

    async def ready(self) -> None:
        pass

    async def work(self, unit: Unit) -> UnitScore:
        began = time.time()
        number = self._attempts[unit.key] = self._attempts.get(unit.key, -1) + 1
        seconds, fails = attempt(unit, number, self._mean_seconds)
        await asyncio.sleep(seconds)
        if fails:
            self._failed.append((began, time.time()))
            raise RuntimeError("simulated failure")
        return UnitScore(nll(unit), NUM_TOKENS, True, time.time() - began)

    async def failed(self) -> list[tuple[float, float]]:
        return self._failed


def sleeping_scorers(scorers: int, mean_seconds: float) -> Any:
    """Start the actor that stands for ``scorers`` scorers."""
    import ray

    actor_class: Any = ray.remote(SleepingScorers)
    return actor_class.options(num_cpus=0, max_concurrency=2 * scorers).remote(mean_seconds)


def on_ray(args: argparse.Namespace) -> None:
    import ray

    from longrope2_ray.workers.actors import Actors
    from longrope2_ray.workers.connection import ray_session
    from longrope2_ray.workers.failures import Limits
    from longrope2_ray.workers.pool import Pool

    def one(scorers: int, settings: Recipe, run_dir: RunDir) -> Trace:
        actor = sleeping_scorers(scorers, args.seconds)
        actors = Actors(lambda name: actor, scorers, {"CPU": 0}, "scorer")
        pool: Pool[Unit, UnitScore] = Pool(actors, Limits(max_attempts=10))
        # The one actor that stands for all has to outlive the scorers that fail.
        with patch.object(ray, "kill"):
            while pool.counts()["starting"]:
                pool.wait()
            trace = search(settings, run_dir, pool, time.time)
        scores = scores_of(run_dir).load().values()
        trace.intervals = [(s.started, s.started + s.seconds, s.key) for s in scores]
        trace.intervals += [(began, ended, None) for began, ended in ray.get(actor.failed.remote())]
        pool.close()
        return trace

    with ray_session():
        table(args, one)


def floor(args: argparse.Namespace) -> None:
    from longrope2_ray.workers.connection import ray_session

    factors = RescaleFactors(IDEAL)
    with ray_session():
        for scorers in args.scorers:
            actor = sleeping_scorers(scorers, args.seconds)
            answers: SimpleQueue[Any] = SimpleQueue()

            def ask(number: int, actor: Any = actor, answers: SimpleQueue[Any] = answers) -> None:
                sample = number % NUM_SAMPLES
                unit = Unit("ideal", SEARCH_SET, sample, str(number), factors)
                actor.work.remote(unit).future().add_done_callback(answers.put)

            for number in range(2 * scorers):
                if number >= scorers:
                    answers.get()
                ask(number)
            units, began, used = 0, time.monotonic(), time.process_time()
            while time.monotonic() - began < args.floor_seconds:
                answers.get()
                ask(units)
                units += 1
            seconds = time.monotonic() - began
            used = time.process_time() - used
            print(
                f"{scorers} calls open, {units / seconds:.1f} units/s: "
                f"{1000 * used / units:.2f} ms of CPU a unit"
            )


# --- as a model


class ModelScorers:
    """The Scorers protocol over a virtual clock.

    Args:
        scorers: how many there are.
        mean_seconds: mean time of a unit.
        driver_seconds: time for which the driver is busy with each unit.
    """

    def __init__(self, scorers: int, mean_seconds: float, driver_seconds: float):
        self._scorers = scorers
        self._mean_seconds = mean_seconds
        self._driver_seconds = driver_seconds
        self.now = 0.0
        self._under_way: list[tuple[float, int, float, Unit]] = []
        self._order = itertools.count()
        self.intervals: list[Busy] = []

    def free(self) -> int:
        return self._scorers - len(self._under_way)

    def submit(self, work: Unit) -> None:
        start, number = self.now, 0
        while True:
            seconds, fails = attempt(work, number, self._mean_seconds)
            if not fails:
                break
            self.intervals.append((start, start + seconds, None))
            start, number = start + seconds, number + 1
        heapq.heappush(self._under_way, (start + seconds, next(self._order), start, work))

    def wait(self) -> list[Done[Unit, UnitScore]]:
        self.now = max(self.now, self._under_way[0][0])
        done = []
        while self._under_way and self._under_way[0][0] <= self.now:
            end, _, start, unit = heapq.heappop(self._under_way)
            self.intervals.append((start, end, unit.key))
            score = UnitScore(nll(unit), NUM_TOKENS, True, end - start)
            done.append(Done(unit, score, "model", start))
        self.now += self._driver_seconds * len(done)
        return done

    def flush(self) -> list[Done[Unit, UnitScore]]:
        return []

    def counts(self) -> Mapping[str, int]:
        return {"busy": len(self._under_way), "idle": self.free()}

    def faults(self) -> Mapping[str, int]:
        return {}


def as_model(args: argparse.Namespace) -> None:
    def one(scorers: int, settings: Recipe, run_dir: RunDir) -> Trace:
        simulated = ModelScorers(scorers, args.seconds, args.driver_ms / 1000)
        trace = search(settings, run_dir, simulated, lambda: simulated.now)
        trace.intervals = simulated.intervals
        return trace

    table(args, one)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["ray", "model", "floor"])
    parser.add_argument("--scorers", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument(
        "--offspring", type=int, nargs="+", default=[64], help="candidates of a generation"
    )
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0, help="mean time of a unit")
    parser.add_argument(
        "--driver-ms", type=float, default=2.0, help="time that the driver takes for a unit (model)"
    )
    parser.add_argument(
        "--floor-seconds", type=float, default=40.0, help="how long to measure (floor)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    {"ray": on_ray, "model": as_model, "floor": floor}[args.kind](args)


if __name__ == "__main__":
    main()
