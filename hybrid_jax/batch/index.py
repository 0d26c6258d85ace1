"""Where the lines of an input lie: one pass over the file checks each and keeps 28 bytes of it, never its text.

Knows nothing of what is asked for in a line.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hybrid_jax.batch.lines import LINE_BYTES, RequestLine, id_hash, read_request

BOM = b"\xef\xbb\xbf"
PIECE_BYTES = 2**20


@dataclass(frozen=True)
class Index:
    """The request lines of a file, in their order.

    offset, size: bytes; id_high, id_low: the hash of each custom_id. size_bytes, sha256: of the whole file, with lines
    that are no requests, of which there are `invalid`.
    """

    path: Path
    offset: np.ndarray
    size: np.ndarray
    id_high: np.ndarray
    id_low: np.ndarray
    size_bytes: int
    sha256: str
    invalid: int

    def __len__(self) -> int:
        return len(self.offset)

    def shard(self, number: int, shard_lines: int) -> range:
        """The lines of a shard."""
        return range(number * shard_lines, min((number + 1) * shard_lines, len(self)))

    def shard_count(self, shard_lines: int) -> int:
        """How many there are."""
        return -(-len(self) // shard_lines)

    def places(self, lines: range) -> dict[tuple[int, int], int]:
        """Line by hash of its id, of a few lines."""
        part = slice(lines.start, lines.stop)
        hashes = zip(self.id_high[part].tolist(), self.id_low[part].tolist(), strict=True)
        return dict(zip(hashes, lines, strict=True))

    def read(self, file: BinaryIO, line: int) -> bytes:
        """The text of a line."""
        file.seek(int(self.offset[line]))
        return file.read(int(self.size[line]))

    def save(self, path: Path) -> None:
        """Keep it for workers on the same file system."""
        about = np.array([str(self.path), self.sha256, str(self.size_bytes), str(self.invalid)])
        with path.open("wb") as file:
            np.savez(file, offset=self.offset, size=self.size, id_high=self.id_high, id_low=self.id_low, about=about)

    @staticmethod
    def load(path: Path) -> "Index":
        """What `save` kept. Raises ValueError where the input has another size since."""
        with np.load(path) as kept:
            source, sha256, size_bytes, invalid = kept["about"].tolist()
            offset, size, high, low = (kept[name] for name in ("offset", "size", "id_high", "id_low"))
            index = Index(Path(source), offset, size, high, low, int(size_bytes), sha256, int(invalid))
        if index.path.stat().st_size != index.size_bytes:
            raise ValueError(f"wanted {index.size_bytes} bytes in {source}, got another number: it changed; start anew")
        return index


def build_index(path: Path, refuse: Callable[[int, str], None]) -> Index:
    """Read a file once. `refuse(number, why)` hears of every line that is no request, with its number from 1.

    Blank lines and a byte order mark are passed over. Raises ValueError for an id that two lines have.
    """
    offsets, sizes, highs, lows = array("q"), array("I"), array("Q"), array("Q")
    digest, invalid, end = hashlib.sha256(), 0, 0
    with path.open("rb") as file:
        for number, (begin, line, whole_bytes) in enumerate(_lines(file, digest.update), start=1):
            end = begin + whole_bytes
            text = line.removeprefix(BOM) if number == 1 else line
            if not text.strip():
                continue
            try:
                request = _request(text, whole_bytes)
            except ValueError as error:
                refuse(number, str(error))
                invalid += 1
                continue
            offsets.append(begin + len(line) - len(text))
            sizes.append(len(text))
            for table, half in zip((highs, lows), id_hash(request.custom_id), strict=True):
                table.append(half)
    offset, size, high, low = (np.array(table) for table in (offsets, sizes, highs, lows))
    index = Index(path, offset, size, high, low, end, digest.hexdigest(), invalid)
    _require_unique(index)
    return index


def _request(line: bytes, whole_bytes: int) -> RequestLine:
    if whole_bytes > LINE_BYTES:
        raise ValueError(f"wanted a line of at most {LINE_BYTES} bytes, got {whole_bytes}")
    return read_request(line)


def _lines(file: BinaryIO, hear: Callable[[bytes], None]) -> Iterator[tuple[int, bytes, int]]:
    """Offset, first bytes and size of each line; `hear` gets every byte. No line is held beyond its limit."""
    offset = 0
    while line := file.readline(LINE_BYTES + 1):
        hear(line)
        size_bytes, last = len(line), line
        while not last.endswith(b"\n") and (last := file.readline(PIECE_BYTES)):
            hear(last)
            size_bytes += len(last)
        yield offset, line, size_bytes
        offset += size_bytes


def _require_unique(index: Index) -> None:
    order = np.lexsort((index.id_low, index.id_high))
    high, low = index.id_high[order], index.id_low[order]
    equal = np.flatnonzero((high[1:] == high[:-1]) & (low[1:] == low[:-1]))
    if len(equal):
        first, second = sorted((int(order[equal[0]]), int(order[equal[0] + 1])))
        with index.path.open("rb") as file:
            name = read_request(index.read(file, second)).custom_id
            numbers = [_line_number(file, int(index.offset[line])) for line in (first, second)]
        raise ValueError(
            f"wanted every custom_id once, got {name[:80]!r} in the lines {numbers[0]} and {numbers[1]} of"
            f" {index.path.name}: rename one"
        )


def _line_number(file: BinaryIO, offset: int) -> int:
    """The number, from 1, of the line that begins there."""
    file.seek(0)
    number, left = 1, offset
    while left and (piece := file.read(min(left, PIECE_BYTES))):
        number += piece.count(b"\n")
        left -= len(piece)
    return number
