"""The gated delta rule on Hopper: rows in decode by one kernel from the projections to the gated output, rows that
prefill by chunks (`gpu_prefill`).

The recurrence of `xla.py`, with the sums over key channels of one pass over the state (k and q not yet of unit length,
c_k and c_q what makes them so, d the decay):

    w = c_k beta (v - d c_k S k);   o = c_q (d S q + (q . k) w);   S <- d S + w k^T

A family of blocks is the value heads of one key head; a slab is one head, so that its norm needs no other block.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.gdn.gpu_prefill import gdn_prefill
from kernels_pallas.gdn.xla import GDNWeights
from kernels_pallas.linear_decode_gpu import (
    MEMBERS,
    WIDTH,
    Block,
    Ref,
    Slabs,
    alike,
    await_state,
    check_decode,
    decode,
    dot,
    fetch_state,
    finish,
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

QUERY, KEY, VALUE = 0, 1, 2  # vectors in shared memory


@dataclass(frozen=True)
class _Settings:
    epsilon: float
    beta_scale: float


def gdn(
    projected: Float[Array, "T G c"],
    gates: Float[Array, "T G 2 n"],
    weights: GDNWeights,
    state: Float[Array, "L N H V K"],
    tail: Float[Array, "L N W-1 2*G*K+H*V"],
    layer: int,
    batch: RaggedBatch,
    *,
    epsilon: float,
    beta_scale: float = 1.0,
) -> tuple[Float[Array, "T H*V"], Float[Array, "L N H V K"], Float[Array, "L N W-1 2*G*K+H*V"]]:
    """One gated delta rule layer between its projections, as `xla.gdn`.

    Raises NotImplementedError unless activations and tails are bfloat16, states float32, key and value heads 128 wide,
    and a key head serves at most 8 value heads.
    """
    (heads, value_width, _), key_heads = state.shape[2:], projected.shape[1]
    check_decode("gdn", (projected, gates, tail), state)
    if value_width != WIDTH or heads > MEMBERS * key_heads:
        raise NotImplementedError(
            f"gdn on a GPU wants value heads of width {WIDTH}, at most {MEMBERS} of a key head, got width {value_width}"
            f" and {heads} of {key_heads} key heads; use backend 'xla'"
        )
    inputs = (*(x.reshape(x.shape[0], -1) for x in (projected, gates)), *_kernel_weights(weights))
    settings = _Settings(epsilon, beta_scale)
    slabs = Slabs(key_heads, heads // key_heads, WIDTH, warpgroups(batch.rows * heads))

    def prefill(pools: tuple[Array, ...], batch: RaggedBatch) -> tuple[Array, tuple[Array, ...]]:
        state, tail = pools
        out, state, tail = gdn_prefill(
            projected, gates, weights, state, tail, layer, batch, epsilon=epsilon, beta_scale=beta_scale
        )
        return out, (state, tail)

    def step(pools: tuple[Array, ...], batch: RaggedBatch) -> tuple[Array, tuple[Array, ...]]:
        return decode("gdn_decode", _decode_row, settings, slabs, 3, inputs, pools, layer, batch, projected.dtype)

    out, (state, tail) = by_rows(step, prefill, (state, tail), batch)
    return out, state, tail


def _kernel_weights(weights: GDNWeights) -> tuple[Array, ...]:
    return weights.convolution, weights.decay_log, weights.decay_bias, weights.output_norm


def _decode_row(settings: _Settings, block: Block, inputs: tuple[Ref, ...], tail: Ref, out: Ref) -> None:
    """One row, one value head."""
    projected, gates, convolution, decay_log, decay_bias, output_norm = inputs
    fetch_state(block)
    head, token, tiles, each = block.slab, block.token, range(block.slabs.tiles), block.slabs.members
    first, kept = block.family * (2 + 2 * each) * WIDTH, block.family * (2 + each) * WIDTH
    places = ((0, 0), (WIDTH, each - 1), ((2 + block.member) * WIDTH, None))  # channels of the key head, owner
    windows = tuple(
        read_window(block, projected, first + start, convolution, tail, kept + start, owner) for start, owner in places
    )
    gate = 2 * block.family * each + block.member
    beta = settings.beta_scale * jax.nn.sigmoid(gates[token, gate].astype(jnp.float32))
    rate = softplus(gates[token, gate + each].astype(jnp.float32) + decay_bias[head])
    decay = jnp.exp(-jnp.exp(decay_log[head]) * rate)
    z = first + (2 + each + block.member) * WIDTH
    closed = [load_row(projected.at[token, block.tile(index, z)]) for index in tiles]
    norms = [load_row(output_norm.at[block.tile(index)]) for index in tiles]
    for vector, window in zip((QUERY, KEY, VALUE), windows, strict=True):
        block.vector(vector)[...] = silu(window.convolved())
    share(block)
    tails_read(block)
    q_length = lax.rsqrt(dot(block, QUERY, QUERY) + L2_EPSILON) * WIDTH**-0.5
    k_length = lax.rsqrt(dot(block, KEY, KEY) + L2_EPSILON)
    overlap = dot(block, QUERY, KEY)
    await_state(block)
    outputs = []
    for index in tiles:
        recalled, carried = products(block, index, (KEY, QUERY))
        added = beta * (load_row(block.vector_tile(VALUE, index)) - decay * recalled * k_length) * k_length
        outputs.append((decay * carried + overlap * added) * q_length)
        update(block, index, alike(decay), added, KEY)
    store_state(block)
    scale = lax.rsqrt(squared(block, outputs) * (1.0 / WIDTH) + settings.epsilon)
    for index, output, gate, norm in zip(tiles, outputs, closed, norms, strict=True):
        out.at[token, block.channels(index)][...] = (output * scale * norm * silu(gate)).astype(out.dtype)
    finish(block, tail, windows)


def fits(memory: StateSpec, dtype: str) -> bool:
    """Whether the kernels have the shapes and dtypes of a layer that remembers this and computes in `dtype`."""
    state, tail = memory.arrays
    heads, value_width, key_width = state.shape
    key_heads = (tail.shape[1] - heads * value_width) // (2 * key_width)
    return dtype == "bfloat16" and value_width == key_width == WIDTH and heads <= MEMBERS * key_heads
