"""How far a job is: a bar on a terminal, elsewhere a JSON line every ten seconds. Knows nothing of replicas."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hybrid_jax.batch.work import Tally

LINE_S = 10.0  # logs of a cluster are read by people, too
Look = Callable[[Tally, int], None]


@contextmanager
def show_tally(console: Console) -> Iterator[Look]:
    """Report on a console for as long as the context lasts."""
    if not console.is_terminal:
        yield _Lines(console).look
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield _Bar(bar).look


class _Bar:
    def __init__(self, bar: Progress):
        self._bar, self._began_s = bar, time.monotonic()
        self._task = bar.add_task("lines", total=None, speed="")

    def look(self, tally: Tally, under_way: int) -> None:
        seconds = time.monotonic() - self._began_s
        speed = f"{tally.prompt_tokens / seconds:.0f} in, {tally.output_tokens / seconds:.0f} out tokens/s"
        if tally.prompt_tokens:
            speed += f", {tally.cached_tokens / tally.prompt_tokens:.0%} cached"
        failed = f", {tally.failed} failed" if tally.failed else ""
        self._bar.update(
            self._task,
            completed=tally.finished,
            total=tally.total,
            speed=speed,
            description=f"lines{failed}, {under_way} run",
        )


class _Lines:
    def __init__(self, console: Console):
        self._console = console
        self._began_s = self._last_s = time.monotonic()
        self._told = -1  # lines that were finished when something was printed

    def look(self, tally: Tally, under_way: int) -> None:
        now_s = time.monotonic()
        due = now_s - self._last_s >= LINE_S or tally.finished == tally.total
        if not due or tally.finished == self._told:
            return
        self._last_s, self._told = now_s, tally.finished
        seconds = max(now_s - self._began_s, 1e-9)
        line = {
            "lines": tally.total,
            "finished": tally.finished,
            "failed": tally.failed,
            "running": under_way,
            "prompt_tokens_per_s": round(tally.prompt_tokens / seconds, 1),
            "output_tokens_per_s": round(tally.output_tokens / seconds, 1),
            "cached_share": round(tally.cached_tokens / max(tally.prompt_tokens, 1), 3),
            "elapsed_s": round(seconds, 1),
        }
        self._console.print(json.dumps(line), highlight=False, soft_wrap=True, markup=False)
