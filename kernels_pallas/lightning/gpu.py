"""Lightning attention on Hopper: rows in decode by one kernel, from the projections to the output before its norm.

The recurrence of `xla.py`; a slab is one head. The output norm runs over groups of heads that no block sees whole: it
and the gate follow in plain jnp. Rows that prefill go by chunks (`gpu_prefill`).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.lightning.gpu_prefill import lightning_prefill
from kernels_pallas.lightning.xla import LightningWeights
from kernels_pallas.linear_decode_gpu import (
    CHANNEL_LAYOUT,
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
    load_channels,
    load_row,
    products,
    share,
    silu,
    store_state,
    update,
    warpgroups,
)
from kernels_pallas.norm import group_rms
from kernels_pallas.op import RaggedBatch, StateSpec, clear_padding
from kernels_pallas.rotary import Rotary
from kernels_pallas.rows import by_rows

VALUE, QUERY, KEY, VECTORS = 0, 1, 2, 4  # vectors in shared memory; of those beside a rotated one some floats are read


@dataclass(frozen=True)
class _Settings:
    heads: int
    scale: float
    epsilon: float
    activated: bool  # queries, keys and values pass SiLU
    normed: bool  # queries and keys have norms
    half: int  # pairs of channels that are rotated


def lightning(
    qkv: Float[Array, "T 3 H K"],
    gate: Float[Array, "T H*V"],
    weights: LightningWeights,
    rotary: Rotary | None,
    pool: Float[Array, "L N H V K"],
    layer: int,
    batch: RaggedBatch,
    *,
    scale: float,
    groups: int,
    epsilon: float,
    silu: bool = False,
) -> tuple[Float[Array, "T H*V"], Float[Array, "L N H V K"]]:
    """One lightning layer between its projections, as `xla.lightning`.

    Raises NotImplementedError unless activations are bfloat16, states float32, and heads 128 wide.
    """
    tokens, heads, value_width = qkv.shape[0], *pool.shape[2:4]
    check_decode("lightning", (qkv, gate), pool)
    if value_width != WIDTH:
        raise NotImplementedError(f"lightning on a GPU wants heads of width {WIDTH}, got {value_width}; use 'xla'")
    norms = [norm for norm in (weights.query_norm, weights.key_norm) if norm is not None]
    inputs = (qkv.reshape(tokens, -1), weights.slopes, *norms, *_rotation(rotary))
    half = 0 if rotary is None else rotary.cos.shape[-1]
    settings = _Settings(heads, scale, epsilon, silu, len(norms) == 2, half)

    def prefill(pools: tuple[Array, ...], batch: RaggedBatch) -> tuple[Array, tuple[Array, ...]]:
        out, pool = lightning_prefill(
            qkv, gate, weights, rotary, pools[0], layer, batch, scale=scale, groups=groups, epsilon=epsilon, silu=silu
        )
        return out, (pool,)

    def step(pools: tuple[Array, ...], batch: RaggedBatch) -> tuple[Array, tuple[Array, ...]]:
        slabs = Slabs(heads, 1, WIDTH, warpgroups(batch.rows * heads))
        out, pools = decode(
            "lightning_decode", _decode_row, settings, slabs, VECTORS, inputs, pools, layer, batch, jnp.float32
        )
        out = group_rms(out, weights.output_norm, groups, epsilon) * jax.nn.sigmoid(gate.astype(jnp.float32))
        return clear_padding(out.astype(qkv.dtype), batch), pools

    out, (pool,) = by_rows(step, prefill, (pool,), batch)
    return out, pool


def _rotation(rotary: Rotary | None) -> tuple[Float[Array, "T K"], ...]:
    """Factors of each channel and of the one that it is paired with: what is past the rotated channels stays."""
    if rotary is None:
        return ()
    rest = (rotary.cos.shape[0], WIDTH - 2 * rotary.cos.shape[1])
    own = jnp.concatenate([rotary.cos, rotary.cos, jnp.ones(rest, jnp.float32)], axis=1)
    other = jnp.concatenate([-rotary.sin, rotary.sin, jnp.zeros(rest, jnp.float32)], axis=1)
    return own, other


def _decode_row(settings: _Settings, block: Block, inputs: tuple[Ref, ...], out: Ref) -> None:
    """One row, one head; without its output norm and gate."""
    qkv, slopes, *rest = inputs
    fetch_state(block)
    head, token = block.slab, block.token
    starts = [pl.ds((part * settings.heads + head) * WIDTH, WIDTH) for part in range(3)]
    q, k, v = (load_channels(qkv.at[token, start]) for start in starts)
    factors = [load_channels(norm) for norm in rest[:2]] if settings.normed else []
    rotation = [load_channels(table.at[token]) for table in rest[-2:]] if settings.half else []
    decay = jnp.exp(-slopes[head])
    if settings.activated:
        q, k, v = silu(q), silu(k), silu(v)
    for vector, value in ((VALUE, v), (QUERY, q), (KEY, k)):
        block.vector(vector)[...] = value
    share(block)
    q_scale: Any = settings.scale
    k_scale: Any = 1.0
    if settings.normed:
        q_scale, k_scale = (
            settings.scale * _one_over_rms(block, QUERY, settings.epsilon),
            _one_over_rms(block, KEY, settings.epsilon),
        )
        q, k = q * factors[0], k * factors[1]
        _replace(block, q, k)
    if settings.half:
        _replace(block, *(_rotated(block, vector, x, rotation, settings.half) for vector, x in ((QUERY, q), (KEY, k))))
    overlap = dot(block, QUERY, KEY)
    await_state(block)
    for index in range(block.slabs.tiles):
        (carried,) = products(block, index, (QUERY,))
        added = load_row(block.vector_tile(VALUE, index)) * k_scale
        out.at[token, block.channels(index)][...] = (decay * carried + overlap * added) * q_scale
        update(block, index, alike(decay), added, KEY)
    store_state(block)
    finish(block, None, ())


def _one_over_rms(block: Block, vector: int, epsilon: float) -> Float[Array, "64"]:
    """One over the root of the mean square of a shared vector, in every row."""
    return lax.rsqrt(dot(block, vector, vector) * (1.0 / WIDTH) + epsilon)


def _replace(block: Block, q: Float[Array, "128"], k: Float[Array, "128"]) -> None:
    """Store other queries and keys, when all threads have read the old ones."""
    share(block)
    block.vector(QUERY)[...] = q
    block.vector(KEY)[...] = k
    share(block)


def _rotated(
    block: Block, vector: int, x: Float[Array, "128"], rotation: list[Float[Array, "128"]], half: int
) -> Float[Array, "128"]:
    """`x`, which is also the shared vector, with its pairs `(j, j + half)` rotated. Looks at the vectors around it."""
    ahead, behind = load_channels(block.vector(vector, half)), load_channels(block.vector(vector, -half))
    channel = plgpu.broadcasted_iota(jnp.int32, (WIDTH,), 0, layout=CHANNEL_LAYOUT)
    paired = jnp.where(channel < half, ahead, jnp.where(channel < 2 * half, behind, jnp.zeros_like(x)))
    return x * rotation[0] + paired * rotation[1]


def fits(memory: StateSpec, dtype: str) -> bool:
    """Whether the kernels have the shapes and dtypes of a layer that remembers this and computes in `dtype`."""
    return dtype == "bfloat16" and memory.arrays[0].shape[1:] == (WIDTH, WIDTH)
