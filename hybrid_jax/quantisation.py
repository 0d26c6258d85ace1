"""Weights of eight bits between a checkpoint and a model: which are kept, their scales, rounding and widening.

A published scale is one for each row of a weight `[out, in]`, one for each block of 128 x 128, or one for all. A
model's scale has the axes of its kernel, where the last input axis counts groups (see `models/quantised.py`): a block
is as many groups as its rows, and blocks are cut where an input axis is. Numbers stay as published. Works on the host.
"""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from hybrid_jax.config import Quantization
from hybrid_jax.hf_directory import list_hf
from hybrid_jax.orbax_directory import is_orbax, open_orbax
from hybrid_jax.orbax_tree import Leaf
from hybrid_jax.safetensors import DTYPES
from hybrid_jax.spelling import EIGHT_BITS, FP8, INT8, Plan, find_spellings, is_row_scale
from models.quantised import BLOCK, Format, quantisable_paths, quantise
from models.weights import WeightTable

NAMES: Mapping[np.dtype, Quantization] = {FP8: "fp8", INT8: "int8"}
GREATEST = {FP8: 448.0, INT8: 127.0}  # numbers that a channel's greatest weight becomes


# -------------------------------------------------------------------------------------------------- what a model keeps


@dataclass(frozen=True)
class Weights:
    """Which weights of a model have eight bits, by the paths of their kernels, and how many could have."""

    formats: Mapping[str, Format]
    possible: int
    widened: frozenset[str] = frozenset()

    def describe(self) -> tuple[str, ...]:
        """A line about them, if there is something to say."""
        if self.widened:
            names = ", ".join(sorted(self.widened))
            return (f"weights: stored in {names}, widened on load: a CPU has no product that reads them as they are",)
        counts = {form: list(self.formats.values()).count(form) for form in dict.fromkeys(self.formats.values())}
        found = ", ".join(f"{count} of {self.possible} matrices in {form}" for form, count in counts.items())
        return (f"weights: {found}",) if found else ()


def quantise_model(
    model: nnx.Module,
    path: Path | None,
    hf: Mapping[str, Any],
    table: WeightTable,
    quantization: Quantization | None,
    widen: bool = False,
) -> Weights:
    """Give an abstract model the weights that its checkpoint has, or that it is to be given on load.

    Args:
      path: the checkpoint, whose headers tell which weights have eight bits; from a config alone, None or a file, they
        are all but those on its list of modules left out. quantization: what weights of a wide checkpoint become; that
        of a checkpoint of eight bits must be the same. widen: whether weights that are stored in eight bits get the
        model's dtype unless `quantization` asks for them.
    Raises ValueError for another `quantization` than the checkpoint's, and for a damaged checkpoint.
    """
    paths = quantisable_paths(model)
    found = _stored_formats(path, table) if _states(hf) and path is not None and path.is_dir() else {}
    found = found or _stated_formats(hf, table)
    names = frozenset(form.name for form in found.values())
    if names and quantization not in (None, *names):
        raise ValueError(
            f"wanted quantization {' or '.join(sorted(names))}, as the checkpoint is stored, got {quantization}: leave "
            "it unset, or take a checkpoint in bfloat16"
        )
    if names and quantization is None and widen:
        return Weights({}, len(paths), names)
    if quantization is not None and not names:
        found = dict.fromkeys(paths, Format(quantization))
    formats = {path: found[path] for path in paths if path in found}
    quantise(model, formats)
    return Weights({path: formats[path] for path in set(formats) - set(quantisable_paths(model))}, len(paths))


def keeps_eight_bits() -> bool:
    """Whether products of the default device read weights of eight bits as they are; XLA on a CPU widens them first."""
    return jax.default_backend() != "cpu"


def _states(hf: Mapping[str, Any]) -> bool:
    return isinstance(hf.get("quantization_config"), dict)


def _stored_formats(path: Path, table: WeightTable) -> dict[str, Format]:
    """Formats by the headers of a checkpoint; none where it holds no tensors. Mixed parameters have none."""
    entries = _orbax_entries(path) if is_orbax(path) else _hf_entries(path)
    plan, _ = find_spellings(table, entries)
    formats = {found.weight.path: _one_format(found.names, entries, plan) for found in plan.found}
    return {path: form for path, form in formats.items() if form is not None}


def _hf_entries(path: Path) -> dict[str, Leaf]:
    files = list_hf(path).files.values()
    return {
        name: Leaf(entry.shape, DTYPES[entry.dtype]) for file in files for name, entry in file.header.entries.items()
    }


def _orbax_entries(path: Path) -> dict[str, Leaf]:
    """What the published files had, which an Orbax directory keeps bit for bit; none where there were none."""
    published = open_orbax(path).published
    headers = () if published is None else published.headers.values()
    return {
        name: Leaf(entry.shape, DTYPES[entry.dtype]) for header in headers for name, entry in header.entries.items()
    }


def _one_format(names: Iterable[str], entries: Mapping[str, Leaf], plan: Plan) -> Format | None:
    """The format of the tensors of a parameter, if they have the same; rows among blocks are blocks of equal scales."""
    tensors = [(entries[name], entries[plan.scales[name]]) for name in names if name in plan.scales]
    dtypes = {weight.dtype for weight, _ in tensors}
    if not tensors or len(tensors) < len(list(names)) or len(dtypes) > 1 or not dtypes <= set(EIGHT_BITS):
        return None
    block = not all(is_row_scale(scale.shape, weight.shape) for weight, scale in tensors)
    return Format(NAMES[dtypes.pop()], block)


