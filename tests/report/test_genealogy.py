"""Where a winner came from: lines of ancestors, operators, a descent and its cascade."""

import html
import math
from pathlib import Path

import numpy as np
import pytest

from longrope2_ray.report.cascade_figure import draw_cascade
from longrope2_ray.report.factors_figure import draw_factors
from longrope2_ray.report.figures import figures_of
from longrope2_ray.report.genealogy import (
    DescentStep,
    descent_steps,
    line_of,
    operator_rows,
    relatives,
)
from longrope2_ray.report.genealogy_figure import draw_descent, draw_genealogy
from longrope2_ray.report.page import write_report
from longrope2_ray.report.rundata import RunData, load_run
from longrope2_ray.rope.baselines import PLAIN
from longrope2_ray.search.scores import SEARCH_SET, SKIPPED_SET, Score, descent_set, scores_of
from longrope2_ray.search.space import Candidate
from longrope2_ray.search.winner import GenerationRecord, Survivor, write_generation
from longrope2_ray.storage.rundir import RunDir

NUM_SAMPLES, NUM_TOKENS, STEPS = 2, 7, 6
FACTS = {
    "geometry": {"head_dim": 64, "rotary_dim": 64, "rope_base": 1e4, "original_length": 256},
    "target_length": 1024,
    "num_samples": NUM_SAMPLES,
}


def candidate(factor: float, origin: str, parent: Candidate | None = None) -> Candidate:
    return Candidate(12, (factor,) * 20, parent_id=parent and parent.id, origin=origin)


def survivor(of: Candidate, ppl: float) -> Survivor:
    return Survivor(of, NUM_SAMPLES * NUM_TOKENS * math.log(ppl), ppl)


# Three generations: b is bred from a, d from b, c from a; x dies out at once, y is never better.
A, X = candidate(4.0, "constant tail"), candidate(5.0, "draw")
B, C, Y = (candidate(4.1 + i / 10, "mutation", A) for i in range(3))
D = candidate(4.5, "crossover", B)
GENERATIONS = (
    GenerationRecord(0, (A, X), (survivor(A, 1.5), survivor(X, 1.9))),
    GenerationRecord(1, (B, C, Y), (survivor(B, 1.3), survivor(C, 1.4))),
    GenerationRecord(2, (D,), (survivor(D, 1.2), survivor(B, 1.3))),
)


def open_run(folder: Path) -> RunDir:
    run_dir = RunDir(str(folder))
    run_dir.open("search", {}, {}, {"name": "toy"}, FACTS)
    return run_dir


def commit(
    run_dir: RunDir, id: str, needle_set: str, ppls: list[float], first_sample: int = 0
) -> None:
    scores_of(run_dir).commit(
        Score(
            vector_id=id,
            sample_id=f"{needle_set}/{sample}",
            needle_set=needle_set,
            sample=sample,
            nll_sum=NUM_TOKENS * math.log(ppl),
            num_tokens=NUM_TOKENS,
            correct=True,
            seconds=1.0,
            scorer="scorer-00",
            started=1000.0 + sample,
        )
        for sample, ppl in enumerate(ppls, first_sample)
    )


def table(page: str, heading: str) -> list[list[str]]:
    """Return the rows of the table that has such a heading."""
    (body,) = (part for part in page.split("<table>")[1:] if f"<th>{heading}</th>" in part)
    rows = body.split("</table>")[0].split("<tbody>")[1].split("<tr")[1:]
    return [
        [cell.split("</td>")[0] for cell in row.split("<td>")[1:]]
        for row in map(html.unescape, rows)
    ]


# --- generations


def test_a_line_of_ancestors_goes_back_to_what_was_drawn() -> None:
    known = relatives(GENERATIONS)
    assert [(r.candidate, r.generation, r.ppl) for r in line_of(D.id, known)] == [
        (A, 0, 1.5),
        (B, 1, 1.3),
        (D, 2, 1.2),
    ]
    assert [r.candidate for r in line_of(X.id, known)] == [X]
    assert line_of(Y.id, known) == [], "it never survived"


def test_a_circle_of_parents_ends() -> None:
    one = Candidate(12, (4.0,) * 20)
    other = Candidate(12, (5.0,) * 20, parent_id=one.id)
    one = Candidate(12, (4.0,) * 20, parent_id=other.id)
    known = relatives([GenerationRecord(0, (), (survivor(one, 1.1), survivor(other, 1.2)))])
    assert len(line_of(one.id, known)) == 2


