"""The report of a run that a plain function scored: at every stage, with every number."""

import dataclasses
import html
import logging
import math
import re
import threading
import types
from collections.abc import Mapping

import numpy as np
import pytest
from toy_training import begin_training, write_step

from longrope2_ray.recipe.identity import identity
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.report.depth_figure import draw_depths
from longrope2_ray.report.page import Report, ReportWriter, is_final, write_report
from longrope2_ray.report.rundata import load_run
from longrope2_ray.report.tables import format_table
from longrope2_ray.report.verdict_sentences import format_interval, verdict_lines
from longrope2_ray.rope.geometry import RopeGeometry
from longrope2_ray.search.loop import SearchLoop
from longrope2_ray.search.scores import (
    SEARCH_SET,
    NeedleSet,
    Score,
    Unit,
    UnitScore,
    report_set,
    scores_of,
)
from longrope2_ray.search.space import Candidate
from longrope2_ray.search.status import Status
from longrope2_ray.search.verdict import contrasts, own_best
from longrope2_ray.search.winner import GenerationRecord, Survivor, Winner, write_generation
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.workers.done import Done

GEOMETRY = RopeGeometry(head_dim=64, rotary_dim=64, base=10000.0, original_length=256)
NAMES = {"factors.png", "depth.png", "genealogy.png", "progress.png", "dimensions.png", "units.png"}
NAMES |= {"report.html"}
TARGET, NUM_SAMPLES, NUM_TOKENS = 2048, 5, 7
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.0)
FINGERPRINTS = {"model": "0123abcd"}
RECIPE = {
    "name": "toy",
    "model": {"path": "toy"},
    "search": {
        "target_length": TARGET,
        "preset": "paper",
        "population_size": 16,
        "iterations": 4,
        "top_k": 8,
        "num_offspring": 8,
    },
    "needles": {"num_samples": NUM_SAMPLES},
    "report": {
        "num_samples": NUM_SAMPLES,
        "lengths": [TARGET, 2 * TARGET],
        "attention_factors": [1.0, "yarn"],
    },
}


class ToyScorers:
    """Two scorers that take turns; NLL grows with the distance from a vector of critical dim 11."""

    def __init__(self, stop_after: int | None = None):
        ratio = TARGET / GEOMETRY.original_length
        self._ideal = np.log(np.minimum((1.25 * ratio) ** (np.arange(32) / 11), 1.25 * ratio))
        self._rng, self._queue = np.random.default_rng(0), list[Unit]()
        self._free_at, self._left = {"scorer-00": 1e9, "scorer-01": 1e9}, stop_after

    def free(self) -> int:
        return 2 - len(self._queue)

    def submit(self, work: Unit) -> None:
        self._queue.append(work)

    def wait(self) -> list[Done[Unit, UnitScore]]:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt
        unit = self._queue.pop(0)
        distance = float(np.mean((np.log(unit.factors.values) - self._ideal) ** 2))
        nll = (
            NUM_TOKENS
            * (0.02 + 1.5 * distance)
            * (1 + 0.1 * unit.sample)
            / unit.factors.attention_factor
        )
        name = min(self._free_at, key=lambda n: self._free_at[n])
        started, seconds = self._free_at[name], float(self._rng.gamma(20, 0.01))
        self._free_at[name] = started + seconds + 0.01
        score = UnitScore(nll, NUM_TOKENS, nll < NUM_TOKENS, seconds)
        return [Done(unit, score, name, started)]

    def counts(self) -> Mapping[str, int]:
        return {"busy": len(self._queue)}

    def flush(self) -> list[Done[Unit, UnitScore]]:
        return []

    def faults(self) -> Mapping[str, int]:
        return {}


