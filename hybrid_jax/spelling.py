"""Which published tensors make up which parameter of a checkpoint, and how they are put together.

A family's weight table lists the spellings in which a parameter may be published. Here the names found in a checkpoint
are matched with it: every parameter in exactly one spelling, every tensor accounted for. A weight of eight bits brings
a second tensor, its scales, whose numbers are the business of `hybrid_jax/quantisation.py`. Reads no files.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from hybrid_jax.hf_directory import raise_problems
from hybrid_jax.orbax_tree import Leaf
from models.quantised import BLOCK
from models.weights import Source, Weight, WeightTable

SCALES = ("_scale", "_scale_inv")  # behind the name of a weight of eight bits: its scales, factors in either spelling
FLOATS = tuple(np.dtype(dtype) for dtype in (jnp.bfloat16, jnp.float16, jnp.float32))
INT8, FP8 = np.dtype(np.int8), np.dtype(jnp.float8_e4m3fn)
EIGHT_BITS = (INT8, FP8)


@dataclass(frozen=True)
class Found:
    """One parameter, the spelling that a checkpoint has of it, and the names of its tensors as they stand in files."""

    weight: Weight
    source: Source
    names: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Every tensor of a checkpoint accounted for.

    `scales` maps weights of eight bits to their scales; `left_out` are tensors that the family does not use.
    """

    found: tuple[Found, ...]
    scales: Mapping[str, str]
    left_out: tuple[str, ...]

    @property
    def kept(self) -> tuple[str, ...]:
        """Tensors that are part of the checkpoint but of no parameter."""
        return (*self.scales.values(), *self.left_out)


# ------------------------------------------------------------------------------------------------------------- matching


def match(table: WeightTable, names: Iterable[str]) -> Plan:
    """Find every parameter among the names of a checkpoint's tensors. Raises ValueError, naming the first problems."""
    plan, problems = find_spellings(table, names)
    raise_problems("the checkpoint does not fit its config", problems)
    return plan


def find_spellings(table: WeightTable, names: Iterable[str]) -> tuple[Plan, list[str]]:
    """As `match`, but gathers what is wrong: missing, unexpected and doubly published tensors."""
    problems: list[str] = []
    by_canonical, left_out = _canonical_names(table, names, problems)
    found = tuple(_find_spelling(weight, by_canonical, problems) for weight in table.weights)
    used = {name for one in found for name in one.names}
    scales: dict[str, str] = {}
    for canonical, name in by_canonical.items():
        if name in used:
            continue
        scaled = [by_canonical.get(canonical.removesuffix(suffix)) for suffix in SCALES if canonical.endswith(suffix)]
        if weight_name := next((one for one in scaled if one in used), None):
            if weight_name in scales:
                problems.append(f"tensors {scales[weight_name]} and {name}: both are scales of {weight_name}")
            scales[weight_name] = name
        else:
            problems.append(f"tensor {name}: unexpected, the config implies no such weight")
    return Plan(found, scales, tuple(left_out)), problems


def _canonical_names(table: WeightTable, names: Iterable[str], problems: list[str]) -> tuple[dict[str, str], list[str]]:
    """The names as found by the names of the table, and the names of tensors that the family does not use."""
    by_canonical: dict[str, str] = {}
    left_out: list[str] = []
    for name in names:
        canonical = table.canonical(name)
        if canonical is None:
            left_out.append(name)
        elif canonical in by_canonical:
            problems.append(f"tensors {by_canonical[canonical]} and {name}: both are {canonical}")
        else:
            by_canonical[canonical] = name
    return by_canonical, left_out


def _find_spelling(weight: Weight, by_canonical: Mapping[str, str], problems: list[str]) -> Found:
    """The one complete spelling of a parameter; otherwise the most complete one, and a problem for every gap."""
    missing = [[name for name in source.names if name not in by_canonical] for source in weight.sources]
    complete = [source for source, gaps in zip(weight.sources, missing, strict=True) if not gaps]
    if len(complete) > 1:
        problems.append(f"tensors {complete[0].names[0]} and {complete[1].names[0]}: two spellings of {weight.path}")
    shares = [len(gaps) / len(source.names) for source, gaps in zip(weight.sources, missing, strict=True)]
    best = shares.index(min(shares))
    source = weight.sources[best]
    problems += [f"tensor {name}: missing, it is part of {weight.path}" for name in missing[best]]
    return Found(weight, source, tuple(by_canonical[name] for name in source.names if name in by_canonical))


