"""TPU chips by the name that JAX gives them, and the topologies that can be compiled for without one.

Memory, bandwidth and operations are those that JAX itself states of a TensorCore, times the cores that JAX counts as
one device; the links are the published interconnect of a chip. Knows nothing of models.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies


@dataclass(frozen=True)
class Chip:
    """What one device of JAX has: a chip, but of a TPU7x one of its two cores.

    memory_bytes: HBM. memory_bytes_s: its bandwidth. operations_s: bfloat16 products. link_bytes_s: to other chips, all
    links together. clock_hz: of the core, assumed where it is not published.
    """

    name: str
    memory_bytes: int
    memory_bytes_s: float
    operations_s: float
    link_bytes_s: float
    clock_hz: float


CHIPS = {
    "TPU v5 lite": Chip("v5e", 17_200_000_000, 0.82e12, 197e12, 200e9, 1.5e9),
    "TPU v5": Chip("v5p", 103_000_000_000, 2.46e12, 459e12, 600e9, 1.75e9),
    "TPU v6 lite": Chip("v6e", 34_400_000_000, 1.64e12, 920e12, 448e9, 1.75e9),
    "TPU7x": Chip("TPU7x", 103_000_000_000, 3.70e12, 1155e12, 600e9, 2.0e9),
}


@dataclass(frozen=True)
class Slice:
    """The devices of a topology, which can be compiled for and nothing else, and what each of them is."""

    topology: str
    devices: tuple[Any, ...]  # of JAX
    chip: Chip


def open_slice(topology: str) -> Slice:
    """The slice of a topology such as `v6e:4x4`.

    Raises ValueError for a topology that the TPU compiler does not know, for a chip that is not in the table, and
    without libtpu, naming the extra that brings it.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # the library looks for the machine that it is on, unless told
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    try:
        devices: Sequence[Any] = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # which one depends on what is missing
        raise ValueError(_reason(topology, error)) from None
    kind = devices[0].device_kind
    if kind not in CHIPS:
        raise ValueError(f"wanted a chip of {', '.join(CHIPS)}, got {kind!r}: choose another topology")
    return Slice(topology, tuple(devices), CHIPS[kind])


def _reason(topology: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "support not installed" in text:
        return f"wanted libtpu to compile for {topology!r}, got none: install the extra, pip install 'hybrid-jax[tpu]'"
    if "lockfile" in text or "already in use" in text:
        return (
            f"wanted libtpu to compile for {topology!r}, but another process uses it: wait for that one, or set "
            "ALLOW_MULTIPLE_LIBTPU_LOAD=1 for both"
        )
    return f"wanted a topology such as v5e:4x4, v5p:2x2x4, v6e:4x4 or tpu7x:2x2x1, got {topology!r}: {text}"
