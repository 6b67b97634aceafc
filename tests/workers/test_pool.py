"""The pool and the whole search on a real Ray: retries, kills, and the same bytes whatever happens."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from longrope2_ray.cli import main
from longrope2_ray.errors import StoppedError
from longrope2_ray.recipe.loading import load_recipe
from longrope2_ray.recipe.sections import ScorerSection
from longrope2_ray.report.page import REFRESHES
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.search import job as search_job
from longrope2_ray.search.loop import SearchRun
from longrope2_ray.search.scores import Score, Unit
from longrope2_ray.search.status import Status
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.workers.connection import ray_session
from longrope2_ray.workers.failures import Decision, decide
from longrope2_ray.workers.pool import ScorerPool
from longrope2_ray.workers.resources import capacity, scorer_resources

ROOT = Path(__file__).parents[2]
ONES = RescaleFactors([1.0, 1.0])


@pytest.fixture(scope="module", autouse=True)
def session():
    ray.cloudpickle.register_pickle_by_value(
        sys.modules[__name__]
    )  # workers do not import the tests
    with ray_session():
        yield


class ToyScorer:
    """An actor without a model: the sample's number is its NLL; sample numbers also order its misbehaviour."""

    def __init__(self, folder: str, start: str = "works"):
        self.folder, self.start = Path(folder), start

    def place(self) -> tuple[int, str]:
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def ready(self) -> None:
        if self.start == "fails" or (self.start == "first-fails" and self._first("start")):
            raise ValueError("model.path: expected a model, got nothing")
        self.broken = self.start == "first-broken" and self._first("start")
        if self.start == "first-hangs" and self._first("start"):
            time.sleep(300)

    def _first(self, what: str) -> bool:
        """Whether no scorer of this folder was here before."""
        try:
            (self.folder / what).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def score(
        self, needle_set: str, sample: int, values, attention_factor: float, start_tokens: int
    ):
        if self.broken:
            raise RuntimeError("uncorrectable ECC error")
        if needle_set == "slow":
            time.sleep(1)
        first_time = self._first(f"{needle_set}-{sample}")
        if needle_set == "raises-once" and first_time:
            raise OSError("a disk hiccup")
        if needle_set == "raises-always":
            raise OSError("a broken disk")
        if needle_set == "out-of-memory" or (needle_set == "out-of-memory-once" and first_time):
            raise RuntimeError("CUDA out of memory. Tried to allocate 31 GiB")
        if needle_set == "dies-once" and first_time:
            os.kill(os.getpid(), signal.SIGKILL)
        if needle_set == "hangs-once" and first_time:
            time.sleep(60)
        wrong = needle_set == "nan" or (needle_set == "nan-once" and first_time)
        return (math.nan if wrong else float(sample)), 8, True, 0.001


def toy_pool(folder: Path, num_scorers: int = 2, start: str = "works", **settings) -> ScorerPool:
    remote = ray.remote(ToyScorer)
    return ScorerPool(
        lambda name: remote.options(name=f"{folder.name}-{name}", num_cpus=0.1).remote(
            str(folder), start
        ),
        num_scorers,
        {"CPU": 0.1},
        ScorerSection(**settings),
    )


def drain(pool: ScorerPool, count: int, seconds: float = 60) -> dict[int, Score]:
    """Every score of ``count`` units; a second answer for a sample would overwrite and shorten it."""
    scores: list[Score] = []
    began = time.monotonic()
    while len(scores) < count and time.monotonic() - began < seconds:
        scores += pool.wait()
    assert len(scores) == count, f"{len(scores)} of {count} scores came"
    return {score.sample: score for score in scores}


def submit(pool: ScorerPool, needle_set: str, count: int) -> None:
    for sample in range(count):
        pool.submit(Unit("vector", needle_set, sample, ONES))


def test_every_unit_comes_back_once_with_its_own_score(tmp_path):
    pool = toy_pool(tmp_path)
    submit(pool, "plain", 20)
    scores = drain(pool, 20)
    while pool.counts()["starting"]:
        pool.wait()
    assert {sample: score.nll_sum for sample, score in scores.items()} == {
        s: float(s) for s in range(20)
    }
    assert {score.scorer for score in scores.values()} <= {"scorer-00", "scorer-01"}
    assert pool.counts() == {"starting": 0, "idle": 2, "busy": 0}
    pool.close()


