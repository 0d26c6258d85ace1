"""Gated delta rule (Gated Delta Networks, arXiv 2412.06464): linear attention that overwrites what a key recalls.

    beta_t = sigmoid(b_t),  g_t = -exp(A_log) softplus(a_t + dt_bias)                 per value head, g <= 0
    S' = exp(g_t) S_{t-1};  u_t = beta_t (v_t - S' k_t);  S_t = S' + u_t k_t^T;  o_t = S_t q_t       S [V, K], float32
    y_t = RMS(o_t) * SiLU(z_t)                                                        per value head

q, k and v are the SiLU of a short causal convolution; q and k have unit length, q is scaled by K^-0.5, and value head h
reads key head h // (H / G). For a chunk of C tokens with G_i = sum_{t <= i} g_t, the u_i solve one triangular system:

    u_i + sum_{j < i} beta_i e^{G_i - G_j} (k_i . k_j) u_j = beta_i (v_i - e^{G_i} S_0 k_i)
    o_i = e^{G_i} S_0 q_i + sum_{j <= i} e^{G_i - G_j} (q_i . k_j) u_j
    S_C = e^{G_C} S_0 + sum_j e^{G_C - G_j} u_j k_j^T

Decays stay in the exponent as sums of g over (j, i], never positive. This is the definition that kernels are held to.

Letters: T tokens, H value heads, G key heads, K key width, V value width, C chunk, W convolution width, N slots,
L layers of the pool.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.norm import l2, rms
from kernels_pallas.op import CONSTANT, RaggedBatch, Shares, clear_padding
from kernels_pallas.recurrence import recur
from kernels_pallas.short_conv.xla import short_conv

EXACT = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GDNWeights:
    """Weights that work between the two products of a layer; all float32."""

    convolution: Float[Array, "W 2*G*K+H*V"]
    decay_log: Float[Array, "H"]  # A_log
    decay_bias: Float[Array, "H"]  # dt_bias
    output_norm: Float[Array, "V"]


SHARES = Shares("delta_heads", (1, 1, (1, 0, 0, None), 2, 3, CONSTANT, None), (1, 2, 3))


def gdn(
    projected: Float[Array, "T G c"],
    gates: Float[Array, "T G 2 n"],
    weights: GDNWeights,
    state: Float[Array, "L N H V K"],
    tail: Float[Array, "L N W-1 2*G*K+H*V"],
    layer: int,
    batch: RaggedBatch,
    *,
    epsilon: float,
    beta_scale: float = 1.0,
) -> tuple[Float[Array, "T H*V"], Float[Array, "L N H V K"], Float[Array, "L N W-1 2*G*K+H*V"]]:
    """One gated delta rule layer between its projections.

    Args:
      projected: by key head: its query, its key, the values of the n = H / G value heads that read it (these three pass
        the convolution), and their output gates z; c = 2 (K + n V). gates: by key head: those of the update, b, and
        those of the decay, a. epsilon: of the output norm. beta_scale: 2 allows negative eigenvalues.
    Returns the gated output in the dtype of `projected`, zeros for padding, and both pools.
    """
    unpacked = unpack(projected, gates, state.shape)
    return gdn_unpacked(
        *unpacked, weights, state, tail, layer, batch,
        key_heads=projected.shape[1], epsilon=epsilon, beta_scale=beta_scale,
    )  # fmt: skip


def unpack(
    projected: Float[Array, "T G c"], gates: Float[Array, "T G 2 n"], state: tuple[int, ...]
) -> tuple[Float[Array, "T 2*G*K+H*V"], Float[Array, "T H V"], Float[Array, "T H"], Float[Array, "T H"]]:
    """The channels of the convolution by key head, z, b and a, for a pool of states of this shape."""
    tokens, (heads, value_width, _) = projected.shape[0], state[2:]
    gated = heads // projected.shape[1] * value_width
    mixed, z = projected[:, :, :-gated], projected[:, :, -gated:]
    b, a = gates[:, :, 0].reshape(tokens, heads), gates[:, :, 1].reshape(tokens, heads)
    return mixed.reshape(tokens, -1), z.reshape(tokens, heads, value_width), b, a


def gdn_unpacked(
    mixed: Float[Array, "T 2*G*K+H*V"],
    z: Float[Array, "T H V"],
    b: Float[Array, "T H"],
    a: Float[Array, "T H"],
    weights: GDNWeights,
    state: Float[Array, "L N H V K"],
    tail: Float[Array, "L N W-1 2*G*K+H*V"],
    layer: int,
    batch: RaggedBatch,
    *,
    key_heads: int,
    epsilon: float,
    beta_scale: float = 1.0,
) -> tuple[Float[Array, "T H*V"], Float[Array, "L N H V K"], Float[Array, "L N W-1 2*G*K+H*V"]]:
    """`gdn` with its inputs one by one, as `unpack` gives them."""
    heads, value_width, key_width = state.shape[2:]
    channels, tail = short_conv(mixed, weights.convolution, tail, layer, batch)
    q, k, v = by_key_head(jax.nn.silu(channels), key_heads, key_width)
    each = heads // key_heads
    q = jnp.repeat(l2(q) * key_width**-0.5, each, axis=1)
    k = jnp.repeat(l2(k), each, axis=1)
    beta = beta_scale * jax.nn.sigmoid(b.astype(jnp.float32))
    rate = jax.nn.softplus(a.astype(jnp.float32) + weights.decay_bias[None, :])
    decay = -jnp.exp(weights.decay_log)[None, :] * rate
    tokens = (q, k, v.reshape(-1, heads, value_width), decay, beta)
    out, state = recur(tokens, gdn_step, gdn_chunk, state, layer, batch)
    out = rms(out, weights.output_norm, epsilon) * jax.nn.silu(z.astype(jnp.float32))
    out = out.reshape(out.shape[0], -1).astype(mixed.dtype)
    return clear_padding(out, batch), state, tail


def by_key_head(
    channels: Float[Array, "T 2*G*K+H*V"], key_heads: int, key_width: int
) -> tuple[Float[Array, "T G K"], Float[Array, "T G K"], Float[Array, "T G n"]]:
    """Queries and keys of each key head, and the values of all heads that read it."""
    grouped = channels.reshape(channels.shape[0], key_heads, -1)
    return grouped[:, :, :key_width], grouped[:, :, key_width : 2 * key_width], grouped[:, :, 2 * key_width :]


def gdn_step(state: Float[Array, "H V K"], token: tuple[Array, ...]) -> tuple[Array, Array]:
    """One token: q, k `[H, K]`, v `[H, V]`, decay, beta `[H]`; returns the output `[H, V]` and the state."""
    q, k, v, decay, beta = token
    state = jnp.exp(decay)[:, None, None] * state
    recalled = jnp.einsum("hvk,hk->hv", state, k, precision=EXACT)
    state = state + (beta[:, None] * (v - recalled))[:, :, None] * k[:, None, :]
    return jnp.einsum("hvk,hk->hv", state, q, precision=EXACT), state


def gdn_chunk(state: Float[Array, "H V K"], token: tuple[Array, ...]) -> tuple[Array, Array]:
    """Up to C tokens of the recurrence, each array with a leading axis C and zeros behind the last token."""
    q, k, v, decay, beta = token
    total_HC = jnp.cumsum(decay, axis=0).T
    i = jnp.arange(q.shape[0])
    before, until_now = (i[:, None] > i[None, :])[None], (i[:, None] >= i[None, :])[None]
    # Summed from j + 1 to i, not as a difference of two totals: those lose their digits after one strong decay.
    apart_HCC = jnp.cumsum(jnp.where(before, decay.T[:, :, None], 0), axis=1)
    decay_HCC = jnp.exp(jnp.where(until_now, apart_HCC, -jnp.inf))
    before_HCC = jnp.where(before, decay_HCC, 0)
    beta_HC = beta.T
    recalled = jnp.einsum("hvk,ihk->hiv", state, k, precision=EXACT) * jnp.exp(total_HC)[:, :, None]
    wanted = beta_HC[:, :, None] * (v.transpose(1, 0, 2) - recalled)
    overlap = beta_HC[:, :, None] * before_HCC * jnp.einsum("ihk,jhk->hij", k, k, precision=EXACT)
    u_HCV = jax.scipy.linalg.solve_triangular(overlap, wanted, lower=True, unit_diagonal=True)
    scores_HCC = jnp.einsum("ihk,jhk->hij", q, k, precision=EXACT) * decay_HCC
    carried = jnp.einsum("hvk,ihk->hiv", state, q, precision=EXACT) * jnp.exp(total_HC)[:, :, None]
    out = carried + jnp.einsum("hij,hjv->hiv", scores_HCC, u_HCV, precision=EXACT)
    left_HC = decay_HCC[:, -1]
    added = jnp.einsum("hjv,jhk->hvk", u_HCV * left_HC[:, :, None], k, precision=EXACT)
    return out.transpose(1, 0, 2), jnp.exp(total_HC[:, -1])[:, None, None] * state + added
