"""The page of a run: one HTML document that loads nothing else."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from longrope2_ray.report.facts import (
    FACTOR_HEADINGS,
    LINE_HEADINGS,
    OPERATOR_HEADINGS,
    TRAINING_HEADINGS,
    ancestor_rows,
    factor_rows,
    operators,
    origin_sentences,
    progress_facts,
    result_facts,
    run_facts,
    training_rows,
)
from longrope2_ray.report.figure_style import name_of_result
from longrope2_ray.report.figures import TRAINING_FIGURE, ReportFigure, figures_of
from longrope2_ray.report.rundata import RunData
from longrope2_ray.report.tables import (
    VERDICT,
    WHAT_RATIOS_ARE,
    Block,
    comparison_blocks,
    comparison_notes,
    interval_blocks,
)
from longrope2_ray.report.verdict_sentences import verdict_lines
from longrope2_ray.search.winner import Winner

REFRESH_SECONDS = 10.0
# Only the page of a run that is under way has this, and only that of a finished run the other.
REFRESHES = '<meta http-equiv="refresh"'
FINISHED = '<meta name="state" content="finished">'
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 60em; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em; margin-bottom: 0 }
h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: .6em 0; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: .4em 0 }
th, td { padding: .2em .8em .2em 0; text-align: right; border-bottom: 1px solid #eee;
  vertical-align: top }
td { white-space: nowrap }
th:first-child, td:first-child, .facts td { text-align: left }
thead th { border-bottom: 1px solid #999 }
.facts td { overflow-wrap: anywhere; white-space: normal }
.facts td:first-child { color: #555; white-space: nowrap }
.best td { font-weight: 700; background: #fdf0e6 }
figure { margin: 1.5em 0 }
figure img { width: 100%; height: auto }
figcaption, .note { color: #555; font-size: .9em }
pre { background: #f7f7f7; padding: 1em; overflow-x: auto }
@media print {
  body { margin: 0; max-width: none }
  figure, table { break-inside: avoid }
  h2 { break-after: avoid }
}
"""


def render_html(run: RunData, figures: Mapping[str, str]) -> str:
    """Return the page of a run at whatever stage it is.

    Args:
        figures: data URL of each figure that is drawn, by the name of its PNG.
    """
    name = escape(run.name or "run")
    state = "" if run.ended else f'{REFRESHES} content="{REFRESH_SECONDS:g}">\n'
    state += f"{FINISHED}\n" if run.winner else ""
    of_search = (figure for figure in figures_of(run) if figure is not TRAINING_FIGURE)
    shown = "".join(_figure(figure, figures) for figure in of_search)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
{state}<title>{name}: LongRoPE2 search</title>
<style>{STYLE}</style></head><body>
<h1>{name}</h1>
<p class="note">LongRoPE2 search, {escape(_state(run))}</p>
{_facts(progress_facts(run))}<h2>{"Result" if run.winner else "Best so far"}</h2>
{_facts(result_facts(run))}{_comparison(run)}
<h2>Figures</h2>
{shown}{_origins(run)}{_trainings(run, figures)}<h2>Run</h2>
{_facts(run_facts(run))}
{_factors(run)}<details><summary>Recipe</summary><pre>{escape(run.recipe_toml)}</pre></details>
</body></html>
"""


def _state(run: RunData) -> str:
    if run.winner:
        return "finished"
    state = run.status.state if run.status else "starting"
    return state if run.ended else f"{state}; this page refreshes itself"


def _comparison(run: RunData) -> str:
    if not run.winner:
        return ""
    tables = "".join(map(_block, comparison_blocks(run.winner)))
    notes = escape(" ".join(comparison_notes(run.winner)))
    verdict = _verdict(run.winner)
    return (
        f'<h2>Comparison</h2>\n{verdict}<p class="note">{notes}</p>\n{tables}'
        f"{_intervals(run.winner)}"
    )


def _verdict(winner: Winner) -> str:
    lines = "".join(f"<p><strong>{escape(line)}</strong></p>\n" for line in verdict_lines(winner))
    return f'{lines}<p class="note">{VERDICT}.</p>\n' if lines else ""


def _intervals(winner: Winner) -> str:
    tables = "".join(map(_block, interval_blocks(winner)))
    found = name_of_result(winner.candidate.critical_dim)
    note = f'<p class="note">{escape(WHAT_RATIOS_ARE.format(found=found))}</p>'
    summary = "<summary>Intervals, baseline by baseline</summary>"
    return f"<details>{summary}\n{note}\n{tables}</details>\n" if tables else ""


def _block(block: Block) -> str:
    return _table(block.headings, block.rows, block.best, block.title)


def _origins(run: RunData) -> str:
    """Return where the best candidate came from: in words, by operator, its ancestors."""
    sentences = "".join(f"<p>{escape(sentence)}</p>\n" for sentence in origin_sentences(run))
    made, line = operators(run), ancestor_rows(run)
    table = _table(OPERATOR_HEADINGS, made) if made else ""
    if line:
        summary = "<summary>The line of ancestors of the best candidate</summary>"
        table += f"<details>{summary}\n{_table(LINE_HEADINGS, line)}</details>\n"
    return f"<h2>Where it came from</h2>\n{sentences}{table}" if sentences or table else ""


def _trainings(run: RunData, figures: Mapping[str, str]) -> str:
    if not run.trainings:
        return ""
    table = _table(TRAINING_HEADINGS, training_rows(run))
    return f"<h2>Training</h2>\n{table}{_figure(TRAINING_FIGURE, figures)}"


def _factors(run: RunData) -> str:
    rows = list(factor_rows(run))
    if not rows:
        return ""
    table = _table(FACTOR_HEADINGS, rows)
    return f"<details><summary>Factors by dimension</summary>\n{table}</details>\n"


def _figure(figure: ReportFigure, figures: Mapping[str, str]) -> str:
    """Return a figure with its caption; nothing while it is not drawn yet."""
    if figure.file not in figures:
        return ""
    image = f'<img alt="{escape(figure.file)}" src="{figures[figure.file]}">'
    return f"<figure>{image}<figcaption>{escape(figure.caption)}</figcaption></figure>\n"


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], best: Sequence[int] = (), caption: str = ""
) -> str:
    """Return an HTML table; ``best`` are the numbers of the rows that stand out."""
    body = "".join(
        _row(cells, "td", ' class="best"' if i in best else "") for i, cells in enumerate(rows)
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    thead = f"<thead>{_row(head, 'th')}</thead>"
    return f"<table>{title}{thead}<tbody>\n{body}</tbody></table>\n"


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    """Return an HTML table of names and values; nothing without any."""
    body = "".join(_row(cells, "td") for cells in rows)
    return body and f'<table class="facts"><tbody>\n{body}</tbody></table>\n'


def _row(cells: Sequence[str], tag: str, attribute: str = "") -> str:
    inner = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
    return f"<tr{attribute}>{inner}</tr>\n"