def open_run(path: object) -> RunDir:
    run_dir = RunDir(str(path))
    recipe = Recipe(**RECIPE)
    geometry = {"head_dim": 64, "rotary_dim": 64, "rope_base": 10000.0, "original_length": 256}
    facts = {"geometry": geometry, "target_length": TARGET, "num_samples": NUM_SAMPLES}
    run_dir.open(
        "search",
        identity(recipe, "search"),
        FINGERPRINTS,
        recipe.model_dump(mode="json"),
        facts,
    )
    return run_dir


def needle_set(name: str) -> NeedleSet:
    ids = tuple(f"{name}/{sample}" for sample in range(NUM_SAMPLES))
    return NeedleSet(name, ids, (NUM_TOKENS,) * NUM_SAMPLES, DEPTHS)


def search(run_dir: RunDir, scorers: ToyScorers, observers=()) -> Winner:
    names = SEARCH_SET, report_set(TARGET), report_set(2 * TARGET)
    sets = {name: needle_set(name) for name in names}
    recipe = Recipe(**RECIPE)
    return SearchLoop(recipe, GEOMETRY, sets, run_dir, scorers, FINGERPRINTS, observers).run()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = open_run(tmp_path_factory.mktemp("run"))
    return run_dir, search(run_dir, ToyScorers())


