"""Kimi delta attention over the rows that prefill, on TPU: one kernel from the projections to the gated output.

The recurrence of `xla.py` by chunks of 128 tokens. A decay per channel does not leave the products of two tokens, and
its two factors must not overflow. So pairs of tokens are covered by a hierarchy: of each block of 2, 4, 8 ... 128
tokens, the pairs of a token j in its left half and a token i in its right half, with the decay between them cut at the
last token r of the left half:

    (q_i e^{g_{r+1} + ... + g_i}) . (k_j e^{g_{j+1} + ... + g_r})

Both exponents are sums of the log decays of one half block, never positive and never a difference: exact for any gate.
A token is on one side of each cut, so a level takes one exponential per token and channel, and one product for the
whole chunk, of which the pairs of the level are selected.

Letters: T tokens, H heads, K key width, V value width, C chunk, W convolution width, N slots, L layers of the pool.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels_pallas.convolution_tpu import shelf_rows
from kernels_pallas.delta_tpu import (
    HALF,
    LOG2_E,
    Result,
    check_widths,
    column,
    convolve,
    each_unrolled,
    finish_heads,
    iota,
    joined_pairs,
    keep_tails,
    lanes,
    lower_halves,
    pad_heads,
    pad_tokens,
    per_token,
    present,
    scan_heads,
    solve,
    unit,
    with_lower_halves,
)
from kernels_pallas.kda.decay import Decay
from kernels_pallas.kda.xla import KDAWeights
from kernels_pallas.op import RaggedBatch
from kernels_pallas.scalar_decay_tpu import LANES, Block, C, Recurrence, Stream, dot, plan, sigmoid
from kernels_pallas.scalar_decay_tpu import prefill as run

UNROLLED = 4  # heads whose chains of products overlap
SUBLANES = 8  # rows of a register

_MIXED, _F, _B, _GATE = range(4)  # streams
_RATE = 0  # scalars
_CONVOLUTION, _BIAS, _NORM = range(1, 4)  # tables


def kda_prefill(
    mixed: Float[Array, "T 2*H*K+H*V"],
    f: Float[Array, "T H K"],
    b: Float[Array, "T H"],
    gate: Float[Array, "T H V"],
    weights: KDAWeights,
    state: Float[Array, "L N H V K"],
    tail: Float[Array, "L N W-1 2*H*K+H*V"],
    layer: int,
    batch: RaggedBatch,
    *,
    decay: Decay,
    epsilon: float,
) -> tuple[Float[Array, "T H*V"], Float[Array, "L N H V K"], Float[Array, "L N W-1 2*H*K+H*V"]]:
    """One Kimi delta attention layer between its projections, as `xla.kda`, for a batch without rows in decode.

    Outputs of tokens in front of the first row are undefined.
    Raises NotImplementedError for heads that are not 128 wide, and for more than 128 of them.
    """
    heads, *widths = state.shape[2:]
    check_widths("kda", heads, tuple(widths))
    tokens, inputs = mixed.shape[0], (mixed, f.reshape(f.shape[0], -1), pad_heads(b), gate.reshape(gate.shape[0], -1))
    streams = tuple(Stream(pad_tokens(x)) for x in inputs)
    bias = weights.decay_bias.astype(jnp.float32).reshape(1, -1)
    recurrence = Recurrence(
        "kda_prefill",
        lambda block: _scan(decay, heads, block),
        lambda block: finish_heads(block, block.constants[_NORM], _GATE, epsilon, sigmoid),
        streams,
        (jnp.exp(weights.decay_log.astype(jnp.float32)),),
        (0.5 * weights.convolution.astype(jnp.float32), bias, weights.output_norm.astype(jnp.float32)[None]),
        heads * LANES,
        mixed.dtype,
        _scratch(heads),
    )
    work = plan(layer, batch, streams[0].values.shape[0])
    out, (state, tail) = run(recurrence, (state, tail), work)
    return out[:tokens], state, tail


_QUERY, _KEY, _VALUE, _LOG = range(4)  # inputs of a head


def _scratch(heads: int) -> tuple[Any, ...]:
    """Queries, keys, values and log2 decays by head, beta by token, shelves."""
    f32 = jnp.float32
    return (
        ((4, heads, C, LANES), f32),
        ((C, LANES), f32),
        ((4, shelf_rows(C), LANES), f32),
        ((UNROLLED, LANES, LANES), f32),
    )


def _scan(decay: Decay, heads: int, block: Block) -> None:
    """All heads of one chunk."""
    _, betas, shelves, _ = block.scratch
    beta = sigmoid(per_token(block, _B, shelves.at[0]))
    betas[...] = jnp.where(present(block), beta, 0.0)
    lax.fori_loop(0, heads, lambda head, _: _prepare(decay, block, head), None)
    each_unrolled(heads, UNROLLED, lambda some: _scan_heads(block, some))


def _prepare(decay: Decay, block: Block, head: Any) -> None:
    """Convolved queries and keys of unit length, values, and log2 decays of one head."""
    inputs, _, shelves, _ = block.scratch
    weight, bias = block.constants[_CONVOLUTION], block.constants[_BIAS]
    query, key, inputs[_VALUE, head] = convolve(block, weight, shelves, 3 * head, 3)
    inputs[_QUERY, head], inputs[_KEY, head] = unit(query, LANES**-0.5), unit(key)
    x = per_token(block, _F, shelves.at[_LOG], head) + bias[:, lanes(head)]
    rate = jnp.full(x.shape, block.constants[_RATE][head])
    inputs[_LOG, head] = jnp.where(present(block), decay(x, rate) * LOG2_E, 0.0)
    keep_tails(block, shelves, 3 * head, 3)


@dataclass(frozen=True)
class _Sums:
    """Sums of log decays `[C, K]` over the tokens of a token's own block.

    until: up to the token itself. after: behind it. total: of all.
    """

    until: Array
    after: Array
    total: Array


def _scan_heads(block: Block, heads: list[Any]) -> None:
    scan_heads(block, block.scratch[3], heads, lambda starts: _chunk(block, heads, starts))


def _chunk(block: Block, heads: list[Any], starts: list[Array]) -> list[Result]:
    """Some heads: each step for all of them."""
    inputs, betas, *_ = block.scratch
    dtype, each = block.windows[_MIXED].dtype, range(len(heads))
    queries, keys = ([inputs[part, head] for head in heads] for part in (_QUERY, _KEY))
    logs = [inputs[_LOG, head] for head in heads]
    scores, overlaps, sums, halves = _pairs(queries, keys, logs, dtype)
    passed = [jnp.exp2(x.until) for x in sums]
    carried = []
    for q, k, factor, start in zip(queries, keys, passed, starts, strict=True):
        both = jnp.concatenate([(q * factor).astype(dtype), (k * factor).astype(dtype)])
        carried.append(dot(both, start.astype(dtype), 1, 1))
    beta = [column(betas[...], head) for head in heads]
    wanted = [beta[n] * (inputs[_VALUE, heads[n]] - carried[n][C:]) for n in each]
    updates = [u.astype(dtype) for u in solve([overlaps[n] * beta[n] for n in each], wanted, dtype)]
    out = [carried[n][:C] + dot(scores[n].astype(dtype), updates[n]) for n in each]
    kept = [(k * jnp.exp2(half.after)).astype(dtype) for k, half in zip(keys, halves, strict=True)]
    totals = [[jnp.exp2(half.total[n : n + 1]) for n in (0, HALF)] for half in halves]
    middle = [starts[n] * totals[n][0] + dot(updates[n][:HALF], kept[n][:HALF], 0, 0) for n in each]
    final = [middle[n] * totals[n][1] + dot(updates[n][HALF:], kept[n][HALF:], 0, 0) for n in each]
    return [Result(*parts) for parts in zip(out, middle, final, strict=True)]


def _pairs(
    queries: list[Array], keys: list[Array], logs: list[Array], dtype: Any
) -> tuple[list[Array], list[Array], list[_Sums], list[_Sums]]:
    """Products `[C, C]` of queries with keys up to their own, and of keys with earlier ones, with decays; the sums of
    log decays over the chunk, and over each half of it.
    """
    row, other = iota(0), iota(1)
    own = [jnp.sum(q * k, axis=1, keepdims=True) for q, k in zip(queries, keys, strict=True)]
    scores = [jnp.where(row == other, x, 0.0) for x in own]
    overlaps = [jnp.zeros((C, C), jnp.float32)] * len(keys)
    sums = [_Sums(x, jnp.zeros_like(x), x) for x in logs]
    halves, size = sums, 2
    while size <= C:
        halves = sums if size == 2 * HALF else halves
        level = _pairs_within if size <= SUBLANES else _pairs_across
        found, pairs = level(queries, keys, sums, size, dtype)
        half = len(pairs)
        for n, both in enumerate(found):
            scores[n] = _replaced(scores[n], both[:half], pairs, size)
            overlaps[n] = _replaced(overlaps[n], both[half:], pairs, size)
        sums, size = [_joined(x, size) for x in sums], 2 * size
    return scores, overlaps, sums, halves


def _replaced(known: Float[Array, "C C"], found: Array, pairs: Array, size: int) -> Float[Array, "C C"]:
    """What is known, with what was found of some pairs; of all rows, or of those in lower halves."""
    if len(pairs) == C:
        return jnp.where(pairs, found, known)
    return with_lower_halves(known, jnp.where(pairs, found, lower_halves(known, size)), size)


def _pairs_within(
    queries: list[Array], keys: list[Array], sums: list[_Sums], size: int, dtype: Any
) -> tuple[list[Array], Array]:
    """A level whose blocks lie within a register: products of all rows, queries over keys, and its pairs."""
    row, other = iota(0), iota(1)
    lower = row % size >= size // 2
    pairs = lower & (other % size < size // 2) & (row // size == other // size)
    found = []
    for q, k, x in zip(queries, keys, sums, strict=True):
        cut = jnp.exp2(jnp.where(lower, x.until, x.after))
        low = (k * cut).astype(dtype)
        found.append(dot(jnp.concatenate([(q * cut).astype(dtype), low]), low, 1, 1))
    return found, pairs


def _pairs_across(
    queries: list[Array], keys: list[Array], sums: list[_Sums], size: int, dtype: Any
) -> tuple[list[Array], Array]:
    """A level of whole registers: products of the rows in lower halves alone, queries over keys, and its pairs."""
    found = []
    for q, k, x in zip(queries, keys, sums, strict=True):
        cut = jnp.exp2(with_lower_halves(x.after, lower_halves(x.until, size), size))
        faded, lower = k * cut, lower_halves(cut, size)
        rows = jnp.concatenate([lower_halves(q, size) * lower, lower_halves(faded, size)])
        found.append(dot(rows.astype(dtype), faded.astype(dtype), 1, 1))
    return found, joined_pairs(size)


def _joined(sums: _Sums, size: int) -> _Sums:
    """The sums over blocks of `size`, from those over half of it."""
    other = _swapped(sums.total, size // 2)
    lower = iota(0) % size >= size // 2
    until = sums.until + jnp.where(lower, other, 0.0)
    return _Sums(until, sums.after + jnp.where(lower, 0.0, other), sums.total + other)


def _swapped(x: Float[Array, "C K"], size: int) -> Float[Array, "C K"]:
    """Neighbouring blocks of `size` rows change places, where the rows of a block are all alike."""
    if size >= SUBLANES:
        return jnp.concatenate([x[(n ^ 1) * size : ((n ^ 1) + 1) * size] for n in range(C // size)])
    ahead, behind = pltpu.roll(x, C - size, 0), pltpu.roll(x, size, 0)
    return jnp.where(iota(0) // size % 2 == 1, behind, ahead)
