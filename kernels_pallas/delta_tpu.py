"""What the two kinds with a delta rule share in prefill on TPU: a chunk's inputs, its triangular system, its outputs.

A chunk is that of the frame, 128 tokens: the side of a matrix unit, so that the products of one head fill it. The u_i
of a chunk solve a unit lower triangular system; `unit_lower_inverse` inverts it, `delta_update` gives the outputs, the
state after the chunk, and that after its first 64 tokens, where snapshots are taken.

Operands of products have the dtype of the activations (bfloat16 costs one pass of a matrix unit, float32 six); sums,
decays, states and the inverse of the smallest blocks are float32. Knows neither kind's gates nor decays.

Letters: C tokens of a chunk, H value heads, K key width, V value width, W convolution width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels_pallas.convolution_tpu import convolved, shelve, tail_after
from kernels_pallas.norm import L2_EPSILON
from kernels_pallas.op import CHUNK
from kernels_pallas.scalar_decay_tpu import LANES, TILE, Block, C, dot

LOG2_E = 1.4426950408889634
BASE = 16  # side of the blocks that are inverted exactly: two registers hold those of all tokens of a chunk
STATE, TAIL = 0, 1  # of a row's memory

Ref = Any
Index = Any  # an int32 scalar of the kernel, or an int


def check_widths(kind: str, heads: int, widths: tuple[int, ...]) -> None:
    """Raises NotImplementedError for heads that are not 128 wide, or more heads than lanes."""
    if widths != (LANES, LANES) or heads > LANES:
        raise NotImplementedError(
            f"{kind} on a TPU wants at most {LANES} heads with keys and values {LANES} wide, got {heads} heads with "
            f"values and keys of {widths}; use backend 'xla'"
        )


def lanes(tile: Index) -> Any:
    """The channels of a tile of 128."""
    return pl.ds(pl.multiple_of(tile * LANES, LANES), LANES)


def iota(axis: int) -> Array:
    """Row or column numbers of a `[C, C]` tile."""
    return lax.broadcasted_iota(jnp.int32, (C, C), axis)


def silu(x: Array) -> Array:
    """`x sigmoid(x)`."""
    return silu_of_twice(0.5 * x)


def silu_of_twice(x: Array) -> Array:
    """`2 x sigmoid(2 x)`: two operations and a transcendental one, if whoever makes x can make half of it."""
    return x + x * jnp.tanh(x)


def pad_tokens(x: Float[Array, "T ..."]) -> Float[Array, "t ..."]:
    """T filled up to whole tiles, as copies need it."""
    return jnp.pad(x, ((0, -x.shape[0] % TILE),) + ((0, 0),) * (x.ndim - 1))


def pad_heads(x: Float[Array, "... H"]) -> Float[Array, "... 128"]:
    """One value per head, in the lanes of a register."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, LANES - x.shape[-1]),))


def present(block: Block) -> Array:
    """Whether each row of a chunk `[C, 128]` is a token of it."""
    return iota(0) < block.length


def chunk_rows(block: Block) -> Any:
    """The rows of a window that the chunk has."""
    return pl.ds(block.offset, C)


def per_token(block: Block, stream: int, shelf: Ref, tile: Index = 0) -> Float[Array, "C 128"]:
    """128 channels of a stream for the tokens of the chunk, float32; undefined behind the last of them."""
    window = block.windows[stream]
    shelf[: window.shape[0], :] = window[:, lanes(tile)].astype(jnp.float32)
    return shelf[chunk_rows(block), :]


def column(values: Float[Array, "C 128"], head: Index) -> Float[Array, "C 128"]:
    """Lane `head` of each row, in every lane."""
    return jnp.take_along_axis(values, jnp.full(values.shape, head, jnp.int32), axis=1, mode="promise_in_bounds")


# ------------------------------------------------------------------------------------------------------ chunk's inputs


