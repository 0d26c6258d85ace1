"""Softmax attention with grouped queries on TPU: the door to the kernels of this folder.

    store_windows     keys and values of rows that prefill, to their pages, in place
    attend            rows in decode, each with its own new token; then tiles of queries of the rows that prefill

Norms and rotary before, the gate after are left to XLA. A cached token is one row of `2 G D` lanes, head by head, its
key, then its value: a range of heads is a range of lanes. A head of 64 channels shares its 128 lanes with its value:
queries have zeros for those.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.gqa.tpu_attend import LANES, Columns, Items, attend, tile
from kernels_pallas.gqa.tpu_pages import plan_windows, store_windows
from kernels_pallas.gqa.xla import GQAWeights
from kernels_pallas.norm import rms
from kernels_pallas.op import (
    KVSpec,
    RaggedBatch,
    clear_padding,
    decode_tokens,
    gather_parts,
    prefill_chunks,
    take,
)
from kernels_pallas.rotary import Rotary, rotate_halves

WIDTHS = (64, 128, 256)
PAGES = (16, 32, 64, 128)
DTYPES = ("bfloat16", "float32")
PREFILL_ROWS = 512  # query rows of a head in a tile: keys wait in the MXU while so many rows pass them
TILE_BYTES = 12 << 20  # of the float32 sums, peaks and totals of a tile


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

    Raises NotImplementedError for dtypes, widths and page sizes without a kernel.
    """
    _check(q, pages)
    (tokens, _, width), key_heads = q.shape, k.shape[1]
    queries = _prepare(q, weights.query_norm, rotary, epsilon).astype(jnp.float32) * (scale * math.log2(math.e))
    keys = _prepare(k, weights.key_norm, rotary, epsilon)
    new = jnp.stack([keys, v], axis=2).reshape(tokens, -1)
    columns = grouped_columns(key_heads, width)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, columns.key_width - width))).astype(q.dtype)
    read, pages = attend_rows(queries, new, pages, layer, batch, columns)
    out = read[..., -width:]
    if gate is not None:
        out = out.astype(jnp.float32) * jax.nn.sigmoid(gate.astype(jnp.float32))
    out = out.reshape(tokens, -1).astype(q.dtype)
    return clear_padding(out, batch), pages


def _check(q: Array, pages: Array) -> None:
    width, page = q.shape[2], pages.shape[2]
    if q.dtype != pages.dtype or str(q.dtype) not in DTYPES:
        wanted = f"pages of the same dtype as the activations, of {DTYPES}"
        raise NotImplementedError(f"gqa on tpu: wanted {wanted}, got {q.dtype} and pages of {pages.dtype}: use 'xla'")
    if width not in WIDTHS:
        raise NotImplementedError(f"gqa on tpu: wanted a head width of {WIDTHS}, got {width}: use backend 'xla'")
    if page not in PAGES:
        raise NotImplementedError(f"gqa on tpu: wanted a page of {PAGES} tokens, got {page}: use backend 'xla'")


def _prepare(x: Array, norm: Array | None, rotary: Rotary | None, epsilon: float) -> Array:
    normed = x if norm is None else rms(x, norm, epsilon)
    return (normed if rotary is None else rotate_halves(normed, rotary)).astype(x.dtype)


def grouped_columns(key_heads: int, width: int) -> Columns:
    """The lanes of a cached token: head by head its key, then its value; read together where both fill 128."""
    step = 2 * width
    read = max(width, LANES)
    return Columns(key_heads, read, read, step, step - read, step)


def attend_rows(
    q: Float[Array, "T H D"],
    new: Float[Array, "T W"],
    pages: Float[Array, "L P S W"],
    layer: int,
    batch: RaggedBatch,
    columns: Columns,
) -> tuple[Float[Array, "T H V"], Float[Array, "L P S W"]]:
    """The outputs of all tokens, zeros for padding, and the pages with the step's cached rows stored.

    Args:
      q: queries of `columns.key_width` channels times the scale and log2(e), those of a key head side by side.
      new: the cached rows of this step's tokens.
    """
    parts = []
    if batch.may_decode:
        index, out, pages = _decode(q, new, pages, layer, batch, columns)
        parts.append((index, out))
    if batch.may_prefill:
        pages = store_windows(new, pages, layer, plan_windows(batch, len(q), pages.shape[2]))
        parts.append(_prefill(q, pages, layer, batch, columns))
    return gather_parts(len(q), parts), pages


def _decode(
    q: Array, new: Array, pages: Array, layer: int, batch: RaggedBatch, columns: Columns
) -> tuple[Array, Array, Array]:
    """The tokens `[B]` of rows in decode, their outputs `[B, H, V]`, and the pages."""
    index = decode_tokens(batch, len(q))
    group = q.shape[1] // columns.heads
    rows = -(-group // 8) * 8
    grouped = take(q, index).reshape(batch.rows, columns.heads, group, columns.key_width)
    padded = jnp.pad(grouped, ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    items = Items(jnp.arange(batch.rows, dtype=jnp.int32), batch.seen, jnp.where(batch.in_decode, batch.seen + 1, 0))
    tiling = tile(1, rows, columns, pages.shape[3], pages.shape[2], pages.dtype.itemsize)
    queries = padded.reshape(batch.rows, -1, columns.key_width)
    out, pages = attend(queries, take(new, index), pages, layer, batch.pages, items, columns, tiling)
    own = out.reshape(batch.rows, columns.heads, rows, columns.value_width)[:, :, :group]
    return index, own.reshape(batch.rows, q.shape[1], columns.value_width), pages


def _prefill(
    q: Array, pages: Array, layer: int, batch: RaggedBatch, columns: Columns
) -> tuple[Array, Float[Array, "n C H V"]]:
    """The tokens `[n, C]` of the tiles of rows that prefill, and their outputs."""
    group = q.shape[1] // columns.heads
    size = tile_queries(group, columns)
    plan = prefill_chunks(batch, len(q), size)
    tiles = len(plan.row)
    grouped = take(q, plan.token).reshape(tiles, size, columns.heads, group, columns.key_width)
    queries = grouped.transpose(0, 2, 3, 1, 4).reshape(tiles, -1, columns.key_width)
    seen = batch.seen[plan.row] + plan.end
    items = Items(plan.row, seen - plan.length, jnp.where(plan.length > 0, seen, 0))
    tiling = tile(size, group * size, columns, pages.shape[3], pages.shape[2], pages.dtype.itemsize)
    out, _ = attend(queries, None, pages, layer, batch.pages, items, columns, tiling)
    own = out.reshape(tiles, columns.heads, group, size, columns.value_width).transpose(0, 3, 1, 2, 4)
    return plan.token, own.reshape(tiles, size, q.shape[1], columns.value_width)


def tile_queries(group: int, columns: Columns) -> int:
    """Tokens of a tile of queries: a power of two, at least 8, about PREFILL_ROWS rows a head while VMEM holds them."""
    row_bytes = 4 * (columns.value_width + 2 * LANES)
    most = min(PREFILL_ROWS, TILE_BYTES // (columns.heads * row_bytes)) // group
    return max(1 << max(most.bit_length() - 1, 0), 8)


def fits(memory: KVSpec, dtype: str) -> bool:
    """Whether the kernels have the shapes and dtypes of a layer that remembers this and computes in `dtype`."""
    return dtype in DTYPES and memory.arrays[0].shape[1] in [2 * width for width in WIDTHS]
