"""Causal depthwise convolution over each request, with the last W - 1 inputs carried in a slot.

    y_t = sum_{w < W} weight[w] * x_{t - (W - 1) + w}          newest input last; inputs before the first token are 0

The tail of a request is its last W - 1 inputs, oldest first. Other kinds build on this convolution; with a gate before
and one behind it, both linear, it is a linear kind of its own (LFM2, arXiv 2511.23404):

    y_t = out_gate_t * convolution(in_gate * u)_t

This is the definition that the kernels are held to.

Letters: T tokens, c channels, W convolution width, B requests, N slots, L layers of the pool.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.op import CONSTANT, RaggedBatch, Shares, clear_padding, read_states, store_states, take, token_rows

SHARES = Shares("convolution_channels", (2, 1, 3, CONSTANT, None), (1, 3))


def gated_short_conv(
    mixed: Float[Array, "T 3 c"],
    weight: Float[Array, "W c"],
    pool: Float[Array, "L N W-1 c"],
    layer: int,
    batch: RaggedBatch,
) -> tuple[Float[Array, "T c"], Float[Array, "L N W-1 c"]]:
    """One gated convolution layer between its projections.

    Args:
      mixed: the projected gate before the convolution, the gate behind it, and the channels. weight: float32.
    Returns the gated output in the dtype of `mixed`, zeros for padding, and the pool.
    """
    in_gate, out_gate, channels = (mixed[:, part].astype(jnp.float32) for part in range(3))
    gated = (in_gate * channels).astype(mixed.dtype)  # as the tail keeps it, so that pieces equal the whole
    out, pool = short_conv(gated, weight, pool, layer, batch)
    return clear_padding((out_gate * out).astype(mixed.dtype), batch), pool


def short_conv(
    x: Float[Array, "T c"],
    weight: Float[Array, "W c"],
    pool: Float[Array, "L N W-1 c"],
    layer: int,
    batch: RaggedBatch,
) -> tuple[Float[Array, "T c"], Float[Array, "L N W-1 c"]]:
    """The convolution of every token, float32, and the pool with the rows' tails (and snapshots of them) stored."""
    width = weight.shape[0]
    tails = read_states(pool, layer, batch)
    row, _ = token_rows(batch, x.shape[0])
    token = jnp.arange(x.shape[0], dtype=jnp.int32)
    inside = token - batch.query_start[row]
    out = jnp.zeros(x.shape, jnp.float32)
    for back in range(width):
        tail = tails[row, jnp.clip(width - 1 - back + inside, 0, width - 2)]
        earlier = jnp.where((inside >= back)[:, None], take(x, jnp.maximum(token - back, 0)), tail.astype(x.dtype))
        out = out + earlier.astype(jnp.float32) * weight[width - 1 - back].astype(jnp.float32)[None, :]
    final = _tail_after(x, tails, batch, batch.lengths)
    snapshot = _tail_after(x, tails, batch, batch.snapshot_length)
    return out, store_states(pool, layer, batch, final, snapshot)


def _tail_after(
    x: Float[Array, "T c"], tails: Float[Array, "B W-1 c"], batch: RaggedBatch, count: Int[Array, "B"]
) -> Float[Array, "B W-1 c"]:
    """The tail of each row after `count` new tokens: what is left of the old tail, then the new inputs."""
    kept = tails.shape[1]
    inside = count[:, None] - kept + jnp.arange(kept, dtype=jnp.int32)[None, :]
    new = take(x, jnp.maximum(batch.query_start[:-1, None] + inside, 0)).astype(tails.dtype)
    old = jnp.take_along_axis(tails, jnp.clip(inside + kept, 0, kept - 1)[:, :, None], axis=1)
    return jnp.where((inside >= 0)[:, :, None], new, old)
