"""Writes the report of a run, ``report.html`` and its figures, at every stage of the run."""

import base64
import io
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from upath import UPath

from longrope2_ray.report.figure_style import DPI
from longrope2_ray.report.figures import figures_of
from longrope2_ray.report.html_page import REFRESH_SECONDS, REFRESHES, render_html
from longrope2_ray.report.rundata import load_run
from longrope2_ray.search.status import Status
from longrope2_ray.storage.rundir import RunDir

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("longrope2")
PAGE = "report.html"
# The share of the time that refreshing the report may take at most.
REFRESH_SHARE = 0.05


def write_report(run_dir: RunDir) -> list[UPath]:
    """Write the figures and the page of a run at whatever stage it is; return their paths.

    Raises:
        RunDirError: if the directory cannot be read or written.
    """
    run = load_run(run_dir)
    urls = {}
    for figure in figures_of(run):
        png, svg = _images(figure.of(run))
        run_dir.write_bytes(figure.file, png)
        urls[figure.file] = "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    run_dir.write_bytes(PAGE, render_html(run, urls).encode())
    return [run_dir.path / name for name in (PAGE, *urls)]


def _images(figure: "Figure") -> tuple[bytes, bytes]:
    """Return a figure as PNG and as SVG."""
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI)
    # It is laid out: doing that again would take as long as drawing.
    figure.set_layout_engine("none")
    figure.savefig(svg, format="svg")
    return png.getvalue(), svg.getvalue()


def is_final(run_dir: RunDir) -> bool:
    """Tell whether the page that is there is the one of the finished run."""
    try:
        return REFRESHES not in (run_dir.path / PAGE).read_text(encoding="utf-8")
    except OSError:
        return False


class ReportWriter:
    """Observer of a search that refreshes the report in a thread beside it.

    The search goes on whatever fails here.

    Args:
        run_dir: the run.
        write: writes the report.
        min_seconds: pause between two refreshes; longer if a report takes long to draw.
    """

    def __init__(
        self,
        run_dir: RunDir,
        write: Callable[[RunDir], object] = write_report,
        min_seconds: float = REFRESH_SECONDS,
    ):
        # An object of its own: at an early end the search gives its own one no more patience.
        self._run_dir = RunDir(run_dir.url, patience_seconds=run_dir.patience_seconds)
        self._report = write
        self._min_seconds = min_seconds
        self._thread: threading.Thread | None = None
        self._due = 0.0
        self._warned = False

    def __call__(self, status: Status, event: str) -> None:
        writing = self._thread is not None and self._thread.is_alive()
        if event == "generation" and not writing and time.monotonic() >= self._due:
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
        except Exception as error:  # whatever it is, it may not end the search
            if not self._warned:
                log.warning(
                    "the report could not be written (%s: %s); the run goes on",
                    type(error).__name__,
                    error,
                )
            self._warned = True
        ended = time.monotonic()
        self._due = ended + max(self._min_seconds, (ended - began) / REFRESH_SHARE)
