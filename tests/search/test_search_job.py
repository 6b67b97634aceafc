"""The whole search on a real Ray and the reference model: the same bytes whatever happens."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy import ledger_of, without_racing

from longrope2_ray.cli import main
from longrope2_ray.errors import RunDirError
from longrope2_ray.recipe.loading import load_recipe
from longrope2_ray.recipe.sections import ScorerSection
from longrope2_ray.report.html_page import FINISHED, REFRESHES
from longrope2_ray.search import job, preparation
from longrope2_ray.search.loop import SearchLoop
from longrope2_ray.search.status import Status
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.workers.resources import Cluster

ROOT = Path(__file__).parents[2]
GIB = 2**30


class FakeCluster(Cluster):
    """A cluster of these nodes."""

    def __init__(self, *nodes: Mapping[str, float]):
        self.has = list(nodes)

    def resources(self) -> Mapping[str, float]:
        names = {name for node in self.has for name in node}
        return {name: sum(node.get(name, 0) for node in self.has) for name in names}

    def nodes(self, without: Collection[str] = ()) -> list[Mapping[str, float]]:
        return self.has


def with_parameters(prepared: preparation.Prepared, count: int) -> preparation.Prepared:
    shape = prepared.shape.model_copy(update={"num_parameters": count})
    return replace(prepared, shape=shape)


def test_a_scorer_that_fits_no_machine_is_refused() -> None:
    huge = with_parameters(preparation.prepare(load_recipe("debug")), 10**12)
    cluster = FakeCluster({"CPU": 2, "memory": 64 * GIB})
    message = r"scorer: expected 3\d{3}\.\d GiB .* the largest machine has 64"
    with pytest.raises(ValueError, match=message), job.scorer_pool(huge, cluster):
        pass


def test_no_room_for_one_scorer_is_refused() -> None:
    prepared = preparation.prepare(load_recipe("debug", ["--scorer.cpus-per-scorer", "4"]))
    message = r"scorer\.cpus_per_scorer: expected room for one scorer .* the cluster has 4 CPU"
    cluster = FakeCluster({"CPU": 2}, {"CPU": 2})
    with pytest.raises(ValueError, match=message), job.scorer_pool(prepared, cluster):
        pass


def test_a_scorer_that_fits_no_gpu_is_refused_where_their_kind_is_known() -> None:
    prepared = preparation.prepare(load_recipe("debug"))
    huge = with_parameters(prepared, 30 * 10**9)  # 112 GiB in float32
    h100 = {"CPU": 8, "GPU": 8, "accelerator_type:H100": 1}
    cluster = FakeCluster(h100, {"CPU": 8, "GPU": 8, "accelerator_type:L40S": 1}, {"CPU": 4})
    message = r"scorer: expected about 11\d\.\d GiB .* the largest has 74\.0 GiB \(h100\)"
    with pytest.raises(ValueError, match=message):
        job.require_gpu_memory(huge, cluster)
    job.require_gpu_memory(prepared, cluster)
    scorer = ScorerSection(gpus_per_scorer=2)
    spread = prepared.recipe.model_copy(update={"scorer": scorer})
    job.require_gpu_memory(replace(huge, recipe=spread), cluster)
    unknown = FakeCluster(h100, {"CPU": 8, "GPU": 8, "accelerator_type:B300": 1})
    job.require_gpu_memory(huge, unknown)


def test_only_the_searchs_needles_can_be_scored_on_the_whole_document() -> None:
    """Table 6's ablation; the two objectives are different searches."""
    answer, document = (
        preparation.prepare(load_recipe("debug", [f"--needles.objective={objective}"]))
        for objective in ("answer", "document")
    )
    length = answer.recipe.search.target_length
    assert {sample.answer_span for sample in document.samples["search"]} == {(1, length)}
    assert document.needle_sets["search"].num_tokens[0] == length - 1
    report = f"report@{length}"
    assert answer.fingerprints["needles search"] != document.fingerprints["needles search"]
    assert answer.fingerprints[f"needles {report}"] == document.fingerprints[f"needles {report}"]
    same = zip(answer.samples["search"], document.samples["search"], strict=True)
    assert all(np.array_equal(one.input_ids, other.input_ids) for one, other in same)


def winner_of(recipe: str, run_dir: Path, *overrides: str) -> bytes:
    """A recipe on the real model; the bytes of its winner."""
    job.search(load_recipe(recipe, overrides), str(run_dir))
    return (run_dir / "winner.json").read_bytes()


def debug_run(run_dir: Path, *overrides: str) -> bytes:
    return winner_of("debug", run_dir, *overrides)


@pytest.fixture(scope="module")
def undisturbed(finished_debug_run: Path) -> bytes:
    return (finished_debug_run / "winner.json").read_bytes()


@pytest.mark.usefixtures("ray_on_this_machine")
def test_one_scorer_and_no_racing_give_the_same_bytes_as_two_with_racing(
    tmp_path: Path, undisturbed: bytes
) -> None:
    with without_racing():
        alone = debug_run(tmp_path / "alone", "--scorer.num-scorers", "1")
    assert alone == undisturbed


