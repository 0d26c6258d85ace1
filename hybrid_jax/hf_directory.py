"""A published checkpoint directory: config.json, and safetensors files with or without an index.

Whatever the directory says is checked before it is used: file names are plain names, files lie in the directory (or, in
a cache of the hub, in the blobs of the same repository), the index and the files agree in both directions. Tensors are
given as they are stored. Which files are the checkpoint is decided as by its publishers' tools: those in the index, or
else `model.safetensors`, or else every safetensors file; others beside them are no part of it. This module knows no
family and no parameter of ours.
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hybrid_jax.safetensors import DTYPES, TENSOR_LIMIT, Entry, Header, TensorFile, open_file

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
MARK = "conversion.json"  # in the destination of a conversion until it is complete
CONFIG_LIMIT_BYTES = 10_000_000
INDEX_LIMIT_BYTES = 100_000_000
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
SHOWN = 10  # problems in one message


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


# ---------------------------------------------------------------------------------------------------------------- files


def check_file_name(name: str) -> None:
    """Refuse a name that could lead out of its directory. Raises ValueError."""
    if not 0 < len(name) <= 255 or not name.isprintable() or "/" in name or "\\" in name or name.startswith("."):
        raise ValueError(f"wanted a plain file name, got {name[:80]!r}: a checkpoint's files lie side by side")


def find_file(directory: Path, name: str) -> Path:
    """The real path of a file of a checkpoint.

    A link may lead within the directory, and from `snapshots/<revision>` of a hub cache to `blobs` beside `snapshots`.
    Raises ValueError where the file is missing, is no regular file or lies elsewhere.
    """
    check_file_name(name)
    try:
        root = directory.resolve()
        path = (root / name).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links is either, depending on the version of Python
        raise ValueError(f"{name}: wanted a file of the checkpoint, got {error}") from None
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(path.is_relative_to(place) for place in allowed):
        raise ValueError(f"{name}: wanted a file within the checkpoint, got a link out of it")
    if not path.is_file():
        raise ValueError(f"{name}: wanted a file of the checkpoint, it is missing or no regular file")
    return path


def check_complete(directory: Path) -> None:
    """Refuse a directory whose conversion was interrupted. Raises ValueError."""
    if os.path.lexists(directory / MARK):
        raise ValueError(f"{directory}: wanted a complete checkpoint, its conversion was interrupted: run it again")


def read_bytes(path: Path, name: str, limit_bytes: int) -> bytes:
    """A small file whole. Raises ValueError where it is larger than the limit."""
    size_bytes = path.stat().st_size
    if size_bytes > limit_bytes:
        raise ValueError(f"{name}: wanted at most {limit_bytes} bytes, got {size_bytes}")
    return path.read_bytes()


def read_config(path: Path) -> dict[str, Any]:
    """The published config of a checkpoint directory, or a config.json by itself, as plain data.

    Infinity and NaN are read as Python's json does, which wrote them. Raises ValueError.
    """
    if path.is_dir():
        file = find_file(path, CONFIG)
    elif path.is_file():
        file = path
    else:
        raise ValueError(f"{path}: wanted a checkpoint directory or a config.json, it does not exist")
    raw = read_bytes(file, CONFIG, CONFIG_LIMIT_BYTES)
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: wanted a config.json, got no JSON: {str(error)[:200]}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: wanted a config.json that is an object, got a {type(config).__name__}")
    return config


def check_quantization(config: Mapping[str, Any]) -> None:
    """Refuse a quantised format other than those of eight bits whose scales belong to weights only. Raises ValueError.

    compressed-tensors states int8 as 'int-quantized' and FP8 as 'float-quantized'; 'fp8' is FP8 in blocks of 128 x
    128. Activations that a config wants quantised from step to step stay wide; a checkpoint with scales for them is
    refused where it is read.
    """
    stated = config.get("quantization_config")
    if stated is None:
        return
    fields = stated if isinstance(stated, dict) else {}
    method, form, block = (fields.get(name) for name in ("quant_method", "format", "weight_block_size"))
    if method == "compressed-tensors" and form in ("int-quantized", "float-quantized"):
        return
    if method == "fp8" and block == [128, 128] and fields.get("activation_scheme") == "dynamic":
        return
    raise ValueError(
        "config.json: wanted no quantization_config, the format 'int-quantized' or 'float-quantized' of "
        "'compressed-tensors', or 'fp8' with weight_block_size [128, 128] and activation_scheme 'dynamic', got "
        f"quant_method {method!r}, format {form!r}, weight_block_size {block!r}: this is not implemented"
    )


def raise_problems(where: str, problems: Iterable[str]) -> None:
    """Raise one ValueError with the first problems and their number; nothing where there are none."""
    found = list(problems)
    if found:
        more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        raise ValueError("\n  ".join([f"{where}: {len(found)} problem(s):", *found[:SHOWN], *more]))


# ------------------------------------------------------------------------------------------------------------ directory


@dataclass(frozen=True)
class HFCheckpoint:
    """The open files of a published checkpoint. `index` is the text of its index, `places` the file of every tensor."""

    directory: Path
    files: Mapping[str, TensorFile]
    index: bytes | None
    places: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor, file by file."""
        return tuple(self.places)

    def entry(self, name: str) -> Entry:
        """What the header says of a tensor."""
        return self.files[self.places[name]].header.entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.entry(name).shape

    def dtype(self, name: str) -> np.dtype:
        """The stored dtype of a tensor."""
        return DTYPES[self.entry(name).dtype]

    def read(self, name: str) -> np.ndarray:
        """A tensor as it is stored, a read-only view of the file."""
        return self.files[self.places[name]].read(name)

    def release(self, name: str) -> None:
        """Give back the memory in which `read` mapped a tensor."""
        self.files[self.places[name]].release(name)


