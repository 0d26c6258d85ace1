"""What a shard has on the disk: attempts, each written by one process to its end, and the mark that it is done.

`NNNNNN.aK.jsonl` holds the results of attempt K, whole lines but for a torn last one; `NNNNNN.aK.log` which lines it
began (`b LINE`, or `a LINE` where nothing ran beside it), when the engine broke (`f`) and that it ended in order (`e`).
`NNNNNN.done` names the attempts and how many bytes of each count. Nothing is ever changed, so a process that is thought
dead and is not does no harm. Knows nothing of engines.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from hybrid_jax.batch import files
from hybrid_jax.batch.lines import id_hash, read_head

GROUP_LINES = 64  # results that reach the disk together
GROUP_BYTES = 8 * 2**20
Places = dict[tuple[int, int], int]  # line by hash of its id


class Done(msgspec.Struct):
    """A finished shard. attempts: bytes that count of each, by its number, the first with a line wins."""

    finished: int
    failed: int
    attempts: dict[int, int]


@dataclass(frozen=True)
class Result:
    """Where the result of a line lies, and whether it is an error."""

    attempt: int
    offset: int
    size: int
    failed: bool


@dataclass
class Shard:
    """What is known of an unfinished shard. marks, alone: crashes with a line under way, and with nothing beside it."""

    attempts: dict[int, int] = field(default_factory=dict)
    results: dict[int, Result] = field(default_factory=dict)
    marks: Counter[int] = field(default_factory=Counter)
    alone: Counter[int] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        """Results that are errors."""
        return sum(result.failed for result in self.results.values())


def attempt_path(folder: Path, shard: int, attempt: int) -> Path:
    """The results of an attempt."""
    return folder / f"{shard:06d}.a{attempt}.jsonl"


def read_done(path: Path) -> Done:
    """The mark of a finished shard. Raises ValueError for a damaged one."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Done)
    except msgspec.MsgspecError as error:
        raise ValueError(f"wanted the mark of a finished shard in {path.name}, got {error}: remove it") from None


def read_shard(folder: Path, shard: int, places: Places) -> Shard:
    """What earlier attempts left. What they wrote is on the disk when this returns."""
    found = Shard()
    for attempt in _attempts(folder, shard):
        path = attempt_path(folder, shard, attempt)
        _sync(path)
        found.attempts[attempt] = read_results(path, attempt, places, found.results, None)
    for attempt in found.attempts:
        _count_marks(attempt_path(folder, shard, attempt).with_suffix(".log"), found)
    return found


def read_results(path: Path, attempt: int, places: Places, results: dict[int, Result], limit_bytes: int | None) -> int:
    """Add the results of a file, of its first bytes where limited; how many bytes are whole lines.

    A line that is there already stays. Ends at the first line that is no result: what follows is torn.
    """
    offset = 0
    with path.open("rb") as file:
        while (limit_bytes is None or offset < limit_bytes) and (line := file.readline()).endswith(b"\n"):
            try:
                head = read_head(line)
            except ValueError:
                break
            number = places.get(id_hash(head.custom_id))
            if number is not None:
                results.setdefault(number, Result(attempt, offset, len(line), head.failed))
            offset += len(line)
    return offset


def _attempts(folder: Path, shard: int) -> list[int]:
    found = (re.fullmatch(rf"{shard:06d}\.a(\d+)\.jsonl", path.name) for path in folder.glob(f"{shard:06d}.a*.jsonl"))
    return sorted(int(match[1]) for match in found if match)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _count_marks(log: Path, shard: Shard) -> None:
    """Mark the lines that have no result and were under way when the engine broke or the process died."""
    begun: dict[int, str] = {}
    ended = False
    for event, line in _events(log):
        if event == "e":
            ended = True
        elif event == "f":
            _mark(begun, shard)
            begun = {}
        elif line not in shard.results:
            begun[line] = event
    if not ended:
        _mark(begun, shard)


def _mark(begun: dict[int, str], shard: Shard) -> None:
    shard.marks.update(list(begun))  # a mapping would add its values
    shard.alone.update(line for line, event in begun.items() if event == "a")


def _events(log: Path) -> Iterator[tuple[str, int]]:
    for text in log.read_text("ascii", "replace").splitlines() if log.exists() else ():
        if match := re.fullmatch(r"([ab]) (\d+)|([ef])", text):
            yield (match[1], int(match[2])) if match[1] else (match[3], -1)


class Attempt:
    """The files of one attempt, while they are written. No other process ever writes to them."""

    def __init__(self, folder: Path, shard: int):
        self.number = max(_attempts(folder, shard), default=-1) + 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        while True:
            path = attempt_path(folder, shard, self.number)
            try:
                self._results = os.open(path, flags | os.O_EXCL, 0o644)
                break
            except FileExistsError:
                self.number += 1
        self._log = os.open(path.with_suffix(".log"), flags, 0o644)
        files.sync_folder(folder)
        self._group: list[bytes] = []
        self.size_bytes = 0

    def begin(self, line: int, alone: bool) -> None:
        """Note that a line is under way. It need not reach the disk: it is there for the next process."""
        files.write(self._log, f"{'a' if alone else 'b'} {line}\n".encode())

    def note_fault(self) -> None:
        """Note that the engine broke with what is under way."""
        files.write(self._log, b"f\n")

    def add(self, result: bytes) -> None:
        """Take a result, which `sync` writes."""
        self._group.append(result)

    @property
    def waiting(self) -> bool:
        """Whether there are results that are not on the disk."""
        return bool(self._group)

    @property
    def full(self) -> bool:
        """Whether those are many."""
        return len(self._group) >= GROUP_LINES or sum(map(len, self._group)) >= GROUP_BYTES

    def sync(self) -> int:
        """Put the results that wait on the disk; how many they were."""
        group, self._group = self._group, []
        if group:
            content = b"".join(group)
            files.append(self._results, content)
            self.size_bytes += len(content)
        return len(group)

    def close(self) -> None:
        """End in order: what is still under way was taken back, and is not to blame for anything."""
        try:
            files.write(self._log, b"e\n")
        finally:
            os.close(self._log)
            os.close(self._results)
