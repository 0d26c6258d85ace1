"""Lightning attention over the rows that prefill, on TPU: one kernel from the projections to the gated output.

The recurrence of `xla.py` by chunks of 128 tokens. Queries, keys and values are read with the heads in front, as the
product that makes them leaves them: the tokens of a head then lie together, and a chunk that starts at any token is
loaded as it is. Of bfloat16, two tokens share a word; even and odd tokens of a chunk are loaded apart and *stay* apart
(`token_of_row`): sums over tokens do not care, and the outputs are stored back in place.

Letters: T tokens, H heads, K key width, V value width, C chunk, N slots, L layers of the pool.
"""

from collections.abc import Callable
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
UNROLLED = 4  # heads whose chains of products overlap


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
_AGE, _PASSED, _LEFT, _LEFT_TAKEN = range(4)  # exponents of a chunk: [C, C] of the mask, and from the start, to the end


def _scratch(settings: _Settings, dtype: Any) -> tuple[Any, ...]:
    f32 = jnp.float32
    return (
        ((4, C, LANES), f32),
        ((4, C, LANES), f32),
        ((WINDOW, LANES), f32),
        ((UNROLLED, 3, WINDOW // 2, LANES), jnp.uint32),
    )


# ----------------------------------------------------------------------------------------------------- order of tokens


def phases(dtype: Any) -> int:
    """Tokens that share a word: their vectors are computed apart, in *phases* of every other token for bfloat16."""
    return 4 // jnp.dtype(dtype).itemsize


def token_of_row(count: int, axis: int = 0) -> Array:
    """The token of each row (or column) of a table `[C, 128]` that lists the tokens of a chunk phase by phase."""
    row = lax.broadcasted_iota(jnp.int32, (C, LANES), axis)
    size = C // count
    return row % size * count + row // size


def load_words(rows: Any, words: Any) -> None:
    """Copy a window `[WINDOW, 128]` of bfloat16 to words `[WINDOW / 2, 128]`, whose rows can be loaded one by one."""
    words[...] = pltpu.bitcast(rows[...], jnp.uint32)


def float_phases(words: Any, offset: Any) -> list[Float[Array, "C/2 128"]]:
    """The even and the odd tokens of a chunk, float32."""
    even, odd = words[pl.ds(offset // 2, C // 2), :], words[pl.ds((offset + 1) // 2, C // 2), :]
    shift = (offset % 2 * 16).astype(jnp.uint32)  # where an even token is the upper half of its word
    parts = [(even << (jnp.uint32(16) - shift)) & jnp.uint32(0xFFFF0000), (odd << shift) & jnp.uint32(0xFFFF0000)]
    return [lax.bitcast_convert_type(part, jnp.float32) for part in parts]


def store_phases(rows: Any, offset: Any, values: Float[Array, "C 128"], count: int) -> None:
    """Store phases in a float32 reference `[WINDOW, 128]`, in the order of the tokens."""
    for phase, part in enumerate(jnp.split(values, count)):
        rows[pl.ds(offset + phase, C // count, stride=count), :] = part


def joined(parts: list[Array], dtype: Any) -> Float[Array, "C 128"]:
    """Phases one behind the other, in the dtype of the products."""
    return jnp.concatenate([part.astype(dtype) for part in parts])


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
        _each_head(settings, lambda head, words: _stage_head(settings, block, head, words))

    _each_head(settings, lambda head, inside: _scan_head(settings, block, head, inside))


def _each_head(settings: _Settings, act: Callable[[Any, int], None]) -> None:
    unrolled = UNROLLED if settings.heads % UNROLLED == 0 else 1

    def heads(index: Any, _: None) -> None:
        for inside in range(unrolled):
            act(index * unrolled + inside, inside)

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
    factors, shelf = block.scratch[0], block.scratch[2]
    root = LANES**0.5 if settings.normed else 1.0  # of the mean, whose sum is what is divided by
    for first, row, scale in ((_Q, 0, root * settings.scale), (_K, 1, root)):
        weight = jnp.broadcast_to(norms[row : row + 1, :], (C, LANES)) * scale
        if not settings.half:
            factors[first] = weight
            continue
        half, lane = settings.half, lax.broadcasted_iota(jnp.int32, (C, LANES), 1)
        shelf[...] = block.windows[2][...]
        count = phases(block.windows[0].dtype)
        table = jnp.concatenate([shelf[pl.ds(block.offset + p, C // count, stride=count), :] for p in range(count)])
        table = jnp.where(token_of_row(count) < block.length, table, 0.0)  # behind the last token it holds anything
        ahead, behind = pltpu.roll(table, LANES - half, 1), pltpu.roll(table, half, 1)
        cos = jnp.where(lane < half, table, jnp.where(lane < 2 * half, behind, 1.0))
        sin = jnp.where(lane < half, -ahead, jnp.where(lane < 2 * half, table, 0.0))
        factors[first] = cos * weight
        factors[first + 1] = sin * _partner(settings, weight)


def _partner(settings: _Settings, x: Float[Array, "C 128"]) -> Float[Array, "C 128"]:
    """The channel that each of the first 2 half is paired with."""
    half, lane = settings.half, lax.broadcasted_iota(jnp.int32, x.shape, 1)
    other = jnp.where(lane < half, lane + half, jnp.where(lane < 2 * half, lane - half, lane))
    return jnp.take_along_axis(x, other, axis=1)


def _make_exponents(block: Block) -> None:
    """Tokens between two, since the start of the chunk, until its end, until the snapshot: as float32 tables."""
    exponents = block.scratch[1]
    count = phases(block.windows[0].dtype)
    token = token_of_row(count)
    apart = token - token_of_row(count, 1)
    exponents[_AGE] = jnp.where(apart >= 0, apart.astype(jnp.float32), MASKED)
    exponents[_PASSED] = (token + 1).astype(jnp.float32)
    for table, end in ((_LEFT, block.length), (_LEFT_TAKEN, block.taken)):
        left = end - 1 - token
        exponents[table] = jnp.where(left >= 0, left.astype(jnp.float32), MASKED)


def _scan_head(settings: _Settings, block: Block, head: Any, inside: int) -> None:
    """Raw outputs and the next state of one head. `inside`: the part of the scratch that it may use."""
    exponents, state, dtype = block.scratch[1], block.memory[0], block.windows[0].dtype
    rate, start = -block.constants[0][head], state[head]
    k = _vectors(settings, block, head, 1, inside)
    q = _vectors(settings, block, head, 0, inside)
    v = joined(_load(settings, block, head, 2, inside), dtype)
    scores = dot(joined(q, dtype), joined(k, dtype), 1, 1) * jnp.exp2(rate * exponents[_AGE])
    passed = joined(_decayed(q, rate, exponents[_PASSED]), dtype)
    out = dot(scores.astype(dtype), v, 1, 0) + dot(passed, start.astype(dtype), 1, 1)
    store_phases(block.raw.at[head], block.offset, out, phases(dtype))
    added = _added(settings, v, _decayed(k, rate, exponents[_LEFT]))
    state[head] = start * _forgotten(rate, block.length) + added


def _stage_head(settings: _Settings, block: Block, head: Any, words: int) -> None:
    """The state of one head after the tokens of a snapshot inside the chunk."""
    k = _vectors(settings, block, head, 1, words)
    v = joined(_load(settings, block, head, 2, words), block.windows[0].dtype)
    rate, left = -block.constants[0][head], block.scratch[1][_LEFT_TAKEN]
    added = _added(settings, v, _decayed(k, rate, left))
    block.stage[0][head] = block.memory[0][head] * _forgotten(rate, block.taken) + added


def _added(settings: _Settings, v: Float[Array, "C V"], kept: list[Array]) -> Float[Array, "V K"]:
    """What a chunk adds to a state. Values that were rounded want keys that are not."""
    whole = jnp.concatenate(kept)
    terms = split(whole, v.dtype) if settings.activated else [whole.astype(v.dtype)]
    return sum((dot(v, term, 0, 0) for term in terms[1:]), dot(v, terms[0], 0, 0))


def _forgotten(rate: Any, count: Any) -> Float[Array, "1 128"]:
    """What is left of a state after `count` tokens."""
    return jnp.exp2(jnp.full((1, LANES), rate * count.astype(jnp.float32)))


def _decayed(parts: list[Array], rate: Any, exponents: Float[Array, "C 128"]) -> list[Array]:
    factors = jnp.split(jnp.exp2(rate * exponents), len(parts))
    return [part * factor for part, factor in zip(parts, factors, strict=True)]


def _vectors(settings: _Settings, block: Block, head: Any, part: int, words: int) -> list[Array]:
    """Queries (part 0) or keys (1) with norm, rotation and scale, float32, by phases."""
    parts = _load(settings, block, head, part, words)
    first, size, prepared = (_Q, _K)[part], C // len(parts), []
    for phase, x in enumerate(parts):
        rows = pl.ds(phase * size, size)
        y = x * block.scratch[0][first, rows]
        if settings.half:
            y = y + _partner(settings, x) * block.scratch[0][first + 1, rows]
        if settings.normed:
            y = y * lax.rsqrt(jnp.sum(x * x, axis=1, keepdims=True) + LANES * settings.epsilon)
        prepared.append(y)
    return prepared


def _load(settings: _Settings, block: Block, head: Any, part: int, words: int) -> list[Array]:
    window, shelf = block.windows[0].at[part, head], block.scratch[3].at[words, part]
    if window.dtype == jnp.float32:
        parts = [window[pl.ds(block.offset, C), :]]
    else:
        load_words(window, shelf)
        parts = float_phases(shelf, block.offset)
    return [x * sigmoid(x) for x in parts] if settings.activated else parts


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
