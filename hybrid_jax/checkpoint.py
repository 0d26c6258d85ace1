"""Parameters from a checkpoint, whatever its form: a published directory of safetensors files or an Orbax directory.

A checkpoint must hold exactly what its config asks for: missing, unexpected or doubly published tensors are errors, as
are shapes that the config does not imply. Parameters are loaded one at a time (from Orbax a few at a time): assembled
on the host in the dtype that the model wants, then handed to the device. A parameter of eight bits has scales beside
it, under its path with `_scale` behind it. This module knows no family and no mesh.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from flax import nnx

from hybrid_jax import orbax_tree
from hybrid_jax.hf_directory import CONFIG, HFCheckpoint, check_quantization, open_hf, raise_problems, read_config
from hybrid_jax.orbax_directory import PARAMETERS, OrbaxCheckpoint, is_orbax, open_orbax
from hybrid_jax.orbax_tree import Leaf
from hybrid_jax.quantisation import can_spread, check_scale, round_weights, spread, widen
from hybrid_jax.spelling import EIGHT_BITS, FLOATS, Found, Plan, cut_as_stored, entry_problems, fill, match, pick
from models.quantised import SUFFIX
from models.registry import find_family
from models.weights import WeightTable

Put = Callable[[nnx.Variable, np.ndarray], jax.Array]

GROUP_FLOOR_BYTES = 16 << 20  # small parameters are read and written together


# ------------------------------------------------------------------------------------------ a model without its numbers


@dataclass(frozen=True)
class Outline:
    """What a config asks a checkpoint for: the family, its table, and shape and run-time dtype of every parameter.

    `total` counts the numbers that published totals count, which leave some learned corrections out.
    """

    family: ModuleType
    table: WeightTable
    leaves: Mapping[str, Leaf]
    total: int


def make_outline(hf: dict[str, Any]) -> Outline:
    """The outline of the model that a published config describes. Raises ValueError for a config that is not known."""
    check_quantization(hf)
    family = find_family(hf)
    config = family.Config.from_hf(hf)
    model = nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0), dtype="bfloat16", backend="xla"))
    table, leaves = family.weight_table(config), read_state(nnx.state(model))
    check_table(table, leaves)
    total = sum(math.prod(leaf.shape) for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)))
    return Outline(family, table, leaves, total)


def read_state(state: nnx.State) -> dict[str, Leaf]:
    """Shape and dtype of every parameter of a state, by dotted path."""
    return {_dotted(keys): Leaf(tuple(leaf.shape), np.dtype(leaf.dtype)) for keys, leaf in nnx.to_flat_state(state)}


def check_table(table: WeightTable, leaves: Iterable[str]) -> None:
    """Refuse a table that is not about exactly these parameters. Raises ValueError."""
    listed, wanted = Counter(weight.path for weight in table.weights), set(leaves)
    problems = [f"{path}: the weight table lacks this parameter" for path in sorted(wanted - set(listed))]
    problems += [f"{path}: the weight table has it, the model does not" for path in sorted(set(listed) - wanted)]
    problems += [f"{path}: the weight table has it {count} times" for path, count in listed.items() if count > 1]
    raise_problems("the weight table does not fit the model", problems)


def group_paths(leaves: Mapping[str, Leaf]) -> list[list[str]]:
    """Consecutive parameters in groups of no more bytes than the largest parameter (or a small floor)."""
    limit = max([GROUP_FLOOR_BYTES, *(leaf.size_bytes for leaf in leaves.values())])
    groups: list[list[str]] = []
    room = 0
    for path, leaf in leaves.items():
        if leaf.size_bytes > room or not groups:
            groups.append([])
            room = limit
        groups[-1].append(path)
        room -= leaf.size_bytes
    return groups


def _dotted(keys: Sequence[Any]) -> str:
    return ".".join(str(key) for key in keys)


# ------------------------------------------------------------------------------------------------------ loading, saving


def put_on_default_device(variable: nnx.Variable, value: np.ndarray) -> jax.Array:
    """The array on the default device."""
    return jax.device_put(value)


def load(path: Path, state: nnx.State, table: WeightTable, put: Put = put_on_default_device) -> nnx.State:
    """The state of a model with the numbers of a checkpoint.

    Args:
      path: a published directory or an Orbax directory, with its config.json. state: the abstract state of the model
        (`nnx.state(nnx.eval_shape(...))`), whose dtypes are the ones wanted. table: the family's. put: places one host
        array on the devices; it is given the abstract variable, which names the logical axes.
    Raises ValueError where the checkpoint is damaged or does not hold exactly the parameters of the state.
    """
    flat = {_dotted(keys): (keys, variable) for keys, variable in nnx.to_flat_state(state)}
    leaves = read_state(state)
    check_table(table, set(leaves) - {f"{path}{SUFFIX}" for path in leaves})
    check_quantization(read_config(path))
    read = _read_orbax(open_orbax(path), table, leaves) if is_orbax(path) else _read_hf(open_hf(path), table, leaves)
    loaded = []
    for name, value in read:
        keys, variable = flat[name]
        array = jax.block_until_ready(put(variable, value))  # one host copy at a time
        loaded.append((keys, variable.replace(array)))
    return nnx.from_flat_state(loaded)


def save(path: Path, hf: Mapping[str, Any], state: nnx.State) -> None:
    """Write a model trained here as a new Orbax directory with its config. Raises ValueError where the path exists."""
    if path.exists():
        raise ValueError(f"{path}: wanted a new directory, it exists")
    path.mkdir(parents=True)
    (path / CONFIG).write_text(json.dumps(hf, indent=2))
    orbax_tree.save(path / PARAMETERS, {_dotted(keys): leaf[...] for keys, leaf in nnx.to_flat_state(state)})


# ------------------------------------------------------------------------------------------------ a published directory


def header_leaves(checkpoint: HFCheckpoint) -> dict[str, Leaf]:
    """Shape and stored dtype of every tensor of a published checkpoint."""
    return {name: Leaf(checkpoint.shape(name), checkpoint.dtype(name)) for name in checkpoint.names}


def _read_hf(
    checkpoint: HFCheckpoint, table: WeightTable, leaves: Mapping[str, Leaf]
) -> Iterator[tuple[str, np.ndarray]]:
    plan = cut_as_stored(match(table, checkpoint.names), {name: checkpoint.shape(name) for name in checkpoint.names})
    raise_problems(str(checkpoint.directory), entry_problems(plan, header_leaves(checkpoint), leaves))
    scales = {name: partial(_read_scale, checkpoint.read, scale) for name, scale in plan.scales.items()}
    stored = {name: checkpoint.dtype(name) for name in checkpoint.names}
    for found in plan.found:
        path = found.weight.path
        leaf, wanted = leaves[path], _wanted_scale(found, leaves, scales, [stored[name] for name in found.names])
        if wanted is not None:
            yield path, _assemble(found, leaf, _read(checkpoint, found.names))
            yield f"{path}{SUFFIX}", _assemble_scale(found, leaf, wanted, scales)
        else:
            wide = leaf if f"{path}{SUFFIX}" not in leaves else replace(leaf, dtype=np.dtype(np.float32))
            parameter = _assemble(found, wide, _read_wide(_read(checkpoint, found.names), found.names, scales))
            yield from _given(path, parameter, leaves)


def _read(checkpoint: HFCheckpoint, names: Iterable[str]) -> Iterator[np.ndarray]:
    for name in names:
        yield checkpoint.read(name)
        checkpoint.release(name)


# ----------------------------------------------------------------------------------------------- weights of eight bits


ReadScale = Callable[[], np.ndarray]


def _read_scale(read: Callable[[str], np.ndarray], name: str) -> np.ndarray:
    return check_scale(name, read(name))


def _wanted_scale(
    found: Found, leaves: Mapping[str, Leaf], scales: Mapping[str, ReadScale], stored: Iterable[np.dtype]
) -> Leaf | None:
    """The scales of a parameter that is kept as stored; None for one that is wide, here or there, or cut otherwise."""
    path = found.weight.path
    leaf, scale = leaves[path], leaves.get(f"{path}{SUFFIX}")
    if scale is None or set(stored) != {leaf.dtype} or not set(found.names) <= set(scales):
        return None
    shapes = [found.source.tensor_shape(leaf.shape, index) for index in range(len(found.names))]
    groups = [found.source.tensor_shape(scale.shape, index)[-1] for index in range(len(found.names))]
    fits = (
        can_spread(scales[name]().shape, shape, count)
        for name, shape, count in zip(found.names, shapes, groups, strict=True)
    )
    return scale if all(fits) else None


def _assemble(found: Found, leaf: Leaf, tensors: Iterable[np.ndarray]) -> np.ndarray:
    parameter = np.empty(leaf.shape, leaf.dtype)
    fill(parameter, found.source, tensors)
    return parameter


def _assemble_scale(found: Found, leaf: Leaf, scale: Leaf, scales: Mapping[str, ReadScale]) -> np.ndarray:
    """The scales of a parameter, from those of its tensors."""
    source = found.source
    spreads = (
        spread(scales[name](), source.tensor_shape(leaf.shape, index), source.tensor_shape(scale.shape, index)[-1])
        for index, name in enumerate(found.names)
    )
    return _assemble(found, scale, spreads)


def _read_wide(
    tensors: Iterable[np.ndarray], names: Iterable[str], scales: Mapping[str, ReadScale]
) -> Iterator[np.ndarray]:
    """Tensors as they are stored, but those of eight bits times their scales, in float32."""
    for name, tensor in zip(names, tensors, strict=True):
        yield widen(tensor, scales[name]()) if name in scales else tensor


def _given(path: str, parameter: np.ndarray, leaves: Mapping[str, Leaf]) -> Iterator[tuple[str, np.ndarray]]:
    """A wide parameter in the dtype that the model wants, which may be one of eight bits."""
    leaf, scale = leaves[path], leaves.get(f"{path}{SUFFIX}")
    if scale is None:
        yield path, parameter.astype(leaf.dtype, copy=False)
        return
    values, factors = round_weights(path, parameter, leaf.dtype, scale.shape)
    yield path, values
    yield f"{path}{SUFFIX}", factors


# --------------------------------------------------------------------------------------------------- an Orbax directory


def orbax_plan(checkpoint: OrbaxCheckpoint, table: WeightTable) -> Plan:
    """The spelling that an Orbax directory records; where it records none, the usual one. Raises ValueError."""
    if checkpoint.published is not None:
        return cut_as_stored(match(table, checkpoint.published.names), checkpoint.published.shapes)
    usual = tuple(Found(weight, weight.sources[0], weight.sources[0].names) for weight in table.weights)
    return Plan(usual, {}, ())


def stored_problems(checkpoint: OrbaxCheckpoint, plan: Plan, leaves: Mapping[str, Leaf]) -> list[str]:
    """Where the parameters of an Orbax directory are not those of a model, or what it records is not what it holds."""
    stored = checkpoint.stored
    problems = [f"parameter {path}: missing" for path in sorted(set(leaves) - set(stored))]
    problems += [f"parameter {path}: unexpected, the config implies none" for path in sorted(set(stored) - set(leaves))]
    for path in sorted(set(stored) & set(leaves)):
        if stored[path].shape != leaves[path].shape:
            problems.append(f"parameter {path}: wanted shape {leaves[path].shape}, got {stored[path].shape}")
        if stored[path].dtype not in (*FLOATS, *(EIGHT_BITS if plan.scales else ())):
            problems.append(
                f"parameter {path}: wanted a float, or float8_e4m3fn or int8 with scales, got {stored[path].dtype}"
            )
    problems += [f"tensor {name}: missing beside the Orbax checkpoint" for name in checkpoint.missing(plan.kept)]
    return problems


def _read_orbax(
    checkpoint: OrbaxCheckpoint, table: WeightTable, leaves: Mapping[str, Leaf]
) -> Iterator[tuple[str, np.ndarray]]:
    plan = orbax_plan(checkpoint, table)
    asked = {found.weight.path: leaves[found.weight.path] for found in plan.found}
    raise_problems(str(checkpoint.directory), stored_problems(checkpoint, plan, asked))
    scales = {name: partial(_read_scale, checkpoint.read_other, scale) for name, scale in plan.scales.items()}
    by_path = {one.weight.path: one for one in plan.found}
    for group in group_paths({path: checkpoint.stored[path] for path in by_path}):
        stored = {path: checkpoint.stored[path] for path in group}
        for path, value in orbax_tree.read(checkpoint.parameters, stored).items():
            found, wanted = by_path[path], _wanted_scale(by_path[path], leaves, scales, [value.dtype])
            if wanted is not None:
                yield path, value
                yield f"{path}{SUFFIX}", _assemble_scale(found, leaves[path], wanted, scales)
            else:
                yield from _given(path, _widen_parameter(value, found, scales), leaves)


def _widen_parameter(value: np.ndarray, found: Found, scales: Mapping[str, ReadScale]) -> np.ndarray:
    """A parameter as it is stored, but one of eight bits times its scales, in float32."""
    if value.dtype not in EIGHT_BITS:
        return value
    tensors = (pick(value, found.source, index) for index in range(len(found.names)))
    return _assemble(found, Leaf(value.shape, np.dtype(np.float32)), _read_wide(tensors, found.names, scales))
