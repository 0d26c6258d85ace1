"""Softmax attention with grouped queries (GQA, arXiv 2305.13245) over pages of keys and values.

    q, k = rotary(RMS(q_t)), rotary(RMS(k_t))                  norms and rotary where the family has them
    o_t = softmax_{s <= t}(scale * q_t . k_s) v_s              query head h reads key head h // (H / G)
    y_t = o_t * sigmoid(gate_t)                                where the family has a gate

This is the definition that the kernels are held to.

Letters: T tokens, H heads, G key and value heads, D head width, P pages, S tokens a page, L layers of the pool.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.attention import attend_rows, causal, masked, softmax
from kernels_pallas.norm import rms
from kernels_pallas.op import CONSTANT, RaggedBatch, Shares, clear_padding, read_pages, write_pages
from kernels_pallas.rotary import Rotary, rotate_halves

EXACT = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GQAWeights:
    """Norms of queries and keys per head; absent where the family has none. They carry any constant offset already."""

    query_norm: Float[Array, "D"] | None = None
    key_norm: Float[Array, "D"] | None = None


SHARES = Shares("heads", (1, 1, 1, 1, None, None, 3, CONSTANT, None), (1, 3))


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
    """One attention layer between its projections; stores this step's keys and values, then attends.

    Args:
      gate: output gate before its sigmoid, or None. rotary: tables of this step's positions, or None.
      scale: factor of the scores. epsilon: of the norms.
    Returns the output in the dtype of `q`, zeros for padding, and the pages.
    """
    dtype, key_heads = q.dtype, k.shape[1]
    q = _prepare(q, weights.query_norm, rotary, epsilon)
    k = _prepare(k, weights.key_norm, rotary, epsilon)
    pages = write_pages(pages, layer, batch, jnp.stack([k, v], axis=2).reshape(len(k), -1))

    def attend(q: Array, position: Array, table: Array) -> Array:
        cached = read_pages(pages, layer, table)
        return _attend(q, position, cached.reshape(len(cached), key_heads, 2, -1), scale)

    out = attend_rows(q, batch, attend, attend)
    if gate is not None:
        out = out * jax.nn.sigmoid(gate.astype(jnp.float32))
    out = out.reshape(out.shape[0], -1).astype(dtype)
    return clear_padding(out, batch), pages


def _attend(q: Array, position: Array, cached: Array, scale: float) -> Float[Array, "C H D"]:
    heads, width = q.shape[1:]
    visible, any_visible = causal(position, cached.shape[0])
    k, v = cached[:, :, 0], masked(cached[:, :, 1], any_visible)
    grouped = q.reshape(q.shape[0], k.shape[1], -1, width)
    scores = jnp.einsum("cgrd,sgd->grcs", grouped, k, precision=EXACT, preferred_element_type=jnp.float32)
    shares = softmax(scores.reshape(heads, *scores.shape[2:]) * scale, visible).reshape(scores.shape)
    shares = shares.astype(v.dtype)
    out = jnp.einsum("grcs,sgd->cgrd", shares, v, precision=EXACT, preferred_element_type=jnp.float32)
    return out.reshape(q.shape)


def _prepare(x: Array, norm: Array | None, rotary: Rotary | None, epsilon: float) -> Array:
    normed = x if norm is None else rms(x, norm, epsilon)
    return (normed if rotary is None else rotate_halves(normed, rotary)).astype(x.dtype)
