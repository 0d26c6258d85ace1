"""The short convolution of rows that prefill, on a Hopper GPU: one pass over the channels.

The definition is that of `short_conv.xla`. `delta_inputs` is a kernel for the kinds with a delta rule: of every chunk
it makes queries and keys of unit length and values, ready for the scan. `convolve` is plain jnp for the other kinds: it
moves the channels by so many tokens where the definition gathers them by index. This module knows no kind.

Letters: T tokens, G groups, c channels of a group, B rows, H value heads, K width of a head, W convolution width,
N slots, L layers of a pool.
"""

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.chunks_gpu import BF16, F32, C, Work, along_columns, along_rows, compiler_params, readable
from kernels_pallas.mosaic_gpu import interpreter, made_once
from kernels_pallas.norm import L2_EPSILON
from kernels_pallas.op import RaggedBatch, read_states, store_states, take

WIDTH = 128  # channels of a head, and of a block of threads
MARGIN = 8  # rows of shared memory before a chunk, the last of them the inputs before it
WIDE = plgpu.Layout.WGMMA_UPCAST_4X  # eight neighbouring channels a thread


def convolve(
    x: Float[Array, "T G d"],
    weight: Float[Array, "W G*c"],
    pool: Float[Array, "L N W-1 G*c"],
    layer: int,
    batch: RaggedBatch,
) -> tuple[Float[Array, "T G c"], Float[Array, "L N W-1 G*c"]]:
    """The convolution of the first c channels of each group, float32, and the pool with tails and snapshots stored.

    Rows in decode are absent from `batch`; outputs of tokens that no row owns are arbitrary.
    """
    tokens, groups, _ = x.shape
    width, size = weight.shape[0], weight.shape[1] // groups
    tails = read_states(pool, layer, batch)
    tails_BWGc = tails.reshape(batch.rows, width - 1, groups, size)
    weight = weight.astype(jnp.float32).reshape(width, 1, groups, size)
    inputs = x[:, :, :size]
    row, inside = _places(batch, tokens)
    out = inputs.astype(jnp.float32) * weight[width - 1]
    for back in range(1, width):
        moved = jnp.pad(inputs, ((back, 0), (0, 0), (0, 0)))[:tokens]
        tail = tails_BWGc[row, jnp.clip(width - 1 - back + inside, 0, width - 2)]
        earlier = jnp.where((inside >= back)[:, None, None], moved, tail.astype(x.dtype))
        out = out + earlier.astype(jnp.float32) * weight[width - 1 - back]
    return out, store_tails(x, tails, pool, layer, batch)


