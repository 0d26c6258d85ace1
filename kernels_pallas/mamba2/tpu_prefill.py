"""Mamba2 over the rows that prefill, on TPU: one kernel from the projections to the gated and normed output.

The recurrence of `xla.py` by chunks of 128 tokens. The work goes by lane tiles of 128 value channels, one head or two:
a vector over the tokens that differs by head is spread over the lanes of its values by a gather of lanes.

Sums of log decays over (j, i] are differences of running totals, which lose digits behind one strong decay. So a log
decay is split in a multiple of 1/16, whose totals are exact, and a rest, whose totals stay small (`_make_totals`).

Letters: T tokens, H heads, G groups, V head width, K state width, C chunk, c channels, N slots, L layers of the pool.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels_pallas.convolution_tpu import convolved, shelf_rows, shelve, tail_after
from kernels_pallas.mamba2.xla import UNLIMITED, Mamba2Weights
from kernels_pallas.op import RaggedBatch
from kernels_pallas.scalar_decay_tpu import (
    LANES,
    WINDOW,
    Block,
    C,
    Recurrence,
    Stream,
    dot,
    padded,
    plan,
    sigmoid,
    split,
)
from kernels_pallas.scalar_decay_tpu import prefill as run

LOG2_E = 1.4426950408889634
STEPS = 16.0  # a log decay is split at multiples of 1 / STEPS
STRONGEST = -256.0  # log2 of a decay that is 0 in float32; totals of a chunk stay exact
MASKED = -1e30
UNROLLED = 4  # lane tiles whose chains of products overlap


@dataclass(frozen=True)
class _Settings:
    slabs: int  # lane tiles of a group
    members: int  # heads of a lane tile
    groups: int
    epsilon: float
    norm_first: bool
    step_limit: tuple[float, float]
    normed: bool

    @property
    def width(self) -> int:
        """V."""
        return LANES // self.members


def mamba2_prefill(
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
    """One Mamba2 layer between its projections, as `xla.mamba2`, for a batch without rows in decode.

    Raises NotImplementedError unless heads are 64 or 128 wide, states 128, and a group's heads whole tiles of 128.
    """
    heads, width, key_width = state.shape[2:]
    _check(heads, width, key_width, groups)
    slabs, members = heads * width // groups // LANES, LANES // width
    normed = weights.output_norm is not None
    settings = _Settings(slabs, members, groups, epsilon, norm_first, step_limit, normed)
    count, spread = padded(mixed.shape[0]), -(-heads // LANES) * LANES
    streams = [
        Stream(_grown(x, count, wide)) for x, wide in ((mixed, mixed.shape[1]), (z, z.shape[1]), (step_size, spread))
    ]
    recurrence = Recurrence(
        "mamba2_prefill",
        lambda block: _scan(settings, block),
        lambda block: _finish(settings, block),
        tuple(streams),
        (),
        _tables(weights, width, spread),
        heads * width,
        mixed.dtype,
        _scratch(settings, spread, mixed.dtype),
    )
    out, (state, tail) = run(recurrence, (state, tail), plan(layer, batch, count))
    return out[: mixed.shape[0]], state, tail


def _check(heads: int, width: int, key_width: int, groups: int) -> None:
    if width not in (64, LANES) or key_width != LANES or heads * width // groups % LANES:
        raise NotImplementedError(
            f"mamba2 on a TPU wants heads of width 64 or 128, a state of width 128, and groups of whole multiples of"
            f" 128 value channels, got {heads} heads of {width} by {key_width} in {groups} groups; use backend 'xla'"
        )


def _grown(x: Array, tokens: int, channels: int) -> Array:
    return jnp.pad(x, ((0, tokens - x.shape[0]), (0, channels - x.shape[1])))


_CONVOLUTION, _CONVOLUTION_BIAS, _RATE, _STEP_BIAS, _SKIP, _NORM = range(6)
# By token and head: the running total of log2 decays and its two parts, and factors: the step, what is left of the
# state before the chunk, step and decay of a value until the end of the chunk, and until the snapshot.
_TOTAL, _COARSE, _FINE, _STEP, _SINCE, _KEPT, _KEPT_TAKEN = range(7)
_BEFORE, _AFTER = range(2)  # B and C of a group


def _tables(weights: Mamba2Weights, width: int, spread: int) -> tuple[Array, ...]:
    """The weights as lines of float32."""
    rate = -jnp.exp(weights.decay_log.astype(jnp.float32)) * LOG2_E
    by_head = [jnp.pad(x.astype(jnp.float32), (0, spread - x.shape[0]))[None] for x in (rate, weights.step_bias)]
    skip = jnp.repeat(weights.skip.astype(jnp.float32), width)[None]
    norm = jnp.ones_like(skip) if weights.output_norm is None else weights.output_norm.astype(jnp.float32)[None]
    convolution = (weights.convolution.astype(jnp.float32), weights.convolution_bias.astype(jnp.float32)[None])
    return (*convolution, *by_head, skip, norm)


def _scratch(settings: _Settings, spread: int, dtype: Any) -> tuple[Any, ...]:
    """Values by token and head, totals with the heads in front, shelves, B and C, their products, gated outputs."""
    f32, tiles = jnp.float32, spread // LANES
    totals, by_head = ((7, tiles, C, LANES), f32), ((3, spread, C), f32)
    shelves, keys = ((UNROLLED, shelf_rows(C), LANES), f32), ((2, C, LANES), dtype)
    return totals, by_head, shelves, keys, ((C, C), f32), ((settings.slabs, WINDOW, LANES), f32)


# ------------------------------------------------------------------------------------------------------------- decays


def _scan(settings: _Settings, block: Block) -> None:
    """All heads of one chunk."""
    _make_totals(settings, block)

    @pl.when(block.snapped)
    def _() -> None:
        lax.fori_loop(0, settings.groups, lambda group, _: _stage_group(settings, block, group), None)

    lax.fori_loop(0, settings.groups, lambda group, _: _scan_group(settings, block, group), None)


def _make_totals(settings: _Settings, block: Block) -> None:
    """All that the heads' steps and decays give, 0 steps and decays of 1 behind the last token."""
    totals, by_head, shelf = block.scratch[0], block.scratch[1], block.scratch[2].at[0]
    earlier = (_iota(0) >= _iota(1)).astype(jnp.float32)
    for tile in range(totals.shape[1]):
        lanes = pl.ds(tile * LANES, LANES)
        shelf[:WINDOW, :] = block.windows[2][:, lanes].astype(jnp.float32)
        x = shelf[pl.ds(block.offset, C), :] + block.constants[_STEP_BIAS][:, lanes]
        step = jnp.clip(_softplus(x), *settings.step_limit)
        step = jnp.where(_iota(0) < block.length, step, 0.0)
        decay = jnp.maximum(step * block.constants[_RATE][:, lanes], STRONGEST)
        rounded = jnp.round(decay * STEPS) * (1.0 / STEPS)
        coarse, fine = dot(earlier, rounded, 1, 0), dot(earlier, decay - rounded, 1, 0)
        for part, total in ((_TOTAL, coarse + fine), (_COARSE, coarse), (_FINE, fine)):
            totals[part, tile] = total
            by_head[part, lanes] = total.T
        totals[_STEP, tile] = step
        totals[_SINCE, tile] = jnp.exp2(coarse + fine)
        for part, last in ((_KEPT, C - 1), (_KEPT_TAKEN, block.taken - 1)):
            left = (_row(coarse, last) - coarse) + (_row(fine, last) - fine)
            totals[part, tile] = step * jnp.exp2(jnp.where(_iota(0) <= last, left, MASKED))


