"""Mamba2 on Hopper: rows in decode by one kernel, from the projections to the output before its gate and norm.

The recurrence of `xla.py`. A family of blocks is a group of heads, which share B and C; a slab is one head or several.
The output norm runs over a group of heads that no block sees whole: it and the gate follow in plain jnp.
Rows that prefill go by chunks (`gpu_prefill`) where heads are 64 or 128 wide, else the way of `xla.py`.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.chunks_gpu import fits_tiles
from kernels_pallas.linear_decode_gpu import (
    MEMBERS,
    TILE,
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
    read_window,
    share,
    silu,
    softplus,
    store_state,
    tails_read,
    update,
    warpgroups,
)
from kernels_pallas.mamba2.gpu_prefill import mamba2_prefill
from kernels_pallas.mamba2.xla import UNLIMITED, Mamba2Weights, gated_then_normed, normed_then_gated
from kernels_pallas.mamba2.xla import mamba2 as mamba2_xla
from kernels_pallas.op import RaggedBatch, StateSpec, clear_padding
from kernels_pallas.rows import by_rows

LARGEST_SLAB = 384  # value channels: 192 KB of shared memory
INPUT, OUTPUT, VALUES = 0, 1, 2  # vectors in shared memory: B, C, and all of x


@dataclass(frozen=True)
class _Settings:
    width: int  # channels of a head
    step_limit: tuple[float, float]


def mamba2(
    z: Float[Array, "T H*V"],
    mixed: Float[Array, "T H*V+2*G*K"],
    step_size: Float[Array, "T H"],
    weights: Mamba2Weights,
    state: Float[Array, "L N H V K"],
    tail: Float[Array, "L N W-1 H*V+2*G*K"],
    layer: int,
    batch: RaggedBatch,
    *,
    groups: int,
    epsilon: float,
    norm_first: bool = False,
    step_limit: tuple[float, float] = UNLIMITED,
) -> tuple[Float[Array, "T H*V"], Float[Array, "L N H V K"], Float[Array, "L N W-1 H*V+2*G*K"]]:
    """One Mamba2 layer between its projections, as `xla.mamba2`.

    Raises NotImplementedError unless activations and tails are bfloat16, states float32 and 128 wide, heads a multiple
    of 64 wide, and a group is 1 to 8 slabs of 128, 256 or 384 channels.
    """
    heads, width, _ = state.shape[2:]
    check_decode("mamba2", (z, mixed, step_size, tail), state)
    slabs = _slabs(heads, width, groups, batch.rows)
    inputs = (
        mixed, step_size, weights.convolution, weights.convolution_bias, weights.decay_log, weights.step_bias,
        weights.skip,
    )  # fmt: skip
    settings = _Settings(width, step_limit)
    end = normed_then_gated if norm_first else gated_then_normed

    def prefill(pools: tuple[Array, ...], batch: RaggedBatch) -> tuple[Array, tuple[Array, ...]]:
        state, tail = pools
        compute = mamba2_prefill if fits_tiles(groups, state.shape[2:]) else mamba2_xla
        out, state, tail = compute(
            z, mixed, step_size, weights, state, tail, layer, batch,
            groups=groups, epsilon=epsilon, norm_first=norm_first, step_limit=step_limit,
        )  # fmt: skip
        return out, (state, tail)

    def step(pools: tuple[Array, ...], batch: RaggedBatch) -> tuple[Array, tuple[Array, ...]]:
        vectors = VALUES + slabs.rows // WIDTH
        out, pools = decode(
            "mamba2_decode", _decode_row, settings, slabs, vectors, inputs, pools, layer, batch, jnp.float32
        )
        out = end(out, z, weights.output_norm, groups, epsilon).astype(mixed.dtype)
        return clear_padding(out, batch), pools

    out, (state, tail) = by_rows(step, prefill, (state, tail), batch)
    return out, state, tail


def _slabs(heads: int, width: int, groups: int, lines: int) -> Slabs:
    """The smallest slabs of which at most 8 make a group."""
    channels = heads * width // groups
    rows = _slab_rows(width, channels)
    if rows is None:
        raise NotImplementedError(
            f"mamba2 on a GPU wants heads of a multiple of {TILE} channels, and groups of 1 to {MEMBERS} times 128, 256"
            f" or 384 channels, got heads of {width} and groups of {channels}; use backend 'xla'"
        )
    members = channels // rows
    return Slabs(groups, members, rows, warpgroups(lines * groups * members))


def _slab_rows(width: int, channels: int) -> int | None:
    """Channels of a slab, None where a group of so many channels has none."""
    sizes = range(WIDTH, LARGEST_SLAB + 1, WIDTH) if width % TILE == 0 else ()
    return next((rows for rows in sizes if channels % rows == 0 and channels // rows <= MEMBERS), None)


def _decode_row(settings: _Settings, block: Block, inputs: tuple[Ref, ...], tail: Ref, out: Ref) -> None:
    """One row, one slab; with the skip, without gate and norm."""
    mixed, step_size, convolution, bias, decay_log, step_bias, skip = inputs
    fetch_state(block)
    token, rows, tiles = block.token, block.slabs.rows, range(block.slabs.tiles)
    values = block.slabs.members * rows
    first = block.family * (values + 2 * WIDTH)  # of the group's channels: x, B, C
    places: list[tuple[Any, int | None]] = [
        (first + values, 0),
        (first + values + WIDTH, block.slabs.members - 1),
    ]
    places += [(first + block.member * rows + start, None) for start in range(0, rows, WIDTH)]
    windows = tuple(read_window(block, mixed, start, convolution, tail, start, owner) for start, owner in places)
    biases = [load_channels(bias.at[window.channels]) for window in windows]
    heads = [block.channels(index).start // settings.width for index in tiles]
    sizes = [softplus(step_size[token, head].astype(jnp.float32) + step_bias[head]) for head in heads]
    sizes = [jnp.clip(size, *settings.step_limit) for size in sizes]
    decays = [jnp.exp(-jnp.exp(decay_log[head]) * size) for head, size in zip(heads, sizes, strict=True)]
    skips = [skip[head] for head in heads]
    for vector, (window, shift) in enumerate(zip(windows, biases, strict=True)):
        block.vector(vector)[...] = silu(window.convolved() + shift)
    share(block)
    tails_read(block)
    overlap = dot(block, INPUT, OUTPUT)
    await_state(block)
    for index, size, decay, skipped in zip(tiles, sizes, decays, skips, strict=True):
        (carried,) = products(block, index, (OUTPUT,))
        x = load_row(block.vector_tile(VALUES, index))
        out.at[token, block.channels(index)][...] = decay * carried + overlap * x * size + x * skipped
        update(block, index, alike(decay), x * size, INPUT)
    store_state(block)
    finish(block, tail, windows)


def fits(memory: StateSpec, dtype: str) -> bool:
    """Whether the kernels have the shapes and dtypes of a layer that remembers this and computes in `dtype`."""
    state, tail = memory.arrays
    heads, width, key_width = state.shape
    groups = (tail.shape[1] - heads * width) // (2 * key_width)
    return dtype == "bfloat16" and key_width == WIDTH and _slab_rows(width, heads * width // groups) is not None
