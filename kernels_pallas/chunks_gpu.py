"""What the prefill kernels of the linear kinds share on a Hopper GPU: the list of work, and tiles of 64 x 64.

Rows that prefill are cut into chunks of 64 tokens from their first new token. `Work` lists the rows, longest first, and
all chunks, as int32 tables that the kernels read. Tiles are bfloat16, tiled and swizzled for the tensor cores. A row
starts at any token, so tiles are streamed by copies that know the swizzle but not the tiling: a tiled copy would take
its token index in units of 8.

This module knows no kind of attention.

Letters: B rows, T tokens, H heads, K key width, V value width, C chunk, n chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.mosaic_gpu import interpreter
from kernels_pallas.op import CHUNK, RaggedBatch

C = CHUNK
F32, BF16 = jnp.float32, jnp.bfloat16
TILE = (C, C)
TILED = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
TRANSFORMS = (plgpu.TilingTransform((8, C)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
BLOCKS = 132  # multiprocessors of an H100 or H200, one persistent block each

# Columns of the table of rows. A slot of 0 is none; a row that starts from zero has none to read.
START, LENGTH, READ, WRITE, SNAPSHOT, SNAPSHOT_LENGTH, FIRST_CHUNK = range(7)


# ----------------------------------------------------------------------------------------------------- the list of work


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Work:
    """The rows that prefill and their chunks.

    Chunks of a row follow one another. `counts` holds the rows that prefill, the tokens before the first of them (those
    of rows in decode) and the first padding token.
    """

    rows: Int[Array, "B 8"]  # longest first; columns as named above
    chunks: Int[Array, "n 3"]  # first token; tokens, none of an unused chunk; of a row's first chunk the row + 1
    tokens: Int[Array, "n C"]  # T where the chunk has none
    counts: Int[Array, "3"]


def plan(batch: RaggedBatch, tokens: int) -> Work:
    """The work of the rows that prefill, out of `tokens` packed tokens."""
    rows = batch.rows
    lengths = jnp.where(batch.in_decode, 0, batch.lengths)
    ends = jnp.cumsum((lengths + C - 1) // C)
    first_chunk = ends - (lengths + C - 1) // C
    read = jnp.where(batch.seen > 0, batch.read_slot, 0)
    columns = [batch.query_start[:-1], lengths, read, batch.write_slot, batch.snapshot_slot, batch.snapshot_length]
    table = jnp.stack([*columns, first_chunk, jnp.zeros_like(lengths)], axis=1).astype(jnp.int32)
    index = jnp.arange(rows)
    longer = (lengths[None, :] > lengths[:, None]) | (
        (lengths[None, :] == lengths[:, None]) & (index[None, :] < index[:, None])
    )
    ordered = jnp.zeros_like(table).at[longer.sum(axis=1)].set(table)
    chunks, tokens_nC = _chunk_tables(batch, lengths, ends, first_chunk, tokens)
    decoded = batch.query_start[jnp.minimum(batch.decodes, rows)]
    counts = jnp.stack([(lengths > 0).sum(), decoded, batch.query_start[-1]]).astype(jnp.int32)
    return Work(ordered, chunks, tokens_nC, counts)


def _chunk_tables(
    batch: RaggedBatch, lengths: Array, ends: Array, first_chunk: Array, tokens: int
) -> tuple[Int[Array, "n 3"], Int[Array, "n C"]]:
    count = (tokens + batch.rows * (C - 1)) // C  # each row adds less than one chunk
    index = jnp.arange(count, dtype=jnp.int32)
    row = (index[:, None] >= ends[None, :]).sum(axis=1)  # one comparison of all: a search would be a loop of launches
    used = row < batch.rows
    row = jnp.where(used, row, 0)
    inside = (index - first_chunk[row]) * C
    length = jnp.where(used, jnp.clip(lengths[row] - inside, 0, C), 0)
    start = jnp.where(used, batch.query_start[row] + inside, 0)
    offset = jnp.arange(C, dtype=jnp.int32)[None, :]
    token = jnp.where(offset < length[:, None], start[:, None] + offset, tokens)
    first = jnp.where(used & (inside == 0), row + 1, 0)
    return jnp.stack([start, length, first], axis=1).astype(jnp.int32), token.astype(jnp.int32)


def fits_tiles(key_heads: int, state: tuple[int, ...]) -> bool:
    """Whether the prefill kernels have states of this shape `[H, V, K]`, whose heads share so many heads of keys."""
    heads, value_width, key_width = state
    whole = heads % key_heads == 0 and heads * value_width % (2 * C) == 0
    return key_width == 2 * C and value_width in (C, 2 * C) and whole


def clear_behind(values: Float[Array, "T c"], batch: RaggedBatch) -> Float[Array, "T c"]:
    """`values` with zeros selected behind the last row's last token, whatever they hold there."""
    real = jnp.arange(values.shape[0], dtype=jnp.int32) < batch.query_start[-1]
    return jnp.where(real[:, None], values, jnp.zeros((), values.dtype))