def _row(x: Float[Array, "C 128"], index: Any) -> Float[Array, "1 128"]:
    return jnp.sum(jnp.where(_iota(0) == index, x, 0.0), axis=0, keepdims=True)


def _iota(axis: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, (C, LANES), axis)


def _softplus(x: Array) -> Array:
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def _spread(settings: _Settings, block: Block, part: int, slab: Any) -> Float[Array, "C 128"]:
    """A value by token and head, in every lane of the values of a lane tile's heads."""
    head = slab * settings.members
    lane = head % LANES + _iota(1) // settings.width
    return jnp.take_along_axis(block.scratch[0][part, head // LANES], lane, axis=1)


def _decay_between(block: Block, head: Any) -> Float[Array, "C C"]:
    """The decay over (j, i] of a head; 0 where j is later.

    Factors that are rounded to bfloat16 do with the difference of whole totals: its error is smaller.
    """
    totals, by_head = block.scratch[:2]
    lane = jnp.full((C, LANES), head % LANES, jnp.int32)
    exponent = jnp.zeros((C, C), jnp.float32)
    for part in (_COARSE, _FINE) if block.out.dtype == jnp.float32 else (_TOTAL,):
        here = jnp.take_along_axis(totals[part, head // LANES], lane, axis=1)
        exponent = exponent + (here - by_head[part, pl.ds(head, 1), :])
    return jnp.exp2(jnp.where(_iota(0) >= _iota(1), exponent, MASKED))


# ------------------------------------------------------------------------------------------------------ the recurrence


def _scan_group(settings: _Settings, block: Block, group: Any) -> None:
    keys, scores = block.scratch[3:5]
    _load_keys(settings, block, group, _keep_tail)
    scores[...] = dot(keys[_AFTER], keys[_BEFORE], 1, 1)
    unrolled = next(n for n in (UNROLLED, 2, 1) if settings.slabs % n == 0)

    def slabs(index: Any, _: None) -> None:
        _scan_slabs(settings, block, group, index * unrolled, unrolled)

    lax.fori_loop(0, settings.slabs // unrolled, slabs, None)


def _load_keys(settings: _Settings, block: Block, group: Any, keep_tail: Callable[[Block, Any, int], None]) -> None:
    """B and C of a group in the dtype of the products, and their tails."""
    keys = block.scratch[3]
    for vector in (_BEFORE, _AFTER):
        tile = group * (settings.slabs + 2) + settings.slabs + vector
        keys[vector] = _channels(block, tile, vector).astype(keys.dtype)
        keep_tail(block, tile, vector)


def _scan_slabs(settings: _Settings, block: Block, group: Any, first: Any, count: int) -> None:
    """Raw outputs and the next states of some lane tiles of a group: each step for all of them, as products start in
    order; and all is read before any is stored, so that their chains overlap.
    """
    keys, scores, each = block.scratch[3], block.scratch[4][...], range(count)
    dtype = keys.dtype
    columns = [group * (settings.slabs + 2) + first + inside for inside in each]
    tiles = [group * settings.slabs + first + inside for inside in each]
    heads = [tile * settings.members for tile in tiles]
    starts = [block.memory[0][pl.ds(head, settings.members)].reshape(LANES, LANES) for head in heads]
    xs = [_channels(block, column, inside) for inside, column in zip(each, columns, strict=True)]
    carried = [dot(keys[_AFTER], start.astype(dtype), 1, 1) for start in starts]
    kept = [x * _spread(settings, block, _KEPT, tile) for x, tile in zip(xs, tiles, strict=True)]
    after = [_after(settings, block, *parts, C - 1) for parts in zip(starts, heads, kept, strict=True)]
    added = [(x * _spread(settings, block, _STEP, tile)).astype(dtype) for x, tile in zip(xs, tiles, strict=True)]
    outs = [x * _spread(settings, block, _SINCE, tile) for x, tile in zip(carried, tiles, strict=True)]
    for member in range(settings.members):
        decays = [_decay_between(block, head + member) for head in heads]
        mine = [jnp.where(_iota(1) // settings.width == member, x, jnp.zeros_like(x)) for x in added]
        weighted = [(scores * decay).astype(dtype) for decay in decays]
        outs = [out + dot(w, values, 1, 0) for out, w, values in zip(outs, weighted, mine, strict=True)]
    for inside, tile, head in zip(each, tiles, heads, strict=True):
        skipped = xs[inside] * block.constants[_SKIP][:, _columns(tile)]
        block.raw[tile, pl.ds(block.offset, C), :] = outs[inside] + skipped
        rows = after[inside].reshape(settings.members, settings.width, LANES)
        block.memory[0][pl.ds(head, settings.members)] = rows
        _keep_tail(block, columns[inside], inside)


def _after(
    settings: _Settings, block: Block, start: Float[Array, "128 K"], head: Any, kept: Float[Array, "C 128"], last: Any
) -> Float[Array, "128 K"]:
    """The state of a lane tile after token `last`, from what is kept of each token's values."""
    since, keys, rows = block.scratch[0].at[_SINCE, head // LANES], block.scratch[3], []
    for member in range(settings.members):
        shape = (settings.width, LANES)
        lane = jnp.full(shape, (head + member) % LANES, jnp.int32)
        rows.append(jnp.take_along_axis(jnp.broadcast_to(since[pl.ds(last, 1), :], shape), lane, axis=1))
    added = sum(dot(part, keys[_BEFORE], 0, 0) for part in split(kept, keys.dtype))
    return start * jnp.concatenate(rows) + added


def _stage_group(settings: _Settings, block: Block, group: Any) -> None:
    """The memory of a group after the tokens of a snapshot inside the chunk."""
    first = group * (settings.slabs + 2)
    _load_keys(settings, block, group, _stage_tail)

    def slab(index: Any, _: None) -> None:
        tile = group * settings.slabs + index
        head, last = tile * settings.members, block.taken - 1
        x = _channels(block, first + index, 0)
        _stage_tail(block, first + index, 0)
        states = pl.ds(head, settings.members)
        start = block.memory[0][states].reshape(LANES, LANES)
        after = _after(settings, block, start, head, x * _spread(settings, block, _KEPT_TAKEN, tile), last)
        block.stage[0][states] = after.reshape(settings.members, settings.width, LANES)

    lax.fori_loop(0, settings.slabs, slab, None)


# ---------------------------------------------------------------------------------------------------- the convolution


def _columns(tile: Any) -> Any:
    return pl.ds(pl.multiple_of(tile * LANES, LANES), LANES)


def _channels(block: Block, tile: Any, inside: int) -> Float[Array, "C 128"]:
    """128 channels behind convolution and SiLU, zeros behind the last token. Their inputs stay on the shelf."""
    columns, shelf = _columns(tile), block.scratch[2].at[inside]
    shelve(shelf, block.windows[0][:, columns], block.memory[1][:, columns], block.offset)
    x = convolved(shelf, block.constants[_CONVOLUTION][:, columns], block.offset, C)
    x = x + block.constants[_CONVOLUTION_BIAS][:, columns]
    return jnp.where(_iota(0) < block.length, x * sigmoid(x), 0.0)


def _keep_tail(block: Block, tile: Any, inside: int) -> None:
    _move_tail(block, tile, inside, block.memory[1], block.length)


def _stage_tail(block: Block, tile: Any, inside: int) -> None:
    _move_tail(block, tile, inside, block.stage[1], block.taken)


def _move_tail(block: Block, tile: Any, inside: int, target: Any, count: Any) -> None:
    """Store the tail of the 128 channels whose inputs are on a shelf, after `count` tokens."""
    tail = tail_after(block.scratch[2].at[inside], block.offset, count, target.shape[0])
    target[:, _columns(tile)] = tail.astype(target.dtype)


# ------------------------------------------------------------------------------------------------ output norm and gate


def _finish(settings: _Settings, block: Block) -> None:
    """The gate and the norm over each group, of all rows of the window."""
    z, weight, gated = block.windows[1], block.constants[_NORM], block.scratch[5]
    count = settings.slabs
    unrolled = 2 if count % 2 == 0 else 1

    def silu(tile: Any) -> Array:
        x = z[:, _columns(tile)].astype(jnp.float32)
        return x * sigmoid(x)

    def group(index: Any, _: None) -> None:
        def add(slab: Any, total: Array) -> Array:
            tile = index * count + slab
            y = block.raw[tile]
            if not settings.norm_first:
                y = y * silu(tile)
                gated[slab] = y
            return total + y * y

        total = lax.fori_loop(0, count, add, jnp.zeros((WINDOW, LANES), jnp.float32), unroll=unrolled)
        mean = jnp.sum(total, axis=1, keepdims=True) * (1.0 / (count * LANES))
        factor = lax.rsqrt(mean + settings.epsilon) if settings.normed else jnp.ones_like(mean)

        def end(slab: Any, _: None) -> None:
            tile = index * count + slab
            y = block.raw[tile] * silu(tile) if settings.norm_first else gated[slab]
            y = y * factor * weight[:, _columns(tile)]
            block.out[:, _columns(tile)] = y.astype(block.out.dtype)

        lax.fori_loop(0, count, end, None, unroll=unrolled)

    lax.fori_loop(0, settings.groups, group, None)
