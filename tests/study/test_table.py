"""The table of a study: its statistics and its text, from outcomes made up here."""

import json
import math
import statistics
from dataclasses import replace

import pytest

from longrope2_ray.study.progress import StudyProgress, StudyStatus
from longrope2_ray.study.table import (
    Baseline,
    Failure,
    Outcome,
    Table,
    bootstrap_ratio,
    build_table,
    format_markdown,
    format_text,
)

OUTCOME = Outcome(
    variant="default",
    seed=0,
    search_ppl=1.0,
    held_out_ppl=2.0,
    accuracy=0.5,
    start_ppl=None,
    start_accuracy=None,
    equivalents=100.0,
    critical_dim=11,
    loss=None,
    trained_ppl=None,
    trained_accuracy=None,
    short_ppl=None,
    short_accuracy=None,
    length=1024,
    attention_factor=1.0,
    baselines=(Baseline("yarn", 1.5, 0.25), Baseline("unscaled", None, 0.0)),
)


def outcomes(variant: str, *ppls: float | None) -> list[Outcome]:
    return [replace(OUTCOME, variant=variant, seed=s, search_ppl=p) for s, p in enumerate(ppls)]


def table(*parts: list[Outcome], failures: tuple[Failure, ...] = ()) -> Table:
    variants = list(dict.fromkeys(its.variant for part in parts for its in part))
    return build_table("s", "demo", variants, [its for part in parts for its in part], failures)


def test_the_median_the_worst_seed_and_the_ratio() -> None:
    found = table(outcomes("a", 1.0, 3.0, 2.0), outcomes("b", 2.0, 6.0, 4.0))
    first, second = (row.summaries["search_ppl"] for row in found.rows)
    assert (first.median, first.worst, first.worst_seed, first.to_first) == (2.0, 3.0, 1, None)
    assert (second.median, second.worst, second.worst_seed) == (4.0, 6.0, 1)
    # Twice the first on every seed: in pairs there is nothing left to vary.
    ratio = second.to_first
    assert ratio is not None
    assert (ratio.ratio, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    assert found.rows[0].summaries["accuracy"].worst == 0.5
    assert "loss" not in found.rows[0].summaries


def test_the_worst_accuracy_is_the_lowest() -> None:
    rows = [replace(OUTCOME, seed=seed, accuracy=value) for seed, value in enumerate((0.5, 0.1))]
    summary = table(rows).rows[0].summaries["accuracy"]
    assert (summary.worst, summary.worst_seed) == (0.1, 1)


def test_the_interval_covers_the_ratio_and_is_the_same_every_time() -> None:
    first, other = [1.1, 1.3, 1.2, 1.15, 1.4], [1.3, 1.2, 1.5, 1.25, 1.6]
    found = bootstrap_ratio(other, first)
    assert found == bootstrap_ratio(other, first)
    assert found is not None
    assert found.ratio == statistics.median(other) / statistics.median(first)
    assert found.low <= found.ratio <= found.high
    assert 0.8 < found.low < 1.0 < found.high < 1.3


@pytest.mark.parametrize(
    ("values", "first"),
    [([1.0], [1.0]), ([], []), ([1.0, math.inf], [1.0, 1.0]), ([0.5, 0.5], [0.0, 0.0])],
)
def test_there_is_no_interval_without_seeds_and_finite_medians(values, first) -> None:
    assert bootstrap_ratio(values, first) is None


def test_only_seeds_that_both_variants_have_are_compared() -> None:
    found = table(outcomes("a", 1.0, 1.0, 9.0), outcomes("b", 2.0, 2.0))
    summary = found.rows[1].summaries["search_ppl"]
    assert summary.to_first is not None
    assert summary.to_first.ratio == 2.0


def test_a_perplexity_that_is_not_finite_is_the_worst() -> None:
    summary = table(outcomes("a", 1.0, None, 2.0)).rows[0].summaries["search_ppl"]
    assert (summary.median, summary.worst, summary.worst_seed) == (2.0, None, 1)
    body = json.dumps(table(outcomes("a", 1.0, None)).to_json(), allow_nan=False)
    assert json.loads(body)["rows"][0]["summaries"]["search_ppl"]["median"] is None


def test_a_report_without_the_winner_leaves_its_columns_out() -> None:
    bare = replace(OUTCOME, held_out_ppl=None, accuracy=None)
    assert set(table([bare]).rows[0].summaries) == {"search_ppl", "equivalents"}
    not_finite = replace(OUTCOME, held_out_ppl=None)
    assert table([not_finite]).rows[0].summaries["held_out_ppl"].median is None


def test_the_text_has_variants_baselines_and_failures() -> None:
    failure = Failure("b", 1, "scorer: no room")
    found = table(outcomes("a", 1.0, 3.0), outcomes("b", 2.0), failures=(failure,))
    markdown = format_markdown(found)
    assert "| a | 2 | 2 (3) | 2 (2) | 50% (50%) | 100 (100) | 11 11 |" in markdown
    assert "| YaRN | 1.5 | 25% |" in markdown
    assert "| unscaled | not finite | 0% |" in markdown
    assert markdown.count("YaRN") == 1
    assert "- b, seed 1: scorer: no room" in markdown
    text = format_text(found)
    assert "critical dim, each seed" in text
    assert "- b, seed 1: scorer: no room" in text
    assert len(found.to_json()["baselines"]) == 2


def test_needles_at_the_start_have_columns_where_others_stand_elsewhere() -> None:
    found = table([replace(OUTCOME, start_ppl=None, start_accuracy=0.25)])
    assert found.rows[0].summaries["start_accuracy"].median == 0.25
    # It was measured and is not finite.
    assert found.rows[0].summaries["start_ppl"].median is None
    assert "at the start" not in format_text(table([OUTCOME]))
    baselines = (Baseline("yarn", 1.5, 0.25, 1.25, 0.5),)
    text = format_markdown(table([replace(OUTCOME, baselines=baselines)]))
    assert "| YaRN | 1.5 | 25% | 1.25 | 50% |" in text


def test_a_study_without_any_outcome_has_a_table_too() -> None:
    found = build_table("s", "demo", ["a", "b"], [], [Failure("a", 0, "why")])
    assert "| a | 0 | - |" in format_markdown(found)
    assert format_text(found).endswith("- a, seed 0: why")


def test_the_progress_counts_trials_and_tells_when_it_ends() -> None:
    now, seen = [0.0], list[StudyStatus]()
    progress = StudyProgress(6, 2, seen.append, (2.0, "z/seed-0"), clock=lambda: now[0])
    progress.started("a/seed-0")
    assert seen[-1].eta_seconds is None
    assert (seen[-1].best_ppl, seen[-1].best_trial) == (2.0, "z/seed-0")
    now[0] = 10.0
    progress.generation("a/seed-0", 0, 1, 1.5)
    assert seen[-1].running == ("a/seed-0 at generation 0 of 1",)
    assert seen[-1].eta_seconds == pytest.approx(70.0)
    now[0] = 20.0
    progress.ended("a/seed-0", failed=False)
    assert (seen[-1].finished, seen[-1].failed, seen[-1].running) == (3, 0, ())
    assert seen[-1].eta_seconds == pytest.approx(60.0)
    progress.started("b/seed-0")
    progress.generation("b/seed-0", 0, 1, None)
    progress.generation("b/seed-0", 1, 1, 1.75)
    progress.ended("b/seed-0", failed=True)
    assert (seen[-1].finished, seen[-1].failed) == (3, 1)
    assert (seen[-1].best_ppl, seen[-1].best_trial) == (1.5, "a/seed-0")