def check_tokens(q: Array, v: Array, pool: Array) -> None:
    """Raises NotImplementedError for dtypes and widths that the prefill kernels do not have."""
    if q.dtype != BF16 or v.dtype != BF16 or pool.dtype != F32:
        raise NotImplementedError(
            f"wanted bfloat16 tokens and a float32 state, got {q.dtype}, {v.dtype}, {pool.dtype}: use backend 'xla'"
        )
    if not fits_tiles(q.shape[1], pool.shape[2:]):
        raise NotImplementedError(
            f"wanted keys of 128 channels, values of 64 or 128, 128 in all, whole groups of heads, got q {q.shape}, "
            f"v {v.shape}: use backend 'xla'"
        )


# -------------------------------------------------------------------------------------------------------- tiles in SMEM


def interpreting() -> bool:
    """Whether kernels are traced for the interpreter, which has one layout and no operands in registers."""
    return interpreter() is not None


def compiler_params() -> plgpu.CompilerParams:
    """Layouts are chosen by hand; `exp2` may be approximate, as it decays bfloat16 operands."""
    return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def tiles(*lead: int) -> Any:
    """`[*lead, 64, 64]` bfloat16 for the tensor cores."""
    return plgpu.SMEM((*lead, *TILE), BF16, transforms=TRANSFORMS)


def stage_tile() -> Any:
    """The tile through which the interpreter takes operands in registers; next to nothing on the device."""
    return tiles() if interpreting() else plgpu.SMEM((8,), F32)


def streamed(ref: Any, *index: Any) -> Any:
    """One tile of `ref`, as made by `tiles`, as the source or target of a copy from or to any token."""
    if interpreting():
        return ref.at[index]
    *alias, swizzle, _ = ref.transforms
    memory = type(ref)(ref.ref, tuple(alias))
    flat = memory.at[index].reshape(*TILE)  # a tile of 64 columns is its rows, one after another
    return type(flat)(flat.ref, (*flat.transforms, swizzle))


def readable(values: Float[Array, "T *n"]) -> Float[Array, "T *n"]:
    """`values`, for the interpreter with a chunk more: the copy engine fills what lies past the end with zeros."""
    if not interpreting():
        return values
    return jnp.pad(values, [(0, C)] + [(0, 0)] * (values.ndim - 1))


def product(pairs: Sequence[tuple[Any, Any]], stage: Any, start: Array | None = None) -> Float[Array, "C C"]:
    """`start + sum of a @ b` in float32 on the tensor cores; waits for the result.

    Args:
      pairs: `a` is a tile in SMEM or a bfloat16 array in registers, `b` a tile in SMEM.
      stage: a tile of the calling warpgroup, through which the interpreter takes an `a` in registers.
    The barrier keeps arithmetic on the result behind the wait, on which it does not otherwise depend.
    """
    if interpreting():
        total = pl.run_scoped(lambda acc: _multiply_staged(acc, pairs, stage), plgpu.ACC(TILE, F32))
        return total if start is None else start + total

    def multiply(acc: Any) -> None:
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)

    def multiply_fresh(acc: Any) -> Array:
        multiply(acc)
        return acc[...]

    if start is None:
        return lax.optimization_barrier(pl.run_scoped(multiply_fresh, plgpu.ACC(TILE, F32)))
    return lax.optimization_barrier(pl.run_state(multiply)(plgpu.ACC.init(start)))


def _multiply_staged(acc: Any, pairs: Sequence[tuple[Any, Any]], stage: Any) -> Array:
    for a, b in pairs:
        held = type(a) is not type(b)  # an array in registers, where b is a view of SMEM
        if held:
            stage[...] = a
            plgpu.commit_smem()
        plgpu.wgmma(acc, stage if held else a, b)
    return acc[...]


def products(terms: Sequence[tuple[Array, Sequence[Any], Any]], stage: Any) -> list[Array]:
    """`start + sum of a @ b` for each `(start, [a, ...], b)`, as `product`, with one wait for all."""
    if interpreting():
        return [product([(a, b) for a in several], stage, start) for start, several, b in terms]

    def multiply(accs: Any) -> None:
        for acc, (_, several, b) in zip(accs, terms, strict=True):
            for a in several:
                plgpu.wgmma(acc, a, b)

    starts = tuple(plgpu.ACC.init(start) for start, _, _ in terms)
    return list(lax.optimization_barrier(pl.run_state(multiply)(starts)))


def iota(dimension: int, shape: tuple[int, int] = TILE) -> Int[Array, "r c"]:
    """The index along a dimension, of every element."""
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=TILED)


def along_rows(values: Float[Array, "r"], shape: tuple[int, int] = TILE) -> Float[Array, "r c"]:
    """`values[i]` in all of row i."""
    return lax.broadcast_in_dim(values, shape, [0])


def along_columns(values: Float[Array, "c"], shape: tuple[int, int] = TILE) -> Float[Array, "r c"]:
    """`values[j]` in all of column j."""
    return lax.broadcast_in_dim(values, shape, [1])


def zeros(shape: tuple[int, int] = TILE) -> Float[Array, "r c"]:
    """A tile of zeros in registers."""
    return plgpu.layout_cast(jnp.zeros(shape, F32), TILED)