@pytest.mark.usefixtures("ray_on_this_machine")
def test_another_report_makes_no_other_search_and_costs_only_its_own_units(
    tmp_path: Path, finished_debug_run: Path, undisturbed: bytes
) -> None:
    """A length is added to a finished run, then the run is asked for the first tables again."""
    finished = shutil.copytree(finished_debug_run, tmp_path / "run")
    before = ledger_of(RunDir(str(finished)))
    methods = json.loads(undisturbed)["report"]
    one_scorer = ["--scorer.num-scorers", "1"]
    longer = debug_run(finished, "--report.lengths", "[1024, 512]", *one_scorer)
    after = ledger_of(RunDir(str(finished)))
    new = [after[key] for key in after if key not in before]
    assert {score.needle_set for score in new} == {"report@512"}
    assert len(new) == len(methods) * load_recipe("debug").report.num_samples
    rows = json.loads(longer)["report"]
    assert [row for row in rows if row["length"] == 1024] == methods
    assert debug_run(finished, *one_scorer) == undisturbed
    assert len(ledger_of(RunDir(str(finished)))) == len(after)
    with pytest.raises(RunDirError, match=r"search\.seed is 0 there and 1 now"):
        debug_run(finished, "--search.seed", "1")


@pytest.mark.usefixtures("ray_on_this_machine")
def test_kill_9_of_a_scorer_costs_its_unit_and_not_the_run(
    tmp_path: Path, undisturbed: bytes
) -> None:
    prepared = preparation.prepare(load_recipe("debug", ["--scorer.num-scorers", "2"]))
    place = RunDir(str(tmp_path / "run"))
    preparation.open_run(prepared, place)
    killed: list[str] = []
    requeued: list[int] = []
    with job.scorer_pool(prepared) as pool:

        def kill_one(status: Status, event: str) -> None:
            requeued.append(status.faults.get("requeued", 0))
            if not killed and status.units_done >= 5:
                name, process = sorted(pool.actors.process_ids().items())[0]
                os.kill(process, signal.SIGKILL)
                killed.append(name)

        SearchLoop(
            prepared.recipe,
            prepared.shape.geometry,
            prepared.needle_sets,
            place,
            pool,
            prepared.fingerprints,
            [kill_one],
        ).run()
        names = set(pool.actors.process_ids())
    assert (tmp_path / "run" / "winner.json").read_bytes() == undisturbed
    assert len(killed) == 1
    assert killed[0] not in names, "the dead scorer was not replaced"
    assert max(requeued) <= 1, "more than the unit in flight was lost"


@pytest.mark.usefixtures("ray_on_this_machine")
def test_kill_9_of_the_driver_costs_at_most_the_units_in_flight(
    tmp_path: Path, undisturbed: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run"
    command = ["search", "debug", "--run-dir", str(place)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    null = subprocess.DEVNULL
    driver = subprocess.Popen(
        [sys.executable, "-m", "longrope2_ray", *command],
        cwd=ROOT,
        env=environment,
        stdout=null,
        stderr=null,
    )
    began = time.monotonic()
    while len(ledger_of(RunDir(str(place)))) < 12:
        assert driver.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() - began < 200, "no scores came"
        time.sleep(0.1)
    driver.kill()
    driver.wait()
    kept = ledger_of(RunDir(str(place)))
    assert not (place / "winner.json").exists()
    assert main(command) == 0
    assert "resuming" in capsys.readouterr().err
    assert (place / "winner.json").read_bytes() == undisturbed
    ledger = ledger_of(RunDir(str(place)))
    assert all(ledger[key] == score for key, score in kept.items()), "scored again"


DESCENT = (
    "--search.descent-steps", "4", "--search.skipped-needles", "2", "--needles.num-samples", "3",
    "--needles.depth", "start", "--report.num-samples", "4", "--report.attention-factors", "[]",
    "--report.methods", '["yarn", "longrope2"]',
)  # fmt: skip


@pytest.mark.long
@pytest.mark.usefixtures("ray_on_this_machine")
def test_a_descent_killed_with_9_ends_in_the_same_bytes_on_another_number_of_scorers(
    tmp_path: Path,
) -> None:
    """Once among the steps, whose gradients stand in the ledger, once in the race after them."""
    expected = winner_of("demo", tmp_path / "whole", *DESCENT, "--scorer.num-scorers", "2")
    total = len(ledger_of(RunDir(str(tmp_path / "whole"))))
    place = tmp_path / "killed"
    command = [sys.executable, "-m", "longrope2_ray", "search", "demo", "--run-dir", str(place)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    null = subprocess.DEVNULL
    for share in (0.5, 0.8):
        driver = subprocess.Popen(
            [*command, *DESCENT], cwd=ROOT, env=environment, stdout=null, stderr=null
        )
        began = time.monotonic()
        while len(ledger_of(RunDir(str(place)))) < share * total:
            assert driver.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() - began < 200, "no scores came"
            time.sleep(0.05)
        driver.kill()
        driver.wait()
    assert any(score.gradient for score in ledger_of(RunDir(str(place))).values())
    assert not (place / "winner.json").exists()
    assert winner_of("demo", place, *DESCENT, "--scorer.num-scorers", "1") == expected


def test_a_finished_run_is_only_read_and_its_report_finished(
    tmp_path: Path, finished_debug_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = shutil.copytree(finished_debug_run, tmp_path / "run")
    command = ["search", "debug", "--run-dir", str(place)]
    # The library writes no report; a driver that died before it did leaves the same.
    assert main(command) == 0
    before = {p: p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file()}
    assert main(command) == 0
    assert "nothing was changed" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file()}
    page = (place / "report.html").read_text()
    assert REFRESHES not in page
    assert FINISHED in page
    (place / "report.html").write_text(page.replace(FINISHED, f"{REFRESHES} content='10'>"))
    assert main(command) == 0
    assert (place / "report.html").read_text().count(FINISHED) == 1
    assert REFRESHES not in (place / "report.html").read_text()
