"""The safetensors format: a checked header, read-only views of a mapped file, and a writer that keeps every byte.

A file is eight bytes (the header's length, little endian), the header (JSON: for each tensor its dtype, shape and byte
range in the data), and the data. Every claim of a header is checked before anything of the claimed size is allocated or
mapped: the data is exactly tiled by the tensors, without hole or overlap, up to the end of the file. The checks go
further than those of the `safetensors` library, which lets a repeated name and a name like a path pass and which cannot
write one tensor at a time. This module knows no directory, no index and no model.
"""

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import jax.numpy as jnp
import msgspec
import numpy as np

HEADER_LIMIT_BYTES = 100_000_000  # of the `safetensors` library: a longer header is refused everywhere
TENSOR_LIMIT = 500_000
NAME_LIMIT = 512  # characters
AXES_LIMIT = 16
SIZE_LIMIT = 2**62  # bytes, and items along one axis
METADATA = "__metadata__"

DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "U8": np.dtype(np.uint8),
        "I8": np.dtype(np.int8),
        "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
        "F8_E5M2": np.dtype(jnp.float8_e5m2),
        "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
        "I16": np.dtype(np.int16),
        "U16": np.dtype(np.uint16),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(jnp.bfloat16),
        "I32": np.dtype(np.int32),
        "U32": np.dtype(np.uint32),
        "F32": np.dtype(np.float32),
        "F64": np.dtype(np.float64),
        "I64": np.dtype(np.int64),
        "U64": np.dtype(np.uint64),
    }
)
DTYPE_NAMES: Mapping[np.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})

Size = Annotated[int, msgspec.Meta(ge=0, le=SIZE_LIMIT)]


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor; `begin` and `end` are bytes from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A checked header. `raw` is its JSON as it stands in the file, padding included."""

    raw: bytes
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    @property
    def data_start(self) -> int:
        """Where the data begins in the file."""
        return 8 + len(self.raw)

    @property
    def data_bytes(self) -> int:
        """Size of the data."""
        return max((entry.end for entry in self.entries.values()), default=0)

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.data_start + self.data_bytes


class _Row(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[Size]
    data_offsets: tuple[Size, Size]


# --------------------------------------------------------------------------------------------------------------- checks


def check_name(name: str, where: str) -> None:
    """Refuse a tensor name that is empty, long, not printable or like a path. Raises ValueError."""
    path_like = "/" in name or "\\" in name or ".." in name
    if not 0 < len(name) <= NAME_LIMIT or not name.isprintable() or path_like or name == METADATA:
        raise ValueError(
            f"{where}: wanted a tensor name of 1 to {NAME_LIMIT} printable characters, no path, got {name[:80]!r}"
        )


def parse_header(raw: bytes, data_bytes: int, where: str) -> Header:
    """Check a header against the size of the data that follows it.

    Args:
      raw: the JSON, padding included. data_bytes: size of the data. where: the file's name, for messages.
    Raises ValueError, naming the file and the tensor.
    """
    rows = _decode(lambda: _read_rows(raw), where, "the header")
    metadata = _decode(lambda: _read_metadata(rows), where, f"the header's {METADATA}")
    if len(rows) > TENSOR_LIMIT:
        raise ValueError(f"{where}: wanted at most {TENSOR_LIMIT} tensors, got {len(rows)}")
    entries = {name: _read_entry(name, row, where) for name, row in rows.items()}
    _check_tiling(entries.values(), data_bytes, where)
    _decode(lambda: json.loads(raw, object_pairs_hook=_unique), where, "the header")
    return Header(raw, MappingProxyType(entries), MappingProxyType(metadata))


def _decode[T](read: Callable[[], T], where: str, what: str) -> T:
    """Run a reader of JSON; its errors become one kind, with the file's name."""
    try:
        return read()
    except (ValueError, RecursionError) as error:  # msgspec's and json's errors are kinds of ValueError
        raise ValueError(f"{where}: wanted {what} in the safetensors format, got: {str(error)[:200]}") from None


def _read_rows(raw: bytes) -> dict[str, msgspec.Raw]:
    """The rows of a header undecoded; the colons are counted first, so that a flood of tiny rows builds nothing."""
    if raw[:1] != b"{":
        raise ValueError("no '{' at its start")
    if raw.count(b":") > 6 * TENSOR_LIMIT:
        raise ValueError(f"more than {TENSOR_LIMIT} tensors")
    return msgspec.json.decode(raw, type=dict[str, msgspec.Raw])


def _read_metadata(rows: dict[str, msgspec.Raw]) -> dict[str, str]:
    """Take the metadata out of the rows; a header without it, or with null, has none."""
    raw = rows.pop(METADATA, None)
    return (msgspec.json.decode(raw, type=dict[str, str] | None) if raw is not None else None) or {}


def _read_entry(name: str, raw: msgspec.Raw, where: str) -> Entry:
    check_name(name, where)
    row = _decode(lambda: msgspec.json.decode(raw, type=_Row), where, f"tensor {name!r}")
    begin, end = row.data_offsets
    if row.dtype not in DTYPES:
        raise ValueError(f"{where}: tensor {name!r}: wanted a dtype of {', '.join(DTYPES)}, got {row.dtype[:20]!r}")
    if len(row.shape) > AXES_LIMIT or math.prod(max(size, 1) for size in row.shape) > SIZE_LIMIT // 8:
        raise ValueError(
            f"{where}: tensor {name!r}: wanted a shape that fits into memory, got {row.shape[:AXES_LIMIT]}"
        )
    size_bytes = math.prod(row.shape) * DTYPES[row.dtype].itemsize
    if end - begin != size_bytes:
        raise ValueError(
            f"{where}: tensor {name!r}: wanted {size_bytes} bytes for {row.dtype} {row.shape}, got the byte range "
            f"{begin} to {end}"
        )
    return Entry(name, row.dtype, tuple(row.shape), begin, end)


