"""A shard while it runs: its lines in order, their results, and its end. Knows nothing of replicas."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO

import msgspec

from hybrid_jax.batch import files
from hybrid_jax.batch.index import Index
from hybrid_jax.batch.journal import Attempt, Done, read_shard
from hybrid_jax.batch.lines import complete_body, read_request, write_failure, write_response
from hybrid_jax.batch.order import order_key, order_lines
from hybrid_jax.batch.settings import BatchConfig

SUSPECT_MARKS = 2  # crashes with a line under way after which it runs alone
FATAL_MARKS = 3  # crashes with it alone under way after which it is an error
GROUP_S = 1.0  # results wait at most so long for others


@dataclass(frozen=True)
class Prompt:
    """One line, read."""

    custom_id: str
    url: str
    body: bytes


@dataclass
class Tally:
    """How far a job is. Tokens are of this process alone, lines of the whole job as far as it was looked at."""

    total: int
    finished: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class _Cached(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Cached = msgspec.field(default_factory=_Cached)


class _Body(msgspec.Struct):
    usage: _Usage | None = None


@dataclass
class ShardWork:
    """The lines of one shard that have no result yet."""

    config: BatchConfig
    index: Index
    seed: int
    number: int
    file: BinaryIO
    tally: Tally
    on_done: Callable[[int], None] = field(default=lambda shard: None)

    def __post_init__(self) -> None:
        self._lines = self.index.shard(self.number, self.config.shard_lines)
        folder = self.config.folder.shards
        self._shard = read_shard(folder, self.number, self.index.places(self._lines))
        self.tally.finished += len(self._shard.results)
        self.tally.failed += self._shard.failed
        self._failed = self._shard.failed
        rest = [line for line in self._lines if line not in self._shard.results]
        keys = (order_key(line, self.index.read(self.file, line)) for line in rest)
        ordered = order_lines(keys)
        self.queue = sorted(ordered, key=self._suspicion)  # a stable sort: suspects last
        self._left = len(rest)
        self._attempt = Attempt(folder, self.number)
        self._waits_since_s = 0.0

    def is_suspect(self, line: int) -> bool:
        """Whether a line must run alone."""
        return self._shard.marks[line] >= SUSPECT_MARKS

    def _suspicion(self, line: int) -> tuple[bool, int]:
        """Those that broke it least often alone come first: one answer clears the engine of the fault."""
        return self.is_suspect(line), self._shard.alone[line]

    def take(self, line: int) -> Prompt | None:
        """Begin a line. None for one that has broken the engine too often: its result is that it failed."""
        request = read_request(self.index.read(self.file, line))
        if self._shard.alone[line] >= FATAL_MARKS:
            message = (
                f"the engine broke {self._shard.marks[line]} times with this line, {FATAL_MARKS} times with it alone"
            )
            self._settle(write_failure(request.custom_id, "engine_broken", message), failed=True)
            return None
        self._attempt.begin(line, self.is_suspect(line))
        return Prompt(request.custom_id, request.url, complete_body(request, self.seed))

    def finish(self, prompt: Prompt, status: int, body: bytes, alone: bool) -> None:
        """Take the answer to a line."""
        usage = msgspec.json.decode(body, type=_Body).usage or _Usage()
        self.tally.prompt_tokens += usage.prompt_tokens
        self.tally.cached_tokens += usage.prompt_tokens_details.cached_tokens
        self.tally.output_tokens += usage.completion_tokens
        self._settle(write_response(prompt.custom_id, status, body), failed=status != 200)
        if alone:
            self._attempt.sync()  # or the next one that runs alone would take it along

    def _settle(self, result: bytes, failed: bool) -> None:
        if not self._attempt.waiting:
            self._waits_since_s = time.monotonic()
        self._attempt.add(result)
        self._left -= 1
        self._failed += failed
        self.tally.finished += 1
        self.tally.failed += failed

    def take_back(self, lines: list[int]) -> None:
        """Put lines under which the engine broke back in the queue, marked."""
        self._attempt.note_fault()
        alone = [line for line in lines if self.is_suspect(line)]
        self._shard.marks.update(lines)
        self._shard.alone.update(alone)
        self.queue = sorted([*lines, *self.queue], key=self._suspicion)

    @property
    def over(self) -> bool:
        """Whether every line has its result."""
        return not self._left

    def sync(self) -> None:
        """Put results on the disk where that is due, and at the end also that the shard is done."""
        if self.over or self._attempt.full or time.monotonic() - self._waits_since_s > GROUP_S:
            self._attempt.sync()

    def close(self) -> None:
        """End in order, with the mark where the shard is done."""
        self._attempt.sync()
        if self.over:
            attempts = self._shard.attempts | {self._attempt.number: self._attempt.size_bytes}
            done = Done(len(self._lines), self._failed, attempts)
            files.create(self.config.folder.done(self.number), msgspec.json.encode(done))
            self.on_done(self.number)
        self._attempt.close()

    def abandon(self) -> None:
        """End after an error of the disk: nothing more is written but, if that works, that nobody is to blame."""
        try:
            self._attempt.close()
        except OSError:
            return
