"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): softmax attention over one compressed row per token.

    c_t = RMS(latent_t),  r_t = rotary(shared key_t)          what is cached: [c_t | r_t]
    [k_s | v_s] = c_s W                                       per head, k of width N, v of width V
    o_t = softmax_{s <= t}(scale * (qn_t . k_s + qr_t . r_s)) v_s

Prefill expands the cached rows to keys and values. Decode absorbs W into the query and the output instead, and never
expands:  qn . (c Wk) = (qn Wk^T) . c  and  sum p (c Wv) = (sum p c) Wv. Products add up in float32; what lies between
two products (the absorbed query, expanded keys and values, shares) has the dtype of the activations. This is the
definition that the kernels are held to.

Letters: T tokens, H heads, K query and key width (N without rotary, R with), V value width, Z latent width, P pages,
S tokens a page, L layers of the pool.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.attention import attend_rows, causal, masked, softmax
from kernels_pallas.norm import rms
from kernels_pallas.op import CONSTANT, RaggedBatch, Shares, read_pages, write_pages
from kernels_pallas.rotary import Rotary, rotate_pairs

EXACT = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MLAWeights:
    """Weights that work between the two products of a layer."""

    latent_norm: Float[Array, "Z"]
    expansion: Float[Array, "Z H N+V"]


SHARES = Shares("heads", (1, None, (None, 1), None, None, CONSTANT, None), (1, None))


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
    """One latent attention layer between its projections; stores this step's compressed rows, then attends.

    Args:
      q: projected queries. latent: projected compressed rows, before norm and rotary.
      rotary: tables of this step's positions (interleaved pairs), or None. scale: factor of the scores.
      epsilon: of the latent norm.
    Returns the output in the dtype of `q`, zeros for padding, and the pages.
    """
    width = weights.latent_norm.shape[0]
    plain = q.shape[2] - (latent.shape[1] - width)
    qn, qr = q[..., :plain], _rotate(q[..., plain:], rotary)
    compressed = rms(latent[:, :width], weights.latent_norm, epsilon).astype(q.dtype)
    shared = _rotate(latent[:, None, width:], rotary)[:, 0]
    pages = write_pages(pages, layer, batch, jnp.concatenate([compressed, shared], axis=-1))

    def decode(q: tuple[Array, Array], position: Array, table: Array) -> Array:
        return _absorbed(*q, position, read_pages(pages, layer, table), weights, scale)

    def prefill(q: tuple[Array, Array], position: Array, table: Array) -> Array:
        return _expanded(*q, position, read_pages(pages, layer, table), weights, scale)

    out = attend_rows((qn, qr), batch, decode, prefill)
    return out.reshape(out.shape[0], -1).astype(q.dtype), pages


def _absorbed(qn: Array, qr: Array, position: Array, cached: Array, weights: MLAWeights, scale: float) -> Array:
    visible, any_visible = causal(position, cached.shape[0])
    cached = masked(cached, any_visible)
    width = weights.latent_norm.shape[0]
    to_keys, to_values = jnp.split(weights.expansion, [qn.shape[2]], axis=2)
    absorbed = jnp.einsum("chn,zhn->chz", qn, to_keys, precision=EXACT)
    query = jnp.concatenate([absorbed, qr], axis=-1)
    scores = jnp.einsum("chz,sz->hcs", query, cached, precision=EXACT, preferred_element_type=jnp.float32)
    shares = softmax(scores * scale, visible).astype(cached.dtype)
    read = jnp.einsum("hcs,sz->chz", shares, cached[:, :width], precision=EXACT)
    return jnp.einsum("chz,zhv->chv", read, to_values, precision=EXACT, preferred_element_type=jnp.float32)


def _expanded(qn: Array, qr: Array, position: Array, cached: Array, weights: MLAWeights, scale: float) -> Array:
    visible, any_visible = causal(position, cached.shape[0])
    cached = masked(cached, any_visible)
    width = weights.latent_norm.shape[0]
    latent, shared = cached[:, :width], cached[:, width:]
    expanded = jnp.einsum("sz,zhn->shn", latent, weights.expansion, precision=EXACT)
    k, v = jnp.split(expanded, [qn.shape[2]], axis=2)
    scores = jnp.einsum("chn,shn->hcs", qn, k, precision=EXACT, preferred_element_type=jnp.float32)
    scores = scores + jnp.einsum("chr,sr->hcs", qr, shared, precision=EXACT, preferred_element_type=jnp.float32)
    shares = softmax(scores * scale, visible).astype(v.dtype)
    return jnp.einsum("hcs,shv->chv", shares, v, precision=EXACT, preferred_element_type=jnp.float32)


def _rotate(x: Array, rotary: Rotary | None) -> Array:
    return x if rotary is None else rotate_pairs(x, rotary).astype(x.dtype)