def test_operators_are_counted_by_what_became_of_their_candidates() -> None:
    assert list(operator_rows(GENERATIONS)) == [
        ("mutation", "3", "2 (67%)", "1"),
        ("constant tail", "1", "1 (100%)", "1"),
        ("crossover", "1", "1 (100%)", "1"),
        ("draw", "1", "1 (100%)", "0"),
    ]
    nameless = GenerationRecord(0, (candidate(4.0, ""),), (survivor(A, 1.5),))
    assert next(operator_rows([nameless]))[0] == "unknown"


@pytest.fixture
def bred(tmp_path: Path) -> RunDir:
    run_dir = open_run(tmp_path)
    for generation in GENERATIONS:
        for one in generation.candidates:
            commit(run_dir, one.id, SEARCH_SET, [1.5] * NUM_SAMPLES)
        write_generation(run_dir, generation)
    return run_dir


def test_the_figure_joins_the_winner_with_its_ancestors(bred: RunDir) -> None:
    (ax,) = draw_genealogy(load_run(bred)).axes
    lines = {c.get_label(): c.get_segments() for c in ax.collections}
    (of_best,) = lines["line of the best so far"]
    assert of_best.tolist() == [[0, 1.5], [1, 1.3], [2, 1.2]]
    (of_other,) = lines["lines of the survivors"]
    assert of_other.tolist() == [[0, 1.5], [1, 1.3]]
    assert len(lines["lines that died out"]) == 3, "every survivor with its parent"
    made = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert made == {
        "constant tail": [[0, 1.5]],
        "draw": [[0, 1.9]],
        "mutation": [[1, 1.3], [1, 1.4]],
        "crossover": [[2, 1.2]],
    }


def test_the_page_of_an_evolution_has_operators_and_ancestors_and_no_cascade(bred: RunDir) -> None:
    names = [path.name for path in write_report(bred)]
    assert "genealogy.png" in names
    assert not {"descent.png", "cascade.png"} & set(names)
    page = (bred.path / "report.html").read_text()
    assert table(page, "survived their generation")[0] == ["mutation", "3", "2 (67%)", "1"]
    line = page[page.index("line of ancestors") :]
    assert [row[0:5:4] + row[1:2] for row in table(line, "needle perplexity")] == [
        ["0", "1.5", "constant tail"],
        ["1", "1.3", "mutation"],
        ["2", "1.2", "crossover"],
    ]
    assert "Spearman" not in page
    assert "descent" not in page


# --- a descent

START = candidate(4.0, "yarn, kept head")


def descend(run_dir: RunDir, steps: int = STEPS) -> list[Candidate]:
    """Commit a race of starts and a descent's steps; return the vectors of the steps."""
    for i in range(4):
        other = START if i == 0 else candidate(6.0 + i, "constant tail")
        commit(run_dir, other.id, SKIPPED_SET, [1.5 + i / 10] * NUM_SAMPLES)
        full = [1.4 + i / 10] * (NUM_SAMPLES if i < 2 else 1)
        commit(run_dir, other.id, SEARCH_SET, full)
    vectors = [START]
    for step in range(steps):
        commit(run_dir, vectors[-1].id, descent_set(step), [2.0 - step / 10] * NUM_SAMPLES)
        vectors.append(candidate(4.01 + step / 100, "descent", vectors[-1]))
    return vectors


def finish(run_dir: RunDir, vectors: list[Candidate], best: float = 1.2) -> None:
    """Race the result under two attention factors and the start."""
    results = [
        Candidate(12, vectors[-1].tail, factor, vectors[-2].id, origin="attention factor")
        for factor in (1.0, 1.1)
    ]
    commit(run_dir, results[0].id, SEARCH_SET, [best] * NUM_SAMPLES)
    commit(run_dir, results[1].id, SEARCH_SET, [3.0])
    survivors = sorted((survivor(results[0], best), survivor(START, 1.4)), key=lambda s: s.nll_sum)
    write_generation(run_dir, GenerationRecord(0, (*results, START), tuple(survivors)))


def test_steps_are_read_from_the_ledger_and_open_ones_are_left_out(tmp_path: Path) -> None:
    run_dir = open_run(tmp_path)
    vectors = descend(run_dir, 11)
    commit(run_dir, vectors[11].id, descent_set(11), [1.5])
    found = descent_steps(scores_of(run_dir).load().values())
    assert [step.step for step in found] == list(range(11)), "in the order of numbers, not names"
    assert found[3] == DescentStep(3, vectors[3].id, pytest.approx(1.7))
    assert descent_steps([]) == []


def check_steps(run: RunData, label: str) -> None:
    lines = {line.get_label(): line for line in draw_descent(run).axes[0].lines}
    losses = [2.0 - step / 10 for step in range(STEPS)]
    assert lines["documents of the step"].get_ydata() == pytest.approx(losses)
    means = np.exp([np.mean(np.log(losses[i : i + 4])) for i in range(STEPS - 3)])
    assert lines["mean of 4 steps"].get_ydata() == pytest.approx(means)
    assert lines[label].get_xydata().tolist() == [[0, pytest.approx(2.0)]]


