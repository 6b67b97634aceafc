"""A line on stderr that counts what is done."""

import sys
from types import TracebackType


class ProgressLine:
    """Shows counts on stderr: each replaces the one before on a terminal, a line each in a log."""

    def __init__(self) -> None:
        self._subject: str | None = None
        self._width = 0

    def show(self, subject: str, count: str) -> None:
        """Show ``subject count``; another subject begins a new line."""
        live = sys.stderr.isatty()
        if live and self._subject not in (None, subject):
            print(file=sys.stderr)
        self._subject = subject
        line = f"{subject} {count}"
        if live:
            # What the line before had more is covered.
            line = "\r" + line.ljust(self._width)
            self._width = len(line) - 1
        print(line, end="" if live else "\n", file=sys.stderr, flush=True)

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._subject is not None and sys.stderr.isatty():
            print(file=sys.stderr)
