"""Kimi delta attention (Kimi Linear, arXiv 2510.26692): the gated delta rule with a decay per key channel.

    beta_t = sigmoid(b_t),  g_t = decay(f_t + dt_bias, exp(A_log))                     g [K] per head, g <= 0
    S' = S_{t-1} diag(exp(g_t));  u_t = beta_t (v_t - S' k_t);  S_t = S' + u_t k_t^T;  o_t = S_t q_t
    y_t = RMS(o_t) * sigmoid(gate_t)                                                   per head; S [V, K], float32

q, k and v are the SiLU of a short causal convolution; q and k have unit length, q is scaled by K^-0.5. For a block of
tokens with G_i = sum_{t <= i} g_t and D_ij = exp(sum_{j < t <= i} g_t) per channel, the u_i solve a triangular system:

    u_i + sum_{j < i} beta_i ((D_ij k_j) . k_i) u_j = beta_i (v_i - S_0 (e^{G_i} k_i))
    o_i = S_0 (e^{G_i} q_i) + sum_{j <= i} ((D_ij k_j) . q_i) u_j
    S_c = S_0 diag(e^{G_c}) + sum_j u_j (D_cj k_j)^T

A decay per channel does not leave the products of keys, and e^{G_i} e^{-G_j} overflows for all but weak decays. So a
chunk is a scan over blocks of 16 tokens, and D [16, 16, H, K] of one block is formed whole from masked sums, whose
exponents are never positive: exact for any gate, and 4 MiB for 32 heads of 128 channels. This is the definition that
the kernels are held to.

Letters: T tokens, H heads, K key width, V value width, C chunk, c tokens of a block, W convolution width, N slots,
L layers of the pool.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.kda.decay import Decay
from kernels_pallas.norm import l2, rms
from kernels_pallas.op import CONSTANT, RaggedBatch, Shares, clear_padding
from kernels_pallas.recurrence import recur
from kernels_pallas.short_conv.xla import short_conv

EXACT = jax.lax.Precision.HIGHEST
BLOCK = 16  # tokens; D grows with its square, the length of the scan falls with it. Divides the chunk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KDAWeights:
    """Weights that work between the two products of a layer; all float32."""

    convolution: Float[Array, "W 2*H*K+H*V"]
    decay_log: Float[Array, "H"]  # A_log
    decay_bias: Float[Array, "H K"]  # dt_bias
    output_norm: Float[Array, "V"]


SHARES = Shares("delta_heads", (1, 1, 1, 1, (1, 0, 0, None), 2, 3, CONSTANT, None), (1, 2, 3))


def kda(
    mixed: Float[Array, "T 2*H*K+H*V"],
    f: Float[Array, "T H K"],
    b: Float[Array, "T H"],
    gate: Float[Array, "T H V"],
    weights: KDAWeights,
    state: Float[Array, "L N H V K"],
    tail: Float[Array, "L N W-1 2*H*K+H*V"],
    layer: int,
    batch: RaggedBatch,
    *,
    decay: Decay,
    epsilon: float,
) -> tuple[Float[Array, "T H*V"], Float[Array, "L N H V K"], Float[Array, "L N W-1 2*H*K+H*V"]]:
    """One Kimi delta attention layer between its projections.

    Args:
      mixed: projected channels before the convolution, by head: its query, its key, its value. f, b: gates of the decay
        and of the update, as projected. gate: output gate, before its sigmoid. decay: what makes a log decay of `f`.
      epsilon: of the output norm.
    Returns the gated output in the dtype of `mixed`, zeros for padding, and both pools.
    """
    heads, _, key_width = state.shape[2:]
    channels, tail = short_conv(mixed, weights.convolution, tail, layer, batch)
    by_head = jax.nn.silu(channels).reshape(channels.shape[0], heads, -1)
    q, k, v = jnp.split(by_head, [key_width, 2 * key_width], axis=2)
    q, k = l2(q) * key_width**-0.5, l2(k)
    beta = jax.nn.sigmoid(b.astype(jnp.float32))
    g = decay(f.astype(jnp.float32) + weights.decay_bias[None], jnp.exp(weights.decay_log)[None, :, None])
    tokens = (q, k, v, g, beta)
    out, state = recur(tokens, kda_step, kda_chunk, state, layer, batch)
    out = rms(out, weights.output_norm, epsilon) * jax.nn.sigmoid(gate.astype(jnp.float32))
    out = out.reshape(out.shape[0], -1).astype(mixed.dtype)
    return clear_padding(out, batch), state, tail


def kda_step(state: Float[Array, "H V K"], token: tuple[Array, ...]) -> tuple[Array, Array]:
    """One token of the recurrence: q, k, g `[H, K]`, v `[H, V]`, beta `[H]`; returns the output `[H, V]`, the state."""
    q, k, v, g, beta = token
    state = state * jnp.exp(g)[:, None, :]
    recalled = jnp.einsum("hvk,hk->hv", state, k, precision=EXACT)
    state = state + (beta[:, None] * (v - recalled))[:, :, None] * k[:, None, :]
    return jnp.einsum("hvk,hk->hv", state, q, precision=EXACT), state


def kda_chunk(state: Float[Array, "H V K"], token: tuple[Array, ...]) -> tuple[Array, Array]:
    """Up to C tokens of the recurrence, each array with a leading axis C and zeros behind the last token."""
    blocks = jax.tree.map(lambda x: x.reshape(-1, BLOCK, *x.shape[1:]), token)
    state, out = jax.lax.scan(lambda state, block: kda_block(state, block)[::-1], state, blocks)
    return out.reshape(-1, *out.shape[2:]), state


def kda_block(state: Float[Array, "H V K"], token: tuple[Array, ...]) -> tuple[Array, Array]:
    """Up to c tokens of the recurrence, each array with a leading axis c and zeros behind the last token."""
    q_HcK, k_HcK, v_HcV, g_HcK = (x.transpose(1, 0, 2) for x in token[:4])
    beta_Hc = token[4].T
    i = jnp.arange(beta_Hc.shape[1])
    before, until_now = i[:, None] > i[None, :], i[:, None] >= i[None, :]
    since_HcK = jnp.exp(jnp.cumsum(g_HcK, axis=1))
    # Summed from j + 1 to i, not as a difference of two totals: those lose their digits after one strong decay.
    apart_HccK = jnp.cumsum(jnp.where(before[None, :, :, None], g_HcK[:, :, None], 0), axis=1)
    decay_HccK = jnp.exp(jnp.where(until_now[None, :, :, None], apart_HccK, -jnp.inf))
    keys_HccK = decay_HccK * k_HcK[:, None]
    scores_Hcc = jnp.einsum("hik,hijk->hij", q_HcK, keys_HccK, precision=EXACT)
    overlap_Hcc = jnp.einsum("hik,hijk->hij", k_HcK, keys_HccK, precision=EXACT) * beta_Hc[:, :, None]
    overlap_Hcc = jnp.where(before[None], overlap_Hcc, 0)
    recalled = jnp.einsum("hvk,hik->hiv", state, k_HcK * since_HcK, precision=EXACT)
    wanted = beta_Hc[:, :, None] * (v_HcV - recalled)
    u_HcV = jax.scipy.linalg.solve_triangular(overlap_Hcc, wanted, lower=True, unit_diagonal=True)
    carried = jnp.einsum("hvk,hik->ihv", state, q_HcK * since_HcK, precision=EXACT)
    out = carried + jnp.einsum("hij,hjv->ihv", scores_Hcc, u_HcV, precision=EXACT)
    added = jnp.einsum("hjv,hjk->hvk", u_HcV, keys_HccK[:, -1], precision=EXACT)
    return out, state * since_HcK[:, -1][:, None, :] + added