@dataclass(frozen=True)
class Listing:
    """What could be read of a directory, and what is wrong with it; `beside` are safetensors files that are no part."""

    files: Mapping[str, TensorFile]
    index: bytes | None
    beside: tuple[str, ...]
    problems: tuple[str, ...]


def open_hf(directory: Path) -> HFCheckpoint:
    """Open a published checkpoint: every header is checked, index and files agree. Raises ValueError."""
    check_complete(directory)
    listing = list_hf(directory)
    raise_problems(str(directory), listing.problems)
    places = {name: file for file, opened in listing.files.items() for name in opened.header.entries}
    return HFCheckpoint(directory, listing.files, listing.index, places)


def list_hf(directory: Path) -> Listing:
    """Read a directory's index and headers, gathering what is wrong instead of raising."""
    problems: list[str] = []
    present = sorted(path.name for path in directory.glob("*.safetensors") if not path.name.startswith("."))
    has_index = os.path.lexists(directory / INDEX)
    index, weight_map = _read_index(directory, problems) if has_index else (None, None)
    if weight_map is not None:
        wanted = sorted(set(weight_map.values()))
    else:
        wanted = [SINGLE] if SINGLE in present else present
    files: dict[str, TensorFile] = {}
    for name in wanted:
        try:
            files[name] = open_file(find_file(directory, name))
        except ValueError as error:
            problems.append(str(error))
    headers = {name: file.header for name, file in files.items()}
    problems += _repeated_names(headers)
    if weight_map is None:
        problems += _missing_shards(wanted)
    else:
        problems += _disagreements(weight_map, headers)
    return Listing(files, index, tuple(name for name in present if name not in wanted), tuple(problems))


def _read_index(directory: Path, problems: list[str]) -> tuple[bytes | None, dict[str, str]]:
    try:
        raw = read_bytes(find_file(directory, INDEX), INDEX, INDEX_LIMIT_BYTES)
        return raw, parse_index(raw)
    except ValueError as error:
        problems.append(str(error))
        return None, {}


def parse_index(raw: bytes) -> dict[str, str]:
    """The file of every tensor, by an index. Raises ValueError where it is none, or names anything but plain files."""
    try:
        if raw.count(b":") > 6 * TENSOR_LIMIT:
            raise ValueError(f"more than {TENSOR_LIMIT} tensors")
        weight_map = msgspec.json.decode(raw, type=_Index).weight_map
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{INDEX}: wanted an object with a 'weight_map' of names, got: {str(error)[:200]}") from None
    for file in set(weight_map.values()):
        check_file_name(file)
    return weight_map


def _repeated_names(headers: Mapping[str, Header]) -> list[str]:
    owners: dict[str, str] = {}
    problems = []
    for file, header in headers.items():
        for name in header.entries:
            if name in owners:
                problems.append(f"tensor {name}: wanted it in one file, it is in {owners[name]} and {file}")
            owners[name] = file
    return problems


def _disagreements(weight_map: Mapping[str, str], headers: Mapping[str, Header]) -> list[str]:
    """Where the index and the headers that could be read differ."""
    lost = [
        f"tensor {name}: the index has it in {file}, which lacks it"
        for name, file in weight_map.items()
        if file in headers and name not in headers[file].entries
    ]
    extra = [
        f"tensor {name}: {file} has it, the index does not"
        for file, header in headers.items()
        for name in header.entries
        if weight_map.get(name) != file
    ]
    return lost + extra


def _missing_shards(files: list[str]) -> list[str]:
    """Shards that the names of the others announce, and no file at all."""
    if not files:
        return [f"wanted *.safetensors or {INDEX}, got neither"]
    numbers: dict[tuple[str, int], set[int]] = {}
    for name in files:
        if found := SHARD.fullmatch(name):
            numbers.setdefault((found[1], int(found[3])), set()).add(int(found[2]))
    return [
        f"{stem}-*-of-{count}.safetensors: wanted {count} shards, got {len(got)}, shard {_gap(got)} is missing"
        for (stem, count), got in numbers.items()
        if got != set(range(1, count + 1))
    ]


def _gap(numbers: set[int]) -> int:
    """The first number from 1 upwards that is not there."""
    return next(number for number in itertools.count(1) if number not in numbers)