@pytest.mark.parametrize("misbehaviour", ["raises-once", "dies-once"])
def test_a_unit_that_fails_once_is_requeued_and_the_others_are_not_disturbed(
    tmp_path, misbehaviour
):
    pool = toy_pool(tmp_path, max_attempts=4)
    submit(pool, misbehaviour, 3)
    scores = drain(pool, 3)
    assert sorted(scores) == [0, 1, 2]
    assert pool.losses()["requeued"] == 3
    pool.close()


def test_a_scorer_that_is_broken_is_replaced_and_does_not_fail_the_unit_again(tmp_path):
    pool = toy_pool(tmp_path, start="first-broken", max_attempts=2)
    while pool.counts()["idle"] < 2:
        pool.wait()
    submit(
        pool, "slow", 6
    )  # the healthy one is busy while the broken one would fail one unit after another
    assert sorted(drain(pool, 6)) == list(range(6))
    assert pool.losses()["requeued"] == 1
    pool.close()


def test_a_dead_scorer_is_replaced_under_a_new_name(tmp_path):
    pool = toy_pool(tmp_path, num_scorers=1)
    submit(pool, "dies-once", 1)
    assert drain(pool, 1)[0].scorer == "scorer-01"
    pool.close()


def test_a_scorer_that_hangs_is_replaced_after_the_stall_limit(tmp_path):
    pool = toy_pool(tmp_path, num_scorers=1, stall_seconds=1.0)
    submit(pool, "hangs-once", 1)
    assert drain(pool, 1)[0].nll_sum == 0.0
    assert pool.losses()["requeued"] == 1
    pool.close()


def test_a_score_that_is_not_finite_is_recorded_without_a_number(tmp_path):
    pool = toy_pool(tmp_path)
    submit(pool, "nan", 1)
    assert drain(pool, 1)[0].nll_sum is None
    pool.close()


@pytest.mark.parametrize("num_scorers", [1, 2])
def test_a_score_is_out_only_if_a_second_opinion_agrees_and_who_was_wrong_is_replaced(
    tmp_path, num_scorers
):
    pool = toy_pool(tmp_path, num_scorers)
    submit(pool, "plain", 4)
    drain(pool, 4)
    while pool.counts()["starting"]:
        pool.wait()
    before = set(pool.process_ids())
    submit(pool, "nan-once", 1)
    score = drain(pool, 1)[0]
    assert score.nll_sum == 0.0
    assert pool.losses()["disputed"] == 1
    replaced = before - set(pool.process_ids())
    assert len(replaced) == 1
    assert score.scorer not in replaced or num_scorers == 1, "who was right was replaced"
    pool.close()


def test_memory_that_was_enough_before_gets_a_fresh_process(tmp_path):
    pool = toy_pool(tmp_path, num_scorers=1)
    submit(pool, "plain", 1)
    drain(pool, 1)
    submit(pool, "out-of-memory-once", 1)
    assert drain(pool, 1)[0].scorer == "scorer-01"
    assert pool.losses()["requeued"] == 1
    pool.close()


def test_scorers_on_a_node_that_is_being_drained_finish_their_unit_and_leave(tmp_path, monkeypatch):
    pool = toy_pool(tmp_path)
    while pool.counts()["idle"] < 2:
        pool.wait()
    submit(pool, "slow", 4)  # two under way, two queued
    here = {ray.get_runtime_context().get_node_id()}
    assert {slot.node for slot in pool._slots.values()} == here
    monkeypatch.setattr("longrope2_ray.workers.pool.draining_nodes", lambda: here)
    pool._looked = -math.inf
    first = drain(pool, 2)
    assert set(first) == {0, 1}
    assert not {"scorer-00", "scorer-01"} & set(pool.process_ids())
    monkeypatch.undo()
    rest = drain(pool, 2)
    assert set(rest) == {2, 3}
    assert not {"scorer-00", "scorer-01"} & {score.scorer for score in rest.values()}
    losses = pool.losses()
    assert losses["requeued"] == 0
    assert losses["preemptions"] >= 2
    pool.close()


@pytest.mark.parametrize("start", ["first-fails", "first-hangs"])
def test_a_scorer_that_does_not_come_up_is_replaced_while_the_others_work(tmp_path, start):
    pool = toy_pool(tmp_path, start=start, load_seconds=3.0)
    submit(pool, "plain", 20)
    assert sorted(drain(pool, 20)) == list(range(20))
    began = time.monotonic()
    while pool.counts()["idle"] < 2:
        pool.wait()
        assert time.monotonic() - began < 120, "the scorer that did not come up was not replaced"
    assert "scorer-02" in pool.process_ids()
    pool.close()