def store_tails(
    x: Float[Array, "T G d"], tails: Float[Array, "B W-1 G*c"], pool: Array, layer: int, batch: RaggedBatch
) -> Float[Array, "L N W-1 G*c"]:
    """The pool with the tails of all rows after this step, and of their snapshots, stored."""
    x = x[:, :, : tails.shape[2] // x.shape[1]]
    kept = (_tail_after(x, tails, batch, count) for count in (batch.lengths, batch.snapshot_length))
    return store_states(pool, layer, batch, *kept)


def _places(batch: RaggedBatch, tokens: int) -> tuple[Int[Array, "T"], Int[Array, "T"]]:
    """The row of each token and its place among the row's new tokens; by comparisons, for a search would be a loop."""
    token = jnp.arange(tokens, dtype=jnp.int32)
    row = (token[:, None] >= batch.query_start[None, 1:]).sum(axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, batch.rows - 1)
    return row, token - batch.query_start[row]


def _tail_after(
    x: Float[Array, "T G c"], tails: Float[Array, "B W-1 G*c"], batch: RaggedBatch, count: Int[Array, "B"]
) -> Float[Array, "B W-1 G*c"]:
    """The tail of each row after `count` new tokens: what is left of the old tail, then the new inputs."""
    kept = tails.shape[1]
    inside = count[:, None] - kept + jnp.arange(kept, dtype=jnp.int32)[None, :]
    new = take(x, jnp.maximum(batch.query_start[:-1, None] + inside, 0)).astype(tails.dtype).reshape(tails.shape)
    old = jnp.take_along_axis(tails, jnp.clip(inside + kept, 0, kept - 1)[:, :, None], axis=1)
    return jnp.where((inside >= 0)[:, :, None], new, old)


def delta_inputs(
    x: Float[Array, "T G d"],
    weight: Float[Array, "W c"],
    tails: Float[Array, "B W-1 c"],
    work: Work,
) -> tuple[Float[Array, "T G K"], Float[Array, "T G K"], Float[Array, "T H K"]]:
    """Queries, keys and values: SiLU of the convolution, queries and keys of unit length, queries times K^-0.5.

    Args:
      x: bfloat16, by group: the channels of its query, of its key, of the values that read it, then any others.
      weight: float32. tails: bfloat16, inputs before each row's first new token.
    Returns bfloat16; arbitrary for tokens of no chunk.
    """
    (tokens, groups, _), (width, channels) = x.shape, weight.shape
    parts = channels // groups // WIDTH

    def body(*refs: Any) -> None:
        x_ref, weight_ref, tail_ref, chunk_ref, *outs, x_s, out_s, arrived = refs
        n, group, part = (lax.axis_index(name) for name in ("n", "g", "p"))
        start, length, first = (chunk_ref[n, i] for i in range(3))

        @pl.when(length > 0)
        def _used() -> None:
            channel = pl.ds((group * parts + part) * WIDTH, WIDTH)
            _fetch(
                x_ref.at[:, group, pl.ds(part * WIDTH, WIDTH)], tail_ref.at[:, :, channel], start, first, x_s, arrived
            )
            weights = [weight_ref.at[w, channel] for w in range(width)]
            _make_part(x_s, weights, part, out_s)
            places = [(outs[0], group, part == 0), (outs[1], group, part == 1)]
            places += [(outs[2], group * (parts - 2) + part - 2, part > 1)]
            for out, head, own in places:
                pl.when(own)(partial(_send, out_s, out.at[:, head], start, length))
            plgpu.wait_smem_to_gmem(0)

    heads = (groups, groups, groups * (parts - 2))
    arguments = (readable(x), weight, tails, work.chunks)
    kernel = made_once(
        ("delta_inputs",),
        arguments,
        lambda: plgpu.kernel(
            body,
            out_type=[jax.ShapeDtypeStruct((tokens, n, WIDTH), BF16) for n in heads],
            scratch_types=[
                plgpu.SMEM((MARGIN + C, WIDTH), BF16),
                plgpu.SMEM((C, WIDTH), BF16),
                plgpu.Barrier(num_arrivals=2),
            ],
            grid=(work.chunks.shape[0], groups, parts),
            grid_names=("n", "g", "p"),
            compiler_params=compiler_params(),
            kernel_name="delta_inputs",
            interpret=interpreter(),
        ),
    )
    return tuple(kernel(*arguments))


def _fetch(x: Any, tails: Any, start: Array, first: Array, x_s: Any, arrived: Any) -> None:
    """Bring a chunk's inputs and those before them: its row's own, or row `first - 1`'s tail for its first chunk."""
    kept = tails.shape[1]
    before = x_s.at[pl.ds(MARGIN - kept, kept)]
    plgpu.copy_gmem_to_smem(x.at[pl.ds(start, C)], x_s.at[pl.ds(MARGIN, C)], arrived)

    @pl.when(first > 0)
    def _tail() -> None:
        plgpu.copy_gmem_to_smem(tails.at[first - 1], before, arrived)

    @pl.when(first == 0)
    def _inside() -> None:
        plgpu.copy_gmem_to_smem(x.at[pl.ds(start - kept, kept)], before, arrived)

    plgpu.barrier_wait(arrived)


def _make_part(x_s: Any, weights: list[Any], part: Array, out_s: Any) -> None:
    """Convolve, activate and, of queries and keys, scale one head's channels of a chunk."""
    made = []
    for half in range(2):
        columns = pl.ds(half * C, C)
        total: Any = None
        for w, weight in enumerate(weights):
            rows = pl.ds(MARGIN - len(weights) + 1 + w, C)
            x = plgpu.load(x_s.at[rows, columns], layout=WIDE, optimized=False).astype(F32)
            factor = plgpu.load(weight.at[columns], layout=WIDE.reduce(0), optimized=False)
            x = x * plgpu.layout_cast(along_columns(factor), WIDE)
            total = x if total is None else total + x
        made.append(total / (1.0 + jnp.exp(-total)))
    square = sum((y * y).sum(axis=1) for y in made)
    size = jnp.where(part == 0, WIDTH**-0.5, 1.0)
    one = plgpu.layout_cast(jnp.ones_like(square), WIDE.reduce(1))
    scale = lax.cond(part < 2, lambda: lax.rsqrt(square + L2_EPSILON) * size, lambda: one)
    for half, y in enumerate(made):
        out_s.at[:, pl.ds(half * C, C)][...] = (y * plgpu.layout_cast(along_rows(scale), WIDE)).astype(BF16)
    plgpu.commit_smem()


def _send(out_s: Any, out: Any, start: Array, length: Array) -> None:
    """Store a chunk's rows; of a chunk that is not full in pieces of a power of two."""

    @pl.when(length >= C)
    def _whole() -> None:
        plgpu.copy_smem_to_gmem(out_s, out.at[pl.ds(start, C)])

    for size in (32, 16, 8, 4, 2, 1):
        before = length & (C - 2 * size)

        @pl.when((length < C) & ((length & size) != 0))
        def _piece(size: int = size, before: Array = before) -> None:
            plgpu.copy_smem_to_gmem(out_s.at[pl.ds(before, size)], out.at[pl.ds(start + before, size)])
