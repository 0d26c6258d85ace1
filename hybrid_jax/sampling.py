"""Chooses the next token of every row on the device, and says which rows are done.

The order of operations on the float32 logits of a row: stop ids are masked while `min_tokens` is not reached; a
temperature under `GREEDY_BELOW` takes the most likely token (lowest id on ties); otherwise divide by the temperature,
keep exactly `top_k` tokens (ties by lower id), of those the fewest that reach `top_p` of their probability, of those
the ones at least `min_p` times as likely as the most likely, and draw from what is left.

**Exact and independent of the batch.** A probability is proportional to `exp((logit - max) / temperature)`, held as a
fixed-point number (`prefixes.py`). The set of tokens kept and the token drawn depend on the row alone, bit for bit: not
on its neighbours, its place in the batch, the size of the batch, nor on how a device splits a sum. The random bits
depend on (seed, choice, index of the generated token) only, so a preempted and resumed request draws what it would have
drawn.

Knows nothing of models, caches or text, nor of what shapes the logits before (`row_tables.py`).
Letters: B rows, Y vocabulary, I stop ids, J blocks of Q tokens, L likeliest tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from hybrid_jax.prefixes import (
    DIGIT_BITS,
    DIGIT_MASK,
    MAX_VOCABULARY,
    count_of,
    difference,
    digits_of,
    first_index,
    mass_of,
    ordinals,
    prefix_of,
    scaled,
    sum_of,
)
from hybrid_jax.request import ERROR, GREEDY_BELOW, LENGTH, MAX_LOGPROBS, MAX_STOP_TOKEN_IDS, RUNNING, STOP, Request

NO_TOKEN = -1  # `sample` for a row with nothing to draw from; pads `stop_ids`
BLOCK = 512  # tokens summed up together by a draw: about the square root of a vocabulary

AnyArray = Array | np.ndarray  # NumPy until the step takes it
Logprobs = tuple[Array, Array, Array]  # [B] of the token drawn; [B, 20] of the likeliest tokens, and their ids


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """What the rows of a step ask of sampling. Made by `pack` from NumPy arrays; goes into the compiled step.

    A padding row has temperature 0 and a `token_limit` of 0: it takes some token and is done.
    """

    temperature: Float[AnyArray, "B"]
    top_k: Int[AnyArray, "B"]  # 0 is off
    top_p: Float[AnyArray, "B"]
    min_p: Float[AnyArray, "B"]
    seed: UInt32[AnyArray, "B 2"]  # high word, low word
    choice: Int[AnyArray, "B"]
    sampled: Int[AnyArray, "B"]  # tokens drawn so far, which is the index of the next one
    min_tokens: Int[AnyArray, "B"]
    token_limit: Int[AnyArray, "B"]
    stop_ids: Int[AnyArray, "B I"]  # padded with -1; compared with tokens, never an index
    row: Int[AnyArray, "B"]  # of `RowTables`; 0 is the null row
    shaped: Bool[AnyArray, "B"]  # whether penalties, a bias or a set of allowed tokens are in use
    presence: Float[AnyArray, "B"]
    frequency: Float[AnyArray, "B"]
    repetition: Float[AnyArray, "B"]
    logprobs: Int[AnyArray, "B"]  # alternatives asked for; -1 is off

    def advanced(self, count: Int[Array, "B"]) -> "SamplingRows":
        """The rows after `count` more tokens each, for a loop on the device."""
        return replace(self, sampled=self.sampled + count)


# ---------------------------------------------------------------------------------------------------------- on the host


def pack(
    requests: Sequence[Request],
    sampled: Sequence[int],
    padded_rows: int,
    eos_token_ids: Sequence[int],
    rows: Sequence[int] | None = None,
) -> SamplingRows:
    """One row per request, then padding, as NumPy arrays. `sampled[i]` counts the tokens that request i already has;
    `rows[i]` is its row of the tables, which may be left out where no request is `shaped`.

    The width of `stop_ids` depends on the number of `eos_token_ids` alone, so a server compiles one shape.
    Raises ValueError for more requests than rows, `sampled` of another length, and `rows` that are not one of its own
    from 1 on for each request.
    """
    if len(requests) > padded_rows or len(sampled) != len(requests):
        raise ValueError(
            f"wanted up to {padded_rows} requests with a count of sampled tokens each, got {len(requests)} requests"
            f" and {len(sampled)} counts: raise padded_rows or pass both for the same requests"
        )
    params = [request.params for request in requests]

    def column(values: Sequence[object], padding: object, dtype: type) -> np.ndarray:
        return np.array([*values, *[padding] * (padded_rows - len(values))], dtype)

    return SamplingRows(
        temperature=column([p.temperature for p in params], 0.0, np.float32),
        top_k=column([p.top_k for p in params], 0, np.int32),
        top_p=column([p.top_p for p in params], 1.0, np.float32),
        min_p=column([p.min_p for p in params], 0.0, np.float32),
        seed=column([_seed_words(r.seed) for r in requests], (0, 0), np.uint32).reshape(padded_rows, 2),
        choice=column([r.choice for r in requests], 0, np.int32),
        sampled=column(sampled, 0, np.int32),
        min_tokens=column([p.min_tokens for p in params], 0, np.int32),
        token_limit=column([r.token_limit for r in requests], 0, np.int32),
        stop_ids=_stop_ids(requests, padded_rows, eos_token_ids),
        row=column(_table_rows(requests, rows), 0, np.int32),
        shaped=column([r.shaped for r in requests], False, np.bool_),
        presence=column([p.presence_penalty for p in params], 0.0, np.float32),
        frequency=column([p.frequency_penalty for p in params], 0.0, np.float32),
        repetition=column([p.repetition_penalty for p in params], 1.0, np.float32),
        logprobs=column([-1 if p.logprobs is None else p.logprobs for p in params], -1, np.int32),
    )


def _table_rows(requests: Sequence[Request], rows: Sequence[int] | None) -> Sequence[int]:
    if rows is None:
        if any(request.shaped for request in requests):
            raise ValueError("wanted the table row of each request with penalties, bias or allowed tokens: pass rows")
        return [0] * len(requests)
    if len(rows) != len(requests) or len(set(rows)) != len(rows) or min(rows, default=1) < 1:
        raise ValueError(f"wanted {len(requests)} different table rows from 1 on, got {list(rows)}: row 0 is padding's")
    return rows


def _seed_words(seed: int) -> tuple[int, int]:
    return seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF


def _stop_ids(requests: Sequence[Request], padded_rows: int, eos_token_ids: Sequence[int]) -> np.ndarray:
    stop_ids = np.full((padded_rows, MAX_STOP_TOKEN_IDS + len(eos_token_ids)), NO_TOKEN, np.int32)
    for row, request in enumerate(requests):
        params = request.params
        ids = [*params.stop_token_ids, *([] if params.ignore_eos else eos_token_ids)]
        stop_ids[row, : len(ids)] = ids
    return stop_ids


# -------------------------------------------------------------------------------------------------------- on the device


def draw(
    logits: Float[Array, "B Y"], rows: SamplingRows, shape: Callable[[Array], Array], likeliest: bool = False
) -> tuple[Int[Array, "B"], Logprobs]:
    """The next token of each row, as `sample` gives it for the logits after `shape`, and what `token_logprobs` gives.

    A step whose rows all take the likeliest token, and ask for nothing beside it, meets one branch, and none where that
    is known when it is traced (`likeliest`): a GPU waits for the host at each.
    """
    if likeliest:
        return _likeliest(logits.astype(jnp.float32)), _no_logprobs(len(logits))
    draws_B, short_B = rows.temperature >= GREEDY_BELOW, rows.sampled < rows.min_tokens
    more_B = draws_B | short_B | rows.shaped | (rows.logprobs >= 0)

    def whole(logits_BY: Array) -> tuple[Array, Logprobs]:
        token_B = sample(shape(logits_BY), rows)
        return token_B, token_logprobs(logits_BY, token_B, rows)

    def plain(logits_BY: Array) -> tuple[Array, Logprobs]:
        return _likeliest(logits_BY), _no_logprobs(len(logits_BY))

    return jax.lax.cond(jnp.any(more_B), whole, plain, logits.astype(jnp.float32))


def sample(logits: Float[Array, "B Y"], rows: SamplingRows) -> Int[Array, "B"]:
    """The next token of each row, int32. The padded tail of the vocabulary must be -inf.

    `NO_TOKEN` for a row with nothing to draw from: a NaN or +inf among its logits, or every token masked. Such a row is
    done with `ERROR` (`finished`); it is no index, so clamp it before it goes into the next step.
    Raises ValueError for a vocabulary of 2**19 tokens or more.
    """
    _check_vocabulary(logits)
    logits = _mask_early_stops(logits.astype(jnp.float32), rows)
    likeliest_B = _likeliest(logits)
    drawn_B = jax.lax.cond(jnp.any(rows.temperature >= GREEDY_BELOW), _draw, lambda *_: likeliest_B, logits, rows)
    return jnp.where((rows.temperature < GREEDY_BELOW) | (likeliest_B == NO_TOKEN), likeliest_B, drawn_B)


def _likeliest(logits_BY: Array) -> Int[Array, "B"]:
    token_B = jnp.argmax(logits_BY, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.isfinite(jnp.max(logits_BY, axis=-1)), token_B, NO_TOKEN)


def _no_logprobs(rows: int) -> Logprobs:
    zeros_BL = jnp.zeros((rows, MAX_LOGPROBS))
    return zeros_BL[:, 0], zeros_BL, zeros_BL.astype(jnp.int32)


def finished(tokens: Int[Array, "B"], rows: SamplingRows) -> tuple[Bool[Array, "B"], Int[Array, "B"]]:
    """Whether each row is done with the token just drawn, and why: RUNNING, STOP, LENGTH or ERROR (int32).

    `rows` are those that the tokens were drawn with. A stop id goes before the limit of tokens: on the last token
    allowed it gives STOP.
    """
    generated_B = rows.sampled + 1
    stops_B = jnp.any(tokens[:, None] == rows.stop_ids, axis=-1) & (generated_B >= rows.min_tokens)
    reason_B = jnp.where(generated_B >= rows.token_limit, LENGTH, RUNNING)
    reason_B = jnp.where(stops_B, STOP, reason_B)
    reason_B = jnp.where(tokens == NO_TOKEN, ERROR, reason_B).astype(jnp.int32)
    return reason_B != RUNNING, reason_B


def token_logprobs(logits: Float[Array, "B Y"], tokens: Int[Array, "B"], rows: SamplingRows) -> Logprobs:
    """Log-softmax (natural, float32) at `tokens`, and at the 20 likeliest tokens with their ids, likeliest first.

    `logits` are the model's own, not shaped ones. Of equal tokens the lower id goes first. A token among the likeliest
    has the same bits there. All 0 for a row that does not ask (`rows.logprobs` < 0) or has `NO_TOKEN`; past the end of
    a vocabulary of fewer than 20 tokens, -inf and `NO_TOKEN`. Raises ValueError for a vocabulary of 2**19 or more.
    """
    _check_vocabulary(logits)
    asks_B = (rows.logprobs >= 0) & (tokens != NO_TOKEN)
    nothing = _no_logprobs(len(tokens))
    return jax.lax.cond(jnp.any(asks_B), _logprobs, lambda *_: nothing, logits.astype(jnp.float32), tokens, asks_B)


def given_logprobs(logits: Float[Array, "B Y"], tokens: Int[Array, "B"]) -> Logprobs:
    """As `token_logprobs`, for tokens that were given: every row asks. Raises ValueError as that does."""
    _check_vocabulary(logits)
    return _logprobs(logits.astype(jnp.float32), tokens, jnp.ones(tokens.shape, bool))


def _logprobs(logits_BY: Array, tokens_B: Array, asks_B: Array) -> Logprobs:
    """The sum under the logarithm is one of integers, so independent of the batch; off by less than 2**-39 a token."""
    short = max(MAX_LOGPROBS - logits_BY.shape[1], 0)
    top_BL, ids_BL = jax.lax.top_k(logits_BY, MAX_LOGPROBS - short)
    top_BL = jnp.pad(top_BL, ((0, 0), (0, short)), constant_values=-jnp.inf)
    ids_BL = jnp.pad(ids_BL, ((0, 0), (0, short)), constant_values=NO_TOKEN)
    own_B1 = jnp.take_along_axis(logits_BY, jnp.maximum(tokens_B, 0)[:, None], axis=1)
    below_BL = jnp.concatenate([own_B1, top_BL], axis=1) - top_BL[:, :1]
    high_B, low_B = mass_of(jnp.exp(logits_BY - top_BL[:, :1]))(jnp.ones_like(logits_BY, bool))
    high_B -= 1 << DIGIT_BITS  # without the 1 of the likeliest token, the sum of the others keeps its digits
    rest_B = high_B.astype(jnp.float32) * 2.0**-DIGIT_BITS + low_B.astype(jnp.float32) * 2.0 ** (-3 * DIGIT_BITS)
    values_BL = jnp.where(asks_B[:, None], below_BL - jnp.log1p(rest_B)[:, None], 0.0)
    return values_BL[:, 0], values_BL[:, 1:], jnp.where(asks_B[:, None], ids_BL, 0)


def support(logits: Float[Array, "B Y"], rows: SamplingRows) -> Bool[Array, "B Y"]:
    """The tokens that a draw may give: what masks, top-k, top-p and min-p leave. A greedy row counts as temperature 1.

    Raises ValueError for a vocabulary of 2**19 tokens or more.
    """
    _check_vocabulary(logits)
    logits = _mask_early_stops(logits.astype(jnp.float32), rows)
    return _kept(logits, _weights(logits, rows), rows)


def _check_vocabulary(logits: Float[Array, "B Y"]) -> None:
    if logits.shape[-1] > MAX_VOCABULARY:
        raise ValueError(
            f"wanted at most {MAX_VOCABULARY} tokens, got {logits.shape[-1]}: sums of more weights overflow 32 bits,"
            " lower DIGIT_BITS"
        )


def _mask_early_stops(logits_BY: Array, rows: SamplingRows) -> Array:
    """-inf at the stop ids of rows that have not reached `min_tokens`."""
    short_B1 = (rows.sampled < rows.min_tokens)[:, None]

    def mask(logits_BY: Array) -> Array:
        id_1Y = jax.lax.broadcasted_iota(jnp.int32, (1, logits_BY.shape[-1]), 1)
        stops_BY = jnp.any(id_1Y[:, None] == rows.stop_ids[:, :, None], axis=1)
        return jnp.where(short_B1 & stops_BY, -jnp.inf, logits_BY)

    return jax.lax.cond(jnp.any(short_B1), mask, lambda unchanged: unchanged, logits_BY)


def _weights(logits_BY: Array, rows: SamplingRows) -> Array:
    """Probabilities up to a factor: float32 in [0, 1], 1 for the most likely token, all 0 if there is nothing to draw.

    The maximum is taken off first, so that no temperature however low can overflow.
    """
    max_B1 = jnp.max(logits_BY, axis=-1, keepdims=True)
    temperature_B1 = jnp.where(rows.temperature < GREEDY_BELOW, 1.0, rows.temperature)[:, None]
    return jnp.where(jnp.isfinite(max_B1), jnp.exp((logits_BY - max_B1) / temperature_B1), 0.0)


def _kept(logits_BY: Array, weights_BY: Array, rows: SamplingRows) -> Array:
    """The set that top-k, top-p and min-p leave, in this order. Never empty where there is something to draw."""
    order_BY = ordinals(logits_BY)

    def top_k(kept_BY: Array) -> Array:
        target_B = jnp.where(rows.top_k > 0, rows.top_k, logits_BY.shape[-1]).astype(jnp.uint32)
        return kept_BY & prefix_of(order_BY, count_of, (jnp.zeros_like(target_B), target_B))

    def top_p(kept_BY: Array) -> Array:
        measure = mass_of(weights_BY)  # what top-k left is a prefix of the same order
        high_B, low_B = scaled(measure(kept_BY), digits_of(jnp.asarray(rows.top_p)))
        target = high_B, jnp.where((high_B == 0) & (low_B == 0), 1, low_B)  # never empty
        return kept_BY & (prefix_of(order_BY, measure, target) | (rows.top_p >= 1.0)[:, None])

    kept_BY = weights_BY > 0.0
    kept_BY = jax.lax.cond(jnp.any(rows.top_k > 0), top_k, lambda unchanged: unchanged, kept_BY)
    kept_BY = jax.lax.cond(jnp.any(rows.top_p < 1.0), top_p, lambda unchanged: unchanged, kept_BY)
    return kept_BY & (weights_BY >= rows.min_p[:, None])  # the most likely token is always kept, with weight 1


def _draw(logits_BY: Array, rows: SamplingRows) -> Array:
    """A token of each row's support with its probability: the first id at which the sum passes a random amount.

    The sum goes over blocks of the vocabulary first, then into the one block that holds the token.
    """
    weights_BY = _weights(logits_BY, rows)
    weights_BY = jnp.where(_kept(logits_BY, weights_BY, rows), weights_BY, 0.0)
    weights_BJQ = jnp.pad(weights_BY, ((0, 0), (0, -weights_BY.shape[1] % BLOCK))).reshape(len(weights_BY), -1, BLOCK)
    measure_blocks = sum_of([jnp.sum(digit_BJQ, axis=-1, dtype=jnp.uint32) for digit_BJQ in digits_of(weights_BJQ)])
    every_BJ = jnp.ones(weights_BJQ.shape[:2], bool)
    high_B, low_B = scaled(measure_blocks(every_BJ), _random_digits(rows))
    target = high_B, low_B + 1
    block_B = first_index(measure_blocks, every_BJ.shape, target)
    block_B1 = jnp.minimum(block_B, every_BJ.shape[1] - 1)[:, None]  # past the end where there is nothing to draw
    before_BJ = jax.lax.broadcasted_iota(jnp.int32, every_BJ.shape, 1) < block_B1
    weights_BQ = jnp.take_along_axis(weights_BJQ, block_B1[:, :, None], axis=1)[:, 0]
    inside_B = first_index(mass_of(weights_BQ), weights_BQ.shape, difference(target, measure_blocks(before_BJ)))
    return block_B1[:, 0] * BLOCK + inside_B


def _random_digits(rows: SamplingRows) -> list[Array]:
    """Four uniform digits of 13 bits per row, from the counter key of (seed, choice, index of the token)."""

    def words(seed_2: Array, choice: Array, sampled: Array) -> Array:
        key = jax.random.wrap_key_data(seed_2, impl="threefry2x32")
        return jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, choice), sampled), (2,), jnp.uint32)

    words_B2 = jax.vmap(words)(*map(jnp.asarray, (rows.seed, rows.choice, rows.sampled)))
    shifts = (32 - DIGIT_BITS, 32 - 2 * DIGIT_BITS)
    return [words_B2[:, word] >> shift & DIGIT_MASK for word in (0, 1) for shift in shifts]
