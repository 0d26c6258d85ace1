"""Rows in decode by one function, all others by another: how a linear kind with two kernels serves one batch.

Knows no kind and no backend.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.op import RaggedBatch

Rows = Callable[[tuple[Array, ...], RaggedBatch], tuple[Array, tuple[Array, ...]]]  # pools, batch -> outputs, pools


def by_rows(
    step: Rows, prefill: Rows, pools: tuple[Array, ...], batch: RaggedBatch
) -> tuple[Float[Array, "T c"], tuple[Array, ...]]:
    """Rows in decode by `step`, all others by `prefill`: each touches the memory of its own rows alone.

    `step` may leave the outputs of other tokens undefined where the batch may prefill. `prefill` sees a batch in which
    the rows in decode are absent.
    """
    if not batch.may_prefill:
        return step(pools, batch)
    if not batch.may_decode:
        return prefill(pools, batch)
    first = batch.query_start[batch.decodes]
    rest = dataclasses.replace(
        batch,
        query_start=jnp.maximum(batch.query_start, first),
        decodes=jnp.zeros_like(batch.decodes),
        content="prefill",
    )
    out, pools = prefill(pools, rest)
    decoded, pools = step(pools, batch)
    in_decode = jnp.arange(out.shape[0], dtype=jnp.int32) < first
    return jnp.where(in_decode[:, None], decoded, out), pools
