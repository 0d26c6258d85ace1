"""One process of a job from start to exit code: look at the input, settle the manifest, run what is left, merge.

Exit codes: 0 all lines answered, or this worker's part done; 1 the engine or the disk broke; 2 bad usage or input, or
files of another job, and no model was loaded; 3 done, and some lines failed; 75 interrupted, to be resumed; 130
interrupted twice. Whatever the code, the same command goes on where it ended.
"""

import asyncio
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from rich.console import Console

from hybrid_jax.batch import files
from hybrid_jax.batch.index import Index, build_index
from hybrid_jax.batch.lines import write_failure
from hybrid_jax.batch.manifest import Manifest, read_manifest, settle_manifest
from hybrid_jax.batch.merge import Merged, drop_shards, merge, read_merged, unfinished_shards
from hybrid_jax.batch.replica import Opener
from hybrid_jax.batch.report import show_tally
from hybrid_jax.batch.run import Interrupted, Run, Signals
from hybrid_jax.batch.settings import BatchConfig, Folder
from hybrid_jax.batch.work import Tally

DONE, BROKEN, FAILED_LINES, RESUMABLE, INTERRUPTED_TWICE = 0, 1, 3, 75, 130
DISK = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO}
SHOWN_LINES = 10  # of those that are no requests
Runner = Callable[[BatchConfig, Index, Manifest, list[int], Signals], None]


def run_batch(config: BatchConfig, model_path: Path, run: Runner) -> int:
    """Do what is left of a job, `run` running its shards, and merge; the exit code.

    Raises ValueError and OSError for what must be changed before anything can run.
    """
    signals = Signals()
    try:
        with _hear_signals(), _own_files(config):
            return _run_batch(config, model_path, run, signals)
    except Interrupted:
        _say("interrupted: the same command goes on with the rest")
        return RESUMABLE if signals.count < 2 else INTERRUPTED_TWICE
    except OSError as error:
        if error.errno not in DISK:
            raise
        _say(f"the disk took no more: {error}. Make room; the same command goes on with the rest")
        return BROKEN
    except RuntimeError:
        traceback.print_exc()
        _say("the engine broke; the same command goes on with the rest")
        return BROKEN


def merge_batch(config: BatchConfig) -> int:
    """Merge a job whose workers are done, or say what it came to; the exit code.

    Raises ValueError where shards are left, or another process merges.
    """
    folder = config.folder
    if not folder.manifest.exists():
        raise ValueError(f"wanted a job in {folder.work}, got none: give the output that its workers were given")
    with _own_files(config):
        merged = read_merged(folder)
        if merged is not None:
            return _exit_code(folder, merged)
        manifest = read_manifest(folder.manifest)
        same = replace(config, shard_lines=manifest.shard_lines, skip_invalid=manifest.invalid_lines > 0)
        index = _look_at(same)
        if index.sha256 != manifest.input_sha256:
            raise ValueError(f"wanted the input that the job began with, got {config.input}, which is another one")
        return _exit_code(folder, _merge(same, index))


def local_runner(open_replica: Opener) -> Runner:
    """Runs shards in this process, on one replica."""

    def run(config: BatchConfig, index: Index, manifest: Manifest, shards: list[int], signals: Signals) -> None:
        replica = open_replica()
        tally = Tally(_count_lines(config, index, shards))
        console = Console(stderr=True)

        async def run_all() -> None:
            await replica.start()
            try:
                with _hear_in_loop(signals), show_tally(console) as look:
                    await Run(config, index, manifest.seed, replica, tally, signals, look).run(shards)
                    look(tally, 0)
            finally:
                await replica.stop()

        asyncio.run(run_all())

    return run


def _run_batch(config: BatchConfig, model_path: Path, run: Runner, signals: Signals) -> int:
    folder = config.folder
    index = _look_at(config)
    manifest = settle_manifest(config, index, model_path)
    shards = [n for n in unfinished_shards(config, index) if n % config.num_shards == config.shard_index]
    merged = read_merged(folder)  # after the look at the shards, which another worker's merge removes
    if merged is not None:
        drop_shards(folder)
        _say("this job was done before")
        return _exit_code(folder, merged) if config.num_shards == 1 else DONE
    folder.shards.mkdir(exist_ok=True)
    if shards:
        _say(f"{_count_lines(config, index, shards)} lines in {len(shards)} shards that are not done")
        run(config, index, manifest, shards, signals)
    if config.num_shards == 1:
        return _exit_code(folder, _merge(config, index))
    _merge_if_last(config, index)
    return DONE


