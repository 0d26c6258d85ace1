"""Lightning attention (Lightning Attention-2, arXiv 2401.04658): linear attention with a constant decay per head.

    S_t = exp(-s) S_{t-1} + v_t k_t^T          S [V, K], float32, S_0 = 0
    o_t = scale * S_t q_t                      the current token is included and not decayed
    y_t = GroupRMS(o_t) * sigmoid(gate_t)      over all H V channels, in equal groups

and for a chunk of C tokens, i and j counted from 0 in the chunk,

    o_i = scale * [exp(-s (i + 1)) S_0 q_i + sum_{j <= i} exp(-s (i - j)) (q_i . k_j) v_j]
    S_C = exp(-s C) S_0 + sum_j exp(-s (C - 1 - j)) v_j k_j^T

The decay stays in the exponent as a difference: its factors exp(-s i) and exp(s j) overflow. Queries, keys and values
may pass SiLU first, then queries and keys an RMS norm per head and a rotary embedding. This is the definition that the
kernels are held to.

Letters: T tokens, H heads, K key width, V value width, C chunk, N slots, L layers of the pool.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.norm import group_rms, rms
from kernels_pallas.op import CONSTANT, RaggedBatch, Shares, clear_padding
from kernels_pallas.recurrence import recur
from kernels_pallas.rotary import Rotary, rotate_halves

EXACT = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LightningWeights:
    """Weights that work between the two products of a layer; the norms of queries and keys may be absent."""

    slopes: Float[Array, "H"]  # s, the decay rate of each head
    output_norm: Float[Array, "H*V"]
    query_norm: Float[Array, "K"] | None = None
    key_norm: Float[Array, "K"] | None = None


SHARES = Shares("linear_heads", (2, 1, (0, 0, None, None), None, 2, CONSTANT, None), (1, 2), ("groups",))


def lightning(
    qkv: Float[Array, "T 3 H K"],
    gate: Float[Array, "T H*V"],
    weights: LightningWeights,
    rotary: Rotary | None,
    pool: Float[Array, "L N H V K"],
    layer: int,
    batch: RaggedBatch,
    *,
    scale: float,
    groups: int,
    epsilon: float,
    silu: bool = False,
) -> tuple[Float[Array, "T H*V"], Float[Array, "L N H V K"]]:
    """One lightning layer between its projections.

    Args:
      qkv: projected queries, keys and values. gate: projected output gate, before its sigmoid.
      rotary: tables of this step's positions, or None. scale: factor of the queries.
      groups: number of groups of the output norm. epsilon: of all norms. silu: whether `qkv` passes SiLU first.
    Returns the gated output in the dtype of `qkv`, zeros for padding, and the pool.
    """
    active = jax.nn.silu(qkv.astype(jnp.float32)) if silu else qkv
    q = _prepare(active[:, 0], weights.query_norm, rotary, epsilon) * scale
    k = _prepare(active[:, 1], weights.key_norm, rotary, epsilon)
    v = active[:, 2].astype(jnp.float32)
    present = jnp.ones(q.shape[:1], jnp.float32)

    def step(state: Array, token: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        q, k, v, _ = token
        return lightning_step(state, q, k, v, weights.slopes)

    def chunk(state: Array, token: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        q, k, v, present = token
        return lightning_chunk(state, q, k, v, present, weights.slopes)

    out, pool = recur((q, k, v, present), step, chunk, pool, layer, batch)
    out = group_rms(out.reshape(out.shape[0], -1), weights.output_norm, groups, epsilon)
    out = (out * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(qkv.dtype)
    return clear_padding(out, batch), pool


def lightning_step(
    state: Float[Array, "H V K"],
    q: Float[Array, "H K"],
    k: Float[Array, "H K"],
    v: Float[Array, "H V"],
    slopes: Float[Array, "H"],
) -> tuple[Float[Array, "H V"], Float[Array, "H V K"]]:
    """One token of the recurrence; `q` carries the scale."""
    state = jnp.exp(-slopes)[:, None, None] * state + v[:, :, None] * k[:, None, :]
    return jnp.einsum("hvk,hk->hv", state, q, precision=EXACT), state


def lightning_chunk(
    state: Float[Array, "H V K"],
    q: Float[Array, "C H K"],
    k: Float[Array, "C H K"],
    v: Float[Array, "C H V"],
    present: Float[Array, "C"],
    slopes: Float[Array, "H"],
) -> tuple[Float[Array, "C H V"], Float[Array, "H V K"]]:
    """Up to C tokens of the recurrence; `present` is 1 for a token and 0 behind the last, where q, k, v are 0."""
    length = jnp.sum(present)
    i = jnp.arange(q.shape[0], dtype=jnp.float32)
    apart = i[:, None] - i[None, :]
    mask_HCC = jnp.exp(jnp.where(apart >= 0, -slopes[:, None, None] * apart[None], -jnp.inf))
    scores_HCC = jnp.einsum("ihk,jhk->hij", q, k, precision=EXACT) * mask_HCC
    since_HC = jnp.exp(-slopes[:, None] * (i[None, :] + 1))
    carried = jnp.einsum("hvk,ihk->ihv", state, q, precision=EXACT) * since_HC.T[:, :, None]
    out = jnp.einsum("hij,jhv->ihv", scores_HCC, v, precision=EXACT) + carried
    left = length - 1 - i
    until_HC = jnp.exp(jnp.where(left >= 0, -slopes[:, None] * left[None, :], -jnp.inf))
    added = jnp.einsum("jhv,jhk->hvk", v * until_HC.T[:, :, None], k, precision=EXACT)
    return out, jnp.exp(-slopes * length)[:, None, None] * state + added


def _prepare(x: Array, norm: Array | None, rotary: Rotary | None, epsilon: float) -> Array:
    x = x.astype(jnp.float32) if norm is None else rms(x, norm, epsilon)
    return x if rotary is None else rotate_halves(x, rotary)
