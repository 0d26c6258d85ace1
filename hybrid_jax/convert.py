"""Converts a published directory to an Orbax directory and back, bit for bit.

To Orbax: every parameter is assembled in its stored dtype and written under its own path; the headers of the published
files are recorded. Back: the recorded files are written again, equal byte by byte; a model that was trained here, which
records none, gets the usual names of its family and files of at most 5 GB with an index.

Both stream: host memory holds one group of parameters, no larger than the largest parameter, and about two copies of
it while Orbax writes. Both continue after an interruption: the destination bears a mark of its source until it is
complete; finished pieces of the Orbax checkpoint and finished files are kept. This module knows no family.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec
import numpy as np

from hybrid_jax import orbax_tree
from hybrid_jax.checkpoint import Outline, group_paths, header_leaves, make_outline, orbax_plan, stored_problems
from hybrid_jax.hf_directory import (
    CONFIG,
    INDEX,
    MARK,
    SINGLE,
    HFCheckpoint,
    find_file,
    open_hf,
    raise_problems,
)
from hybrid_jax.orbax_directory import OTHER, PARAMETERS, RECORD, OrbaxCheckpoint, Published, is_orbax, open_orbax
from hybrid_jax.orbax_tree import Leaf
from hybrid_jax.progress import Progress
from hybrid_jax.published_config import read_published_config
from hybrid_jax.safetensors import DTYPE_NAMES, FileWriter, Header, make_header
from hybrid_jax.spelling import Found, Plan, cut_as_stored, entry_problems, fill, match, pick

FILE_LIMIT_BYTES = 5_000_000_000  # of the hub's tools, for the files of a model that was trained here
COPIED = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "README.md",
)


class _Mark(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    source: str


# ------------------------------------------------------------------------------------------------------------- to Orbax


def to_orbax(source: Path, destination: Path, progress: Progress) -> None:
    """Convert a published directory to a new Orbax directory, or go on with a conversion that was interrupted.

    Raises ValueError where the source is damaged or does not fit its config, or the destination holds anything else.
    """
    outline = make_outline(read_published_config(source))
    checkpoint = open_hf(source)
    entries = header_leaves(checkpoint)
    plan = cut_as_stored(match(outline.table, checkpoint.names), {name: leaf.shape for name, leaf in entries.items()})
    raise_problems(str(source), entry_problems(plan, entries, outline.leaves) + _mixed_dtypes(plan, entries))
    _claim(destination, _identify_hf(checkpoint))
    _write_parameters(checkpoint, plan, outline, destination / PARAMETERS, progress)
    if plan.kept and not (destination / OTHER).exists():
        _write_other(checkpoint, plan, destination / OTHER)
    published = Published({name: file.header for name, file in checkpoint.files.items()}, checkpoint.index)
    _complete(source, destination, {RECORD: published.encode()})


def _mixed_dtypes(plan: Plan, entries: Mapping[str, Leaf]) -> list[str]:
    """Parameters that cannot be kept bit for bit, since their tensors have several dtypes."""
    dtypes = {found.weight.path: {str(entries[name].dtype) for name in found.names} for found in plan.found}
    return [f"parameter {path}: wanted one dtype, got {sorted(got)}" for path, got in dtypes.items() if len(got) > 1]


def _write_parameters(
    checkpoint: HFCheckpoint, plan: Plan, outline: Outline, directory: Path, progress: Progress
) -> None:
    found = {one.weight.path: one for one in plan.found}
    stored = {path: Leaf(outline.leaves[path].shape, checkpoint.dtype(one.names[0])) for path, one in found.items()}
    progress.start("parameters", sum(leaf.size_bytes for leaf in stored.values()))
    done = set(stored) if orbax_tree.is_finished(directory) else orbax_tree.finished_paths(directory)
    if not done <= set(stored):
        raise ValueError(f"{directory.parent}: wanted parts of this conversion, got others: delete it and start again")
    progress.advance(sum(stored[path].size_bytes for path in done))
    for group in group_paths({path: leaf for path, leaf in stored.items() if path not in done}):
        orbax_tree.save_piece(directory, {path: _assemble(checkpoint, found[path], stored[path]) for path in group})
        progress.advance(sum(stored[path].size_bytes for path in group))
    if not orbax_tree.is_finished(directory):
        orbax_tree.finish(directory)


def _assemble(checkpoint: HFCheckpoint, found: Found, leaf: Leaf) -> np.ndarray:
    parameter = np.empty(leaf.shape, leaf.dtype)
    fill(parameter, found.source, _read(checkpoint, found.names))
    return parameter


def _read(checkpoint: HFCheckpoint, names: Iterable[str]) -> Iterator[np.ndarray]:
    for name in names:
        yield checkpoint.read(name)
        checkpoint.release(name)


def _write_other(checkpoint: HFCheckpoint, plan: Plan, path: Path) -> None:
    """The tensors that are no parameters, as published."""
    entries = [checkpoint.entry(name) for name in plan.kept]
    with FileWriter(path, make_header([(entry.name, entry.dtype, entry.shape) for entry in entries], {})) as writer:
        for name, tensor in zip(plan.kept, _read(checkpoint, plan.kept), strict=True):
            writer.write(name, tensor)
        writer.finish()


# --------------------------------------------------------------------------------------------------- to published files


def to_hf(source: Path, destination: Path, progress: Progress) -> None:
    """Convert an Orbax directory to a new published directory, or go on with a conversion that was interrupted.

    Raises ValueError where the source is damaged or does not fit its config, or the destination holds anything else.
    """
    outline = make_outline(read_published_config(source))
    if not is_orbax(source):
        raise ValueError(f"{source}: wanted an Orbax directory with {PARAMETERS}, got none")
    checkpoint = open_orbax(source)
    plan = orbax_plan(checkpoint, outline.table)
    raise_problems(str(source), stored_problems(checkpoint, plan, outline.leaves))
    published = checkpoint.published or usual_files(plan, checkpoint.stored)
    raise_problems(str(source), record_problems(checkpoint, plan, published))
    _claim(destination, _identify_orbax(checkpoint))
    progress.start("files", sum(header.data_bytes for header in published.headers.values()))
    for name, header in published.headers.items():
        if (destination / name).exists():
            progress.advance(header.data_bytes)
        else:
            _write_file(checkpoint, plan, destination / name, header, progress)
    _complete(source, destination, {} if published.index is None else {INDEX: published.index})


def record_problems(checkpoint: OrbaxCheckpoint, plan: Plan, published: Published) -> list[str]:
    """Where the headers to be written do not fit the parameters that an Orbax directory holds."""
    entries = {name: entry for header in published.headers.values() for name, entry in header.entries.items()}
    wanted = {
        name: (DTYPE_NAMES[checkpoint.stored[found.weight.path].dtype], found.source.tensor_shape(leaf.shape, index))
        for found in plan.found
        for leaf in [checkpoint.stored[found.weight.path]]
        for index, name in enumerate(found.names)
    }
    kept = {} if checkpoint.other is None else checkpoint.other.header.entries
    wanted |= {name: (kept[name].dtype, kept[name].shape) for name in plan.kept}
    return [
        f"tensor {name}: the record has {entries[name].dtype} {entries[name].shape}, stored is {dtype} {shape}"
        for name, (dtype, shape) in wanted.items()
        if (entries[name].dtype, entries[name].shape) != (dtype, shape)
    ]


def usual_files(plan: Plan, stored: Mapping[str, Leaf], limit_bytes: int = FILE_LIMIT_BYTES) -> Published:
    """Headers and index for a model that records none, in the usual spelling of its family."""
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    room = limit_bytes
    for found in plan.found:
        leaf = stored[found.weight.path]
        each_bytes = leaf.size_bytes // len(found.names)
        for number, name in enumerate(found.names):
            if each_bytes > room and shards[-1]:
                shards.append([])
                room = limit_bytes
            shards[-1].append((name, DTYPE_NAMES[leaf.dtype], found.source.tensor_shape(leaf.shape, number)))
            room -= each_bytes
    if len(shards) == 1:
        return Published({SINGLE: make_header(shards[0], {"format": "pt"})}, None)
    stem, count = SINGLE.removesuffix(".safetensors"), len(shards)
    files = {f"{stem}-{n:05d}-of-{count:05d}.safetensors": shard for n, shard in enumerate(shards, start=1)}
    total_bytes = sum(leaf.size_bytes for leaf in stored.values())
    weight_map = {name: file for file, shard in files.items() for name, _, _ in shard}
    index = msgspec.json.encode({"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    headers = {file: make_header(shard, {"format": "pt"}) for file, shard in files.items()}
    return Published(headers, msgspec.json.format(index))


def _write_file(checkpoint: OrbaxCheckpoint, plan: Plan, path: Path, header: Header, progress: Progress) -> None:
    """One published file, from a few parameters at a time."""
    parts = {
        found.weight.path: [(index, name) for index, name in enumerate(found.names) if name in header.entries]
        for found in plan.found
    }
    sources = {found.weight.path: found.source for found in plan.found}
    wanted = {parameter: checkpoint.stored[parameter] for parameter, names in parts.items() if names}
    with FileWriter(path, header) as writer:
        for group in group_paths(wanted):
            values = orbax_tree.read(checkpoint.parameters, {parameter: wanted[parameter] for parameter in group})
            for parameter, value in values.items():
                for index, name in parts[parameter]:
                    writer.write(name, pick(value, sources[parameter], index))
                    progress.advance(header.entries[name].size_bytes)
        for name in plan.kept:
            if name in header.entries:
                writer.write(name, checkpoint.read_other(name))
                progress.advance(header.entries[name].size_bytes)
        writer.finish()


# ------------------------------------------------------------------------------------------- a destination and its mark


def _identify_hf(checkpoint: HFCheckpoint) -> str:
    """A digest that changes when the published files do; it takes their headers, sizes and times, not their data."""
    digest = hashlib.sha256(find_file(checkpoint.directory, CONFIG).read_bytes())
    for name, file in checkpoint.files.items():
        status = file.path.stat()
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}".encode() + file.header.raw)
    return digest.hexdigest()


def _identify_orbax(checkpoint: OrbaxCheckpoint) -> str:
    """A digest that changes when the Orbax directory does; Orbax's own metadata bear the time of the save."""
    digest = hashlib.sha256(find_file(checkpoint.directory, CONFIG).read_bytes())
    digest.update((checkpoint.parameters / "_CHECKPOINT_METADATA").read_bytes())
    digest.update(b"" if checkpoint.published is None else checkpoint.published.encode())
    return digest.hexdigest()


def _claim(destination: Path, source: str) -> None:
    """Mark a new or empty directory; accept one that bears the mark of this source. Raises ValueError otherwise."""
    mark = destination / MARK
    if mark.exists():
        try:
            found = msgspec.json.decode(mark.read_bytes(), type=_Mark).source
        except ValueError:
            found = ""
        if found != source:
            raise ValueError(f"{destination}: wanted a part of this conversion, got one of another source: delete it")
        return
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination}: wanted a new or empty directory, it holds something: choose another")
    destination.mkdir(parents=True, exist_ok=True)
    _write_whole(mark, msgspec.json.encode(_Mark(source)))


def _complete(source: Path, destination: Path, texts: Mapping[str, bytes]) -> None:
    """Copy the small files, write the others given, and take the mark away."""
    for name in COPIED:
        if os.path.lexists(source / name):
            _copy_whole(find_file(source, name), destination / name)
    for name, text in texts.items():
        _write_whole(destination / name, text)
    (destination / MARK).unlink()


def _write_whole(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


def _copy_whole(source: Path, path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    shutil.copyfile(source, part)
    os.replace(part, path)