def test_a_unit_that_always_fails_stops_the_run_with_its_reason(tmp_path):
    pool = toy_pool(tmp_path, max_attempts=2)
    submit(pool, "raises-always", 1)
    with pytest.raises(StoppedError, match=r"a broken disk .*scorer\.max_attempts"):
        drain(pool, 1)
    pool.close()


def test_what_came_in_with_a_failure_that_stops_the_run_is_not_lost(tmp_path):
    pool = toy_pool(tmp_path, num_scorers=4, max_attempts=1)
    while pool.counts()["idle"] < 4:
        pool.wait()
    submit(pool, "raises-always", 3)  # as where a model does not fit: all at once
    pool.submit(Unit("vector", "plain", 3, ONES))
    began = time.monotonic()
    while pool._answers.qsize() < 4:
        assert time.monotonic() - began < 60
        time.sleep(0.01)
    with pytest.raises(StoppedError, match="a broken disk"):
        pool.wait()
    assert [score.needle_set for score in pool.flush()] == ["plain"]
    pool.close()


def test_out_of_memory_stops_at_once_and_names_the_fields(tmp_path):
    pool = toy_pool(tmp_path)
    submit(pool, "out-of-memory", 1)
    with pytest.raises(StoppedError, match=r"scorer\.gpus_per_scorer"):
        drain(pool, 1)
    pool.close()


def test_scorers_that_never_come_up_stop_the_run_with_the_reason(tmp_path):
    pool = toy_pool(tmp_path, start="fails")
    submit(pool, "plain", 1)
    with pytest.raises(StoppedError, match=r"model\.path: expected a model, got nothing"):
        drain(pool, 1)
    pool.close()


def test_what_ray_says_about_memory_is_memory():
    """Its words for a process that the node's memory monitor killed, and for a task of one."""
    for words in ("Task was killed due to the node running low on memory.",
                  "The actor died.\n\tclass_name: Scorer\nThe actor is dead because its worker process has died. "
                  "Worker exit type: NODE_OUT_OF_MEMORY"):  # fmt: skip
        assert "scorer.mlp_chunk_tokens" in decide("died", words, 3, 3)[1]
    assert (
        "memory"
        not in decide("died", "The actor died unexpectedly before finishing this task.", 3, 3)[1]
    )


def test_decisions_are_retry_until_attempts_are_used_up():
    assert decide("died", "node lost", 1, 3)[0] is Decision.RETRY
    assert decide("died", "node lost", 3, 3)[0] is Decision.STOP
    assert decide("raised", "CUDA out of memory", 1, 3)[0] is Decision.STOP


def test_capacity_counts_whole_scorers():
    assert capacity([{"CPU": 8, "GPU": 3}], {"CPU": 1, "GPU": 2}) == 1
    assert capacity([{"CPU": 2}], {"CPU": 1, "GPU": 0}) == 2
    assert capacity([{"CPU": 2}], {"CPU": 1, "GPU": 1}) == 0
    assert (
        capacity([{"CPU": 3}, {"CPU": 3}, {"CPU": 3}], {"CPU": 2, "GPU": 0}) == 3
    )  # and not 9 / 2
    assert scorer_resources(ScorerSection(), "auto", {"CPU": 2}) == {"CPU": 1, "GPU": 0}
    assert scorer_resources(ScorerSection(), "auto", {"CPU": 2, "GPU": 8}) == {"CPU": 1, "GPU": 1}


def test_a_scorer_that_fits_no_machine_is_refused():
    prepared = search_job.prepare(load_recipe("debug"))
    huge = replace(prepared, spec=replace(prepared.spec, num_parameters=10**12))
    with (
        pytest.raises(
            ValueError, match=r"scorer: expected 3\d{3}\.\d GiB .* the largest machine has"
        ),
        search_job.scorer_pool(huge),
    ):
        pass


