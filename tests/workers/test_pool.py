"""The pool on a real Ray, with work that has nothing to do with needles: retries, kills, drained
nodes."""

import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray

from longrope2_ray.errors import StoppedError
from longrope2_ray.storage.ledger import Ledger
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.workers.actors import Actors, actor_factory
from longrope2_ray.workers.done import Done
from longrope2_ray.workers.failures import Limits
from longrope2_ray.workers.pool import Pool
from longrope2_ray.workers.resources import Cluster

RESOURCES = {"CPU": 0.1}
ADVICE = "set scorer.gpus_per_scorer"


@pytest.fixture(scope="module", autouse=True)
def on_ray(ray_on_this_machine: None) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers import no tests


class Task(NamedTuple):
    """A unit of work; its kind orders how a worker misbehaves."""

    kind: str
    number: int

    def __str__(self) -> str:
        return f"doing task {self.number} of {self.kind}"


class Setup:
    """Sets a worker up whose result of a task is the task's number."""

    def __init__(self, folder: Path, start: str = "works"):
        self.folder, self.start = folder, start

    def __call__(self, num_gpus: int) -> Callable[[Task], float]:
        if self.start == "fails" or (self.start == "first-fails" and self._first("start")):
            raise ValueError("model.path: expected a model, got nothing")
        broken = self.start == "first-broken" and self._first("start")
        if self.start == "first-hangs" and self._first("start"):
            time.sleep(300)
        return partial(self.work, broken)

    def _first(self, what: str) -> bool:
        """Whether no worker of this folder was here before."""
        try:
            (self.folder / what).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def work(self, broken: bool, task: Task) -> float:
        kind, number = task
        if broken:
            raise RuntimeError("uncorrectable ECC error")
        if kind == "slow":
            time.sleep(1)
        first_time = self._first(f"{kind}-{number}")
        if kind == "raises-once" and first_time:
            raise OSError("a disk hiccup")
        if kind == "raises-always":
            raise OSError("a broken disk")
        if kind == "out-of-memory" or (kind == "out-of-memory-once" and first_time):
            raise RuntimeError("CUDA out of memory. Tried to allocate 31 GiB")
        if kind == "dies-once" and first_time:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hangs-once" and first_time:
            time.sleep(60)
        wrong = kind == "nan" or (kind == "nan-once" and first_time)
        return math.nan if wrong else float(number)


MakePool = Callable[..., Pool[Task, float]]


@pytest.fixture
def make_pool(tmp_path: Path) -> Iterator[MakePool]:
    made: list[Pool[Task, float]] = []

    def make(
        num_workers: int = 2, start: str = "works", cluster: Cluster | None = None, **limits: Any
    ) -> Pool[Task, float]:
        factory = actor_factory(Setup(tmp_path, start), RESOURCES)
        actors = Actors(
            lambda name: factory(f"{tmp_path.name}-{name}"),
            num_workers,
            RESOURCES,
            "scorer",
            cluster,
        )
        made.append(Pool(actors, Limits(memory_advice=ADVICE, **limits), math.isnan))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def drain(pool: Pool[Task, float], count: int, seconds: float = 60) -> dict[int, Done[Task, float]]:
    """Every result of ``count`` tasks; a second one of a task would overwrite and shorten it."""
    done: list[Done[Task, float]] = []
    began = time.monotonic()
    while len(done) < count and time.monotonic() - began < seconds:
        done += pool.wait()
    assert len(done) == count, f"{len(done)} of {count} results came"
    return {one.work.number: one for one in done}


def submit(pool: Pool[Task, float], kind: str, count: int) -> None:
    for number in range(count):
        pool.submit(Task(kind, number))


def wait_for_idle(pool: Pool[Task, float], count: int) -> None:
    began = time.monotonic()
    while pool.counts()["idle"] < count:
        pool.wait()
        assert time.monotonic() - began < 120, f"{count} workers never came up"


