"""The loop of a job: keeps a replica full of lines, shard after shard, and their results on the disk.

At most `Replica.window` lines are in memory, and one shard's beginnings of prompts while it is put in order.
"""

import asyncio
import faulthandler
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from hybrid_jax.batch.index import Index
from hybrid_jax.batch.replica import Answered, Broken, Replica
from hybrid_jax.batch.settings import BatchConfig
from hybrid_jax.batch.work import Prompt, ShardWork, Tally

POLL_S = 0.2  # between two looks at signals, the disk and the engine's health
FRUITLESS_FAULTS = 6  # in a row without one finished line: the fault lies in no line
WATCHDOG_S = 300.0  # without a turn of the engine


class Interrupted(Exception):
    """A signal ended the job, which can be resumed."""


@dataclass
class Signals:
    """What signals asked for."""

    count: int = 0


@dataclass(frozen=True)
class Under:
    """A line under way."""

    work: ShardWork
    line: int
    prompt: Prompt
    alone: bool


class Run:
    """One process's part of a job. `look` hears how far it is, several times a second, with the lines under way."""

    def __init__(
        self,
        config: BatchConfig,
        index: Index,
        seed: int,
        replica: Replica,
        tally: Tally,
        signals: Signals,
        look: Callable[[Tally, int], None],
    ):
        self._config, self._index, self._seed, self._replica = config, index, seed, replica
        self._tally, self._signals, self._look = tally, signals, look
        self._open: list[ShardWork] = []
        self._under: dict[asyncio.Task[Answered], Under] = {}
        self._faults = 0

    async def run(self, shards: Iterable[int]) -> None:
        """Run shards to their ends.

        Raises Interrupted, OSError of the disk, and RuntimeError where the engine is beyond help.

        In any case everything that was answered is on the disk, as far as the disk takes it.
        """
        with self._index.path.open("rb") as file:
            feed = self._works(iter(shards), file)
            try:
                await self._loop(feed)
                if self._signals.count:
                    await self._wind_up()
                    raise Interrupted
            except OSError:
                self._abandon()
                raise
            finally:
                await self._cancel()
                for work in self._open:
                    work.close()

    def _works(self, shards: Iterator[int], file: BinaryIO) -> Iterator[ShardWork]:
        """Open one shard after another."""
        for number in shards:
            work = ShardWork(self._config, self._index, self._seed, number, file, self._tally)
            self._open.append(work)
            yield work

    async def _loop(self, feed: Iterator[ShardWork]) -> None:
        while not self._signals.count:
            self._admit(feed)
            self._close_finished()
            if not self._under:
                if any(work.queue for work in self._open):
                    continue
                return
            await self._settle_some()

    def _admit(self, feed: Iterator[ShardWork]) -> None:
        """Begin lines until the window is full; one that must run alone, when nothing else is under way."""
        while len(self._under) < self._replica.window and not any(under.alone for under in self._under.values()):
            work = next((work for work in self._open if work.queue), None) or next(feed, None)
            if work is None:
                return
            if not work.queue:
                continue
            alone = work.is_suspect(work.queue[0])
            if alone and self._under:
                return
            line = work.queue.pop(0)
            prompt = work.take(line)
            if prompt is not None:
                task = asyncio.ensure_future(self._replica.answer(prompt.url, prompt.body))
                self._under[task] = Under(work, line, prompt, alone)

    async def _settle_some(self) -> None:
        """Wait for answers, for a moment, and take them in."""
        done, _ = await asyncio.wait(self._under, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
        broken = [task for task in done if isinstance(task.exception(), Broken)]
        for task in done:
            if task not in broken:
                self._finish(task)
        if broken:
            await self._recover()
        for work in self._open:
            work.sync()
        self._look(self._tally, len(self._under))
        if self._replica.stalled_s > WATCHDOG_S:
            _end_stuck(self._replica.stalled_s)

    def _finish(self, task: asyncio.Task[Answered]) -> None:
        answered, under = task.result(), self._under.pop(task)
        under.work.finish(under.prompt, answered.status, answered.body, under.alone)
        self._faults = 0

    async def _recover(self) -> None:
        """Start the replica anew; the lines that were under way go back, marked."""
        await asyncio.wait(self._under)
        for task in [task for task in self._under if task.exception() is None]:
            self._finish(task)
        lost, self._under = list(self._under.values()), {}
        for work in self._open:
            if lines := [under.line for under in lost if under.work is work]:
                work.take_back(lines)
        self._faults += 1
        if self._faults > FRUITLESS_FAULTS:
            raise RuntimeError(f"the engine broke {self._faults} times without one answer between: see its words above")
        await self._replica.start()

    def _close_finished(self) -> None:
        for work in [work for work in self._open if work.over]:
            work.close()
            self._open.remove(work)

    async def _wind_up(self) -> None:
        """Let what is under way finish, for the grace or until the next signal."""
        end_s = asyncio.get_running_loop().time() + self._config.grace_s
        while self._under and self._signals.count < 2 and asyncio.get_running_loop().time() < end_s:
            done, _ = await asyncio.wait(self._under, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task.exception() is None:
                    self._finish(task)
                else:
                    del self._under[task]
        self._close_finished()

    async def _cancel(self) -> None:
        tasks = list(self._under)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._under.clear()

    def _abandon(self) -> None:
        for work in self._open:
            work.abandon()
        self._open.clear()


def _end_stuck(stalled_s: float) -> None:
    """End a process whose engine is stuck; what was answered is on the disk."""
    print(
        f"the engine took no turn for {stalled_s:.0f} s: where its threads stand follows", file=sys.stderr, flush=True
    )
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    os._exit(1)
