"""Lightning attention over the rows that prefill, on TPU: one kernel from the projections to the gated output.

The recurrence of `xla.py` by chunks of 128 tokens. Queries, keys and values are read with the heads in front, as the
product that makes them leaves them: the tokens of a head then lie together. Of bfloat16, two tokens share a word:
a chunk that starts at an odd row of its window is put together from halves of words.

Heads are taken some at a time, and each step is done for all of them before the next: products start in the order of
the program, so that a head's products would wait for the vector arithmetic of its own scores.

Letters: T tokens, H heads, K key width, V value width, C chunk, N slots, L layers of the pool.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels_pallas.lightning.xla import LightningWeights
from kernels_pallas.op import RaggedBatch
from kernels_pallas.rotary import Rotary
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
SMALLEST_SLOPE = 1e-25  # keeps 0 * inf out of the masked exponents; no chunk is long enough to see it
MASKED = 1e30  # a distance so far that any slope forgets
UNROLLED = 8  # heads whose chains of products overlap


@dataclass(frozen=True)
class _Settings:
    heads: int
    groups: int
    scale: float
    epsilon: float
    activated: bool  # queries, keys and values pass SiLU
    normed: bool  # queries and keys have norms
    half: int  # pairs of channels that are rotated


def lightning_prefill(
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
    """One lightning layer between its projections, as `xla.lightning`, for a batch without rows in decode.

    Raises NotImplementedError for heads that are not 128 wide.
    """
    heads, value_width, key_width = pool.shape[2:]
    if (value_width, key_width) != (LANES, LANES):
        raise NotImplementedError(f"lightning on a TPU wants heads of width 128, got {value_width}; use backend 'xla'")
    settings = _Settings(
        heads,
        groups,
        scale,
        epsilon,
        silu,
        weights.query_norm is not None,
        0 if rotary is None else rotary.cos.shape[1],
    )
    tokens = qkv.shape[0]
    ones = jnp.ones((LANES,), jnp.float32)
    norms = [ones if norm is None else norm for norm in (weights.query_norm, weights.key_norm)]
    count = padded(tokens)
    streams = [Stream(_pad(qkv, count).transpose(1, 2, 0, 3), 2), Stream(_pad(gate, count))]
    streams += [Stream(_pad(x, count)) for x in _rotation(rotary)]
    rate = jnp.maximum(weights.slopes.astype(jnp.float32) * LOG2_E, SMALLEST_SLOPE)
    recurrence = Recurrence(
        "lightning_prefill",
        lambda block: _scan(settings, block),
        lambda block: _finish(settings, block),
        tuple(streams),
        (rate,),
        (jnp.stack(norms).astype(jnp.float32), weights.output_norm.astype(jnp.float32)[None]),
        heads * LANES,
        qkv.dtype,
        _scratch(settings, qkv.dtype),
    )
    out, (pool,) = run(recurrence, (pool,), plan(layer, batch, count))
    return out[:tokens], pool


def _pad(x: Array, tokens: int) -> Array:
    return jnp.pad(x, ((0, tokens - x.shape[0]),) + ((0, 0),) * (x.ndim - 1))


def _rotation(rotary: Rotary | None) -> tuple[Float[Array, "T 128"], ...]:
    """Cosines and sines of a token side by side: a register wide."""
    if rotary is None:
        return ()
    both = jnp.concatenate([rotary.cos, rotary.sin], axis=1)
    return (jnp.pad(both, ((0, 0), (0, LANES - both.shape[1]))),)


_Q, _Q_PARTNER, _K, _K_PARTNER = range(4)  # factors of a chunk's queries and keys, and of their partners
_QUERY, _KEY, _VALUE, _KEPT = range(4)  # operands of a head's products; the last may be two
_AGE, _PASSED, _LEFT, _LEFT_TAKEN = range(4)  # exponents of a chunk: [C, C] of the mask, and from the start, to the end


def _scratch(settings: _Settings, dtype: Any) -> tuple[Any, ...]:
    f32 = jnp.float32
    return (
        ((4, C, LANES), f32),
        ((4, C, LANES), f32),
        ((UNROLLED, _KEPT + _terms(settings, dtype), C, LANES), dtype),
        ((UNROLLED, 3, WINDOW // 2, LANES), jnp.uint32),
    )


# ------------------------------------------------------------------------------------------------------ the recurrence


def _scan(settings: _Settings, block: Block) -> None:
    """All heads of one chunk."""
    _make_factors(settings, block)
    _make_exponents(block)

    @pl.when(block.length < C)
    def _() -> None:
        _clear_absent(settings, block)

    @pl.when(block.snapped)
    def _() -> None:
        lax.fori_loop(0, settings.heads, lambda head, _: _stage_head(settings, block, head), None)

    unrolled = next(n for n in (UNROLLED, 4, 2, 1) if settings.heads % n == 0)

    def heads(index: Any, _: None) -> None:
        first = index * unrolled
        _prepare(settings, block, first, unrolled)
        _scan_heads(settings, block, first, unrolled)

    lax.fori_loop(0, settings.heads // unrolled, heads, None)


def _clear_absent(settings: _Settings, block: Block) -> None:
    """Zeros for the keys and values behind the last token, which hold anything."""
    row = lax.broadcasted_iota(jnp.int32, (WINDOW, LANES), 0)
    present = row < block.offset + block.length

    def head(index: Any, _: None) -> None:
        for part in (1, 2):
            rows = block.windows[0][part, index]
            block.windows[0][part, index] = jnp.where(present, rows, jnp.zeros_like(rows))

    lax.fori_loop(0, settings.heads, head, None)


def _make_factors(settings: _Settings, block: Block) -> None:
    """Norm weights, scale and rotation of all heads in one: `x own + partner(x) other`."""
    norms, _ = block.constants[1:]
    factors = block.scratch[0]
    root = LANES**0.5 if settings.normed else 1.0  # of the mean, whose sum is what is divided by
    for first, row, scale in ((_Q, 0, root * settings.scale), (_K, 1, root)):
        weight = jnp.broadcast_to(norms[row : row + 1, :], (C, LANES)) * scale
        if not settings.half:
            factors[first] = weight
            continue
        half, lane = settings.half, lax.broadcasted_iota(jnp.int32, (C, LANES), 1)
        table = block.windows[2][pl.ds(block.offset, C), :]
        table = jnp.where(_tokens() < block.length, table, 0.0)  # behind the last token it holds anything
        ahead, behind = pltpu.roll(table, LANES - half, 1), pltpu.roll(table, half, 1)
        cos = jnp.where(lane < half, table, jnp.where(lane < 2 * half, behind, 1.0))
        sin = jnp.where(lane < half, -ahead, jnp.where(lane < 2 * half, table, 0.0))
        factors[first] = cos * weight
        factors[first + 1] = sin * _partner(settings, weight)


def _partner(settings: _Settings, x: Float[Array, "C 128"]) -> Float[Array, "C 128"]:
    """The channel that each of the first 2 half is paired with, float32; 0 for the others.

    Of bfloat16 by a product with a permutation, which is exact: the matrix units have time, the lane units have not.
    """
    half, lane = settings.half, lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
    other = jnp.where(lane < half, lane + half, jnp.where(lane < 2 * half, lane - half, LANES))
    if x.dtype == jnp.float32:
        found = jnp.take_along_axis(x, jnp.minimum(other, LANES - 1), axis=1)
        return jnp.where(lane < 2 * half, found, 0.0)
    return dot(x, (lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0) == other).astype(x.dtype), 1, 0)


def _tokens(axis: int = 0) -> Array:
    """The token of each row, or of each column, of a table `[C, 128]`."""
    return lax.broadcasted_iota(jnp.int32, (C, LANES), axis)


def _make_exponents(block: Block) -> None:
    """Tokens between two, since the start of the chunk, until its end, until the snapshot: as float32 tables."""
    exponents = block.scratch[1]
    token = _tokens()
    apart = token - _tokens(1)
    exponents[_AGE] = jnp.where(apart >= 0, apart.astype(jnp.float32), MASKED)
    exponents[_PASSED] = (token + 1).astype(jnp.float32)
    for table, end in ((_LEFT, block.length), (_LEFT_TAKEN, block.taken)):
        left = end - 1 - token
        exponents[table] = jnp.where(left >= 0, left.astype(jnp.float32), MASKED)


def _prepare(settings: _Settings, block: Block, first: Any, count: int) -> None:
    """Operands of the products of `count` heads, in their dtype: queries, keys, values, keys as the chunk's end sees
    them. Apart from the products, so that fewer registers are wanted at a time; all is read before any is stored.
    """
    operands, found = block.scratch[2], []
    for inside in range(count):
        head = first + inside
        k = _vectors(settings, block, head, 1, inside)
        q, v = _vectors(settings, block, head, 0, inside), _values(settings, block, head, inside)
        found.append([q.astype(v.dtype), k.astype(v.dtype), v, *_kept(settings, block, head, k, _LEFT)])
    for inside, parts in enumerate(found):
        for part, value in enumerate(parts):
            operands[inside, part] = value


def _scan_heads(settings: _Settings, block: Block, first: Any, count: int) -> None:
    """Raw outputs and the next states of `count` heads: each step for all of them, as products start in order; and all
    is read before any is stored.
    """
    exponents, operands, state = block.scratch[1], block.scratch[2], block.memory[0]
    rates = [-block.constants[0][first + inside] for inside in range(count)]
    heads = [[operands[inside, part] for part in range(operands.shape[1])] for inside in range(count)]
    starts = [state[first + inside] for inside in range(count)]
    products = [dot(q, k, 1, 1) for q, k, *_ in heads]
    carried = [dot(head[_QUERY], start.astype(operands.dtype), 1, 1) for head, start in zip(heads, starts, strict=True)]
    added = [_added(v, kept) for _, _, v, *kept in heads]
    scores = [x * jnp.exp2(rate * exponents[_AGE]) for x, rate in zip(products, rates, strict=True)]
    outs = [dot(x.astype(operands.dtype), head[_VALUE], 1, 0) for x, head in zip(scores, heads, strict=True)]
    for inside, rate in enumerate(rates):
        out = outs[inside] + carried[inside] * jnp.exp2(rate * exponents[_PASSED])
        block.raw[first + inside, pl.ds(block.offset, C), :] = out
        state[first + inside] = starts[inside] * _forgotten(rate, block.length) + added[inside]


def _stage_head(settings: _Settings, block: Block, head: Any) -> None:
    """The state of one head after the tokens of a snapshot inside the chunk."""
    kept = _kept(settings, block, head, _vectors(settings, block, head, 1, 0), _LEFT_TAKEN)
    added = _added(_values(settings, block, head, 0), kept)
    rate = -block.constants[0][head]
    block.stage[0][head] = block.memory[0][head] * _forgotten(rate, block.taken) + added


def _terms(settings: _Settings, dtype: Any) -> int:
    """Terms that kept keys are split in. Values that were rounded want keys that are not."""
    return 2 if settings.activated and dtype != jnp.float32 else 1


def _kept(settings: _Settings, block: Block, head: Any, k: Float[Array, "C K"], exponents: int) -> list[Array]:
    """Keys with their decay, in the dtype of the products."""
    dtype, rate = block.windows[0].dtype, -block.constants[0][head]
    whole = k * jnp.exp2(rate * block.scratch[1][exponents])
    return split(whole, dtype) if _terms(settings, dtype) > 1 else [whole.astype(dtype)]


def _added(v: Float[Array, "C V"], kept: list[Array]) -> Float[Array, "V K"]:
    """What a chunk adds to a state."""
    return sum((dot(v, term, 0, 0) for term in kept[1:]), dot(v, kept[0], 0, 0))


def _forgotten(rate: Any, count: Any) -> Float[Array, "1 128"]:
    """What is left of a state after `count` tokens."""
    return jnp.exp2(jnp.full((1, LANES), rate * count.astype(jnp.float32)))


def _vectors(settings: _Settings, block: Block, head: Any, part: int, shelf: int) -> Float[Array, "C K"]:
    """Queries (part 0) or keys (1) with norm, rotation and scale, float32. `shelf`: the one that it may use."""
    first, x = (_Q, _K)[part], _activated(settings, block, head, part, shelf)
    whole = x.astype(jnp.float32)
    y = whole * block.scratch[0][first]
    if settings.half:
        y = y + _partner(settings, x) * block.scratch[0][first + 1]
    if settings.normed:
        y = y * lax.rsqrt(jnp.sum(whole * whole, axis=1, keepdims=True) + LANES * settings.epsilon)
    return y


def _values(settings: _Settings, block: Block, head: Any, shelf: int) -> Float[Array, "C V"]:
    """Values in the dtype of the products."""
    return _activated(settings, block, head, 2, shelf).astype(block.windows[0].dtype)


def _activated(settings: _Settings, block: Block, head: Any, part: int, shelf: int) -> Float[Array, "C 128"]:
    x = _load(block, head, part, shelf)
    if not settings.activated:
        return x
    whole = x.astype(jnp.float32)
    return whole * sigmoid(whole)


def _load(block: Block, head: Any, part: int, shelf: int) -> Float[Array, "C 128"]:
    """The chunk's tokens. Of bfloat16 from a shelf of words, whose rows can be loaded one by one.

    A chunk that starts at an odd row takes the upper half of each word and the lower half of the next; one that starts
    at an even row finds a word twice.
    """
    window, words, offset = block.windows[0].at[part, head], block.scratch[3].at[shelf, part], block.offset
    if window.dtype == jnp.float32:
        return window[pl.ds(offset, C), :]
    words[...] = pltpu.bitcast(window[...], jnp.uint32)
    here, next_ = words[pl.ds(offset // 2, C // 2), :], words[pl.ds((offset + 1) // 2, C // 2), :]
    shift = (offset % 2 * 16).astype(jnp.uint32)
    return pltpu.bitcast((here >> shift) | (next_ << shift), window.dtype)


# ------------------------------------------------------------------------------------------------ output norm and gate


def _finish(settings: _Settings, block: Block) -> None:
    """The norm over each group of heads, and the gate, of all rows of the window."""
    each = settings.heads // settings.groups
    _, weight = block.constants[1:]
    gate = block.windows[1]

    def group(index: Any, _: None) -> None:
        def add(inside: Any, total: Array) -> Array:
            raw = block.raw[index * each + inside]
            return total + raw * raw

        total = lax.fori_loop(0, each, add, jnp.zeros((WINDOW, LANES), jnp.float32), unroll=True)
        mean = jnp.sum(total, axis=1, keepdims=True) * (1.0 / (each * LANES))
        factor = lax.rsqrt(mean + settings.epsilon)

        def head(inside: Any, _: None) -> None:
            tile = index * each + inside
            columns = pl.ds(pl.multiple_of(tile * LANES, LANES), LANES)
            half = block.raw[tile] * factor * (0.5 * weight[:, columns])  # sigmoid(g) = (1 + tanh(g / 2)) / 2
            opened = half + half * jnp.tanh(0.5 * gate[:, columns].astype(jnp.float32))
            block.out[:, columns] = opened.astype(block.out.dtype)

        lax.fori_loop(0, each, head, None, unroll=True)

    lax.fori_loop(0, settings.groups, group, None)
