"""How pools and kernels of experts lie in the memory of a device: on a TPU as is said here, elsewhere as the compiler
likes best.

A TPU keeps an array in tiles of its last two axes, and the compiler may turn the axes of an argument round where that
pads fewer bytes. A kernel reads rows in the order of the axes: the pool would be copied where a step begins, and back
where it ends. So the order is stated, for arguments and results of every program that takes the pools.

So it is for kernels of experts. A grouped product reads one matrix after another, each whole: kernels that lie in
another order are copied, all of them, where a dispatch begins. Knows no model.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as Order
from jax.sharding import Sharding


def is_stated(device: Any) -> bool:
    """Whether the order of a pool's axes is stated on a device of JAX, which may be one of a topology."""
    return device.platform == "tpu"


def pool_format(sharding: Sharding, axes: int) -> Sharding | Format:
    """The sharding of a pool of so many axes, with their order where that is stated."""
    return _ordered(sharding, tuple(range(axes)))


def weight_format(sharding: Sharding, axes: tuple[str | None, ...]) -> Sharding | Format:
    """The sharding of a weight with these logical axes; with their order where it is a kernel of experts.

    Matrices lie whole, their two axes innermost: `[E, D, c, F]` as `[E, c, D, F]`.
    """
    if "expert" not in axes or "model" not in axes:
        return sharding
    inner = tuple(at for at, axis in enumerate(axes) if axis in ("model", "expert_mlp"))
    return _ordered(sharding, tuple(at for at in range(len(axes)) if at not in inner) + inner)


def weight_formats(state: nnx.State, sharding: Callable[[tuple[str | None, ...]], Sharding]) -> nnx.State:
    """The `weight_format` of every weight of a state, which may be abstract, in place of its value.

    `sharding`: of a weight, by its logical axes.
    """
    flat = ((path, leaf, leaf.get_metadata("axes")) for path, leaf in nnx.to_flat_state(state))
    return nnx.from_flat_state([(path, leaf.replace(weight_format(sharding(axes), axes))) for path, leaf, axes in flat])


def _ordered(sharding: Sharding, order: tuple[int, ...]) -> Sharding | Format:
    device = next(iter(sharding.device_set))
    return Format(Order(order), sharding) if is_stated(device) else sharding
