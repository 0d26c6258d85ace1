"""Writes that are on the disk when they return: all of them, and the locks of a job. Knows nothing of what is written.

A crash leaves the file of `append` with a torn end at worst, and that of `replace` and `create` as it was or whole.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def append(fd: int, content: bytes) -> None:
    """Write at the end of an open file, and wait until it is on the disk. Raises OSError, as of a full disk."""
    write(fd, content)
    os.fsync(fd)


def write(fd: int, content: bytes) -> None:
    """Write all of it, which the system may take in pieces."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(fd, rest) :]


def replace(path: Path, content: bytes) -> None:
    """Give a file new content, at once."""
    temporary = _temporary(path, content)
    os.replace(temporary, path)
    sync_folder(path.parent)


def create(path: Path, content: bytes) -> bool:
    """Make a file with its content, at once; False, and nothing changed, where there is one already."""
    temporary = _temporary(path, content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync_folder(path.parent)
    return True


def _temporary(path: Path, content: bytes) -> Path:
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        append(fd, content)
    except BaseException:
        temporary.unlink()
        raise
    finally:
        os.close(fd)
    return temporary


def sync_folder(path: Path) -> None:
    """Put on the disk which files a folder has."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def lock(path: Path, shared: bool = False) -> Iterator[bool]:
    """Hold a lock while the context lasts; False where another process has it.

    The system lets go of it when the process ends, in whatever way.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(fd)