def convolve(block: Block, weight: Ref, shelves: Ref, first: Index, count: int) -> list[Float[Array, "C 128"]]:
    """`count` tiles of stream 0 after convolution and SiLU, zeros behind the last token; the row's tail goes on.

    weight: half of the convolution's. shelves: one for each tile, so that nothing waits for the tile before.
    """
    tiles = [(shelves.at[index], lanes(first + index)) for index in range(count)]
    tail, kept = block.memory[TAIL], block.memory[TAIL].shape[0]
    for shelf, channels in tiles:
        shelve(shelf, block.windows[0][:, channels], tail[:, channels], block.offset)
    here = present(block)
    out = [
        jnp.where(here, silu_of_twice(convolved(shelf, weight[:, channels], block.offset, C)), 0.0)
        for shelf, channels in tiles
    ]
    for shelf, channels in tiles:
        tail[:, channels] = tail_after(shelf, block.offset, block.length, kept).astype(tail.dtype)
    return out


def keep_tails(block: Block, shelves: Ref, first: Index, count: int) -> None:
    """Put the tails of these tiles in a snapshot inside the chunk, if there is one."""
    tail, kept = block.stage[TAIL], block.stage[TAIL].shape[0]

    @pl.when(block.snapped)
    def _() -> None:
        for index in range(count):
            after = tail_after(shelves.at[index], block.offset, block.taken, kept)
            tail[:, lanes(first + index)] = after.astype(tail.dtype)


def unit(x: Float[Array, "C 128"], scale: float = 1.0) -> Float[Array, "C 128"]:
    """Rows of length `scale`."""
    return x * (scale * lax.rsqrt(jnp.sum(x * x, axis=1, keepdims=True) + L2_EPSILON))


# ---------------------------------------------------------------------------------------------------- the delta update


def solve(
    systems: list[Float[Array, "C C"]], wanted: list[Float[Array, "C V"]], dtype: Any
) -> list[Float[Array, "C V"]]:
    """`(I + a)^{-1} wanted` of strictly lower `a`, for some heads side by side.

    Blocks of 16 are inverted by substitution in float32. Then twice the size at a time, `X <- X - X L X` with L the
    blocks of `a` that join two of X, in products of `dtype` of the rows that change; the last step joins solutions. A
    power series over the whole would cancel huge powers of `a` where keys repeat.
    """
    inverses = [_spread_blocks(x) for x in _invert_blocks([_diagonal_blocks(a) for a in systems])]
    size = 2 * BASE
    while size < C:
        inverses = _join_inverses(systems, inverses, size, dtype)
        size *= 2
    low = [x.astype(dtype) for x in inverses]
    parts = [dot(x, w.astype(dtype)) for x, w in zip(low, wanted, strict=True)]
    joins, nothing = joined_pairs(C), jnp.zeros((C, LANES), dtype)
    links = [
        dot(jnp.where(joins, lower_halves(a, C), 0.0).astype(dtype), part.astype(dtype))
        for a, part in zip(systems, parts, strict=True)
    ]
    lost = [
        dot(lower_halves(x, C), with_lower_halves(nothing, link.astype(dtype), C))
        for x, link in zip(low, links, strict=True)
    ]
    return [with_lower_halves(part, lower_halves(part, C) - less, C) for part, less in zip(parts, lost, strict=True)]


def _join_inverses(systems: list[Array], inverses: list[Array], size: int, dtype: Any) -> list[Array]:
    """Inverses of blocks of `size` from those of half of it: only the lower halves of the blocks change."""
    joins = joined_pairs(size)
    low = [x.astype(dtype) for x in inverses]
    links = [
        dot(jnp.where(joins, lower_halves(a, size), 0.0).astype(dtype), x) for a, x in zip(systems, low, strict=True)
    ]
    nothing = jnp.zeros((C, LANES), dtype)
    lost = [
        dot(lower_halves(x, size), with_lower_halves(nothing, link.astype(dtype), size))
        for x, link in zip(low, links, strict=True)
    ]
    return [with_lower_halves(x, lower_halves(x, size) - less, size) for x, less in zip(inverses, lost, strict=True)]