def _look_at(config: BatchConfig) -> Index:
    """The lines of the input. Raises ValueError for one that is no request, unless those are to be errors."""
    refused = _Refused(config.folder.invalid if config.skip_invalid else None)
    try:
        index = build_index(config.input, refused.refuse)
    finally:
        refused.close()
    if refused.first and not config.skip_invalid:
        shown = "\n  ".join(refused.first)
        raise ValueError(
            f"wanted a request in every line of {config.input}, got {index.invalid} others:\n  {shown}\n"
            "Correct them, or pass --skip-invalid to have them in the file of errors"
        )
    if not len(index) and not index.invalid:
        raise ValueError(f"wanted requests in {config.input}, got an empty file: see docs/batch.md for the format")
    return index


class _Refused:
    """Lines that are no requests: the first ones for people, all of them as results where there is a file for them."""

    def __init__(self, path: Path | None):
        self.first: list[str] = []
        self._path = path
        self._file = None if path is None else path.with_name(f"{path.name}.tmp").open("wb")

    def refuse(self, number: int, why: str) -> None:
        """Take one."""
        if len(self.first) < SHOWN_LINES:
            self.first.append(f"line {number}: {why}")
        if self._file is not None:
            self._file.write(write_failure(None, "invalid_line", f"line {number}: {why}"))

    def close(self) -> None:
        """Put the file in its place."""
        if self._file is not None and self._path is not None:
            self._file.close()
            Path(self._file.name).replace(self._path)


def _count_lines(config: BatchConfig, index: Index, shards: list[int]) -> int:
    return sum(len(index.shard(shard, config.shard_lines)) for shard in shards)


def _merge(config: BatchConfig, index: Index) -> Merged:
    left = unfinished_shards(config, index)
    if left:
        raise ValueError(f"wanted every shard done, got {len(left)} that are not, first {left[0]}: run their workers")
    return merge(config, index)


def _merge_if_last(config: BatchConfig, index: Index) -> None:
    """Merge where every other worker is done too, and no other one merges."""
    if unfinished_shards(config, index):
        return
    with files.lock(config.folder.work / "merge.lock") as locked:
        if locked and read_merged(config.folder) is None:
            _merge(config, index)


def _exit_code(folder: Folder, merged: Merged) -> int:
    _say(f"{merged.answered} answers in {folder.output}, {merged.failed} errors in {folder.errors}")
    return FAILED_LINES if merged.failed else DONE


# ------------------------------------------------------------------------------------------------ locks and signals


@contextmanager
def _own_files(config: BatchConfig) -> Iterator[None]:
    """Hold the job's files against other processes, and make the folder of a new job.

    Raises ValueError where another process has them, or the output is not this job's.
    """
    folder = config.folder
    if config.output.resolve() == config.input.resolve():
        raise ValueError(f"wanted an output other than the input, got {config.output} twice: choose another")
    if config.restart and folder.work.exists():
        with files.lock(folder.work / "lock") as locked:
            _require_locked(locked, folder)
            _move_aside(folder)
    if folder.output.exists() and not folder.work.exists() and not config.restart:
        raise ValueError(f"wanted a new output, got {folder.output}, which is there: choose another, or pass --restart")
    folder.work.mkdir(exist_ok=True)
    with files.lock(folder.work / "lock", shared=config.num_shards > 1) as job_locked:
        _require_locked(job_locked, folder)
        with files.lock(folder.work / f"worker-{config.shard_index}.lock") as locked:
            _require_locked(locked, folder)
            yield


def _require_locked(locked: bool, folder: Folder) -> None:
    if not locked:
        raise ValueError(f"wanted {folder.work} for this process, got it in use by another: wait for its end")


def _move_aside(folder: Folder) -> None:
    number = 1
    while (old := folder.work.with_name(f"{folder.work.name}.{number}")).exists():
        number += 1
    folder.work.rename(old)
    _say(f"the files of the earlier run are in {old}")


@contextmanager
def _hear_signals() -> Iterator[None]:
    """While no line runs, a signal ends the process at once: no file is ever half changed, and a compiler is deaf."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        os.write(2, b"hybrid-jax batch: interrupted: the same command goes on\n")
        os._exit(RESUMABLE)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _hear_in_loop(signals: Signals) -> Iterator[None]:
    """While lines run, the first signal lets them finish for a while, the second takes them back."""

    def note(number: int, frame: FrameType | None) -> None:
        signals.count += 1
        if signals.count == 1:
            _say(f"{signal.Signals(number).name}: no new line is begun; once more to take those that run back")

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(f"hybrid-jax batch: {text}", file=sys.stderr, flush=True)
