"""Tables and the page of a run, from its directory alone: a text table and one self-contained ``report.html``.

Works at every stage of a run.
"""

import base64
import io
import logging
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from longrope2_ray.report.figures import (
    DPI,
    FIGURES,
    NOT_YET,
    TRAINING,
    draw_factors,
    draw_message,
)
from longrope2_ray.report.rundata import RunData, load_run
from longrope2_ray.report.tables import HEADINGS, _blocks, _critical, _notes, _number
from longrope2_ray.rope.factors import assemble
from longrope2_ray.search.status import Status
from longrope2_ray.storage.rundir import RunDir

log = logging.getLogger("longrope2")


REFRESH_SECONDS = 20.0


REFRESHES = '<meta http-equiv="refresh"'


REFRESH_SHARE = 0.05  # of the time, that refreshing may take at most


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60em; margin: 2em auto;
  padding: 0 1em }
h1 { font-size: 1.5em; margin-bottom: 0 } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: .6em 0; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: .4em 0 }
th, td { padding: .2em 1.2em .2em 0; text-align: right; border-bottom: 1px solid #eee; vertical-align: top }
th:first-child, td:first-child, .facts td { text-align: left } thead th { border-bottom: 1px solid #999 }
.facts td { overflow-wrap: anywhere } .facts td:first-child { color: #555; white-space: nowrap }
.best td { font-weight: 700; background: #fdf0e6 }
figure { margin: 1.5em 0 } figure img { width: 100%; height: auto }
figcaption, .note { color: #555; font-size: .9em } pre { background: #f7f7f7; padding: 1em; overflow-x: auto }
@media print { body { margin: 0; max-width: none } figure, table { break-inside: avoid } h2 { break-after: avoid } }
"""


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], best: Sequence[int] = (), caption: str = ""
) -> str:
    """An HTML table; without ``head`` one of facts, name and value."""

    def row(cells: Sequence[str], tag: str, attribute: str = "") -> str:
        return (
            f"<tr{attribute}>"
            + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
            + "</tr>\n"
        )

    body = "".join(
        row(cells, "td", ' class="best"' if i in best else "") for i, cells in enumerate(rows)
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    top = f"<table>{title}<thead>{row(head, 'th')}</thead>" if head else '<table class="facts">'
    return f"{top}<tbody>\n{body}</tbody></table>\n"


def _result_facts(run: RunData) -> Iterator[tuple[str, str]]:
    """The best candidate so far."""
    if run.best is None:
        yield "best candidate", f"none: {NOT_YET}"
        return
    id, tail = run.best["id"], run.best["tail"]
    yield "found critical dimension", _critical(run.best["critical_dim"])
    if run.geometry:
        yield (
            "theoretical critical dimension",
            f"{run.theoretical} (ten periods: {run.geometry.ten_period_dim})",
        )
    yield "factors from there on", f"{tail[0]:.4g} to {tail[-1]:.4g}"
    yield "attention factor", f"{run.best['attention_factor']:.3f}"
    if run.best["start_tokens"]:
        yield "positions that keep the original RoPE", str(run.best["start_tokens"])
    yield "needle perplexity, search needles", _number(run.best["ppl"])
    born = [str(g.index) for g in run.generations if any(c["id"] == id for c in g.candidates)]
    yield "candidate", f"{id}, bred for generation {born[0] if born else '?'}"


def _run_facts(run: RunData) -> Iterator[tuple[str, str]]:
    """What was run on what, and what it took."""
    recipe, generations = run.recipe, run.generations
    yield "model", str(recipe.get("model.path", "unknown"))
    for name, value in sorted((run.facts.get("fingerprints") or {}).items()):
        yield f"fingerprint of {name}", str(value)
    if run.geometry:
        geometry, ratio = run.geometry, run.target_length / run.geometry.original_length
        yield (
            "window",
            f"{geometry.original_length} -> {run.target_length} tokens (ratio {ratio:g})",
        )
        yield (
            "RoPE",
            f"base {geometry.base:g}, {geometry.rotary_dim} of {geometry.head_dim} dimensions of a head rotary",
        )
    yield (
        "generations closed",
        f"{len(generations)} of {recipe.get('search.iterations', -1) + 1 or 'unknown'}",
    )
    scored, out = sum(g.scored for g in generations), sum(g.raced_out for g in generations)
    if scored:
        yield (
            "units in closed generations",
            f"{scored} scored, {out} raced out ({out / (scored + out):.1%} saved)",
        )
    if len(run.rows) > scored:
        where = (
            "units ahead that no generation asked for"
            if run.winner
            else "units in the open generation or ahead"
        )
        yield where, f"{len(run.rows) - scored} scored"
    if run.rows:
        yield "time per unit", f"median {statistics.median(row.seconds for row in run.rows):.3g} s"
        yield "scorers seen", str(len({row.scorer for row in run.rows}))
    if run.busy_share is not None:
        yield (
            "searching",
            f"{sum(g.end - g.begin for g in generations):.4g} s, scorers {run.busy_share:.0%} busy",
        )


def _factor_rows(run: RunData) -> Iterator[tuple[str, str, str]]:
    if run.best and run.geometry:
        factors = assemble(run.best["critical_dim"], run.best["tail"])
        for dim, (period, factor) in enumerate(
            zip(run.geometry.periods_tokens, factors, strict=True)
        ):
            yield str(dim), f"{period:.1f}", f"{factor:.6g}"


TRAINING_HEADINGS = ("training", "steps", "loss, short", "loss, long", "tokens", "tokens/s")


def _training_rows(run: RunData) -> Iterator[tuple[str, ...]]:
    """Where each training stands: losses of the last tenth of its logged steps, median pace."""
    for name, rows in run.trainings.items():
        last = rows[-max(len(rows) // 10, 1) :]
        losses = [
            [row["window_losses"][w] for row in last if w in row["window_losses"]]
            for w in ("short", "long")
        ]
        yield (
            name,
            f"{rows[-1]['step']} of {rows[-1]['num_steps']}",
            *(f"{statistics.fmean(values):.3f}" if values else "-" for values in losses),
            f"{rows[-1]['step'] * rows[-1]['num_positions']:,}",
            f"{statistics.median(row['tokens_per_second'] for row in rows):,.0f}",
        )


def render_html(run: RunData, figures: Mapping[str, str]) -> str:
    """The page; ``figures`` is the name of a PNG -> data URL."""
    name = escape(str(run.recipe.get("name") or run.status.get("name") or "run"))
    state = (
        "finished"
        if run.winner
        else f"{run.status.get('state', 'starting')}; this page refreshes itself"
    )
    refresh = "" if run.winner else f'{REFRESHES} content="{REFRESH_SECONDS:g}">\n'
    comparison = ""
    if run.winner:
        tables = "".join(
            _table(HEADINGS, block.rows, block.best, block.title) for block in _blocks(run.winner)
        )
        notes = escape(" ".join(_notes(run.winner)))
        comparison = f'<h2>Comparison</h2>\n<p class="note">{notes}</p>\n{tables}'
    factors = ""
    if rows := list(_factor_rows(run)):
        table = _table(("dimension", "period (tokens)", "factor"), rows)
        factors = f"<details><summary>Factors by dimension</summary>\n{table}</details>\n"

    def show(file: str, caption: str) -> str:
        image = f'<img alt="{escape(file)}" src="{figures[file]}">'
        return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>\n"

    shown = "".join(show(file, caption) for file, _, caption in FIGURES)
    training = ""
    if run.trainings:
        file, _, caption = TRAINING
        training = f"<h2>Training</h2>\n{_table(TRAINING_HEADINGS, _training_rows(run))}{show(file, caption)}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
{refresh}<title>{name}: LongRoPE2 search</title>
<style>{STYLE}</style></head><body>
<h1>{name}</h1>
<p class="note">LongRoPE2 search, {escape(state)}</p>
<h2>{"Result" if run.winner else "Best so far"}</h2>
{_table((), _result_facts(run))}{comparison}
<h2>Figures</h2>
{shown}{training}<h2>Run</h2>
{_table((), _run_facts(run))}
{factors}<details><summary>Recipe</summary><pre>{escape(run.recipe_toml)}</pre></details>
</body></html>
"""


def write_report(run_dir: RunDir) -> list[Any]:
    """Write the figures and ``report.html`` of a run at whatever stage it is; returns their paths.

    Raises:
        RunDirError: if the directory cannot be read or written.
    """
    run, urls = load_run(run_dir), {}
    for name, draw, _ in (*FIGURES, *([TRAINING] if run.trainings else [])):
        figure = (
            draw(run)
            if run.generations or draw in (draw_factors, TRAINING[1])
            else draw_message(NOT_YET)
        )
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=DPI)
        figure.set_layout_engine(
            "none"
        )  # it stays as laid out; doing it again would take as long as drawing
        figure.savefig(svg, format="svg")
        run_dir.write_bytes(name, png.getvalue())
        urls[name] = "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()
    run_dir.write_bytes("report.html", render_html(run, urls).encode())
    return [run_dir.path / name for name in ("report.html", *urls)]


def is_final(run_dir: RunDir) -> bool:
    """Whether the page that is there is the one of the finished run."""
    try:
        return REFRESHES not in (run_dir.path / "report.html").read_text(encoding="utf-8")
    except OSError:
        return False


class ReportWriter:
    """Observer of a search that refreshes the report in a thread beside it; whatever fails, the search goes on.

    Args:
        run_dir: the run.
        write: what makes the report.
        min_seconds: pause between two refreshes; longer if a report takes long to draw.
    """

    def __init__(
        self,
        run_dir: RunDir,
        write: Callable[[RunDir], object] = write_report,
        min_seconds: float = REFRESH_SECONDS,
    ):
        # Eyes of its own: what a driver compacts away is what the driver itself has read.
        self._run_dir = RunDir(run_dir.url, patience_seconds=run_dir.patience_seconds)
        self._report, self._min_seconds = write, min_seconds
        self._thread: threading.Thread | None = None
        self._due = 0.0
        self._warned = False

    def __call__(self, status: Status, event: str) -> None:
        at_work = self._thread is not None and self._thread.is_alive()
        if event == "generation" and not at_work and time.monotonic() >= self._due:
            self._thread = threading.Thread(target=self._write, name="report", daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Write the last report, after the one under way."""
        if self._thread is not None:
            self._thread.join()
        self._write()

    def _write(self) -> None:
        began = time.monotonic()
        try:
            self._report(self._run_dir)
        except Exception as error:  # no report is worth a search
            if not self._warned:
                log.warning(
                    "the report could not be written (%s: %s); the run goes on",
                    type(error).__name__,
                    error,
                )
            self._warned = True
        ended = time.monotonic()
        self._due = ended + max(self._min_seconds, (ended - began) / REFRESH_SHARE)
