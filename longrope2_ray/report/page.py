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
from longrope2_ray.report.html_page import FINISHED, REFRESH_SECONDS, render_html
from longrope2_ray.report.rundata import load_run
from longrope2_ray.search.status import Status
from longrope2_ray.storage.rundir import RunDir

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("longrope2")
PAGE = "report.html"
# The share of the time that writing the text may take at most, and that drawing figures may.
TEXT_SHARE = 0.02
FIGURES_SHARE = 0.05
# So long the end of a search waits for its last page.
END_SECONDS = 5.0


class Report:
    """The report of a run, which remembers its figures: they take a hundred times as long as text.

    Args:
        run_dir: the run.
    """

    def __init__(self, run_dir: RunDir):
        self._run_dir = run_dir
        # File of each figure that was drawn -> its data URL.
        self._urls: dict[str, str] = {}

    def write(self, draw: bool = True) -> list[UPath]:
        """Write the page of the run at whatever stage it is; return the paths of its files.

        Args:
            draw: whether to draw the figures anew; if not, the page shows those drawn last.

        Raises:
            RunDirError: if the directory cannot be read or written.
        """
        run = load_run(self._run_dir)
        figures = figures_of(run)
        if draw:
            for figure in figures:
                png, svg = _images(figure.of(run))
                self._run_dir.write_bytes(figure.file, png)
                encoded = base64.b64encode(svg).decode()
                self._urls[figure.file] = f"data:image/svg+xml;base64,{encoded}"
        self._run_dir.write_bytes(PAGE, render_html(run, self._urls).encode())
        return [self._run_dir.path / name for name in (PAGE, *self._urls)]


def write_report(run_dir: RunDir) -> list[UPath]:
    """Write the figures and the page of a run at whatever stage it is; return their paths.

    Raises:
        RunDirError: if the directory cannot be read or written.
    """
    return Report(run_dir).write()


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
        return FINISHED in (run_dir.path / PAGE).read_text(encoding="utf-8")
    except OSError:
        return False


class ReportWriter:
    """Observer of a search that refreshes the report in a thread beside it.

    The text is written after every generation and step of a descent, and every few seconds between
    them; figures are drawn at a generation's or step's end if they do not take too much time. The
    search goes on whatever fails here.

    Args:
        run_dir: the run.
        write: writes the report, its figures too if it is told so; ``Report.write`` unless given.
        min_seconds: pause between two refreshes inside a generation.
    """

    def __init__(
        self,
        run_dir: RunDir,
        write: Callable[[bool], object] | None = None,
        min_seconds: float = REFRESH_SECONDS,
    ):
        # An object of its own: at an early end the search gives its own one no more patience.
        own_dir = RunDir(run_dir.url, patience_seconds=run_dir.patience_seconds)
        self._report = write or Report(own_dir).write
        self._min_seconds = min_seconds
        self._thread: threading.Thread | None = None
        # When text and figures may be written again, and when text is wanted without an event.
        self._text_due = self._figures_due = self._wanted = 0.0
        # Whether a generation or step has ended that is not in the text, or the figures, yet.
        self._new_text = self._new_figures = False
        self._warned = False

    def __call__(self, status: Status, event: str) -> None:
        if event == "end":
            # A search that ended early has nobody else to write that its page need not refresh.
            if status.state != "finished":
                self._start(draw=False)
                self._join(END_SECONDS)
            return
        if event == "generation":
            self._new_text = self._new_figures = True
        now = time.monotonic()
        busy = self._thread is not None and self._thread.is_alive()
        draw = self._new_figures and now >= self._figures_due
        text = now >= self._text_due and (self._new_text or now >= self._wanted)
        if not busy and (draw or text):
            self._new_text, self._new_figures = False, self._new_figures and not draw
            self._start(draw)

    def finish(self) -> None:
        """Write the last report, after the one under way."""
        self._join(None)
        self._write(draw=True)

    def _start(self, draw: bool) -> None:
        """Write in a thread, after the one that is under way."""
        before = self._thread

        def run() -> None:
            if before is not None:
                before.join()
            self._write(draw)

        self._thread = threading.Thread(target=run, name="report", daemon=True)
        self._thread.start()

    def _join(self, seconds: float | None) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    def _write(self, draw: bool) -> None:
        began = time.monotonic()
        try:
            self._report(draw)
        except Exception as error:  # whatever it is, it may not end the search
            if not self._warned:
                log.warning(
                    "the report could not be written (%s: %s); the run goes on",
                    type(error).__name__,
                    error,
                )
            self._warned = True
        ended = time.monotonic()
        took = ended - began
        self._wanted = ended + self._min_seconds
        if draw:
            self._figures_due = ended + took / FIGURES_SHARE
        else:
            self._text_due = ended + took / TEXT_SHARE
