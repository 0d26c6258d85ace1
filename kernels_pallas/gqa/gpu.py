"""Softmax attention with grouped queries on Hopper: the door to the kernels of this folder.

    store_tokens      this step's keys and values to their pages, in place
    attend_items      rows in decode, cut along their cached tokens; sum_splits joins the parts
    attend_chunks     rows that prefill, 64 queries at a time

Norms, rotary and gate are left to XLA. Each path touches its own rows only.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.gqa.gpu_decode import ROWS, attend_items, decode_plan
from kernels_pallas.gqa.gpu_pages import RUN, store_tokens, token_places
from kernels_pallas.gqa.gpu_prefill import attend_chunks, plan_units
from kernels_pallas.gqa.gpu_splits import BLOCK, split_rows, sum_splits
from kernels_pallas.gqa.xla import GQAWeights
from kernels_pallas.norm import rms
from kernels_pallas.op import KVSpec, RaggedBatch, clear_padding, decode_tokens, take, token_rows
from kernels_pallas.rotary import Rotary, rotate_halves

WIDTHS = (64, 128, 256)
PAGES = (16, 32, 64, 128, 256)
UNIT_OVERHEAD = 1.0  # blocks: queries in, a partial output of at most 16 heads out and in again


def gqa(
    q: Float[Array, "T H D"],
    k: Float[Array, "T G D"],
    v: Float[Array, "T G D"],
    gate: Float[Array, "T H D"] | None,
    weights: GQAWeights,
    rotary: Rotary | None,
    pages: Float[Array, "L P S G*2*D"],
    layer: int,
    batch: RaggedBatch,
    *,
    scale: float,
    epsilon: float,
) -> tuple[Float[Array, "T H*D"], Float[Array, "L P S G*2*D"]]:
    """One attention layer between its projections, as `xla.gqa` defines it; the pages are updated in place.

    Raises NotImplementedError for other dtypes than bfloat16 and for widths and page sizes without a kernel.
    """
    shape = pages.shape
    pages = pages.reshape(*shape[:3], k.shape[1], 2, -1)
    _check(q, pages)
    q = _prepare(q, weights.query_norm, rotary, epsilon)
    k = _prepare(k, weights.key_norm, rotary, epsilon)
    pages = _store(jnp.stack([k, v], axis=2), pages, layer, batch)
    out = _attend(q, pages, layer, batch, scale)
    if gate is not None:
        out = out * jax.nn.sigmoid(gate.astype(jnp.float32))
    return clear_padding(out.reshape(out.shape[0], -1).astype(q.dtype), batch), pages.reshape(shape)


def _check(q: Array, pages: Array) -> None:
    width, page = q.shape[2], pages.shape[2]
    group = q.shape[1] // pages.shape[3]
    if q.dtype != jnp.bfloat16 or pages.dtype != jnp.bfloat16:
        raise NotImplementedError(f"gqa on gpu: wanted bfloat16, got {q.dtype} and pages of {pages.dtype}: use 'xla'")
    if width not in WIDTHS:
        raise NotImplementedError(f"gqa on gpu: wanted a head width of {WIDTHS}, got {width}: use backend 'xla'")
    if page not in PAGES:
        raise NotImplementedError(f"gqa on gpu: wanted a page of {PAGES} tokens, got {page}: use backend 'xla'")
    if group > ROWS:
        raise NotImplementedError(f"gqa on gpu: wanted at most {ROWS} query heads a key head, got {group}: use 'xla'")


def _prepare(x: Array, norm: Array | None, rotary: Rotary | None, epsilon: float) -> Array:
    normed = x if norm is None else rms(x, norm, epsilon)
    return (normed if rotary is None else rotate_halves(normed, rotary)).astype(x.dtype)


def _store(values: Float[Array, "T G 2 D"], pages: Array, layer: int, batch: RaggedBatch) -> Array:
    tokens = values.shape[0]
    held = jax.new_ref(pages.reshape(*pages.shape[:3], -1, RUN))
    places = token_places(batch, tokens, pages.shape[2])
    store_tokens(values.reshape(tokens, -1, RUN), *places, held, jnp.full((1,), layer, jnp.int32))
    return jax.freeze(held).reshape(pages.shape)


def _attend(
    q: Float[Array, "T H D"], pages: Array, layer: int, batch: RaggedBatch, scale: float
) -> Float[Array, "T H D"]:
    """The outputs of all tokens; arbitrary for padding."""
    row, _ = token_rows(batch, q.shape[0])
    if not batch.may_prefill:
        return _decode(q, pages, layer, batch, scale)[row].astype(jnp.float32)
    prefilled = _prefill(q, pages, layer, batch, scale)
    if not batch.may_decode:
        return prefilled
    decoded = _decode(q, pages, layer, batch, scale)[row].astype(jnp.float32)
    return jnp.where(batch.in_decode[row][:, None, None], decoded, prefilled)


def _prefill(
    q: Float[Array, "T H D"], pages: Array, layer: int, batch: RaggedBatch, scale: float
) -> Float[Array, "T H D"]:
    """The outputs of rows that prefill, zeros for all other tokens."""
    units = plan_units(batch, q.shape[0])
    number = jnp.full((1,), layer, jnp.int32)
    out = attend_chunks(take(q, units.token), batch.pages, units, pages, number, scale)
    return take(out.reshape(-1, *q.shape[1:]), units.place).astype(jnp.float32)


def _decode(
    q: Float[Array, "T H D"], pages: Array, layer: int, batch: RaggedBatch, scale: float
) -> Float[Array, "B H D"]:
    """The outputs of rows in decode; arbitrary for other rows."""
    (tokens, heads, width), (page, key_heads) = q.shape, (pages.shape[2], pages.shape[3])
    group = heads // key_heads
    padded = -(-group // 8) * 8
    length = jnp.where(batch.in_decode, batch.seen + 1, 0)
    items = split_rows(length, -(-batch.pages.shape[1] * page // BLOCK), key_heads, UNIT_OVERHEAD)
    queries = take(q, decode_tokens(batch, tokens)).reshape(-1, key_heads, group, width)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, padded - group), (0, 0)))
    plan = decode_plan(key_heads, padded, width, page)
    number = jnp.full((1,), layer, jnp.int32)
    parts = attend_items(queries, batch.pages, length, items, pages, number, scale, plan)
    return sum_splits(*parts, items, heads)[..., :width]


def fits(memory: KVSpec, dtype: str) -> bool:
    """Whether the kernels have the shapes and dtypes of a layer that remembers this and computes in `dtype`."""
    return dtype == "bfloat16" and memory.arrays[0].shape[1] in [2 * width for width in WIDTHS]