def _stated_formats(hf: Mapping[str, Any], table: WeightTable) -> dict[str, Format]:
    """Formats by a config: one for all parameters but those on its list; none where the format is not known."""
    if not _states(hf):
        return {}
    stated = hf["quantization_config"]
    known = {"int-quantized": Format("int8"), "float-quantized": Format("fp8")}
    form = Format("fp8", True) if stated.get("quant_method") == "fp8" else known.get(stated.get("format"))
    if form is None:
        return {}
    if "block" in _strategies(stated):
        form = Format(form.name, True)
    left_out = [*(stated.get("ignore") or ()), *(stated.get("modules_to_not_convert") or ())]
    ignored = {name for entry in left_out for name in (entry, _canonical(table, entry))}
    names = {row.path: row.sources[0].names for row in table.weights}
    return {path: form for path, tensors in names.items() if not any(_is_left_out(name, ignored) for name in tensors)}


def _strategies(stated: Mapping[str, Any]) -> set[Any]:
    groups = stated.get("config_groups") or {}
    return {(group.get("weights") or {}).get("strategy") for group in groups.values()}


def _canonical(table: WeightTable, module: str) -> str:
    return (table.canonical(f"{module}.weight") or module).removesuffix(".weight")


def _is_left_out(tensor: str, ignored: Iterable[str]) -> bool:
    """Whether a list of modules has that of a tensor: by name, by the name of one around it, or by an expression."""
    module = tensor.removesuffix(".weight")
    return any(
        re.match(entry[3:], module) if entry.startswith("re:") else f".{entry}." in f".{module}." for entry in ignored
    )


# ------------------------------------------------------------------------------------------------------------- numbers


def check_scale(name: str, scale: np.ndarray) -> np.ndarray:
    """The scales in float32. Raises ValueError where one is not a finite number above 0."""
    wide = scale.astype(np.float32)
    wrong = np.argwhere(~(np.isfinite(wide) & (wide > 0)))
    if len(wrong):
        at = tuple(int(index) for index in wrong[0])
        raise ValueError(
            f"tensor {name}: wanted finite scales above 0, got {wide[at]} at {at} and {len(wrong) - 1} more: the "
            "checkpoint is damaged, fetch it again"
        )
    return wide


def can_spread(scale: tuple[int, ...], shape: tuple[int, ...], groups: int) -> bool:
    """Whether published scales of a shape are all one within each of `groups` groups of a row of a weight."""
    return is_row_scale(scale, shape) or shape[-1] <= BLOCK or BLOCK % (shape[-1] // groups) == 0


def spread(scale: np.ndarray, shape: tuple[int, ...], groups: int) -> np.ndarray:
    """Published scales of a weight `[..., out, in]` as `[..., out, n]`, one for each of `groups` groups of a row."""
    rows = shape[:-1]
    if scale.size == 1 or scale.shape in (rows, (*rows, 1)):
        each = scale.reshape((1,) * len(shape) if scale.size == 1 else (*rows, 1))
        return np.broadcast_to(each, (*rows, groups))
    columns = np.arange(groups) * (shape[-1] // groups) // BLOCK
    return scale[..., np.arange(rows[-1]) // BLOCK, :][..., columns]


def widen(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 weights from a tensor `[..., out, in]` of eight bits and its scales as published."""
    per_row = is_row_scale(scale.shape, values.shape)
    factors = spread(scale.astype(np.float32), values.shape, 1 if per_row else values.shape[-1])
    return values.astype(np.float32) * factors


def round_weights(
    path: str, kernel: np.ndarray, dtype: np.dtype, scale_shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Values of eight bits and float32 scales of a kernel, whose axes are cut into so many parts that share a scale.

    A scale is the greatest weight of its part over the greatest number of the dtype, 1 where all are zero. Slice by
    slice of the first axis where it has a scale for each. Raises ValueError for a weight that is not finite.
    """
    values, scale = np.empty(kernel.shape, dtype), np.empty(scale_shape, np.float32)
    slices: list[Any] = list(range(kernel.shape[0])) if scale_shape[0] == kernel.shape[0] else [slice(None)]
    for index in slices:
        part = kernel[index]
        values[index], scale[index] = _round_slice(path, part, dtype, scale_shape[kernel.ndim - part.ndim :])
    return values, scale


def _round_slice(
    path: str, kernel: np.ndarray, dtype: np.dtype, scale_shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    parts = [(count, length // count) for length, count in zip(kernel.shape, scale_shape, strict=True)]
    split = kernel.astype(np.float32).reshape(list(itertools.chain(*parts)))
    greatest = np.abs(split).max(axis=tuple(range(1, split.ndim, 2)), keepdims=True)
    if not np.isfinite(greatest).all():
        raise ValueError(
            f"parameter {path}: wanted finite weights to round them to {dtype}, got NaN or infinity: the checkpoint is "
            "damaged"
        )
    scale = np.where(greatest > 0, greatest / np.float32(GREATEST[dtype]), np.float32(1)).astype(np.float32)
    scale = np.maximum(scale, np.finfo(np.float32).tiny)  # of weights too small for float32 to divide
    rounded = np.clip(split / scale, -GREATEST[dtype], GREATEST[dtype])
    rounded = np.rint(rounded) if dtype == INT8 else rounded
    return rounded.astype(dtype).reshape(kernel.shape), scale.reshape(scale_shape)
