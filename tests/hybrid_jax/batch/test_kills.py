"""Jobs that are killed, stopped or run out of disk at any moment: every line is answered exactly once in the end.

Processes are forked from one that has imported everything, since a start of Python costs more than a whole job here.
"""

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from hybrid_jax.batch.settings import BatchConfig
from tests.hybrid_jax.batch.replicas import (
    FakeOpener,
    check_output,
    config_of,
    exit_with_fake,
    run_fake,
    write_input,
)

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.hybrid_jax.batch.replicas"])
WRITE = os.write
KILLS = 20
LINES = 200


def start(config: BatchConfig, opener: FakeOpener, prepare: Callable[[], None] | None = None) -> ForkServerProcess:
    process = CONTEXT.Process(target=exit_with_fake, args=(config, opener, prepare))
    process.start()
    return process


def finish(process: ForkServerProcess) -> int | None:
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def begun(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def wait_for(journal: Path, count: int, process: ForkServerProcess) -> None:
    end_s = time.monotonic() + 30
    while begun(journal) < count and process.is_alive() and time.monotonic() < end_s:
        time.sleep(0.001)


@pytest.mark.slow
def test_twenty_kills_at_random_points(tmp_path: Path) -> None:
    config, journal, chance = config_of(write_input(tmp_path, LINES)), tmp_path / "journal", random.Random(11)
    opener, kills = FakeOpener(delay_s=0.01, journal=journal), 0
    while kills < KILLS:
        process = start(config, opener)
        wait_for(journal, begun(journal) + chance.randrange(1, 2 * LINES // KILLS), process)
        time.sleep(chance.uniform(0, 0.01))
        process.kill()
        assert finish(process) == -signal.SIGKILL, "the job was over before it could be killed often enough"
        kills += 1
    assert finish(start(config, opener)) == 0
    check_output(config, LINES)
    often = Counter(text.split(" ", 1)[1] for text in journal.read_text().splitlines())
    assert len(often) == LINES and sum(often.values()) > LINES


def die_at(operation: int) -> None:
    """Kill this process at its n-th operation on files, before it is done, a write when half of it is done."""
    left = iter(range(operation - 1, -1, -1))

    def deadly(function: Callable[..., object], *arguments: object) -> object:
        if next(left, 0) == 0:
            if function is WRITE:
                fd, content = arguments
                WRITE(fd, memoryview(content)[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    for name in ("write", "fsync", "replace", "link"):
        setattr(os, name, partial(deadly, getattr(os, name)))


def run_to_the_kill(folder: Path, operation: int) -> bool:
    """A job that is killed there, and then done; False where it was over before."""
    config = config_of(write_input(folder, 8, l3="bad"), shard_lines=4)
    code = finish(start(config, FakeOpener(window=4), partial(die_at, operation)))
    if code == 3:
        return False
    assert code == -signal.SIGKILL
    assert run_fake(config, FakeOpener(window=4)) == 3
    check_output(config, 8, failed=(3,))
    return True


@pytest.mark.slow
def test_a_kill_at_every_operation_on_files(tmp_path: Path) -> None:
    for operation in range(1, 400):
        folder = tmp_path / str(operation)
        folder.mkdir()
        if not run_to_the_kill(folder, operation):
            break
    assert 30 < operation < 399


@pytest.mark.parametrize("torn_bytes", [1, 20])
def test_a_torn_line_is_done_again(tmp_path: Path, torn_bytes: int) -> None:
    config, journal = config_of(write_input(tmp_path, 16), shard_lines=16), tmp_path / "journal"
    process = start(config, FakeOpener(delay_s=0.5, window=2, journal=journal))
    path = config.folder.shards / "000000.a0.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 2:  # a group is written after a second
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    finish(process)
    whole = path.read_bytes()
    path.write_bytes(whole[:-torn_bytes])
    kept = {found["custom_id"] for found in map(_loads, whole[:-torn_bytes].splitlines()[:-1])}
    journal.unlink()
    assert run_fake(config, FakeOpener(journal=journal)) == 0
    check_output(config, 16)
    again = {text.split(" ", 1)[1].replace("prompt ", "line-") for text in journal.read_text().splitlines()}
    assert again == {f"line-{n}" for n in range(16)} - kept and kept


def _loads(text: bytes) -> dict[str, str]:
    found: dict[str, str] = json.loads(text)
    return found


def test_a_line_that_kills_the_process_is_given_up_and_no_other(tmp_path: Path) -> None:
    config = config_of(write_input(tmp_path, 48))
    opener, codes = FakeOpener(delay_s=0.01, killers=("prompt 20",)), []
    while not codes or codes[-1] == -signal.SIGKILL:
        codes.append(finish(start(config, opener)))
    assert codes == [-signal.SIGKILL] * 5 + [3]
    check_output(config, 48, failed=(20,))


# ------------------------------------------------------------------------------------------------------ the disk


def limit_files(size_bytes: int, words: Path) -> None:
    """No file of this process may grow beyond that: what a full disk is like. `words`: what it says."""
    os.dup2(os.open(words, os.O_WRONLY | os.O_CREAT), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))


@pytest.mark.parametrize("size_bytes", [700, 3000, 9000])
def test_a_full_disk_ends_the_job_and_loses_nothing(tmp_path: Path, size_bytes: int) -> None:
    config, words = config_of(write_input(tmp_path, 64), shard_lines=32), tmp_path / "words"
    assert finish(start(config, FakeOpener(delay_s=0.002), partial(limit_files, size_bytes, words))) == 1
    assert "the disk took no more" in words.read_text()
    assert not config.output.exists()
    assert run_fake(config) == 0
    check_output(config, 64)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    config = config_of(write_input(tmp_path, 4))
    elsewhere = BatchConfig(config.input, tmp_path / "none" / "out.jsonl", "fake", ("fake",))
    with pytest.raises(OSError, match="none"):
        run_fake(elsewhere)


# ---------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_lines_finish_and_the_job_goes_on_later(tmp_path: Path, number: int) -> None:
    config, journal = config_of(write_input(tmp_path, 100)), tmp_path / "journal"
    process = start(config, FakeOpener(delay_s=0.3, journal=journal))
    wait_for(journal, 20, process)
    os.kill(process.pid or 0, number)
    assert finish(process) == 75
    before = begun(journal)
    assert 20 <= before < 100 and not config.output.exists()
    assert run_fake(config, FakeOpener(journal=journal)) == 0
    assert begun(journal) == 100, "a line that could finish was done again"
    check_output(config, 100)


def test_a_second_signal_takes_lines_back(tmp_path: Path) -> None:
    config, journal = config_of(write_input(tmp_path, 40), grace_s=60.0), tmp_path / "journal"
    process = start(config, FakeOpener(delay_s=30.0, journal=journal))
    wait_for(journal, 8, process)
    os.kill(process.pid or 0, signal.SIGTERM)
    time.sleep(0.4)
    os.kill(process.pid or 0, signal.SIGTERM)
    assert finish(process) == 130
    assert [text[0] for text in (config.folder.shards / "000000.a0.log").read_text().splitlines()] == [*"bbbbbbbb", "e"]
    assert run_fake(config) == 0
    check_output(config, 40)


def test_grace_ends(tmp_path: Path) -> None:
    config, journal = config_of(write_input(tmp_path, 40), grace_s=0.3), tmp_path / "journal"
    process = start(config, FakeOpener(delay_s=30.0, journal=journal))
    wait_for(journal, 8, process)
    began_s = time.monotonic()
    os.kill(process.pid or 0, signal.SIGTERM)
    assert finish(process) == 75 and time.monotonic() - began_s < 10


def test_two_processes_do_not_share_a_job(tmp_path: Path) -> None:
    config, journal = config_of(write_input(tmp_path, 40)), tmp_path / "journal"
    process = start(config, FakeOpener(delay_s=30.0, journal=journal))
    wait_for(journal, 8, process)
    for other in (config, config_of(config.input, restart=True), config_of(config.input, shard_index=1, num_shards=2)):
        with pytest.raises(ValueError, match="in use by another"):
            run_fake(other)
    process.kill()
    finish(process)
    assert run_fake(config) == 0
    check_output(config, 40)