def lower_halves(x: Float[Array, "C n"], size: int) -> Float[Array, "C/2 n"]:
    """The rows in the lower half of each block of `size` rows."""
    return jnp.concatenate([x[start + size // 2 : start + size] for start in range(0, C, size)])


def with_lower_halves(x: Float[Array, "C n"], rows: Float[Array, "C/2 n"], size: int) -> Float[Array, "C n"]:
    """`x` with other rows in the lower half of each block of `size` rows."""
    half = size // 2
    pairs = [(x[start : start + half], rows[start // 2 : start // 2 + half]) for start in range(0, C, size)]
    return jnp.concatenate([part for pair in pairs for part in pair])


def joined_pairs(size: int) -> Array:
    """Of the rows in lower halves, the columns in the upper half of the same block: `[C / 2, C]`."""
    row, column = (lax.broadcasted_iota(jnp.int32, (C // 2, C), axis) for axis in range(2))
    return (column // size == row // (size // 2)) & (column % size < size // 2)


def _block_of_lane() -> Array:
    return lax.broadcasted_iota(jnp.int32, (BASE, C), 1) // BASE


def _diagonal_blocks(a: Float[Array, "C C"]) -> Float[Array, "16 C"]:
    """The diagonal blocks side by side."""
    blocks = a[:BASE]
    for block in range(1, C // BASE):
        blocks = jnp.where(_block_of_lane() == block, a[block * BASE : (block + 1) * BASE], blocks)
    return blocks


def _spread_blocks(blocks: Float[Array, "16 C"]) -> Float[Array, "C C"]:
    """Blocks side by side put on the diagonal."""
    return jnp.concatenate([jnp.where(_block_of_lane() == block, blocks, 0.0) for block in range(C // BASE)])


def _invert_blocks(systems: list[Float[Array, "16 C"]]) -> list[Float[Array, "16 C"]]:
    """Substitution, a row of all blocks at a time: once row m is known, the rows below lose their share of it."""
    row, lane = (lax.broadcasted_iota(jnp.int32, (BASE, C), axis) for axis in range(2))
    inverses = [jnp.where(row == lane % BASE, 1.0, 0.0)] * len(systems)
    for m in range(BASE - 1):
        at = lane // BASE * BASE + m
        shares = [jnp.take_along_axis(a, at, axis=1, mode="promise_in_bounds") for a in systems]
        inverses = [x - share * x[m : m + 1] for x, share in zip(inverses, shares, strict=True)]
    return inverses


@dataclass(frozen=True)
class Result:
    """What a chunk makes of one head: outputs, and the states after `HALF` and after all of its tokens."""

    out: Float[Array, "C V"]
    half: Float[Array, "V K"]
    final: Float[Array, "V K"]


def scan_heads(
    block: Block, halves: Ref, heads: list[Index], scan: Callable[[list[Float[Array, "V K"]]], list[Result]]
) -> None:
    """Some heads of a chunk: all are read before any is stored, so that their chains of products overlap.

    Args:
      halves: room for a state of each. scan: of the states of all, reads nothing that is stored here.
    """
    starts = [block.memory[STATE][head] for head in heads]
    results = scan(starts)
    for index, (head, result) in enumerate(zip(heads, results, strict=True)):
        block.raw[head, chunk_rows(block), :] = result.out
        block.memory[STATE][head] = result.final
        halves[index] = result.half

    @pl.when(block.snapped)
    def _() -> None:
        for index, head in enumerate(heads):
            block.stage[STATE][head] = halves[index]


HALF = CHUNK  # tokens of a snapshot inside a chunk: the only multiple of CHUNK there is


# ------------------------------------------------------------------------------------------------------ chunk's outputs


def finish_heads(block: Block, weight: Ref, gates: int, epsilon: float, activation: Callable[[Array], Array]) -> None:
    """`RMS(out) weight activation(gate)` of each head, for all rows of the window; stream `gates` has the gates."""
    gate = block.windows[gates]

    def head(index: Index) -> None:
        raw, channels = block.raw[index], lanes(index)
        normed = raw * lax.rsqrt(jnp.mean(raw * raw, axis=1, keepdims=True) + epsilon) * weight[...]
        opened = activation(gate[:, channels].astype(jnp.float32))
        block.out[:, channels] = (normed * opened).astype(block.out.dtype)

    def some(heads: list[Index]) -> None:
        for index in heads:
            head(index)

    each_unrolled(block.raw.shape[0], 2, some)


def each_unrolled(count: int, unrolled: int, act: Callable[[list[Index]], None]) -> None:
    """`act` on indices below `count`, as many at a time as divide it, at most `unrolled`: their products overlap."""
    step = next(n for n in range(min(unrolled, count), 0, -1) if count % n == 0)

    def some(index: Index, _: None) -> None:
        act([index * step + inside for inside in range(step)])

    lax.fori_loop(0, count // step, some, None)
