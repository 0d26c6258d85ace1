"""Runs a linear-attention recurrence over a ragged batch: rows in decode by one step, the others chunk by chunk.

A kind gives its mathematics for one request: `step` for one token and `chunk` for up to C tokens. Reading and writing
slots, snapshots, and which token belongs to whom are the same for every kind and live here. Requests never mix: the
result of a row depends on its own tokens and state alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.op import (
    CHUNK,
    Chunks,
    RaggedBatch,
    decode_tokens,
    gather_parts,
    prefill_chunks,
    read_states,
    store_states,
    take,
)

Step = Callable[[Array, Any], tuple[Array, Array]]  # state, one token -> output, state
Chunk = Callable[[Array, Any], tuple[Array, Array]]  # state, C tokens (zeros past the end) -> outputs, state


def recur(
    tokens: Any, step: Step, chunk: Chunk, pool: Float[Array, "L N *s"], layer: int, batch: RaggedBatch
) -> tuple[Float[Array, "T ..."], Float[Array, "L N *s"]]:
    """Run a recurrence over all rows of the batch.

    Args:
      tokens: a tree of arrays `[T, ...]`, what the recurrence consumes. A token of zeros must leave the state as it is.
      step, chunk: the kind's mathematics, for one request.
      pool: states of this kind's layers; layer: index of this layer in it.
    Returns the outputs, zeros for padding tokens, and the pool with final states and snapshots stored.
    """
    count = jax.tree.leaves(tokens)[0].shape[0]
    start = read_states(pool, layer, batch)
    parts: list[tuple[Array, Array]] = []
    final = snapshot = start
    if batch.may_decode:
        index = decode_tokens(batch, count)
        out, stepped = jax.vmap(step)(start, jax.tree.map(lambda x: take(x, index), tokens))
        decoding = batch.in_decode.reshape((-1,) + (1,) * (start.ndim - 1))
        final = snapshot = jnp.where(decoding, stepped, start)
        parts.append((index, out))
    if batch.may_prefill:
        plan = prefill_chunks(batch, count, CHUNK)
        out, final, snapshot = _scan_chunks(tokens, chunk, plan, start, final, batch)
        parts.append((plan.token, out))
    return gather_parts(count, parts), store_states(pool, layer, batch, final, snapshot)


def _scan_chunks(
    tokens: Any, chunk: Chunk, plan: Chunks, start: Array, final: Array, batch: RaggedBatch
) -> tuple[Array, Array, Array]:
    """The outputs `[n, C, ...]` of all chunks, and each row's final state and snapshot `[B, ...]`."""

    def body(carry: tuple[Array, Array, Array], xs: tuple[Any, Any]) -> tuple[tuple[Array, Array, Array], Array]:
        state, final, snapshot = carry
        (row, first, length, end), piece = xs
        state = jnp.where(first, start[row], state)
        out, state = chunk(state, piece)
        final = final.at[row].set(jnp.where(length > 0, state, final[row]))
        taken = (length > 0) & (end == batch.snapshot_length[row])
        snapshot = snapshot.at[row].set(jnp.where(taken, state, snapshot[row]))
        return (state, final, snapshot), out

    pieces = jax.tree.map(lambda x: take(x, plan.token), tokens)
    carry = (jnp.zeros_like(start[0]), final, final)
    (_, final, snapshot), out = jax.lax.scan(body, carry, ((plan.row, plan.first, plan.length, plan.end), pieces))
    return out, final, snapshot
