"""Weights of eight bits with float32 scales: what they are, the products that read them, and who has them.

A weight is `values * scale`. A format says how many input channels share a scale: all of them (one scale for each
output channel), or a group. `values` is as the kernel that it stands for; `scale` has its shape too, but for the last
input axis, which counts groups, and the other input axes, which are 1 where all input channels share a scale.
Activations stay as they are. Products widen the values where they multiply: nothing here makes a wide copy of a weight
if the compiler can fuse the two. Knows no checkpoint and no mesh.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.layers import Axes, Linear
from models.moe import Experts
from models.quantised_experts import Kernels, all_experts, some_experts
from models.squared_relu import SquaredReLUExperts, squared_relu

EightBits = Literal["fp8", "int8"]
DTYPES: Mapping[EightBits, Any] = {"fp8": jnp.float8_e4m3fn, "int8": jnp.int8}
BLOCK = 128  # input channels, and output channels, that share a scale of a checkpoint in blocks
LEAST_GROUP = 8  # input channels: with fewer to a scale the scales would weigh half as much as the weights
FEW_ROWS = 256  # of a product that is bound by reading its weights
SUFFIX = "_scale"  # behind the name of a weight: its scales
# Small products that decide what a state forgets and takes in, and one whose kernel an operation reads itself.
WIDE = frozenset({"gates", "update_gate", "decay_gate", "expansion"})


@dataclass(frozen=True)
class Format:
    """How weights are stored. `block`: whether scales are those of blocks of 128 x 128 instead of output channels."""

    name: EightBits
    block: bool = False

    def __str__(self) -> str:
        return f"{self.name} with a scale for each {f'block of {BLOCK} x {BLOCK}' if self.block else 'output channel'}"

    def scale_shape(self, shape: tuple[int, ...], first: int, last: int) -> tuple[int, ...]:
        """The shape of the scales of a kernel whose axes `first` to `last` - 1 are its inputs.

        Raises ValueError where blocks cut the last of these into groups that are too small.
        """
        if not self.block:
            return (*shape[:first], *(1,) * (last - first), *shape[last:])
        group = math.gcd(BLOCK, shape[last - 1])
        if group < LEAST_GROUP:
            raise ValueError(
                f"wanted input channels in multiples of {LEAST_GROUP} for scales of blocks, got {shape[last - 1]} in "
                f"{shape}: convert this checkpoint to scales for each output channel"
            )
        return (*shape[: last - 1], shape[last - 1] // group, *shape[last:])


class Scale(nnx.Variable):
    """The float32 scales of a weight; no part of published totals."""


def quantised_pair(kernel: nnx.Param, form: Format, first: int, last: int) -> tuple[nnx.Param, Scale]:
    """Abstract values and scales that stand for an abstract kernel, with its logical axes."""
    axes: Axes = kernel.get_metadata("axes")
    shape = form.scale_shape(kernel.shape, first, last)
    kept = (
        axis if length == shape[at] else None for at, (axis, length) in enumerate(zip(axes, kernel.shape, strict=True))
    )
    scale_axes = axes if form.block else tuple(kept)
    values = jax.ShapeDtypeStruct(kernel.shape, DTYPES[form.name])
    return nnx.Param(values, axes=axes), Scale(jax.ShapeDtypeStruct(shape, jnp.float32), axes=scale_axes)


# ------------------------------------------------------------------------------------------------------------- products


def channel_product(x: Array, values: Array, scale: Float[Array, "*o"], inputs: int) -> Array:
    """`x W` over the last `inputs` axes of `x` with a scale for each output channel, which multiplies the result."""
    contracted = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))
    y = jax.lax.dot_general(x, values.astype(x.dtype), (contracted, ((), ())))
    scale = scale.reshape((1,) * (x.ndim - inputs) + scale.shape)
    return (y.astype(jnp.float32) * scale).astype(x.dtype)


def group_product(x: Array, values: Array, scale: Array, inputs: int) -> Array:
    """`x W` over the last `inputs` axes of `x` with a scale for each group of input channels of an output channel.

    The weight is widened as it is read. For few rows the groups stay an axis of the product, for many they do not:
    each is how the TPU compiler fuses the two.
    """
    groups = scale.shape[inputs - 1]
    split = (*values.shape[: inputs - 1], groups, values.shape[inputs - 1] // groups)
    wide = values.reshape(*split, *values.shape[inputs:]).astype(jnp.float32) * jnp.expand_dims(scale, inputs)
    wide = wide.astype(x.dtype)
    if math.prod(x.shape[:-inputs]) > FEW_ROWS:
        wide = wide.reshape(values.shape)
    else:
        x, inputs = x.reshape(*x.shape[:-1], *split[-2:]), inputs + 1
    contracted = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))
    return jax.lax.dot_general(x, wide, (contracted, ((), ())))


# ---------------------------------------------------------------------------------------------- modules that have them


class QuantisedLinear(nnx.Module):
    """`Linear` with a kernel of eight bits."""

    def __init__(self, linear: Linear, form: Format):
        self.kernel, self.kernel_scale = quantised_pair(linear.kernel, form, 0, linear.inputs)
        self.inputs = linear.inputs
        self.format = form

    def __call__(self, x: Float[Array, "T *i"]) -> Float[Array, "T *o"]:
        kernel, scale = self.kernel[...], self.kernel_scale[...]
        if self.format.block:
            return group_product(x, kernel, scale, self.inputs)
        return channel_product(x, kernel, scale.reshape(scale.shape[self.inputs :]), self.inputs)


class QuantisedExperts(nnx.Module):
    """`Experts` with kernels of eight bits."""

    def __init__(self, experts: Experts, form: Format):
        self.gate_up, self.gate_up_scale = quantised_pair(experts.gate_up, form, 1, 2)
        self.down, self.down_scale = quantised_pair(experts.down, form, 1, 2)
        self.activate = experts.activate
        self.format = form

    def __call__(self, x: Float[Array, "T D"], experts: Array, weights: Array) -> Float[Array, "T D"]:
        return all_experts(x, experts, weights, *self._kernels(), self.activate)

    def partial(self, x: Float[Array, "T D"], experts: Array, weights: Array, part: Array) -> Float[Array, "T D"]:
        """What share number `part` of the experts adds."""
        return some_experts(x, experts, weights, *self._kernels(), self.activate, part)

    def _kernels(self) -> tuple[Kernels, Kernels]:
        gate_up, down = (
            Kernels(self.gate_up[...], self.gate_up_scale[...]),
            Kernels(self.down[...], self.down_scale[...]),
        )
        return gate_up, down


class QuantisedSquaredReLUExperts(nnx.Module):
    """`SquaredReLUExperts` with kernels of eight bits."""

    def __init__(self, experts: SquaredReLUExperts, form: Format):
        self.up, self.up_scale = quantised_pair(experts.up, form, 1, 2)
        self.down, self.down_scale = quantised_pair(experts.down, form, 1, 2)
        self.format = form

    def __call__(self, x: Float[Array, "T D"], experts: Array, weights: Array) -> Float[Array, "T D"]:
        return all_experts(x, experts, weights, *self._kernels(), squared_relu)

    def partial(self, x: Float[Array, "T D"], experts: Array, weights: Array, part: Array) -> Float[Array, "T D"]:
        """What share number `part` of the experts adds."""
        return some_experts(x, experts, weights, *self._kernels(), squared_relu, part)

    def _kernels(self) -> tuple[Kernels, Kernels]:
        return Kernels(self.up[...], self.up_scale[...]), Kernels(self.down[...], self.down_scale[...])


# -------------------------------------------------------------------------------------------------------------- a model


@dataclass(frozen=True)
class Substitute:
    """What stands for modules of one class: its quantised class, and the names of the kernels that it quantises."""

    make: Callable[[Any, Format], nnx.Module]
    kernels: tuple[str, ...]


SUBSTITUTES: Mapping[type, Substitute] = {
    Linear: Substitute(QuantisedLinear, ("kernel",)),
    Experts: Substitute(QuantisedExperts, ("gate_up", "down")),
    SquaredReLUExperts: Substitute(QuantisedSquaredReLUExperts, ("up", "down")),
}


@dataclass(frozen=True)
class Site:
    """A module that may be quantised: who holds it under which name, and the paths of its kernels."""

    holder: nnx.Module
    name: str
    substitute: Substitute
    paths: tuple[str, ...]


def find_sites(model: nnx.Module) -> Iterator[Site]:
    """Every module of a model that may be quantised: products of layers and of the draft, and experts.

    Embedding, head, norms, routers, convolutions and the gates of a state stay as they are.
    """
    for place, holder in nnx.iter_modules(model):
        for name, child in vars(holder).items():
            substitute = SUBSTITUTES.get(type(child))
            if substitute is not None and not WIDE & {*place, name}:
                path = ".".join(map(str, (*place, name)))
                yield Site(holder, name, substitute, tuple(f"{path}.{kernel}" for kernel in substitute.kernels))


def quantisable_paths(model: nnx.Module) -> tuple[str, ...]:
    """The paths of all kernels that may be quantised."""
    return tuple(path for site in find_sites(model) for path in site.paths)


def quantise(model: nnx.Module, formats: Mapping[str, Format]) -> None:
    """Give an abstract model weights of eight bits, by the paths of their kernels; those without a format stay.

    A module whose kernels have not all the same format stays too. Raises ValueError as `Format.scale_shape`.
    """
    for site in list(find_sites(model)):
        found = {formats.get(path) for path in site.paths}
        form = found.pop()
        if form is not None and not found:
            setattr(site.holder, site.name, site.substitute.make(getattr(site.holder, site.name), form))
