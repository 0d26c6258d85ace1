"""The gated short convolution on a TPU: rows in decode by a kernel of one token a row, the others by chunks.

Both are bound by the bytes of tokens and tails. The three parts of the projections are read with the part in front, as
the product that makes them leaves them.

Letters: T tokens, c channels, W convolution width, C chunk, n rows of a group, N slots, L layers of the pool.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels_pallas.convolution_tpu import convolved, shelf_rows, shelve, tail_after
from kernels_pallas.mosaic_tpu import interpreter
from kernels_pallas.op import RaggedBatch, StateSpec, clear_padding, decode_tokens, put
from kernels_pallas.rows import by_rows
from kernels_pallas.scalar_decay_tpu import LANES, TILE, Block, C, Recurrence, Stream, padded, plan
from kernels_pallas.scalar_decay_tpu import prefill as run

GROUP = 64  # rows whose tails are copied at once: enough copies to hide the latency of each

Ref = Any


def gated_short_conv(
    mixed: Float[Array, "T 3 c"],
    weight: Float[Array, "W c"],
    pool: Float[Array, "L N W-1 c"],
    layer: int,
    batch: RaggedBatch,
) -> tuple[Float[Array, "T c"], Float[Array, "L N W-1 c"]]:
    """One gated convolution layer between its projections, as `xla.gated_short_conv`.

    Raises NotImplementedError unless activations and tails are both bfloat16 or both float32, and whole tiles wide.
    """
    channels, dtypes = mixed.shape[2], {str(mixed.dtype), str(pool.dtype)}
    if dtypes not in ({"bfloat16"}, {"float32"}) or channels % LANES:
        raise NotImplementedError(
            f"short_conv on a TPU wants bfloat16 or float32 throughout and channels in multiples of {LANES}, got"
            f" {', '.join(sorted(dtypes))} and {channels} channels; use backend 'xla'"
        )

    def prefill(pools: tuple[Array, ...], batch: RaggedBatch) -> tuple[Array, tuple[Array, ...]]:
        return _prefill(mixed, weight, pools, layer, batch)

    def step(pools: tuple[Array, ...], batch: RaggedBatch) -> tuple[Array, tuple[Array, ...]]:
        out, pools = _decode(mixed, weight, pools, layer, batch)
        return clear_padding(out, batch), pools

    out, (pool,) = by_rows(step, prefill, (pool,), batch)
    return out, pool


def fits(memory: StateSpec, dtype: str) -> bool:
    """Whether the kernels have the shapes and dtypes of a layer that remembers this and computes in `dtype`."""
    (tail,) = memory.arrays
    return dtype in ("bfloat16", "float32") and tail.dtype == dtype and tail.shape[1] % LANES == 0


# -------------------------------------------------------------------------------------------------- rows that prefill


def _prefill(
    mixed: Array, weight: Array, pools: tuple[Array, ...], layer: int, batch: RaggedBatch
) -> tuple[Float[Array, "T c"], tuple[Array, ...]]:
    tokens, _, channels = mixed.shape
    count = padded(tokens)
    parts = jnp.pad(mixed, ((0, count - tokens), (0, 0), (0, 0))).transpose(1, 0, 2)
    recurrence = Recurrence(
        "short_conv_prefill",
        lambda block: _each_tile(block, _convolve),
        lambda block: _each_tile(block, _finish),
        (Stream(parts, 1),),
        (),
        (weight.astype(jnp.float32),),
        channels,
        mixed.dtype,
        (((shelf_rows(C), LANES), jnp.float32),),
    )
    out, pools = run(recurrence, pools, plan(layer, batch, count))
    return out[:tokens], pools


def _each_tile(block: Block, act: Any) -> None:
    lax.fori_loop(0, block.raw.shape[0], lambda tile, _: act(block, tile, _columns(tile)), None)


def _columns(tile: Any) -> Any:
    return pl.ds(pl.multiple_of(tile * LANES, LANES), LANES)


def _convolve(block: Block, tile: Any, columns: Any) -> None:
    """128 channels of a chunk, and their tails."""
    window, (tail,), (stage,), shelf = block.windows[0], block.memory, block.stage, block.scratch[0]
    gated = _gated(window[0, :, columns], window[2, :, columns])
    shelve(shelf, gated, tail[:, columns], block.offset)
    block.raw[tile, pl.ds(block.offset, C), :] = convolved(shelf, block.constants[0][:, columns], block.offset, C)
    kept = tail.shape[0]
    tail[:, columns] = tail_after(shelf, block.offset, block.length, kept).astype(tail.dtype)

    @pl.when(block.snapped)
    def _() -> None:
        stage[:, columns] = tail_after(shelf, block.offset, block.taken, kept).astype(stage.dtype)


def _finish(block: Block, tile: Any, columns: Any) -> None:
    out_gate = block.windows[0][1, :, columns].astype(jnp.float32)
    block.out[:, columns] = (out_gate * block.raw[tile]).astype(block.out.dtype)


def _gated(in_gate: Array, x: Array) -> Array:
    """As the tail keeps it, so that pieces equal the whole."""
    return (in_gate.astype(jnp.float32) * x.astype(jnp.float32)).astype(x.dtype)


# ---------------------------------------------------------------------------------------------------- rows in decode


def _decode(
    mixed: Array, weight: Array, pools: tuple[Array, ...], layer: int, batch: RaggedBatch
) -> tuple[Float[Array, "T c"], tuple[Array, ...]]:
    """All rows in decode; their tokens are the first ones. Outputs of other tokens are undefined."""
    (pool,), (tokens, _, channels) = pools, mixed.shape
    count = padded(min(tokens, batch.rows))
    group = GROUP if count % GROUP == 0 else TILE
    used = min(count, tokens)
    parts = jnp.pad(mixed[:used], ((0, count - used), (0, 0), (0, 0))).transpose(1, 0, 2)
    tail = pltpu.VMEM((group, *pool.shape[2:]), pool.dtype)
    line = pltpu.VMEM((group, channels), jnp.float32)
    lists = (jnp.full((1,), layer, jnp.int32), *_slots_by_token(batch, count))
    out, pool = pl.pallas_call(
        _decode_group,
        out_shape=[jax.ShapeDtypeStruct((count, channels), mixed.dtype), jax.typeof(pool)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(lists),
            grid=(count // group,),
            in_specs=[
                pl.BlockSpec((3, group, channels), lambda index, *_: (0, index, 0)),
                pl.BlockSpec(memory_space=pltpu.VMEM),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[
                pl.BlockSpec((group, channels), lambda index, *_: (index, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            scratch_shapes=[tail, line, line, pltpu.SemaphoreType.DMA((3,))],
        ),
        input_output_aliases={len(lists) + 2: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpreter(),
        name="short_conv_decode",
    )(*lists, parts, weight.astype(jnp.float32), pool)
    return jnp.pad(out[:used], ((0, tokens - used), (0, 0))), (pool,)


def _slots_by_token(batch: RaggedBatch, count: int) -> tuple[Array, ...]:
    """Slots to read, to write and of the snapshot of each token in decode; 0 where there is nothing to do."""
    token = decode_tokens(batch, count)
    read = jnp.where(batch.seen > 0, batch.read_slot, 0)
    return tuple(
        put(jnp.zeros((count,), jnp.int32), token, slot) for slot in (read, batch.write_slot, batch.snapshot_slot)
    )


def _decode_group(
    layer: Ref,
    read: Ref,
    write: Ref,
    snapshot: Ref,
    parts: Ref,
    weight: Ref,
    _: Ref,
    out: Ref,
    pool: Ref,
    *scratch: Ref,
) -> None:
    """Tails of the rows in, one step of each row, tails out."""
    tails, gated, lines, signals = scratch
    group, kept = tails.shape[0], tails.shape[1]
    first = pl.program_id(0) * group

    def copies(slots: Ref, signal: int, act: Any) -> None:
        def one(row: Any, _: None) -> None:
            slot = slots[first + row]
            ends = (pool.at[layer[0], slot], tails.at[row])
            source, target = ends if signal == 0 else ends[::-1]
            pl.when(slot > 0)(lambda: act(pltpu.make_async_copy(source, target, signals.at[signal])))

        lax.fori_loop(0, group, one, None)

    tails[...] = jnp.zeros(tails.shape, tails.dtype)
    copies(read, 0, lambda copy: copy.start())
    gated[...] = _gated(parts[0], parts[2]).astype(jnp.float32)
    copies(read, 0, lambda copy: copy.wait())

    def step(row: Any, _: None) -> None:
        window = jnp.concatenate([tails[row].astype(jnp.float32), gated[pl.ds(row, 1), :]])
        total = window[0:1] * weight[0:1, :]
        for tap in range(1, kept + 1):
            total = total + window[tap : tap + 1] * weight[tap : tap + 1, :]
        lines[pl.ds(row, 1), :] = total
        tails[row] = window[1:].astype(tails.dtype)

    lax.fori_loop(0, group, step, None)
    for slots, signal in ((write, 1), (snapshot, 2)):
        copies(slots, signal, lambda copy: copy.start())
    out[...] = (parts[1].astype(jnp.float32) * lines[...]).astype(out.dtype)
    for slots, signal in ((write, 1), (snapshot, 2)):
        copies(slots, signal, lambda copy: copy.wait())