def _check_tiling(entries: Iterable[Entry], data_bytes: int, where: str) -> None:
    """The tensors lie one behind the other, from the first byte of the data to the last."""
    at = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != at:
            fault = "overlaps the tensor before it" if entry.begin < at else "leaves a hole before it"
            raise ValueError(
                f"{where}: tensor {entry.name!r}: wanted it to begin at {at}, got {entry.begin}: it {fault}"
            )
        if entry.end > data_bytes:
            raise ValueError(
                f"{where}: tensor {entry.name!r}: wanted it to end within the {data_bytes} bytes of data, got "
                f"{entry.end}: the file is cut off or the header is wrong"
            )
        at = entry.end
    if at != data_bytes:
        raise ValueError(f"{where}: wanted {at} bytes of data, which the tensors fill, got {data_bytes}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a repeated key is an error."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name[:80]!r} twice")
        found[name] = value
    return found


def make_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> Header:
    """A header for tensors given as (name, dtype, shape), laid out in that order within widest dtype first.

    The order keeps every tensor aligned to its items; spaces at the end align the data to eight bytes.
    """
    entries: dict[str, Entry] = {}
    at = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -DTYPES[tensor[1]].itemsize):
        check_name(name, "a new header")
        end = at + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = Entry(name, dtype, shape, at, end)
        at = end
    rows: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    for entry in entries.values():
        rows[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [entry.begin, entry.end]}
    raw = msgspec.json.encode(rows)
    return Header(raw + b" " * (-len(raw) % 8), MappingProxyType(entries), MappingProxyType(dict(metadata)))


# -------------------------------------------------------------------------------------------------------------- reading


def read_header(file: int, where: str) -> Header:
    """The checked header of an open file. Raises ValueError."""
    file_bytes = os.fstat(file).st_size
    if file_bytes < 8:
        raise ValueError(f"{where}: wanted a safetensors file, got one of {file_bytes} bytes")
    header_bytes = int.from_bytes(os.pread(file, 8, 0), "little")
    limit = min(HEADER_LIMIT_BYTES, file_bytes - 8)
    if header_bytes > limit:
        raise ValueError(
            f"{where}: wanted a header of at most {limit} bytes, got {header_bytes} in its first eight bytes"
        )
    raw = os.pread(file, header_bytes, 8)
    return parse_header(raw, file_bytes - 8 - header_bytes, where)


class TensorFile:
    """An open file; its tensors are read-only views of the mapped bytes."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise ValueError(f"{path.name}: wanted a safetensors file, got nothing or no regular file")
        self.path = path
        with open(path, "rb") as file:
            self.header = read_header(file.fileno(), path.name)
            self._bytes = mmap.mmap(file.fileno(), self.header.file_bytes, access=mmap.ACCESS_READ)

    def read(self, name: str) -> np.ndarray:
        """A tensor without copying it. Raises KeyError for a name that the header lacks."""
        entry = self.header.entries[name]
        start, dtype = self.header.data_start + entry.begin, DTYPES[entry.dtype]
        return np.frombuffer(self._bytes, dtype, math.prod(entry.shape), start).reshape(entry.shape)

    def release(self, name: str) -> None:
        """Give the memory of a tensor's pages back; they are read again when somebody looks at them."""
        entry, page = self.header.entries[name], mmap.PAGESIZE
        start = (self.header.data_start + entry.begin) // page * page
        end = self.header.data_start + entry.end
        if entry.size_bytes:
            self._bytes.madvise(mmap.MADV_DONTNEED, start, end - start)


def open_file(path: Path) -> TensorFile:
    """Check a file's header and map the file. Raises ValueError."""
    return TensorFile(path)


# -------------------------------------------------------------------------------------------------------------- writing


class FileWriter:
    """Writes the tensors of a header in any order; the file appears under its name once it is complete.

    Use as a context: leaving it by an error removes what was written.
    """

    def __init__(self, path: Path, header: Header):
        self._path = path
        self._part = path.with_name(f".{path.name}.part")
        self._header = header
        self._left = set(header.entries)
        self._file = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.truncate(self._file, header.file_bytes)
        self._write_at(0, len(header.raw).to_bytes(8, "little") + header.raw)

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Write one tensor. Raises ValueError where it is not what the header says, or came before."""
        entry = self._header.entries[name]
        got = DTYPE_NAMES.get(tensor.dtype), tuple(tensor.shape)
        if name not in self._left or got != (entry.dtype, entry.shape):
            state = "unwritten" if name in self._left else "not written again"
            raise ValueError(f"{name}: wanted {entry.dtype} {entry.shape}, {state}, got {got[0]} {got[1]}")
        flat = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        self._write_at(self._header.data_start + entry.begin, memoryview(flat))
        self._left.remove(name)

    def finish(self) -> None:
        """Put the complete file in its place. Raises ValueError where a tensor was not written."""
        if self._left:
            raise ValueError(f"{self._path.name}: wanted every tensor written, {sorted(self._left)[:10]} were not")
        os.fsync(self._file)
        os.replace(self._part, self._path)

    def __enter__(self) -> "FileWriter":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)
        self._part.unlink(missing_ok=True)

    def _write_at(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file, view[: 1 << 30], offset)
            view, offset = view[written:], offset + written
