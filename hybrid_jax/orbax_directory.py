"""An Orbax directory of this engine, and what it records of the published checkpoint that it was made from.

    config.json, tokenizer.json, …   as published
    parameters/                      one Orbax checkpoint: our parameters under their paths, in the stored dtype
    hybrid_jax.json                  the header of every published safetensors file and the index, verbatim
    other.safetensors                published tensors that are no parameters (scales of int8 weights, a vision tower)

The last two are absent where the model was trained here. With them the published files can be written again byte for
byte. Nothing recorded is trusted: file names are plain names and headers pass the checks of the format. This module
knows no family.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from hybrid_jax import orbax_tree
from hybrid_jax.hf_directory import check_complete, check_file_name, find_file, parse_index, read_bytes
from hybrid_jax.orbax_tree import Leaf
from hybrid_jax.safetensors import Header, TensorFile, open_file, parse_header

PARAMETERS = "parameters"
RECORD = "hybrid_jax.json"
OTHER = "other.safetensors"
RECORD_LIMIT_BYTES = 200_000_000


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    header: str
    data_bytes: int


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    files: list[_File]
    index: str | None


@dataclass(frozen=True)
class Published:
    """The safetensors files of a published checkpoint without their data: headers by file name, and the index."""

    headers: Mapping[str, Header]
    index: bytes | None

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor, file by file."""
        return tuple(name for header in self.headers.values() for name in header.entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: entry.shape for header in self.headers.values() for name, entry in header.entries.items()}

    def encode(self) -> bytes:
        """The record as JSON."""
        files = [_File(name, header.raw.decode(), header.data_bytes) for name, header in self.headers.items()]
        return msgspec.json.encode(_Record(files, None if self.index is None else self.index.decode()))


def decode_published(raw: bytes) -> Published:
    """Read a record and check all that it says. Raises ValueError."""
    try:
        record = msgspec.json.decode(raw, type=_Record)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{RECORD}: wanted a record of published files, got: {str(error)[:200]}") from None
    headers: dict[str, Header] = {}
    for file in record.files:
        check_file_name(file.name)
        if file.name in headers or not file.name.endswith(".safetensors"):
            raise ValueError(f"{RECORD}: wanted distinct names of safetensors files, got {file.name[:80]!r}")
        headers[file.name] = parse_header(file.header.encode(), file.data_bytes, f"{RECORD}: {file.name}")
    index = None if record.index is None else record.index.encode()
    published = Published(headers, index)
    if len(set(published.names)) != len(published.names):
        raise ValueError(f"{RECORD}: wanted every tensor in one file, got one in two files")
    places = {name: file for file, header in headers.items() for name in header.entries}
    if index is not None and parse_index(index) != places:
        raise ValueError(f"{RECORD}: wanted an index that agrees with the headers, got another")
    return published


@dataclass(frozen=True)
class OrbaxCheckpoint:
    """An open Orbax directory: its parameters, and what it records of the published files, if anything."""

    directory: Path
    stored: Mapping[str, Leaf]
    published: Published | None
    other: TensorFile | None

    @property
    def parameters(self) -> Path:
        """The Orbax checkpoint within the directory."""
        return self.directory / PARAMETERS

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of the names that are not among the tensors kept as published."""
        kept = {} if self.other is None else self.other.header.entries
        return [name for name in names if name not in kept]

    def read_other(self, name: str) -> np.ndarray:
        """A tensor that is kept as published. Raises ValueError where it is missing."""
        if self.other is None or self.missing([name]):
            raise ValueError(f"{OTHER}: wanted the tensor {name}, it is missing")
        return self.other.read(name)


def is_orbax(directory: Path) -> bool:
    """Whether a directory is meant to be an Orbax directory of this engine."""
    return (directory / PARAMETERS).is_dir()


def open_orbax(directory: Path) -> OrbaxCheckpoint:
    """Open an Orbax directory; reads no data. Raises ValueError where anything in it is damaged."""
    check_complete(directory)
    _refuse_links(directory / PARAMETERS)
    stored = orbax_tree.read_leaves(directory / PARAMETERS)
    published = None
    if (directory / RECORD).exists():
        published = decode_published(read_bytes(find_file(directory, RECORD), RECORD, RECORD_LIMIT_BYTES))
    other = open_file(find_file(directory, OTHER)) if (directory / OTHER).exists() else None
    return OrbaxCheckpoint(directory, stored, published, other)


def _refuse_links(parameters: Path) -> None:
    """Orbax follows links wherever they lead, and writes none."""
    for path in (parameters, *parameters.rglob("*")):
        if path.is_symlink():
            raise ValueError(f"{parameters}: wanted plain files and folders, {path.name[:80]!r} is a link")