def test_a_scorer_that_fits_no_gpu_of_the_cluster_is_refused_where_their_kind_is_known(monkeypatch):
    prepared = search_job.prepare(load_recipe("debug"))
    huge = replace(
        prepared, spec=replace(prepared.spec, num_parameters=30 * 10**9)
    )  # 112 GiB in float32
    nodes = [
        {"CPU": 8, "GPU": 8, "accelerator_type:H100": 1},
        {"CPU": 8, "GPU": 8, "accelerator_type:L40S": 1},
        {"CPU": 4},
    ]
    monkeypatch.setattr("longrope2_ray.workers.resources.node_resources", lambda: nodes)
    with pytest.raises(
        ValueError,
        match=r"scorer: expected about 11\d\.\d GiB .* the largest has 74\.0 GiB \(h100\)",
    ):
        search_job._require_gpu_memory(huge)
    search_job._require_gpu_memory(prepared)
    spread = prepared.recipe.model_copy(update={"scorer": ScorerSection(gpus_per_scorer=2)})
    search_job._require_gpu_memory(replace(huge, recipe=spread))
    nodes[1] = {"CPU": 8, "GPU": 8, "accelerator_type:B300": 1}  # unknown: it may be large enough
    search_job._require_gpu_memory(huge)


def debug_run(run_dir: Path, *overrides: str) -> bytes:
    """The debug recipe on the real model; the bytes of its winner."""
    prepared = search_job.prepare(load_recipe("debug", overrides))
    place = RunDir(str(run_dir))
    search_job.open_run(prepared, place)
    search_job.run_search(prepared, place, ())
    return (run_dir / "winner.json").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> bytes:
    return debug_run(tmp_path_factory.mktemp("undisturbed") / "run", "--scorer.num-scorers", "2")


def test_one_scorer_and_no_racing_give_the_same_bytes_as_two_with_racing(tmp_path, undisturbed):
    alone = debug_run(tmp_path / "alone", "--scorer.num-scorers", "1", "--search.racing", "off")
    assert alone == undisturbed


def test_kill_9_of_a_scorer_costs_its_unit_and_not_the_run(tmp_path, undisturbed):
    prepared = search_job.prepare(load_recipe("debug", ["--scorer.num-scorers", "2"]))
    place = RunDir(str(tmp_path / "run"))
    search_job.open_run(prepared, place)
    killed: list[str] = []
    requeued: list[int] = []
    with search_job.scorer_pool(prepared) as pool:

        def kill_one(status: Status, event: str) -> None:
            requeued.append(status.losses.get("requeued", 0))
            if not killed and status.units_done >= 5:
                name, process = sorted(pool.process_ids().items())[0]
                os.kill(process, signal.SIGKILL)
                killed.append(name)

        SearchRun(
            prepared.recipe,
            prepared.spec.geometry,
            prepared.num_tokens,
            place,
            pool,
            prepared.fingerprints,
            [kill_one],
        ).run()
        names = set(pool.process_ids())
    assert (tmp_path / "run" / "winner.json").read_bytes() == undisturbed
    assert len(killed) == 1
    assert killed[0] not in names, "the dead scorer was not replaced"
    assert max(requeued) <= 1, "more than the unit in flight was lost"


def test_kill_9_of_the_driver_costs_at_most_the_units_in_flight(tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "longrope2_ray", "search", "debug", "--run-dir", str(run_dir)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    first = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    began = time.monotonic()
    while len(RunDir(str(run_dir)).load_scores()) < 12:
        assert first.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() - began < 200, "no scores came"
        time.sleep(0.1)
    first.kill()
    first.wait()
    kept = RunDir(str(run_dir)).load_scores()
    assert not (run_dir / "winner.json").exists()
    second = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert second.returncode == 0, second.stderr[-2000:]
    assert "resuming" in second.stderr
    assert (run_dir / "winner.json").read_bytes() == undisturbed
    ledger = RunDir(str(run_dir)).load_scores()
    assert all(ledger[key] == score for key, score in kept.items()), (
        "a kept score was computed again"
    )
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*") if p.is_file()}
    third = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert third.returncode == 0
    assert "nothing was changed" in third.stdout
    assert before == {p: p.stat().st_mtime_ns for p in run_dir.rglob("*") if p.is_file()}
    page = (run_dir / "report.html").read_text()
    (run_dir / "report.html").write_text(
        page.replace("<title>", f"{REFRESHES} content='10'><title>")
    )  # not the last one
    assert main(["search", "debug", "--run-dir", str(run_dir)]) == 0
    assert REFRESHES not in (run_dir / "report.html").read_text()
