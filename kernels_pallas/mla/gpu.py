"""Multi-head latent attention on Hopper: the door to the kernels of this folder.

    store_tokens      this step's compressed rows to their pages, in place
    attend_items      rows in decode, absorbed, cut along their cached rows; sum_splits joins the parts
    prefill           rows that prefill, absorbed, 64 queries at a time

Norm, rotary and the products with the expansion are left to XLA. Each path touches its own rows only.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.gqa.gpu import PAGES
from kernels_pallas.gqa.gpu_pages import RUN, store_tokens, token_places
from kernels_pallas.gqa.gpu_splits import BLOCK, split_rows, sum_splits
from kernels_pallas.mla.gpu_decode import COLUMNS, attend_items
from kernels_pallas.mla.gpu_prefill import prefill
from kernels_pallas.mla.xla import EXACT, MLAWeights, _rotate
from kernels_pallas.norm import rms
from kernels_pallas.op import KVSpec, RaggedBatch, clear_padding, decode_tokens, take, token_rows
from kernels_pallas.rotary import Rotary

TILE = 64  # heads of one product
MOST_WIDTH = 576  # of a cached row: two blocks of 64 rows and the queries fill shared memory
UNIT_OVERHEAD = 2.0  # blocks: the partial output of a tile of heads out and in again


def mla(
    q: Float[Array, "T H N+R"],
    latent: Float[Array, "T Z+R"],
    weights: MLAWeights,
    rotary: Rotary | None,
    pages: Float[Array, "L P S Z+R"],
    layer: int,
    batch: RaggedBatch,
    *,
    scale: float,
    epsilon: float,
) -> tuple[Float[Array, "T H*V"], Float[Array, "L P S Z+R"]]:
    """One latent attention layer between its projections, as `xla.mla` defines it; the pages are updated in place.

    Raises NotImplementedError for other dtypes than bfloat16 and for widths, heads and page sizes without a kernel.
    """
    width = weights.latent_norm.shape[0]
    _check(q, pages, width)
    plain = q.shape[2] - (latent.shape[1] - width)
    qn, qr = q[..., :plain], _rotate(q[..., plain:], rotary)
    compressed = rms(latent[:, :width], weights.latent_norm, epsilon).astype(q.dtype)
    shared = _rotate(latent[:, None, width:], rotary)[:, 0]
    pages = _store(jnp.concatenate([compressed, shared], axis=-1), pages, layer, batch)
    out = _attend(qn, qr, weights, pages, layer, batch, scale)
    return clear_padding(out.reshape(out.shape[0], -1).astype(q.dtype), batch), pages


def _check(q: Array, pages: Array, width: int) -> None:
    heads, cached, page = q.shape[1], pages.shape[3], pages.shape[2]
    if q.dtype != jnp.bfloat16 or pages.dtype != jnp.bfloat16:
        raise NotImplementedError(f"mla on gpu: wanted bfloat16, got {q.dtype} and pages of {pages.dtype}: use 'xla'")
    if width % (2 * COLUMNS) or cached % RUN or cached > MOST_WIDTH:
        wanted = f"a latent width of a multiple of {2 * COLUMNS}, with the rotary at most {MOST_WIDTH}, all in 64s"
        raise NotImplementedError(f"mla on gpu: wanted {wanted}, got {width} of {cached}: use backend 'xla'")
    if heads % 8 or heads % -(-heads // TILE):
        raise NotImplementedError(f"mla on gpu: wanted heads in equal tiles of at most {TILE}, got {heads}: use 'xla'")
    if page not in PAGES:
        raise NotImplementedError(f"mla on gpu: wanted a page of {PAGES} tokens, got {page}: use backend 'xla'")


def _store(values: Float[Array, "T W"], pages: Array, layer: int, batch: RaggedBatch) -> Array:
    held = jax.new_ref(pages.reshape(*pages.shape[:3], -1, RUN))
    places = token_places(batch, values.shape[0], pages.shape[2])
    store_tokens(values.reshape(values.shape[0], -1, RUN), *places, held, jnp.full((1,), layer, jnp.int32))
    return jax.freeze(held).reshape(pages.shape)


def _attend(
    qn: Array, qr: Array, weights: MLAWeights, pages: Array, layer: int, batch: RaggedBatch, scale: float
) -> Float[Array, "T H V"]:
    """The outputs of all tokens; arbitrary for padding."""
    if not batch.may_prefill:
        return _decode(qn, qr, weights, pages, layer, batch, scale)
    prefilled = _prefill(qn, qr, weights, pages, layer, batch, scale)
    if not batch.may_decode:
        return prefilled
    row, _ = token_rows(batch, qn.shape[0])
    return jnp.where(
        batch.in_decode[row][:, None, None], _decode(qn, qr, weights, pages, layer, batch, scale), prefilled
    )


def _prefill(
    qn: Array, qr: Array, weights: MLAWeights, pages: Array, layer: int, batch: RaggedBatch, scale: float
) -> Float[Array, "T H V"]:
    """The outputs of rows that prefill, zeros for all other tokens."""
    to_keys, to_values = jnp.split(weights.expansion, [qn.shape[2]], axis=2)
    absorbed = jnp.einsum("thn,zhn->thz", qn, to_keys, precision=EXACT)
    queries = jnp.concatenate([absorbed, qr], axis=-1)
    number = jnp.full((1,), layer, jnp.int32)
    read = prefill(queries, pages, number, batch, scale, weights.latent_norm.shape[0])
    return jnp.einsum("thz,zhv->thv", read, to_values, precision=EXACT, preferred_element_type=jnp.float32)


def _decode(
    qn: Array, qr: Array, weights: MLAWeights, pages: Array, layer: int, batch: RaggedBatch, scale: float
) -> Float[Array, "T H V"]:
    """The outputs of the tokens of rows in decode; arbitrary for other tokens."""
    tokens, heads, plain = qn.shape
    parts, latent = -(-heads // TILE), weights.latent_norm.shape[0]
    to_keys, to_values = jnp.split(weights.expansion, [plain], axis=2)
    index = decode_tokens(batch, tokens)
    absorbed = jnp.einsum("bhn,zhn->bhz", take(qn, index), to_keys, precision=EXACT)
    queries = jnp.concatenate([absorbed, take(qr, index)], axis=-1)
    queries = queries.reshape(-1, parts, heads // parts, queries.shape[-1])
    length = jnp.where(batch.in_decode, batch.seen + 1, 0)
    items = split_rows(length, -(-batch.pages.shape[1] * pages.shape[2] // BLOCK), parts, UNIT_OVERHEAD)
    number = jnp.full((1,), layer, jnp.int32)
    sums = attend_items(queries, batch.pages, length, items, pages, number, scale, latent)
    read = sum_splits(*sums, items, heads)
    out = jnp.einsum("bhz,zhv->bhv", read, to_values, precision=EXACT, preferred_element_type=jnp.float32)
    row, _ = token_rows(batch, tokens)
    return out[row]


def fits(memory: KVSpec, dtype: str) -> bool:
    """Whether the kernels have the shapes and dtypes of a layer that remembers this and computes in `dtype`.

    A latent of 256 or 512 numbers and a rotary part of 64.
    """
    return dtype == "bfloat16" and memory.arrays[0].shape[-1] in (2 * COLUMNS + RUN, 4 * COLUMNS + RUN)
