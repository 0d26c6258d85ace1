"""Divides a model among the devices of a mesh: the one table from logical axes to mesh axes, and what follows from it.

A mesh has three axes. "model" and "expert" divide a model together, but heads divide over "model" alone and are
repeated over "expert": so more devices can share a model than its heads allow. "data" counts devices that hold the
same. A logical axis divides where its mesh axes divide every length of that name in the model; where they do not, the
table says whether every device keeps the whole of it, which `Layout.whole` tells, or the wish is refused. Activations
and the step's inputs are whole on every device. Nothing here needs arrays or devices that exist: abstract states and
devices of a topology do as well.

Weights and pools of an operation divide alike, and it runs on each device for its own heads (`jax.shard_map`): no
operation communicates. A sum over heads, inner channels or experts is one all-reduce. See docs/sharding.md.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Format
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float

from hybrid_jax.formats import is_stated, pool_format, weight_format, weight_formats
from hybrid_jax.programs import DeviceMemory
from kernels_pallas.op import CONSTANT, ArraySpec, Cache, KVSpec, Memory, Op
from models.decoder import Decoder
from models.division import Summand
from models.layers import Axes

DATA, EXPERT, MODEL = "data", "expert", "model"  # axes of the mesh
HEADS, ALL = (MODEL,), (EXPERT, MODEL)  # what divides heads, and what divides the rest


@dataclass(frozen=True)
class Rule:
    """Which mesh axes divide a logical axis; `needed`: whether the wish is refused if they cannot."""

    mesh_axes: tuple[str, ...] = ()
    needed: bool = False


TABLE: Mapping[str, Rule] = {
    "model": Rule(),  # the residual stream
    "vocabulary": Rule(ALL),
    "heads": Rule(HEADS, needed=True),
    "kv_heads": Rule(HEADS),  # of projections; fewer heads than devices: every device projects all
    "kept_heads": Rule(HEADS),  # of pages: `Layout.key_heads` repeats heads until they divide
    "delta_heads": Rule(HEADS, needed=True),  # of keys, each with the values that read it
    "linear_heads": Rule(HEADS, needed=True),
    "norm_groups": Rule(HEADS, needed=True),  # of the output norm, which needs all channels of a group
    "state_groups": Rule(HEADS),  # many families have one or two groups, whose heads all need B and C
    "convolution_channels": Rule(HEADS),
    "mlp": Rule(ALL, needed=True),
    "expert": Rule(ALL, needed=True),
    "expert_mlp": Rule(),  # whole experts lie on a device: their inner width is small
}


def planned_mesh(tensor_parallel: int, expert_parallel: int = 1) -> AbstractMesh:
    """A mesh of so many devices that need not exist, for sizes and shardings."""
    return AbstractMesh((1, expert_parallel, tensor_parallel), (DATA, EXPERT, MODEL))


def make_mesh(devices: Sequence[Any], tensor_parallel: int, expert_parallel: int = 1) -> Mesh:
    """A mesh of devices, real ones or those of a topology; `tensor_parallel` neighbours divide the heads of a model.

    Raises ValueError where the devices do not fall into groups of so many.
    """
    parts = tensor_parallel * expert_parallel
    if parts < 1 or len(devices) % parts or not devices:
        raise ValueError(
            f"wanted a multiple of tensor_parallel * expert_parallel = {parts} devices, got {len(devices)}: "
            f"set tensor_parallel to {_choices(_divisors(max(len(devices), 1)))}, expert_parallel to 1"
        )
    return Mesh(np.asarray(devices, object).reshape(-1, expert_parallel, tensor_parallel), (DATA, EXPERT, MODEL))


def best_split(model: Decoder, devices: int) -> tuple[int, int]:
    """The greatest `tensor_parallel` for so many devices that the heads of a model allow, and `expert_parallel`."""
    lengths = _lengths(model)
    heads = math.gcd(*(n for name, counts in lengths.items() if _needs(name, HEADS) for n in counts))
    tensor_parallel = math.gcd(heads, devices)
    return tensor_parallel, devices // tensor_parallel


class Placement(Protocol):
    """Where a model and its memory lie. `whole` says, a line each, what every device has whole though it may divide."""

    @property
    def whole(self) -> tuple[str, ...]:
        """The lines."""

    @property
    def everywhere(self) -> Sharding:
        """Of what every device has whole."""

    def weights(self, state: nnx.State) -> nnx.State:
        """The sharding of every weight of a state, which may be abstract, in place of its value."""

    def memory(self, specs: tuple[Memory, ...]) -> DeviceMemory:
        """The formats of the pools, and the sharding of all else that stays on the devices from step to step."""

    def put(self, variable: nnx.Variable, value: np.ndarray) -> jax.Array:
        """A weight on the devices: the `put` of `checkpoint.load`."""

    def allocate(self, make: Callable[[], DeviceMemory], specs: tuple[Memory, ...]) -> DeviceMemory:
        """What `make` makes, on the devices."""

    def program(self, function: Callable[..., Any], model: Decoder, inputs: int, keep_unused: bool = False) -> Any:
        """A function of weights, memory (donated) and `inputs` more, which gives memory and more, under `jax.jit`.

        keep_unused: whether the program takes arguments that it does not read.
        """


@dataclass(frozen=True)
class OneDevice:
    """All on one device, which is the default device unless nothing but abstract arrays is placed."""

    device: Any = field(default_factory=lambda: jax.devices()[0])
    whole: tuple[str, ...] = ()

    @property
    def everywhere(self) -> Sharding:
        """The device."""
        return SingleDeviceSharding(self.device)

    def weights(self, state: nnx.State) -> nnx.State:
        """The device, with the order of axes where that is stated, in place of the value of every weight."""
        return weight_formats(state, lambda axes: self.everywhere)

    def memory(self, specs: tuple[Memory, ...]) -> DeviceMemory:
        """The device, and the formats of the pools on it."""
        pools = tuple(
            tuple(pool_format(self.everywhere, len(_pool_axes(spec, array))) for array in spec.arrays) for spec in specs
        )
        return DeviceMemory(Cache(specs, pools), self.everywhere, self.everywhere)  # type: ignore[arg-type]

    def put(self, variable: nnx.Variable, value: np.ndarray) -> jax.Array:
        """A weight on the device."""
        stated = is_stated(self.device)
        return jax.device_put(value, weight_format(self.everywhere, _axes(variable)) if stated else None)

    def allocate(self, make: Callable[[], DeviceMemory], specs: tuple[Memory, ...]) -> DeviceMemory:
        """What `make` makes."""
        return jax.jit(make, out_shardings=self.memory(specs))() if is_stated(self.device) else make()

    def program(self, function: Callable[..., Any], model: Decoder, inputs: int, keep_unused: bool = False) -> Any:
        """The function under `jax.jit`."""
        memory = self.memory(model.specs) if is_stated(self.device) else None
        given = (None, memory, *(None,) * inputs)
        return jax.jit(
            function, donate_argnums=(1,), keep_unused=keep_unused, in_shardings=given, out_shardings=(memory, None)
        )


@dataclass(frozen=True)
class Layout:
    """How one model lies on a mesh, and its `Division`. Made by `divide`.

    `divided` are the logical axes that divide. `whole` says, a line each, which could not and are whole on each device.
    """

    mesh: Mesh | AbstractMesh
    divided: frozenset[str]
    whole: tuple[str, ...]

    @property
    def parts(self) -> int:
        """Devices that divide the model."""
        return _count(self.mesh, ALL)

    @property
    def head_parts(self) -> int:
        """Devices that divide its heads."""
        return _count(self.mesh, HEADS)

    @property
    def everywhere(self) -> NamedSharding:
        """Of what every device has whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    # ------------------------------------------------------------------------------------------------------ shardings

    def spec(self, axes: Axes) -> PartitionSpec:
        """How an array with these logical axes divides."""
        return PartitionSpec(*(TABLE[axis].mesh_axes if axis in self.divided else None for axis in axes))

    def sharding(self, axes: Axes) -> NamedSharding:
        """As `spec`, on the mesh."""
        return NamedSharding(self.mesh, self.spec(axes))

    def local_shape(self, axes: Axes, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of one device's share of an array; () names no axes."""
        named = axes or (None,) * len(shape)
        return tuple(
            length // _count(self.mesh, TABLE[axis].mesh_axes) if axis in self.divided else length
            for axis, length in zip(named, shape, strict=True)
        )

    def weights(self, state: nnx.State) -> nnx.State:
        """The sharding or format of every weight of a state, which may be abstract, in place of its value."""
        return weight_formats(state, self.sharding)

    def pools(self, specs: Sequence[Memory]) -> tuple[tuple[Sharding | Format, ...], ...]:
        """The formats of the pools `[L, P, S, w]` and `[L, N, ...]` of a cache."""

        def lying(axes: Axes) -> Sharding | Format:
            return pool_format(self.sharding(axes), len(axes))

        return tuple(tuple(lying(_pool_axes(spec, array)) for array in spec.arrays) for spec in specs)

    def put(self, variable: nnx.Variable, value: np.ndarray) -> jax.Array:
        """A weight on the devices, each with its share only: the `put` of `checkpoint.load`."""
        axes = _axes(variable)
        place = weight_format(self.sharding(axes), axes)
        return jax.make_array_from_callback(value.shape, place, lambda index: value[index])

    def memory(self, specs: tuple[Memory, ...]) -> DeviceMemory:
        """The shardings of all that stays on the devices from step to step, and the formats of its pools."""
        return DeviceMemory(Cache(specs, self.pools(specs)), self.everywhere, self.everywhere)  # type: ignore[arg-type]

    def allocate(self, make: Callable[[], DeviceMemory], specs: tuple[Memory, ...]) -> DeviceMemory:
        """What `make` makes, each device its share only."""
        return jax.jit(make, out_shardings=self.memory(specs))()

    def program(self, function: Callable[..., Any], model: Decoder, inputs: int, keep_unused: bool = False) -> Any:
        """A function of weights, memory (donated) and `inputs` more, which gives memory and more, under `jax.jit`."""
        memory = self.memory(model.specs)
        given, made = (self.weights(nnx.state(model)), memory, *(self.everywhere,) * inputs), (memory, self.everywhere)
        return jax.jit(function, donate_argnums=(1,), keep_unused=keep_unused, in_shardings=given, out_shardings=made)

    # ------------------------------------------------------------------------------------------------------- division

    def op(self, op: Op, backend: str, options: Mapping[str, Any]) -> Callable[..., Any]:
        """The function of a backend on every device, for its own heads."""
        shares = op.shares
        divides = shares.axis in self.divided
        counts = {name: options[name] // self.head_parts for name in shares.counts if divides}
        function = partial(op.on(backend), **{**options, **counts})

        def call(*arguments: Any) -> Any:
            given = list(zip(arguments, shares.arguments, strict=True))
            arrays = tuple(argument for argument, share in given if share != CONSTANT)

            def run(*arrays: Any) -> Any:
                left = iter(arrays)
                return function(*(argument if share == CONSTANT else next(left) for argument, share in given))

            inputs = tuple(_argument_spec(argument, share, divides) for argument, share in given if share != CONSTANT)
            outputs = tuple(_dimension_spec(share, divides) for share in shares.results)
            return jax.shard_map(run, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)(*arrays)

        return call

    def key_heads(self, heads: int) -> int:
        """Heads of keys and values that pages keep: each as often as makes them divide."""
        return math.lcm(heads, self.head_parts)

    def array_bytes(self, array: ArraySpec) -> int:
        """Bytes of one device's share of a memory for one token or request, its heads repeated as `key_heads` says."""
        named = zip(array.axes or (None,) * len(array.shape), array.shape, strict=True)
        kept = [self.key_heads(length) if axis == "kept_heads" else length for axis, length in named]
        return math.prod(self.local_shape(array.axes, kept)) * jnp.dtype(array.dtype).itemsize

    def total(self, summand: Summand, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The sum of what all devices add, each with its own experts and inner channels."""
        if "expert" not in self.divided:
            return summand.whole(x)
        graph, state = nnx.split(summand)
        specs = jax.tree.map(
            lambda leaf: self.spec(_axes(leaf)), state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
        )

        def run(state: nnx.State, x: Array) -> Array:
            part = jax.lax.axis_index(ALL)
            return jax.lax.psum(nnx.merge(graph, state).partial(x, part), ALL)

        everywhere = PartitionSpec()
        return jax.shard_map(
            run, mesh=self.mesh, in_specs=(specs, everywhere), out_specs=everywhere, check_vma=False
        )(state, x)  # fmt: skip

    def gathered(self, logits: Float[Array, "B Y"]) -> Float[Array, "B Y"]:
        """The logits of the whole vocabulary on every device.

        The first constraint says that the products divide: without it the compiler may gather the head's weights.
        """
        logits = jax.lax.with_sharding_constraint(logits, self.sharding((None, "vocabulary")))
        return jax.lax.with_sharding_constraint(logits, self.everywhere)


def divide(model: Decoder, mesh: Mesh) -> Layout:
    """Lay a model, which may be abstract, out on a mesh and bind the layout to its layers, once and for all.

    Raises ValueError where something that must divide does not, with the numbers that would do.
    """
    layout = lay_out(model, mesh)
    model.divide(layout)
    return layout


def lay_out(model: Decoder, mesh: Mesh | AbstractMesh) -> Layout:
    """How a model would lie on a mesh; the model stays as it is. Raises ValueError as `divide`, for its weights."""
    lengths = _lengths(model)
    parts = {name: _count(mesh, TABLE[name].mesh_axes) for name in lengths}
    wanted = {name for name in lengths if TABLE[name].mesh_axes}
    fits = {name for name in wanted if not any(length % parts[name] for length in lengths[name])}
    needed = {name: lengths[name] for name in sorted(wanted) if TABLE[name].needed}
    if needed.keys() - fits:
        raise ValueError(_refusal(mesh, needed, needed.keys() - fits))
    whole = tuple(
        f"{name}: all {min(lengths[name])} are whole on each of {parts[name]} devices, they do not divide"
        for name in sorted(wanted - fits)
    )
    return Layout(mesh, frozenset(wanted & fits | {"kept_heads"}), whole)


def _refusal(mesh: Mesh | AbstractMesh, needed: Mapping[str, Iterable[int]], refused: Collection[str]) -> str:
    """What must divide and does not, and what `tensor_parallel` and all devices together may be."""
    listed = " and ".join(f"{min(needed[name])} {name}" for name in sorted(refused))
    every = math.gcd(*(length for counts in needed.values() for length in counts))
    rest = math.gcd(*(length for name, counts in needed.items() if _needs(name, ALL) for length in counts))
    got = f"tensor_parallel {mesh.shape[MODEL]}, expert_parallel {mesh.shape[EXPERT]}"
    return (
        f"wanted {listed} to divide evenly over the devices of a model, got {got}: set tensor_parallel to "
        f"{_choices(_divisors(every))}, and with it expert_parallel for up to {rest} devices in all"
    )


def _needs(name: str, mesh_axes: tuple[str, ...]) -> bool:
    return TABLE[name].needed and TABLE[name].mesh_axes == mesh_axes


def _count(mesh: Mesh | AbstractMesh, mesh_axes: Iterable[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in mesh_axes)


def place_model(model: Decoder, tensor_parallel: int, expert_parallel: int = 1) -> OneDevice | Layout:
    """Where a model, which may be abstract, lies: on one device, or divided among the first so many of all processes.

    Raises ValueError as `divide`, and where there are fewer devices, or a process would have none.
    """
    devices, parts = jax.devices(), tensor_parallel * expert_parallel
    wanted = f"wanted {parts} devices (tensor_parallel {tensor_parallel}, expert_parallel {expert_parallel})"
    if parts > len(devices):
        raise ValueError(f"{wanted}, got {len(devices)}: set fewer")
    chosen = devices[:parts]
    if len({device.process_index for device in chosen}) < jax.process_count():
        raise ValueError(f"{wanted}, some of each of {jax.process_count()} processes: set all {len(devices)} devices")
    return OneDevice() if parts == 1 else divide(model, make_mesh(chosen, tensor_parallel, expert_parallel))


def _lengths(model: Decoder) -> dict[str, set[int]]:
    """The lengths of each logical axis in a model's weights. Raises KeyError for one that the table lacks."""
    lengths: dict[str, set[int]] = {}
    for _, leaf in nnx.to_flat_state(nnx.state(model)):
        for name, length in zip(_axes(leaf), leaf.shape, strict=True):
            if name is not None:
                lengths.setdefault(name, set()).add(length)
    return lengths


def _pool_axes(spec: Memory, array: ArraySpec) -> Axes:
    """The logical axes of a pool, None for layers, pages or slots, tokens, and for what has no name."""
    axes = array.axes or (None,) * len(array.shape)
    return (None,) * 3 + axes[:1] if type(spec) is KVSpec else (None,) * 2 + axes  # a row of a page is one axis


def _axes(leaf: nnx.Variable) -> Axes:
    return leaf.get_metadata("axes")


def _dimension_spec(dimension: int | None, divides: bool) -> PartitionSpec:
    return PartitionSpec(*(None,) * dimension, MODEL) if divides and dimension is not None else PartitionSpec()


def _argument_spec(argument: Any, share: int | tuple[int | None, ...] | None, divides: bool) -> Any:
    """The spec of an argument; of a dataclass of arrays one for each of its fields, where it is there."""
    match share:
        case tuple():
            values = zip(dataclasses.fields(argument), share, strict=True)
            return type(argument)(**{field.name: _dimension_spec(each, divides) for field, each in values})
        case _:
            return _dimension_spec(share, divides)


def _divisors(count: int) -> list[int]:
    return [number for number in range(1, count + 1) if count % number == 0]


def _choices(numbers: Sequence[int]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, numbers[:-1])), str(numbers[-1]))))
