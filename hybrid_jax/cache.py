"""Allocates the pools that hold what the layers remember: pages for full attention, slots for recurrent states."""

from collections import Counter

import jax.numpy as jnp

from hybrid_jax.routing import Routing
from kernels_pallas.op import Cache, KVSpec, Memory


def allocate(specs: tuple[Memory, ...], routing: Routing, pages: int, slots: int, page_size: int) -> Cache:
    """Empty pools. Page 0 and slot 0 are null, so `pages - 1` and `slots - 1` can be given out.

    Their content is arbitrary by contract; zeros are the cheapest to make.
    """
    layers = Counter(route.place.pool for route in routing.routes)
    pools = []
    for index, spec in enumerate(specs):
        lead = (layers[index], pages, page_size) if type(spec) is KVSpec else (layers[index], slots)
        pools.append(tuple(jnp.zeros(lead + spec.pool_shape(array), array.dtype) for array in spec.arrays))
    return Cache(specs, tuple(pools))