def test_a_descent_under_way_shows_its_perplexity(tmp_path: Path) -> None:
    run_dir = open_run(tmp_path)
    descend(run_dir)
    run = load_run(run_dir)
    check_steps(run, "start")
    assert len(draw_descent(run).axes) == 1
    names = {figure.file for figure in figures_of(run)}
    assert {"descent.png", "cascade.png"} <= names
    write_report(run_dir)
    assert "The descent took 6 steps." in (tmp_path / "report.html").read_text()


def test_the_race_after_a_descent_is_drawn_best_first_with_the_name_of_the_start(
    tmp_path: Path,
) -> None:
    run_dir = open_run(tmp_path)
    finish(run_dir, descend(run_dir))
    run = load_run(run_dir)
    check_steps(run, "start: yarn, kept head")
    _, raced = draw_descent(run).axes
    assert [label.get_text() for label in raced.get_yticklabels()] == [
        "attention factor 1.000",
        "start: yarn, kept head\nattention factor 1.000",
        "attention factor 1.100",
    ]
    assert [line.get_xdata()[0] for line in raced.lines] == pytest.approx([1.2, 1.4])
    assert [text.get_text() for text in raced.texts] == ["1.2", "1.4", "eliminated"]


def test_the_page_of_a_descent_tells_its_way_in_words_and_rows(tmp_path: Path) -> None:
    run_dir = open_run(tmp_path)
    vectors = descend(run_dir)
    finish(run_dir, vectors)
    names = {path.name for path in write_report(run_dir)}
    assert {"descent.png", "cascade.png"} <= names
    assert not {"genealogy.png", "progress.png", "dimensions.png"} & names, (
        "there is one generation"
    )
    page = html.unescape((tmp_path / "report.html").read_text())
    assert "The descent took 6 steps from yarn, kept head." in page
    assert "better at full length" not in page
    line = page[page.index("line of ancestors") :]
    assert [row[:2] for row in table(line, "needle perplexity")] == [
        ["descent", "start: yarn, kept head"],
        ["descent", "6 steps"],
        ["0", "attention factor"],
    ]
    assert table(page, "survived their generation") == [
        ["attention factor", "2", "1 (50%)", "1"],
        ["yarn, kept head", "1", "1 (100%)", "0"],
    ]


def test_a_start_that_its_descent_did_not_improve_is_named(tmp_path: Path) -> None:
    run_dir = open_run(tmp_path)
    finish(run_dir, descend(run_dir), best=1.6)
    write_report(run_dir)
    page = html.unescape((tmp_path / "report.html").read_text())
    assert "Its start is better at full length than what it ended in." in page
    line = page[page.index("line of ancestors") :]
    assert [row[:2] for row in table(line, "needle perplexity")] == [["0", "yarn, kept head"]]


def test_the_cascade_is_drawn_with_its_correlation_and_said_in_words(tmp_path: Path) -> None:
    run_dir = open_run(tmp_path)
    descend(run_dir)
    run = load_run(run_dir)
    (ax,) = draw_cascade(run).axes
    words = "Spearman's rank correlation 1.00, 4 candidates"
    assert ax.get_title() == words
    drawn = {line.get_label(): len(line.get_xdata()) for line in ax.lines}
    assert drawn == {"complete at full length, 2": 2, "eliminated at full length, 2": 2}
    complete = ax.lines[0].get_xydata()
    assert complete[0].tolist() == [1.0, 1.0]
    assert complete[1] == pytest.approx(
        [math.log(1.6) / math.log(1.5), math.log(1.5) / math.log(1.4)]
    )
    write_report(run_dir)
    page = html.unescape((tmp_path / "report.html").read_text())
    assert f"Skipped documents against full length: {words}." in page


# --- the vector


def test_the_found_vector_is_drawn_against_every_published_method(bred: RunDir) -> None:
    ax = draw_factors(load_run(bred)).axes[0]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels[:2] == ["LongRoPE2, best so far", "all survivors"]
    assert {"unscaled", "PI", "NTK", "NTK-aware", "YaRN", "Llama 3"} < set(labels[2:])
    assert len(labels) == 2 + len(PLAIN)
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["PI"].get_ydata().tolist() == [4.0] * 32
    looks = {(line.get_color(), line.get_linestyle()) for line in ax.lines if line.get_label()}
    assert len(looks) >= len(labels) - 1, "each line has a look of its own"
    assert ax.get_yscale() == "log"
    marks = {text.get_text().split()[0]: text.get_position()[0] for text in ax.texts}
    assert marks == {"found": 12, "theoretical": 13}
