"""The end of a job: results of all shards into one output and one file of errors, in the order of the input.

One shard's places are in memory at a time. Knows nothing of engines.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import msgspec

from hybrid_jax.batch import files
from hybrid_jax.batch.index import Index
from hybrid_jax.batch.journal import Result, attempt_path, read_done, read_results
from hybrid_jax.batch.settings import BatchConfig, Folder


class Merged(msgspec.Struct, frozen=True):
    """What a whole job came to: lines of the output and of the errors."""

    answered: int
    failed: int


def unfinished_shards(config: BatchConfig, index: Index) -> list[int]:
    """Shards without the mark that they are done."""
    return [shard for shard in range(index.shard_count(config.shard_lines)) if not config.folder.done(shard).exists()]


def merge(config: BatchConfig, index: Index) -> Merged:
    """Write output and errors, each at once, note that, and drop the shards' files.

    Raises ValueError for a result that is missing.
    """
    folder = config.folder
    answered, failed = _temporary(folder.output), _temporary(folder.errors)
    with answered.open("wb") as good, failed.open("wb") as bad:
        invalid = _copy_invalid(folder, bad)
        counts = [0, invalid]
        for shard in range(index.shard_count(config.shard_lines)):
            for result, line in _results(config, index, shard):
                (bad if result.failed else good).write(line)
                counts[result.failed] += 1
        for file in (good, bad):
            file.flush()
            os.fsync(file.fileno())
    os.replace(failed, folder.errors)
    os.replace(answered, folder.output)
    files.sync_folder(folder.output.parent)
    merged = Merged(*counts)
    files.replace(folder.merged, msgspec.json.encode(merged))
    drop_shards(folder)
    return merged


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _copy_invalid(folder: Folder, bad: BinaryIO) -> int:
    """The results of lines that are no requests; how many."""
    if not folder.invalid.exists():
        return 0
    count = 0
    with folder.invalid.open("rb") as file:
        for line in file:
            bad.write(line)
            count += 1
    return count


def _results(config: BatchConfig, index: Index, shard: int) -> Iterator[tuple[Result, bytes]]:
    """The results of a shard in the order of its lines."""
    lines = index.shard(shard, config.shard_lines)
    places, found = index.places(lines), dict[int, Result]()
    attempts = read_done(config.folder.done(shard)).attempts
    paths = {attempt: attempt_path(config.folder.shards, shard, attempt) for attempt in sorted(attempts)}
    for attempt, path in paths.items():
        read_results(path, attempt, places, found, attempts[attempt])
    missing = [line for line in lines if line not in found]
    if missing:
        raise ValueError(
            f"wanted a result of every line, got none of {len(missing)} in shard {shard}, which is marked as done: "
            f"remove {config.folder.done(shard)} and run again"
        )
    with ExitStack() as stack:
        opened = {attempt: stack.enter_context(path.open("rb")) for attempt, path in paths.items()}
        for line in lines:
            result = found[line]
            opened[result.attempt].seek(result.offset)
            yield result, opened[result.attempt].read(result.size)


def read_merged(folder: Folder) -> Merged | None:
    """What the job came to, None while it is not over. Raises ValueError where its output is gone."""
    if not folder.merged.exists():
        return None
    if not folder.output.exists():
        raise ValueError(f"wanted the output of a finished job in {folder.output}, got none: start anew with --restart")
    return msgspec.json.decode(folder.merged.read_bytes(), type=Merged)


def drop_shards(folder: Folder) -> None:
    """Remove what the output holds now."""
    shutil.rmtree(folder.shards, ignore_errors=True)
