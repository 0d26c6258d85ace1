"""Parameters in an Orbax checkpoint: written piece by piece, and read back a few at a time.

The checkpoint is one ordinary Orbax checkpoint of a nested dictionary of arrays, which any user of Orbax restores with
`orbax.checkpoint.experimental.v1.load(directory)`. Orbax's partial saving writes it in pieces: every `save_piece`
leaves one finished piece, marked by Orbax, beside the final place, and `finish` merges the pieces (data files are
renamed, not copied) and moves the checkpoint to its place in one step. The alternative, one checkpoint per parameter,
needs no merging, but then no single call restores the model. Arrays are stored uncompressed: trained weights hardly
shrink, and compression holds further copies in memory.

This module knows paths, shapes and dtypes; it knows no file but Orbax's own, no model and no published name.
"""

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp  # type: ignore[import-untyped]

CHUNK_BYTES = 64 << 20  # a reader of one slice reads whole chunks; the copies of a chunk bound the memory of a save


@dataclass(frozen=True)
class Leaf:
    """Shape and dtype of one stored parameter; Orbax takes it as the target of a load into host memory."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


# -------------------------------------------------------------------------------------------------------------- writing


def save(directory: Path, leaves: Mapping[str, jax.Array | np.ndarray]) -> None:
    """Write a whole checkpoint at once. Raises ValueError where the directory exists."""
    if directory.exists():
        raise ValueError(f"{directory}: wanted a new directory, it exists")
    with _context():
        ocp.save(directory.absolute(), _nest(leaves))


def save_piece(directory: Path, leaves: Mapping[str, np.ndarray]) -> None:
    """Write some parameters of a checkpoint that `finish` will complete; no parameter twice."""
    with _context():
        ocp.partial.save(directory.absolute(), _nest(leaves))


def finished_paths(directory: Path) -> set[str]:
    """The parameters in the finished pieces of an interrupted checkpoint.

    Removes what an interruption left unfinished: a piece being written, or, where merging had begun, everything.
    """
    pieces = _pieces(directory)
    for torn in directory.parent.glob(f"{pieces.name}.orbax-checkpoint-tmp*"):
        shutil.rmtree(torn)
    if not pieces.exists():
        return set()
    found = list(pieces.iterdir())
    merging = any(".pending_" not in piece.name for piece in found)
    if merging:
        shutil.rmtree(pieces)
        return set()
    return {path for piece in found for path in _piece_paths(piece)}


def finish(directory: Path) -> None:
    """Merge the pieces; the checkpoint appears at its place complete."""
    with _context():
        ocp.partial.finalize(directory.absolute())


def is_finished(directory: Path) -> bool:
    """Whether a complete Orbax checkpoint stands at this place."""
    return (directory / "_CHECKPOINT_METADATA").is_file()  # which Orbax writes last


def _pieces(directory: Path) -> Path:
    """Where Orbax gathers the pieces of a checkpoint."""
    return directory.with_name(f"{directory.name}.partial_save")


def _piece_paths(piece: Path) -> list[str]:
    """The parameters of a piece, by the tree that Orbax stores with it; none where Orbax's commit mark is missing."""
    if not (piece / "commit_success.txt").exists():
        shutil.rmtree(piece)
        return []
    tree = json.loads((piece / "state" / "_METADATA").read_bytes())["tree_metadata"]
    return [".".join(key["key"] for key in leaf["key_metadata"]) for leaf in tree.values()]


def _context() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.memory.deepcopy_host_arrays = False  # nobody changes the arrays while they are saved
    context.pytree.loading.partial_load = True
    return context


# -------------------------------------------------------------------------------------------------------------- reading


def read_leaves(directory: Path) -> dict[str, Leaf]:
    """Every parameter of a checkpoint with its shape and dtype; reads no data. Raises ValueError."""
    if not is_finished(directory):
        raise ValueError(f"{directory}: wanted an Orbax checkpoint, got none that is complete")
    try:
        tree = ocp.metadata(directory.absolute()).metadata
    except Exception as error:  # what Orbax and TensorStore raise for a damaged checkpoint is not specified
        raise ValueError(f"{directory}: wanted a readable Orbax checkpoint, got: {_first_line(error)}") from error
    if tree is None:  # Orbax has written the reason into the log
        raise ValueError(f"{directory}: wanted a readable Orbax checkpoint, its arrays cannot be opened")
    return {path: _leaf(path, value) for path, value in _flatten(tree)}


def read(directory: Path, leaves: Mapping[str, Leaf]) -> dict[str, np.ndarray]:
    """Some parameters of a checkpoint as host arrays. Raises ValueError.

    Args:
      leaves: what to read, as `read_leaves` gave it: Orbax allocates by its own shapes and converts dtypes unasked.
    """
    try:
        with _context():
            tree = ocp.load(directory.absolute(), _nest(leaves))
    except Exception as error:  # see read_leaves
        raise ValueError(f"{directory}: wanted {', '.join(leaves)[:200]}, got: {_first_line(error)}") from error
    found = dict(_flatten(tree))
    for path, leaf in leaves.items():
        got = found[path]  # the leaf itself where Orbax has no such parameter
        if not isinstance(got, np.ndarray) or (got.shape, got.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(f"{directory}: {path}: wanted {leaf}, got {got.shape} {got.dtype}")
    return found


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dictionary by the parts of dotted paths."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *folders, name = path.split(".")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return tree


def _flatten(tree: Any) -> Iterable[tuple[str, Any]]:
    """Dotted paths and leaves. Raises ValueError where the tree has anything but dictionaries."""
    for keys, value in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not all(isinstance(key, jax.tree_util.DictKey) for key in keys):
            raise ValueError(f"{jax.tree_util.keystr(keys)}: wanted nested dictionaries in the Orbax checkpoint")
        yield ".".join(str(key.key) for key in keys), value


def _leaf(path: str, value: Any) -> Leaf:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if not isinstance(shape, tuple) or dtype is None:
        raise ValueError(f"{path}: wanted an array in the Orbax checkpoint, got {str(value)[:80]}")
    return Leaf(shape, np.dtype(dtype))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
