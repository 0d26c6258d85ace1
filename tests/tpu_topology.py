"""Compiles for TPUs that are not there: the TPU compiler makes programs for a named topology on any machine.

Needs `libtpu` beside JAX. Several test processes load it at once, and none has a TPU: the settings below say so before
JAX does, once a process.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")

import jax
from jax.experimental import topologies

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


@cache
def devices(topology: str) -> list[jax.Device]:
    """The devices of a topology, which can be compiled for and nothing else."""
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def compile_for(topology: str, function: Callable[..., Any], *arguments: Any, **jit: Any) -> jax.stages.Compiled:
    """`function` compiled by the TPU compiler for one chip of a topology.

    arguments: arrays or `ShapeDtypeStruct`s, in any tree. jit: settings of `jax.jit`, such as `donate_argnums`.
    """
    one = jax.sharding.SingleDeviceSharding(devices(topology)[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), arguments)
    kind = devices(topology)[0].device_kind
    chip = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=chip)):
        traced = jax.jit(function, **jit).trace(*shapes)
        return traced.lower(lowering_platforms=("tpu",)).compile()