@dataclass(frozen=True)
class Row:
    """A committed task."""

    name: str
    number: float

    @property
    def key(self) -> str:
        return self.name


def test_any_work_goes_through_pool_and_ledger_with_a_kill_in_the_middle(
    make_pool: MakePool, tmp_path: Path
) -> None:
    """Evaluation will stand on these two: nothing is lost, nothing is done twice in the ledger."""
    run_dir = RunDir(str(tmp_path / "run"))
    run_dir.create()
    run_dir.take_over()
    ledger = Ledger(run_dir, "tasks", Row)
    pool = make_pool()
    wait_for_idle(pool, 2)
    submit(pool, "slow", 8)
    killed: list[int] = []
    while len(ledger) < 8:
        ledger.commit(Row(str(one.work), one.result) for one in pool.wait())
        if len(ledger) >= 2 and not killed:
            killed.append(sorted(pool.actors.process_ids().values())[0])
            os.kill(killed[0], signal.SIGKILL)
    assert pool.faults()["deaths"] == 1
    again = Ledger(RunDir(run_dir.url), "tasks", Row).load()
    assert {row.number for row in again.values()} == set(map(float, range(8)))
    chunks = [run_dir.read_json(name) or {} for name in run_dir.names("tasks")]
    committed = Counter(row["name"] for chunk in chunks for row in chunk["rows"])
    assert set(committed.values()) == {1}


def test_every_unit_comes_back_once_with_its_own_result(make_pool: MakePool) -> None:
    pool = make_pool()
    submit(pool, "plain", 20)
    done = drain(pool, 20)
    wait_for_idle(pool, 2)
    assert {number: one.result for number, one in done.items()} == {n: float(n) for n in range(20)}
    assert {one.worker for one in done.values()} <= {"scorer-00", "scorer-01"}
    assert pool.counts() == {"starting": 0, "idle": 2, "busy": 0}


@pytest.mark.parametrize("fault", ["raises-once", "dies-once"])
def test_a_unit_that_fails_once_is_requeued_and_the_others_are_not_disturbed(
    make_pool: MakePool, fault: str
) -> None:
    pool = make_pool(max_attempts=4)
    submit(pool, fault, 3)
    assert sorted(drain(pool, 3)) == [0, 1, 2]
    assert pool.faults()["requeued"] == 3


def test_a_worker_that_is_broken_is_replaced_and_does_not_fail_the_unit_again(
    make_pool: MakePool,
) -> None:
    pool = make_pool(start="first-broken", max_attempts=2)
    wait_for_idle(pool, 2)
    # The healthy one is busy while the broken one would fail one unit after another.
    submit(pool, "slow", 6)
    assert sorted(drain(pool, 6)) == list(range(6))
    assert pool.faults()["requeued"] == 1


def test_a_dead_worker_is_replaced_under_a_new_name(make_pool: MakePool) -> None:
    pool = make_pool(num_workers=1)
    submit(pool, "dies-once", 1)
    assert drain(pool, 1)[0].worker == "scorer-01"


def test_a_worker_that_hangs_is_replaced_after_the_stall_limit(make_pool: MakePool) -> None:
    pool = make_pool(num_workers=1, stall_seconds=1.0)
    submit(pool, "hangs-once", 1)
    assert drain(pool, 1)[0].result == 0.0
    assert pool.faults()["requeued"] == 1


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_doubtful_result_counts_only_if_a_second_opinion_agrees(
    make_pool: MakePool, num_workers: int
) -> None:
    pool = make_pool(num_workers)
    wait_for_idle(pool, num_workers)
    before = set(pool.actors.process_ids())
    submit(pool, "nan-once", 1)
    done = drain(pool, 1)[0]
    assert done.result == 0.0
    assert pool.faults()["disputed"] == 1
    replaced = before - set(pool.actors.process_ids())
    assert len(replaced) == 1
    assert done.worker not in replaced or num_workers == 1, "the right one was replaced"
    submit(pool, "nan", 1)
    assert math.isnan(drain(pool, 1)[0].result)


