"""Progress of work on bytes: a bar in a terminal, plain lines elsewhere.

Knows nothing of the work.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar


class Progress(Protocol):
    """What a long job reports to."""

    def start(self, what: str, total_bytes: int) -> None:
        """A new part of the job begins."""

    def advance(self, size_bytes: int) -> None:
        """So many bytes more are done."""


class Silence:
    """Reports nothing."""

    def start(self, what: str, total_bytes: int) -> None:
        """Nothing."""

    def advance(self, size_bytes: int) -> None:
        """Nothing."""


class _TerminalBar:
    def __init__(self, bar: Bar):
        self._bar = bar
        self._task = bar.add_task("", total=None)

    def start(self, what: str, total_bytes: int) -> None:
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(what, total=total_bytes)

    def advance(self, size_bytes: int) -> None:
        self._bar.advance(self._task, size_bytes)


class _Lines:
    """One line at the start of a part, one for every tenth of it."""

    def __init__(self, console: Console):
        self._console = console
        self._what, self._total, self._done = "", 1, 0

    def start(self, what: str, total_bytes: int) -> None:
        self._what, self._total, self._done = what, max(total_bytes, 1), 0
        self._console.print(f"{what}: {total_bytes / 1e9:.2f} GB", highlight=False)

    def advance(self, size_bytes: int) -> None:
        before = 10 * self._done // self._total
        self._done += size_bytes
        if 10 * self._done // self._total > before:
            self._console.print(f"{self._what}: {100 * self._done // self._total} %", highlight=False)


@contextmanager
def show_progress(console: Console) -> Iterator[Progress]:
    """Progress on a console, for as long as the context lasts."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console) as bar:
        yield _TerminalBar(bar)
