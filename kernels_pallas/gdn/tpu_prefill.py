"""The gated delta rule over the rows that prefill, on TPU: one kernel from the projections to the gated output.

The recurrence of `xla.py` by chunks of 128 tokens. Key heads are walked in order; the products of queries and keys
serve all value heads that read them.

Sums of log decays are kept in two parts, a multiple of 1/64 that is exact and a remainder below 1: a difference of two
sums then keeps its digits also behind a token that forgets everything.

Letters: T tokens, H value heads, G key heads, K key width, V value width, C chunk, W convolution width, N slots,
L layers of the pool.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
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
    keep_tails,
    pad_heads,
    pad_tokens,
    per_token,
    present,
    scan_heads,
    silu,
    solve,
    unit,
)
from kernels_pallas.gdn.xla import GDNWeights
from kernels_pallas.op import RaggedBatch
from kernels_pallas.scalar_decay_tpu import LANES, Block, C, Recurrence, Stream, dot, plan, sigmoid
from kernels_pallas.scalar_decay_tpu import prefill as run

UNROLLED = 4  # value heads whose chains of products overlap
STEPS = 64.0  # of the exact part of a sum, per doubling
WEAKEST = -512.0  # log2 of a decay that leaves nothing of a float32; 128 of them stay exact in steps of 1 / 64
MASKED = -1e30  # log2 of a decay that is not wanted

_MIXED, _Z, _B, _A = range(4)  # streams
_CONVOLUTION, _DECAY, _NORM = range(3)  # tables
_EXACT, _REST, _BETA = range(3)  # gates of a chunk, by token; the first two also by head


@dataclass(frozen=True)
class _Settings:
    key_heads: int
    each: int  # value heads of a key head
    epsilon: float
    beta_scale: float

    @property
    def unrolled(self) -> int:
        """Value heads at a time: of whole key heads, or a part of those of one."""
        if self.each > UNROLLED:
            return next(n for n in range(UNROLLED, 0, -1) if self.each % n == 0)
        return self.each * next(n for n in range(UNROLLED // self.each, 0, -1) if self.key_heads % n == 0)


def gdn_prefill(
    mixed: Float[Array, "T 2*G*K+H*V"],
    z: Float[Array, "T H V"],
    b: Float[Array, "T H"],
    a: Float[Array, "T H"],
    weights: GDNWeights,
    state: Float[Array, "L N H V K"],
    tail: Float[Array, "L N W-1 2*G*K+H*V"],
    layer: int,
    batch: RaggedBatch,
    *,
    key_heads: int,
    epsilon: float,
    beta_scale: float = 1.0,
) -> tuple[Float[Array, "T H*V"], Float[Array, "L N H V K"], Float[Array, "L N W-1 2*G*K+H*V"]]:
    """One gated delta rule layer between its projections, as `xla.gdn`, for a batch without rows in decode.

    Outputs of tokens in front of the first row are undefined.
    Raises NotImplementedError for heads that are not 128 wide, and for more than 128 of them.
    """
    heads, *widths = state.shape[2:]
    check_widths("gdn", heads, tuple(widths))
    settings = _Settings(key_heads, heads // key_heads, epsilon, beta_scale)
    tokens, inputs = mixed.shape[0], (mixed, z.reshape(z.shape[0], -1), pad_heads(b), pad_heads(a))
    streams = tuple(Stream(pad_tokens(x)) for x in inputs)
    decay = jnp.stack([pad_heads(x.astype(jnp.float32)) for x in (weights.decay_bias, weights.decay_log)])
    recurrence = Recurrence(
        "gdn_prefill",
        lambda block: _scan(settings, block),
        lambda block: finish_heads(block, block.constants[_NORM], _Z, epsilon, silu),
        streams,
        (),
        (0.5 * weights.convolution.astype(jnp.float32), decay, weights.output_norm.astype(jnp.float32)[None]),
        heads * LANES,
        mixed.dtype,
        _scratch(settings, heads, mixed.dtype),
    )
    work = plan(layer, batch, streams[0].values.shape[0])
    out, (state, tail) = run(recurrence, (state, tail), work)
    return out[:tokens], state, tail


_KEYS, _VALUES, _BY_TOKEN, _BY_HEAD, _SHELVES, _HALVES = range(6)  # scratch; keys lie below the queries


def _scratch(settings: _Settings, heads: int, dtype: Any) -> tuple[Any, ...]:
    f32 = jnp.float32
    return (
        ((settings.key_heads, 2 * C, LANES), dtype),
        ((heads, C, LANES), f32),
        ((3, C, LANES), f32),
        ((2, LANES, 1, C), f32),
        ((2 + settings.each, shelf_rows(C), LANES), f32),
        ((settings.unrolled, LANES, LANES), f32),
    )


def _scan(settings: _Settings, block: Block) -> None:
    """All heads of one chunk."""
    _make_gates(settings, block)
    lax.fori_loop(0, settings.key_heads, lambda head, _: _prepare(settings, block, head), None)
    each_unrolled(
        settings.key_heads * settings.each, settings.unrolled, lambda some: _scan_heads(settings, block, some)
    )


def _make_gates(settings: _Settings, block: Block) -> None:
    """Sums of log decays since the start of the chunk, in two parts, and beta: for all heads at once."""
    decay = block.constants[_DECAY]
    by_token, by_head, shelves = (block.scratch[index] for index in (_BY_TOKEN, _BY_HEAD, _SHELVES))
    here = present(block)
    beta = settings.beta_scale * sigmoid(per_token(block, _B, shelves.at[0]))
    rate = jax.nn.softplus(per_token(block, _A, shelves.at[1]) + decay[0:1, :])
    logs = jnp.maximum(-jnp.exp(decay[1:2, :]) * rate * LOG2_E, WEAKEST)
    logs = jnp.where(here, logs, 0.0)
    exact = jnp.round(logs * STEPS) * (1.0 / STEPS)
    until_now = jnp.where(iota(0) >= iota(1), 1.0, 0.0)
    for part, values in ((_EXACT, exact), (_REST, logs - exact)):
        total = dot(until_now, values)
        by_token[part] = total
        by_head[part] = total.T.reshape(LANES, 1, C)
    by_token[_BETA] = jnp.where(here, beta, 0.0)


def _prepare(settings: _Settings, block: Block, key_head: Any) -> None:
    """Convolved queries and keys of unit length, and the values that go with them."""
    keys, values, shelves = (block.scratch[index] for index in (_KEYS, _VALUES, _SHELVES))
    weight, first = block.constants[_CONVOLUTION], key_head * (2 + settings.each)
    query, key, *rest = convolve(block, weight, shelves, first, 2 + settings.each)
    keys[key_head, :C, :] = unit(query, LANES**-0.5).astype(keys.dtype)
    keys[key_head, C:, :] = unit(key).astype(keys.dtype)
    for value, x in enumerate(rest):
        values[key_head * settings.each + value] = x
    keep_tails(block, shelves, first, 2 + settings.each)


@dataclass(frozen=True)
class _Sums:
    """Sums of log2 decays since the start of a chunk, in two parts: by token in every lane `[C, 128]`."""

    exact: Array
    rest: Array

    def until(self, end: int, tokens: slice) -> Array:
        """The decay from behind each of the tokens up to token `end`."""
        exact, rest = self.exact, self.rest
        return jnp.exp2((exact[end - 1 : end] - exact[tokens]) + (rest[end - 1 : end] - rest[tokens]))

    def passed(self) -> Array:
        """The decay from the start of the chunk up to each token."""
        return jnp.exp2(self.exact + self.rest)

    def between(self, exact: Array, rest: Array) -> Array:
        """The decay of each pair of tokens, given their sums by lane `[1, C]`; 0 from a later to an earlier one."""
        apart = (self.exact - exact) + (self.rest - rest)
        return jnp.exp2(jnp.where(iota(0) >= iota(1), apart, MASKED))


def _scan_heads(settings: _Settings, block: Block, heads: list[Any]) -> None:
    """Value heads of one key head, or of some: each step for all of them."""
    keys = [block.scratch[_KEYS][lax.div(head, settings.each)] for head in heads[:: settings.each]]
    products = [dot(both, both[C:], 1, 1) for both in keys]
    which = [index // settings.each for index in range(len(heads))]

    def scan(starts: list[Array]) -> list[Result]:
        return _chunk(block, heads, starts, [keys[n] for n in which], [products[n] for n in which])

    scan_heads(block, block.scratch[_HALVES], heads, scan)


def _chunk(
    block: Block, heads: list[Any], starts: list[Array], keys: list[Array], products: list[Array]
) -> list[Result]:
    """Some value heads. keys: queries over keys `[2 C, K]` of each; products: of both with the keys."""
    values, by_token, by_head = (block.scratch[index] for index in (_VALUES, _BY_TOKEN, _BY_HEAD))
    dtype, each = keys[0].dtype, range(len(heads))
    carried = [dot(keys[n], starts[n].astype(dtype), 1, 1) for n in each]
    sums = [_Sums(*(column(by_token[part], head) for part in (_EXACT, _REST))) for head in heads]
    betas = [column(by_token[_BETA], head) for head in heads]
    decays = [sums[n].between(by_head[_EXACT, head], by_head[_REST, head]) for n, head in enumerate(heads)]
    strict = iota(0) > iota(1)
    overlaps = [jnp.where(strict, products[n][C:] * decays[n] * betas[n], 0.0) for n in each]
    passed = [x.passed() for x in sums]
    wanted = [betas[n] * (values[heads[n]] - passed[n] * carried[n][C:]) for n in each]
    updates = solve(overlaps, wanted, dtype)
    scores = [(products[n][:C] * decays[n]).astype(dtype) for n in each]
    out = [passed[n] * carried[n][:C] + dot(scores[n], updates[n].astype(dtype)) for n in each]

    def added(n: int, begin: int, end: int) -> Float[Array, "V K"]:
        """What tokens leave in the state at the last of them."""
        left = sums[n].until(end, slice(begin, end))
        return dot((updates[n][begin:end] * left).astype(dtype), keys[n][C + begin : C + end], 0, 0)

    half = [starts[n] * passed[n][HALF - 1 : HALF] + added(n, 0, HALF) for n in each]
    final = [half[n] * sums[n].until(C, slice(HALF - 1, HALF)) + added(n, HALF, C) for n in each]
    return [Result(*parts) for parts in zip(out, half, final, strict=True)]