def test_memory_that_was_enough_before_gets_a_fresh_process(make_pool: MakePool) -> None:
    pool = make_pool(num_workers=1)
    submit(pool, "plain", 1)
    drain(pool, 1)
    submit(pool, "out-of-memory-once", 1)
    assert drain(pool, 1)[0].worker == "scorer-01"
    assert pool.faults()["requeued"] == 1


class DrainingCluster(Cluster):
    """A cluster that gives notice of nodes on order."""

    def __init__(self) -> None:
        self.noticed: set[str] = set()

    def nodes(self, without: Collection[str] = ()) -> list[Any]:
        return super().nodes()

    def draining_nodes(self) -> set[str]:
        return self.noticed


def test_workers_on_a_node_that_is_being_drained_finish_their_unit_and_are_given_up(
    make_pool: MakePool,
) -> None:
    cluster = DrainingCluster()
    pool = make_pool(cluster=cluster)
    wait_for_idle(pool, 2)
    submit(pool, "slow", 4)  # two busy, two queued
    cluster.noticed = {ray.get_runtime_context().get_node_id()}
    time.sleep(0.2)
    pool.actors._looked = -math.inf
    first = drain(pool, 2)
    assert set(first) == {0, 1}
    assert not {"scorer-00", "scorer-01"} & set(pool.actors.process_ids())
    cluster.noticed = set()
    rest = drain(pool, 2)
    assert set(rest) == {2, 3}
    assert not {"scorer-00", "scorer-01"} & {one.worker for one in rest.values()}
    assert pool.faults()["requeued"] == 0
    assert pool.faults()["preemptions"] >= 2


@pytest.mark.parametrize("start", ["first-fails", "first-hangs"])
def test_a_worker_that_does_not_come_up_is_replaced_while_the_others_work(
    make_pool: MakePool, start: str
) -> None:
    pool = make_pool(start=start, load_seconds=3.0)
    submit(pool, "plain", 20)
    assert sorted(drain(pool, 20)) == list(range(20))
    wait_for_idle(pool, 2)
    assert "scorer-02" in pool.actors.process_ids()


def test_a_unit_that_always_fails_stops_the_run_with_its_reason(make_pool: MakePool) -> None:
    pool = make_pool(max_attempts=2)
    submit(pool, "raises-always", 1)
    message = r"failed doing task 0 of raises-always: .*a broken disk .*scorer\.max_attempts"
    with pytest.raises(StoppedError, match=message):
        drain(pool, 1)


def test_what_came_in_with_a_failure_that_stops_the_run_is_not_lost(make_pool: MakePool) -> None:
    pool = make_pool(num_workers=4, max_attempts=1)
    wait_for_idle(pool, 4)
    submit(pool, "raises-always", 3)  # as where a model does not fit: all at once
    pool.submit(Task("plain", 3))
    began = time.monotonic()
    while pool.actors.num_answers < 4:
        assert time.monotonic() - began < 60
        time.sleep(0.01)
    with pytest.raises(StoppedError, match="a broken disk"):
        pool.wait()
    assert [one.work.kind for one in pool.flush()] == ["plain"]


def test_out_of_memory_stops_at_once_and_names_the_fields(make_pool: MakePool) -> None:
    pool = make_pool()
    submit(pool, "out-of-memory", 1)
    with pytest.raises(StoppedError, match=r"scorer\.gpus_per_scorer"):
        drain(pool, 1)


def test_workers_that_never_come_up_stop_the_run_with_the_reason(make_pool: MakePool) -> None:
    pool = make_pool(start="fails")
    submit(pool, "plain", 1)
    with pytest.raises(StoppedError, match=r"model\.path: expected a model, got nothing"):
        drain(pool, 1)