def check_files(run_dir: RunDir, paths) -> str:
    """Every file is there, figures show something, the page loads nothing; returns its text."""
    assert {path.name for path in paths} == NAMES
    for path in paths:
        if path.name.endswith(".png"):
            from matplotlib.image import imread

            pixels = imread(str(path))
            assert pixels.shape[1] > 1000
            assert pixels[..., :3].std() > 0.02
    page = (run_dir.path / "report.html").read_text(encoding="utf-8")
    loads = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]{1,40})|(@import|url\()""", page)
    assert loads
    assert all(source.startswith("data:image/svg+xml;base64,") for source, _ in loads)
    assert "<script" not in page
    return page


def test_before_the_first_generation(tmp_path):
    run_dir = open_run(tmp_path)
    page = check_files(run_dir, write_report(run_dir))
    assert "no generation has been closed" in page
    assert "http-equiv" in page  # the page of a running search loads itself again


def test_mid_search(tmp_path):
    run_dir = open_run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        search(run_dir, ToyScorers(stop_after=120))
    run = load_run(run_dir)
    page = check_files(run_dir, write_report(run_dir))
    assert 0 < len(run.generations) < 5
    assert f"<td>{len(run.generations)} of 5</td>" in page
    assert "units in the open generation" in page
    assert "Comparison" not in page


def test_without_geometry_ledger_and_critical_dimension(tmp_path):
    run_dir = RunDir(str(tmp_path))
    run_dir.open("search", {}, {}, {}, {})
    candidate = Candidate(0, (1.0,) * 8 + (8.0,) * 24)
    write_generation(run_dir, GenerationRecord(0, (candidate,), (Survivor(candidate, 1.0, 1.15),)))
    assert "every dimension was searched" in check_files(run_dir, write_report(run_dir))


def test_finished_run_shows_every_number(finished):
    run_dir, winner = finished
    page = html.unescape(check_files(run_dir, write_report(run_dir)))
    table = format_table(winner)
    assert "http-equiv" not in page
    for row in winner.report:
        for cell in (
            f"{row.needles.ppl:.4g}",
            f"{row.needles.accuracy:.0%}",
            f"{row.attention_factor:.3f}",
        ):
            assert f"<td>{cell}</td>" in page
            assert cell in table
    for factor in winner.factors.values:
        assert f"<td>{factor:.6g}</td>" in page
    assert "0123abcd" in page
    assert "population_size = 16" in page  # the recipe


def test_format_table_marks_the_best_of_each_block(finished):
    _, winner = finished
    table = format_table(winner)
    theory = GEOMETRY.theoretical_critical_dim
    assert f"found {winner.candidate.critical_dim}; theoretical {theory}" in table
    assert "held out" in table.lower()
    assert "beyond the target the baselines get the larger ratio" in table
    *blocks, verdicts = table.split("\n\n")[1:]
    assert verdicts.startswith("Verdict, each method at its own best attention factor")
    assert [line.split(":")[0] for line in verdicts.splitlines()[1:]] == [
        "2048 tokens",
        "4096 tokens",
    ]
    assert len(blocks) == 4  # two lengths at two attention factors
    for block in blocks:
        best = [line for line in block.splitlines() if line.startswith("*")]
        rows = [
            row
            for row in winner.report
            if block.startswith(f"{row.length} tokens")
            and f"attention factor {row.compared_at:.3f}" in block
        ]
        assert len(best) == 1
        assert f"{min(row.needles.ppl for row in rows):.4g}" in best[0]


def test_tables_and_page_show_the_groups_of_depths_and_the_verdict(finished):
    run_dir, winner = finished
    page = html.unescape(check_files(run_dir, write_report(run_dir)))
    table = format_table(winner)
    for depth in ("0", "0.25", "0.5", "0.75"):
        assert f"<th>depth {depth}</th>" in page
        assert f"depth {depth}" in table
    for row in winner.report:
        for needles in row.needles.by_depth().values():
            cell = f"{needles.ppl:.4g} / {needles.accuracy:.0%}"
            assert f"<td>{cell}</td>" in page
            assert cell in table
    lines = verdict_lines(winner)
    assert len(lines) == 2
    for line in lines:
        assert f"<strong>{line}</strong>" in page
        assert line in table
    comparison = page[page.index("<h2>Comparison</h2>") :]
    assert comparison.index(lines[0]) < comparison.index("<table>")
    for contrast in contrasts(winner):
        ratio, bounds = format_interval(contrast.contrast.overall).split(", ")
        assert f"<td>{ratio}</td><td>{bounds}</td>" in page


def test_needles_at_one_depth_have_no_columns_by_depth(finished):
    _, winner = finished
    rows = tuple(
        dataclasses.replace(
            row, needles=dataclasses.replace(row.needles, depth_per_sample=(0.5,) * NUM_SAMPLES)
        )
        for row in winner.report
    )
    table = format_table(dataclasses.replace(winner, report=rows))
    assert "All needles stand at depth 0.5." in table
    assert "  depth 0.5" not in table


def test_the_figure_of_depths_has_a_line_for_each_method_at_its_best(finished):
    run_dir, winner = finished
    run = load_run(run_dir)
    (ax,) = draw_depths(run).axes
    rows = [row for row in winner.report if row.length == TARGET]
    lines = {line.get_label(): line for line in ax.lines}
    assert len(lines) == len({row.method for row in rows})
    best = own_best([row for row in rows if row.method == "yarn"])
    line = lines[f"YaRN, {best.attention_factor:.3f}"]
    assert list(line.get_xdata()) == [0.0, 0.25, 0.5, 0.75]
    assert list(line.get_ydata()) == [needles.ppl for needles in best.needles.by_depth().values()]
    reported_elsewhere = tuple(row for row in winner.report if row.length != TARGET)
    elsewhere = dataclasses.replace(winner, report=reported_elsewhere)
    (ax,) = draw_depths(dataclasses.replace(run, winner=elsewhere)).axes
    assert f"{2 * TARGET} tokens" in ax.get_xlabel()


def test_format_table_without_finite_numbers(finished):
    _, winner = finished
    rows = tuple(
        dataclasses.replace(
            row, needles=dataclasses.replace(row.needles, nll_per_sample=(None,) * NUM_SAMPLES)
        )
        for row in winner.report
    )
    infinite = dataclasses.replace(winner, report=rows)
    whole = dataclasses.replace(winner.candidate, critical_dim=0, start_tokens=8)
    table = format_table(dataclasses.replace(infinite, candidate=whole))
    assert "The first 8 positions keep the original RoPE." in table
    assert "not finite" in table
    assert "every dimension was searched" in table
    assert "LongRoPE2" not in table  # a search over every dimension is the first paper's
    assert "  LongRoPE  " in table
    assert "  LongRoPE2  " in format_table(infinite)
    assert not any(line.startswith("*") for line in table.splitlines())


def test_work_adds_up(finished):
    run_dir, _ = finished
    run = load_run(run_dir)
    rows = [s for s in scores_of(run_dir).load().values() if s.needle_set == SEARCH_SET]
    assert sum(g.units_scored for g in run.generations) == len(rows)
    candidates = sum(len(g.candidates) for g in run.generations)
    units = sum(g.units_scored + g.units_eliminated for g in run.generations)
    assert units == candidates * NUM_SAMPLES
    assert any(g.units_eliminated for g in run.generations)
    assert all(len(g.new_ppls) * NUM_SAMPLES <= g.units_scored for g in run.generations)
    assert math.isclose(
        sum(g.busy_seconds for g in run.generations), sum(s.seconds for s in rows), rel_tol=0.05
    )
    # A unit takes 0.2 s, then the scorer idles 0.01 s.
    assert run.busy_share == pytest.approx(0.95, abs=0.05)


def test_pause_between_attempts_is_not_idle_time(tmp_path):
    run_dir = open_run(tmp_path)
    ledger = scores_of(run_dir)
    for index, began in enumerate((1000.0, 9000.0)):
        candidates = tuple(Candidate(12, (8.0 + 2 * index + n,) * 20) for n in range(2))
        ledger.commit(
            Score(
                vector_id=candidate.id,
                sample_id=f"search/{sample}",
                needle_set=SEARCH_SET,
                sample=sample,
                nll_sum=1.0,
                num_tokens=7,
                correct=True,
                seconds=1.0,
                scorer="scorer-00",
                started=began + NUM_SAMPLES * n + sample,
            )
            for n, candidate in enumerate(candidates)
            for sample in range(NUM_SAMPLES)
        )
        survivors = tuple(Survivor(candidate, 5.0, 1.15) for candidate in candidates)
        write_generation(run_dir, GenerationRecord(index, candidates, survivors))
    assert load_run(run_dir).busy_share == pytest.approx(1.0)


class RecordedWrites:
    """What a writer was asked for: (name of the thread, whether to draw), held up on demand."""

    def __init__(self, hold: bool = False):
        self.seen: list[tuple[str, bool]] = []
        self.go = threading.Event()
        self._hold = hold

    def __call__(self, draw: bool) -> None:
        self.seen.append((threading.current_thread().name, draw))
        if self._hold:
            self.go.wait(5)


def test_writer_refreshes_beside_the_search_and_finishes(tmp_path):
    written = RecordedWrites(hold=True)
    writer = ReportWriter(RunDir(str(tmp_path)), written)
    status = Status("toy")
    writer(status, "generation")
    writer(status, "generation")  # the first one still runs
    written.go.set()
    writer.finish()
    assert written.seen == [("report", True), (threading.current_thread().name, True)]


def test_the_text_is_written_after_every_generation_and_figures_when_there_is_time(tmp_path):
    written = RecordedWrites()
    writer = ReportWriter(RunDir(str(tmp_path)), written)
    status = Status("toy")
    writer(status, "generation")
    writer._join(5)
    writer._figures_due += 1000  # drawing took long
    for event in ("generation", "units", "generation"):
        writer._text_due = 0.0
        writer(status, event)
        writer._join(5)
    assert [draw for _, draw in written.seen] == [True, False, False]
    writer._figures_due = writer._text_due = 0.0
    writer(status, "units")
    writer._join(5)
    assert written.seen[-1] == ("report", True), "what could not be drawn then is drawn now"
    writer._text_due = writer._wanted = 0.0
    writer(status, "units")
    writer._join(5)
    assert written.seen[-1] == ("report", False), "a generation of hours is followed too"


def test_writing_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    clock = [1000.0]
    fake = types.SimpleNamespace(monotonic=lambda: clock[0])
    monkeypatch.setattr("longrope2_ray.report.page.time", fake)

    def write(draw):
        clock[0] += 4.0 if draw else 0.04

    writer = ReportWriter(RunDir(str(tmp_path)), write)
    began, spent = clock[0], 0.0
    for _ in range(4000):
        before = clock[0]
        writer(Status("toy"), "generation")
        writer._join(5)
        spent += clock[0] - before
        clock[0] += 0.1
    assert spent / (clock[0] - began) < 0.08


@pytest.mark.parametrize("state", ["interrupted", "stopped"])
def test_the_page_of_a_search_that_ended_early_does_not_refresh(tmp_path, state):
    run_dir = open_run(tmp_path)
    writer = ReportWriter(run_dir)
    run_dir.write_json("status.json", dataclasses.asdict(Status("toy", "searching")))
    writer(Status("toy", "searching"), "units")
    writer._join(30)
    page = (tmp_path / "report.html").read_text()
    assert '<meta http-equiv="refresh" content="10">' in page
    assert "searching; this page refreshes itself" in page
    run_dir.write_json("status.json", dataclasses.asdict(Status("toy", state)))
    writer(Status("toy", state), "end")
    page = (tmp_path / "report.html").read_text()
    assert "http-equiv" not in page
    assert f"LongRoPE2 search, {state}" in page
    assert not is_final(run_dir), "a resumed search writes it again"


def test_the_page_says_where_a_descent_stands_before_any_figure(tmp_path):
    run_dir = open_run(tmp_path)
    status = Status("toy", "descending", descent_step=7, descent_steps=16, eta_seconds=65.0)
    status.equivalents, status.equivalents_left, status.scorers = 12.5, 30.2, {"busy": 2}
    run_dir.write_json("status.json", dataclasses.asdict(status))
    Report(run_dir).write(draw=False)
    page = html.unescape((tmp_path / "report.html").read_text())
    for name, value in (
        ("state", "descending, step 7 of 16"),
        ("time left", "1:05"),
        ("scorers", "2 busy"),
        ("cost of the search", "12.5 full-length equivalents (FLOPs), about 30 left"),
    ):
        assert f"<td>{name}</td><td>{value}</td>" in page
    assert "<img" not in page


def test_writer_survives_a_failing_report(tmp_path, caplog):
    def write(draw):
        raise OSError("no space")

    run_dir = open_run(tmp_path)
    writer = ReportWriter(run_dir, write, min_seconds=0.0)
    with caplog.at_level(logging.WARNING, "longrope2"):
        winner = search(run_dir, ToyScorers(), [writer])
        writer.finish()
    assert winner.report
    assert len(caplog.records) == 1
    assert "no space" in caplog.text


def test_trainings_beside_each_other_have_their_losses_in_the_report(tmp_path):
    run_dir = RunDir(str(tmp_path))
    run_dir.create()
    run_dir.write_json("run.json", {"kind": "search", "recipe": {}, "fingerprints": {}})
    for name, num_logged in (("mixed", 20), ("plain", 3)):
        begin_training(run_dir, name)
        for step in range(1, num_logged + 1):
            losses = {"long": 4 - step / 10} if step % 2 else {"short": 3.0, "long": 4 - step / 10}
            write_step(run_dir, step, name, num_steps=20, window_losses=losses)
    write_step(run_dir, 1, "no-training")
    assert {path.name for path in write_report(run_dir)} == NAMES | {"training.png"}
    page = html.unescape((tmp_path / "report.html").read_text())
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr>.*?</tr>", page)]
    assert ["mixed", "20", "of", "20", "3.000", "2.050", "81,920", "1,234"] in rows
    assert ["plain", "3", "of", "20", "-", "3.700", "12,288", "1,234"] in rows
    assert 'alt="training.png"' in page
    assert "no-training" not in page, "a folder without the run.json of a training is none"
