"""What the device remembers of each running request beside the model's cache, and how that changes its logits.

The tables stay on the device and are donated from step to step, so that the next step can be started before the host
has seen the tokens of the last one. A request holds one row from its first step to its end; row 0 is the null row of
padding, which is read but never written.

The order in which logits are shaped, which is that of vLLM and HF transformers: tokens that are not allowed get -inf,
and the bias is added; the logit of a token of the prompt or the output is divided by the repetition penalty where it is
positive, else multiplied; then, of the output alone, `count * frequency` and, where the count is not 0, `presence` are
taken off. `min_tokens`, temperature and the rest follow (`sampling.py`).

What a row gets depends on its own logits and its own tables alone, bit for bit.
Knows nothing of models, caches, pages or text. Letters: B rows of the step, R rows of the tables, Y vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from hybrid_jax.request import MAX_LOGIT_BIASES, RUNNING, SamplingParams
from hybrid_jax.sampling import NO_TOKEN, SamplingRows

IN_PROMPT = 1 << 30  # of a tally, above every count


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowTables:
    """One row for each request that runs, and the null row."""

    newest: Int[Array, "R"]  # newest token drawn, always one of the vocabulary
    reason: Int[Array, "R"]  # RUNNING or why the row ended
    bias: Float[Array, "R Y"]  # added to the logits; -inf for a token that is not allowed
    tallies: Int[Array, "R Y"]  # how often a token was generated, and IN_PROMPT if the prompt has it


def empty_tables(rows: int, vocabulary: int) -> RowTables:
    """Tables of `rows`, the null row among them, for logits of width `vocabulary`: 8 bytes for each entry of both."""
    return RowTables(
        newest=jnp.zeros((rows,), jnp.int32),
        reason=jnp.full((rows,), RUNNING, jnp.int32),
        bias=jnp.zeros((rows, vocabulary), jnp.float32),
        tallies=jnp.zeros((rows, vocabulary), jnp.int32),
    )


# ---------------------------------------------------------------------------------------------------------- on the host


def row_contents(
    params: SamplingParams, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int], vocabulary: int
) -> tuple[np.ndarray, np.ndarray]:
    """The bias, float32, and the tallies, int32, `[Y]` each, of a request that has so much output already.

    `vocabulary` is the width of the logits. Raises ValueError for an id that is not below it.
    """
    biased = dict(params.logit_bias)
    allowed = params.allowed_token_ids or ()
    _check_ids([*biased, *allowed, *prompt_token_ids, *output_token_ids], vocabulary)
    bias = np.zeros(vocabulary, np.float32)
    bias[list(biased)] = list(biased.values())
    if params.allowed_token_ids is not None:
        bias[np.isin(np.arange(vocabulary), allowed, invert=True)] = -np.inf
    tallies = np.bincount(np.asarray(output_token_ids, np.int32), minlength=vocabulary).astype(np.int32)
    tallies[np.asarray(prompt_token_ids, np.int32)] |= IN_PROMPT
    return bias, tallies


def _check_ids(ids: Sequence[int], vocabulary: int) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        wrong = next(i for i in ids if not 0 <= i < vocabulary)
        raise ValueError(f"wanted token ids from 0 to {vocabulary - 1}, got {wrong}: check them before a request runs")


def place_row(tables: RowTables, row: int, bias: Float[np.ndarray, "Y"], tallies: Int[np.ndarray, "Y"]) -> RowTables:
    """Give `row` to a request, whose `row_contents` these are: it runs, and has drawn nothing since.

    `tables` are donated. Raises ValueError for the null row and one past the end.
    """
    rows = len(tables.newest)
    if not 0 < row < rows:
        raise ValueError(f"wanted a row from 1 to {rows - 1}, got {row}: row 0 is padding's")
    return _place(tables, np.int32(row), bias, tallies)


def place_mask(tables: RowTables, row: int, mask: UInt32[np.ndarray, "M"], params: SamplingParams) -> RowTables:
    """Let `row` draw nothing but what `mask` allows from its next token on, with the bias of `params`.

    mask: a bit for each id, the lowest first; ids past its end are not allowed. `tables` are donated.
    """
    vocabulary = tables.bias.shape[1]
    words = np.zeros(-(-vocabulary // 32), np.uint32)
    words[: len(mask)] = mask[: len(words)]
    ids, values = np.full(MAX_LOGIT_BIASES, vocabulary, np.int32), np.zeros(MAX_LOGIT_BIASES, np.float32)
    for index, (token, bias) in enumerate(dict(params.logit_bias).items()):
        ids[index], values[index] = token, bias
    return _place_mask(tables, np.int32(row), words, ids, values)


def place_nothing(tables: RowTables) -> RowTables:
    """The same tables, donated: compiles what placing a row and a mask runs, while requests may be in the rows."""
    rows, vocabulary = tables.bias.shape
    tables = place_mask(tables, rows, np.zeros(0, np.uint32), SamplingParams())
    return _place(tables, np.int32(rows), np.zeros(vocabulary, np.float32), np.zeros(vocabulary, np.int32))


# -------------------------------------------------------------------------------------------------------- on the device


@partial(jax.jit, donate_argnums=(0,))
def _place(tables: RowTables, row: Array, bias_Y: Array, tallies_Y: Array) -> RowTables:
    """A row past the end is dropped."""
    return RowTables(
        newest=tables.newest.at[row].set(0, mode="drop"),
        reason=tables.reason.at[row].set(RUNNING, mode="drop"),
        bias=tables.bias.at[row].set(bias_Y, mode="drop"),
        tallies=tables.tallies.at[row].set(tallies_Y, mode="drop"),
    )


@partial(jax.jit, donate_argnums=(0,))
def _place_mask(tables: RowTables, row: Array, words_M: Array, ids: Array, values: Array) -> RowTables:
    """A row past the end is dropped, and so is an id."""
    bits_M32 = words_M[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None] & 1
    bits_Y = bits_M32.reshape(-1)[: tables.bias.shape[1]]
    bias_Y = jnp.where(bits_Y == 1, 0.0, -jnp.inf).astype(jnp.float32).at[ids].add(values, mode="drop")
    return replace(tables, bias=tables.bias.at[row].set(bias_Y, mode="drop"))


def shape_logits(logits: Float[Array, "B Y"], rows: SamplingRows, tables: RowTables) -> Float[Array, "B Y"]:
    """The logits, float32, after bias and penalties in rows with `shaped`; those of other rows as they are.

    A NaN or +inf in a row stays one, so that `sample` ends the row. A batch without such rows reads no table.
    """

    def shape(logits_BY: Array) -> Array:
        shaped_BY = _penalised(logits_BY + tables.bias[rows.row], tables.tallies[rows.row], rows)
        return jnp.where(jnp.asarray(rows.shaped)[:, None], shaped_BY, logits_BY)

    return jax.lax.cond(jnp.any(rows.shaped), shape, lambda unchanged: unchanged, logits.astype(jnp.float32))


def _penalised(logits_BY: Array, tallies_BY: Array, rows: SamplingRows) -> Array:
    repetition_B1, frequency_B1, presence_B1 = (
        jnp.asarray(penalty_B)[:, None] for penalty_B in (rows.repetition, rows.frequency, rows.presence)
    )
    count_BY = tallies_BY & (IN_PROMPT - 1)
    # Multiplied by the inverse: a compiler may do so with a division by one number a row, and need not in every shape.
    factor_BY = jnp.where(logits_BY > 0.0, 1.0 / repetition_B1, repetition_B1)
    logits_BY = jnp.where(tallies_BY > 0, logits_BY * factor_BY, logits_BY)
    logits_BY -= frequency_B1 * count_BY.astype(jnp.float32)
    return logits_BY - jnp.where(count_BY > 0, presence_B1, 0.0)


def count_tokens(
    tables: RowTables, rows: SamplingRows, tokens: Int[Array, "B"], running: Bool[Array, "B"]
) -> RowTables:
    """The tables after `tokens` were drawn: the newest token and the tallies of the rows that run.

    Rows that do not run, the null row, and rows with `NO_TOKEN` stay as they are. Rows that run are different rows.
    """
    drawn_B = running & (rows.row > 0) & (tokens != NO_TOKEN)
    row_B = jnp.where(drawn_B, rows.row, len(tables.newest))  # past the end: dropped
    return replace(
        tables,
        newest=tables.newest.at[row_B].set(tokens, mode="drop"),
        tallies=tables.tallies.at[row_B, tokens].add(1, mode="drop"),
    )
