"""How the full kinds walk a ragged batch in plain jnp: which queries attend to which pages.

Rows in decode attend all at once; the others in blocks of queries, one block at a time, so that the scores of one block
are all that exists. What a block does with its row's pages is the kind's own mathematics.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.op import RaggedBatch, decode_tokens, gather_parts, prefill_chunks, take

BLOCK = 256  # queries; larger blocks expand a compressed cache less often, smaller ones hold fewer scores

# Queries of one row (a tree with leading axis C), their positions [C], the row's page table [M] -> outputs [C, ...]
Attend = Callable[[Any, Int[Array, "C"], Int[Array, "M"]], Array]


def attend_rows(queries: Any, batch: RaggedBatch, decode: Attend, prefill: Attend) -> Float[Array, "T ..."]:
    """The outputs of all tokens, zeros for padding. `queries` is a tree of arrays `[T, ...]`."""
    count = jax.tree.leaves(queries)[0].shape[0]
    parts: list[tuple[Array, Array]] = []
    if batch.may_decode:
        index = decode_tokens(batch, count)
        one = jax.tree.map(lambda x: take(x, index)[:, None], queries)
        parts.append((index[:, None], jax.vmap(decode)(one, batch.seen[:, None], batch.pages)))
    if batch.may_prefill:
        parts.append(_attend_blocks(queries, batch, count, prefill))
    return gather_parts(count, parts)


def _attend_blocks(queries: Any, batch: RaggedBatch, count: int, prefill: Attend) -> tuple[Array, Array]:
    """The indices `[n, C]` of the tokens that prefill and their outputs `[n, C, ...]`."""
    plan = prefill_chunks(batch, count, min(BLOCK, count))
    inside = jnp.arange(plan.token.shape[1], dtype=jnp.int32)[None, :]
    start = batch.seen[plan.row] + plan.end - plan.length
    position = jnp.where(inside < plan.length[:, None], start[:, None] + inside, 0)
    pieces = jax.tree.map(lambda x: take(x, plan.token), queries)
    return plan.token, jax.lax.map(lambda block: prefill(*block), (pieces, position, batch.pages[plan.row]))


def causal(position: Int[Array, "C"], context: int) -> tuple[Bool[Array, "C s"], Bool[Array, "s"]]:
    """Which of a row's `context` cached tokens each query may see, and which any of them may see."""
    token = jnp.arange(context, dtype=jnp.int32)
    return token[None, :] <= position[:, None], token <= jnp.max(position)


def masked(values: Array, seen: Bool[Array, "s"]) -> Array:
    """Values `[s, ...]` with zeros selected where nothing was stored: a page may hold anything past its last token."""
    return jnp.where(seen.reshape((-1,) + (1,) * (values.ndim - 1)), values, jnp.zeros((), values.dtype))


def softmax(scores: Float[Array, "H C s"], visible: Bool[Array, "C s"]) -> Float[Array, "H C s"]:
    """Softmax over the visible tokens, float32."""
    return jax.nn.softmax(jnp.where(visible[None], scores, -jnp.inf), axis=-1)