def cut_as_stored(plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """The plan with joined tensors cut where a checkpoint, which stores tensors of these shapes, cuts them."""
    return replace(plan, found=tuple(_cut_as_stored(found, shapes) for found in plan.found))


def _cut_as_stored(found: Found, shapes: Mapping[str, tuple[int, ...]]) -> Found:
    usual = found.source.joined
    lengths = tuple(shapes[name][0] for name in found.names if shapes[name])
    if not usual or len(lengths) != len(usual) or sum(lengths) != sum(usual):
        return found
    return replace(found, source=replace(found.source, joined=lengths))


def entry_problems(plan: Plan, entries: Mapping[str, Leaf], leaves: Mapping[str, Leaf]) -> list[str]:
    """Tensors whose stored shape is not what the config implies, or whose stored dtype cannot be loaded."""
    problems = []
    for found in plan.found:
        if len(found.names) < len(found.source.joined):
            continue  # where the others were cut is unknown, and a missing tensor is a problem already
        for index, name in enumerate(found.names):
            wanted = found.source.tensor_shape(leaves[found.weight.path].shape, index)
            entry, scale = entries[name], plan.scales.get(name)
            if entry.shape != wanted:
                problems.append(f"tensor {name}: wanted shape {wanted}, got {entry.shape}")
            if entry.dtype not in (EIGHT_BITS if scale else FLOATS):
                some = "bfloat16, float16, float32, or float8_e4m3fn or int8 with scales"
                kind = "int8 or float8_e4m3fn, since it has scales" if scale else some
                problems.append(f"tensor {name}: wanted {kind}, got {entry.dtype}")
            problems += _scale_problems(scale, entries[scale], wanted) if scale else []
    return problems


def _scale_problems(name: str, entry: Leaf, wanted: tuple[int, ...]) -> list[str]:
    """What is wrong with the scales of a weight of the wanted shape, as far as their header tells."""
    problems = []
    if not (is_row_scale(entry.shape, wanted) or entry.shape == block_scale_shape(wanted)):
        problems.append(
            f"tensor {name}: wanted one scale per row of {wanted}, got {entry.shape}; nor are these the "
            f"{block_scale_shape(wanted)} scales of blocks of {BLOCK} x {BLOCK}"
        )
    if entry.dtype not in FLOATS:
        problems.append(f"tensor {name}: wanted scales in bfloat16, float16 or float32, got {entry.dtype}")
    return problems


def is_row_scale(shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether scales of a shape are one for each row of a weight `[..., out, in]`, or one for all."""
    return shape in (weight[:-1], (*weight[:-1], 1), (), (1,))


def block_scale_shape(weight: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one scale for each block of a weight `[..., out, in]`."""
    return (*weight[:-2], *(-(-length // BLOCK) for length in weight[-2:]))


# -------------------------------------------------------------------------------------------------------------- numbers


def fill(parameter: np.ndarray, source: Source, tensors: Iterable[np.ndarray]) -> None:
    """Store published tensors, in the order of `source.names`, into a parameter, converting to its dtype.

    As `source.assemble`, but without a second copy of all tensors, except where joined tensors are dealt out.
    """
    if source.joined and source.dealt:
        parameter[...] = source.assemble([tensor.copy() for tensor in tensors], parameter.shape)
        return
    for index, tensor in zip(range(len(source.names)), tensors, strict=True):
        view, each = _part(parameter, source, index)
        view[...] = each.assemble([tensor], view.shape)


def pick(parameter: np.ndarray, source: Source, index: int) -> np.ndarray:
    """The published tensor number `index` of a parameter: the inverse of `fill`, and its exception."""
    if source.joined and source.dealt:
        return source.split(parameter)[index]
    view, each = _part(parameter, source, index)
    return each.split(view)[0]


def _part(parameter: np.ndarray, source: Source, index: int) -> tuple[np.ndarray, Source]:
    """A view of the part of a parameter that one tensor is, and the spelling of that part."""
    return (_joined if source.joined else _stacked)(parameter, source, index)


def _joined(parameter: np.ndarray, source: Source, index: int) -> tuple[np.ndarray, Source]:
    left, right = (side.split() for side in source.pattern.split("->"))
    start, axis = sum(source.joined[:index]), right.index(left[0])
    view = np.moveaxis(np.moveaxis(parameter, axis, 0)[start : start + source.joined[index]], 0, axis)
    return view, Source(("",), source.pattern)


def _stacked(parameter: np.ndarray, source: Source, index: int) -> tuple[np.ndarray, Source]:
    left, right = (side.split() for side in source.pattern.split("->"))
    grid, rest = left[: len(source.grid)], left[len(source.grid) :]
    axes = [right.index(letter) for letter in grid]
    pattern = f"{' '.join(rest)} -> {' '.join(letter for letter in right if letter not in grid)}"
    each = Source(("",), pattern, dealt=source.dealt)
    place: tuple[Any, ...] = np.unravel_index(index, source.grid) if source.grid else ()
    return np.moveaxis(parameter, axes, range(len(axes)))[(*place, ...)], each
