"""Kimi delta attention on Hopper: rows in decode by one kernel from the projections to the gated output.

The recurrence of `xla.py`, with the sums over key channels of one pass over the state (c_k and c_q make k and q of unit
length, the decay d has one factor per key channel):

    w = c_k beta (v - c_k S (d k));   o = c_q (S (d q) + (q . k) w);   S <- S diag(d) + w k^T

A slab is one head: blocks share nothing. Rows that prefill go by chunks (`gpu_prefill`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.kda.decay import BoundedDecay, Decay, SoftplusDecay
from kernels_pallas.kda.gpu_prefill import kda_prefill
from kernels_pallas.kda.xla import KDAWeights
from kernels_pallas.linear_decode_gpu import (
    PART,
    WIDTH,
    Block,
    Ref,
    Slabs,
    await_state,
    check_decode,
    decode,
    dot,
    fetch_state,
    finish,
    load_channels,
    load_column,
    load_row,
    products,
    read_window,
    share,
    silu,
    softplus,
    squared,
    store_state,
    tails_read,
    update,
    warpgroups,
)
from kernels_pallas.norm import L2_EPSILON
from kernels_pallas.op import RaggedBatch, StateSpec
from kernels_pallas.rows import by_rows

QUERY, KEY, VALUE, KEPT, KEPT_QUERY, KEPT_KEY, VECTORS = range(7)  # vectors in shared memory


def kda(
    mixed: Float[Array, "T 2*H*K+H*V"],
    f: Float[Array, "T H K"],
    b: Float[Array, "T H"],
    gate: Float[Array, "T H V"],
    weights: KDAWeights,
    state: Float[Array, "L N H V K"],
    tail: Float[Array, "L N W-1 2*H*K+H*V"],
    layer: int,
    batch: RaggedBatch,
    *,
    decay: Decay,
    epsilon: float,
) -> tuple[Float[Array, "T H*V"], Float[Array, "L N H V K"], Float[Array, "L N W-1 2*H*K+H*V"]]:
    """One Kimi delta attention layer between its projections, as `xla.kda`.

    Raises NotImplementedError unless activations and tails are bfloat16, states float32, and keys and values 128 wide.
    """
    tokens, (heads, value_width, _) = mixed.shape[0], state.shape[2:]
    check_decode("kda", (mixed, f, b, gate, tail), state)
    if value_width != WIDTH:
        raise NotImplementedError(f"kda on a GPU wants value heads of width {WIDTH}, got {value_width}; use 'xla'")
    inputs = (
        mixed, f.reshape(tokens, -1), b, gate.reshape(tokens, -1), weights.convolution, weights.decay_log,
        weights.decay_bias.reshape(-1), weights.output_norm,
    )  # fmt: skip
    settings = _Settings(_in_kernel(decay), epsilon)

    def prefill(pools: tuple[Array, ...], batch: RaggedBatch) -> tuple[Array, tuple[Array, ...]]:
        state, tail = pools
        out, state, tail = kda_prefill(
            mixed, f, b, gate, weights, state, tail, layer, batch, decay=decay, epsilon=epsilon
        )
        return out, (state, tail)

    def step(pools: tuple[Array, ...], batch: RaggedBatch) -> tuple[Array, tuple[Array, ...]]:
        slabs = Slabs(heads, 1, WIDTH, warpgroups(batch.rows * heads))
        return decode("kda_decode", _decode_row, settings, slabs, VECTORS, inputs, pools, layer, batch, mixed.dtype)

    out, (state, tail) = by_rows(step, prefill, (state, tail), batch)
    return out, state, tail


def _by_softplus(x: Array, rate: Array) -> Array:
    return -rate * softplus(x)


def _softplus_decay(decay: SoftplusDecay) -> Decay:
    return _by_softplus


def _as_is(decay: BoundedDecay) -> Decay:
    return decay


# A decay as a kernel can compute it: Mosaic has no log1p, of which `jax.nn.softplus` is made.
_KERNEL_DECAYS: Mapping[type, Callable[..., Decay]] = {SoftplusDecay: _softplus_decay, BoundedDecay: _as_is}


def _in_kernel(decay: Decay) -> Decay:
    if type(decay) not in _KERNEL_DECAYS:
        known = ", ".join(kind.__name__ for kind in _KERNEL_DECAYS)
        raise NotImplementedError(f"kda on a GPU wants a decay of {known}, got {decay!r}; use backend 'xla'")
    return _KERNEL_DECAYS[type(decay)](decay)


@dataclass(frozen=True)
class _Settings:
    decay: Decay
    epsilon: float


def _decode_row(settings: _Settings, block: Block, inputs: tuple[Ref, ...], tail: Ref, out: Ref) -> None:
    """One row, one head."""
    mixed, f, b, gate, convolution, decay_log, decay_bias, output_norm = inputs
    fetch_state(block)
    head, token, tiles = block.slab, block.token, range(block.slabs.tiles)
    starts = tuple((3 * head + part) * WIDTH for part in range(3))
    windows = tuple(read_window(block, mixed, start, convolution, tail, start, None) for start in starts)
    keys = pl.ds(head * WIDTH, WIDTH)
    x = load_channels(f.at[token, keys]) + load_channels(decay_bias.at[keys])
    beta = jax.nn.sigmoid(b[token, head].astype(jnp.float32))
    gates = [load_row(gate.at[token, block.channels(index)]) for index in tiles]
    norms = [load_row(output_norm.at[block.tile(index)]) for index in tiles]
    kept = jnp.exp(settings.decay(x, lax.broadcast_in_dim(jnp.exp(decay_log[head]), x.shape, ())))
    q, k, v = (silu(window.convolved()) for window in windows)
    for vector, value in ((QUERY, q), (KEY, k), (VALUE, v), (KEPT, kept), (KEPT_QUERY, kept * q), (KEPT_KEY, kept * k)):
        block.vector(vector)[...] = value
    share(block)
    tails_read(block)
    q_length = lax.rsqrt(dot(block, QUERY, QUERY) + L2_EPSILON) * WIDTH**-0.5
    k_length = lax.rsqrt(dot(block, KEY, KEY) + L2_EPSILON)
    overlap = dot(block, QUERY, KEY)
    await_state(block)
    outputs = []
    for index in tiles:
        recalled, carried = products(block, index, (KEPT_KEY, KEPT_QUERY))
        added = beta * (load_row(block.vector_tile(VALUE, index)) - recalled * k_length) * k_length
        outputs.append((carried + overlap * added) * q_length)
        update(block, index, lambda start: load_column(block, KEPT, start, PART), added, KEY)
    store_state(block)
    scale = lax.rsqrt(squared(block, outputs) * (1.0 / WIDTH) + settings.epsilon)
    for index, output, closed, norm in zip(tiles, outputs, gates, norms, strict=True):
        out.at[token, block.channels(index)][...] = (output * scale * norm * jax.nn.sigmoid(closed)).astype(out.dtype)
    finish(block, tail, windows)


def fits(memory: StateSpec, dtype: str) -> bool:
    """Whether the kernels have the shapes and dtypes of a layer that remembers this and computes in `dtype`."""
    return dtype == "bfloat16" and memory.arrays[0].shape[1:] == (WIDTH, WIDTH)
