"""Compiles for TPUs that are not there: the TPU compiler makes programs for a named topology on any machine.

Needs `libtpu` beside JAX. Several test processes load it at once, and none has a TPU: the settings below say so before
JAX does, once a process.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from hybrid_jax.formats import pool_format
from hybrid_jax.hlo import count_copies

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
    return _compiled(topology, jax.jit(function, **jit), shapes)


def compile_in_place(topology: str, function: Callable[..., Any], *arguments: Any, pools: int) -> jax.stages.Compiled:
    """`function`, which gives an output and the pools, compiled for one chip; argument number `pools` are the old ones.

    They lie in the order of their axes, as those of an engine do. Fails where they are not updated where they lie, or
    one is copied.
    """
    one = jax.sharding.SingleDeviceSharding(devices(topology)[0])

    def placed(tree: Any, place: Callable[[Any], Any]) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), tree)

    shapes = [placed(argument, lambda x: one) for argument in arguments]
    shapes[pools] = placed(arguments[pools], lambda x: pool_format(one, x.ndim))
    formats = jax.tree.map(lambda x: x.format, shapes[pools])
    compiled = _compiled(topology, jax.jit(function, donate_argnums=pools, out_shardings=(one, formats)), shapes)
    stats: Any = compiled.memory_analysis()
    kept = jax.tree.leaves(arguments[pools])
    assert stats.alias_size_in_bytes >= sum(pool.size * pool.dtype.itemsize for pool in kept)
    assert count_copies(compiled.as_text() or "", [(pool.shape, pool.dtype.name) for pool in kept]) == 0
    return compiled


def as_dtype(tree: Any, dtype: Any) -> Any:
    """The shapes of a tree, what is bfloat16 in another dtype."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype if x.dtype == jnp.bfloat16 else x.dtype), tree)


def _compiled(topology: str, jitted: Any, shapes: Sequence[Any]) -> jax.stages.Compiled:
    kind = devices(topology)[0].device_kind
    chip = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=chip)):
        return jitted.trace(*shapes).lower(lowering_platforms=("tpu",)).compile()
