"""How pools lie in the memory of a device: on a TPU in the order of their axes, elsewhere as the compiler likes best.

A TPU keeps an array in tiles of its last two axes, and the compiler may turn the axes of an argument round where that
pads fewer bytes. A kernel reads rows in the order of the axes: the pool would be copied where a step begins, and back
where it ends. So the order is stated, for arguments and results of every program that takes the pools. Knows no model.
"""

from typing import Any

from jax.experimental.layout import Format
from jax.experimental.layout import Layout as Order
from jax.sharding import Sharding


def is_stated(device: Any) -> bool:
    """Whether the order of a pool's axes is stated on a device of JAX, which may be one of a topology."""
    return device.platform == "tpu"


def pool_format(sharding: Sharding, axes: int) -> Sharding | Format:
    """The sharding of a pool of so many axes, with their order where that is stated."""
    device = next(iter(sharding.device_set))
    return Format(Order(tuple(range(axes))), sharding) if is_stated(device) else sharding
