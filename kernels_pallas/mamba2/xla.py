"""Mamba2 (State Space Duality, arXiv 2405.21060): linear attention with a step size that decays the state.

    [x_t | B_t | C_t] = SiLU(conv(x | B | C)_t + bias)              per group; x [H, V], B and C [G, K]
    d_t = clip(softplus(dt_t + dt_bias)),  a_t = -exp(A_log) d_t    per head, a <= 0
    S_t = exp(a_t) S_{t-1} + d_t x_t B_t^T;  y_t = S_t C_t + D x_t  S [V, K], float32; head h reads group h // (H / G)

The gate z and a grouped RMS norm finish it: `GroupRMS(y * SiLU(z))`, or `GroupRMS(y) * SiLU(z)`, or `y * SiLU(z)`.
For a chunk of C tokens with A_i = sum_{t <= i} a_t:

    S_i C_i = e^{A_i} S_0 C_i + sum_{j <= i} e^{A_i - A_j} (C_i . B_j) d_j x_j
    S_C = e^{A_C} S_0 + sum_j e^{A_C - A_j} d_j x_j B_j^T

Decays stay in the exponent as sums of a over (j, i], never positive. This is the definition that kernels are held to.

Letters: T tokens, H heads, G groups, R heads a group, V head width, K state width, C chunk, W convolution width,
N slots, L layers of the pool.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.norm import group_rms
from kernels_pallas.op import CONSTANT, RaggedBatch, Shares, clear_padding
from kernels_pallas.recurrence import recur
from kernels_pallas.short_conv.xla import short_conv

EXACT = jax.lax.Precision.HIGHEST
UNLIMITED = (0.0, float("inf"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mamba2Weights:
    """Weights that work between the two products of a layer; all float32. Some families have no output norm."""

    convolution: Float[Array, "W H*V+2*G*K"]
    convolution_bias: Float[Array, "H*V+2*G*K"]
    decay_log: Float[Array, "H"]  # A_log
    step_bias: Float[Array, "H"]  # dt_bias
    skip: Float[Array, "H"]  # D
    output_norm: Float[Array, "H*V"] | None


SHARES = Shares("state_groups", (1, 1, 1, (1, 0, 0, 0, 0, 0), 2, 3, CONSTANT, None), (1, 2, 3), ("groups",))


def mamba2(
    z: Float[Array, "T H*V"],
    mixed: Float[Array, "T H*V+2*G*K"],
    step_size: Float[Array, "T H"],
    weights: Mamba2Weights,
    state: Float[Array, "L N H V K"],
    tail: Float[Array, "L N W-1 H*V+2*G*K"],
    layer: int,
    batch: RaggedBatch,
    *,
    groups: int,
    epsilon: float,
    norm_first: bool = False,
    step_limit: tuple[float, float] = UNLIMITED,
) -> tuple[Float[Array, "T H*V"], Float[Array, "L N H V K"], Float[Array, "L N W-1 H*V+2*G*K"]]:
    """One Mamba2 layer between its projections.

    Args:
      z: output gate. mixed: projected channels before the convolution, by group: x of its heads, its B, its C.
      step_size: dt without bias.
      groups: G, of B and C and of the output norm. epsilon: of the output norm.
      norm_first: whether the norm comes before the gate. step_limit: smallest and largest step d.
    Returns the gated output in the dtype of `mixed`, zeros for padding, and both pools.
    """
    heads, width, key_width = state.shape[2:]
    channels, tail = short_conv(mixed, weights.convolution, tail, layer, batch)
    channels = jax.nn.silu(channels + weights.convolution_bias[None, :])
    values = heads * width // groups
    x, b, c = jnp.split(channels.reshape(channels.shape[0], groups, -1), [values, values + key_width], axis=2)
    x = x.reshape(-1, heads, width)
    step = jax.nn.softplus(step_size.astype(jnp.float32) + weights.step_bias[None, :])
    step = jnp.clip(step, *step_limit)
    decay = -jnp.exp(weights.decay_log)[None, :] * step
    out, state = recur((c, b, step[:, :, None] * x, decay), mamba2_step, mamba2_chunk, state, layer, batch)
    out = (out + weights.skip[None, :, None] * x).reshape(out.shape[0], -1)
    finish = normed_then_gated if norm_first else gated_then_normed
    out = finish(out, z, weights.output_norm, groups, epsilon).astype(mixed.dtype)
    return clear_padding(out, batch), state, tail


def gated_then_normed(out: Array, z: Array, weight: Array | None, groups: int, epsilon: float) -> Float[Array, "T H*V"]:
    """`GroupRMS(out * SiLU(z))`, without the norm where there is no weight."""
    gated = out * jax.nn.silu(z.astype(jnp.float32))
    return gated if weight is None else group_rms(gated, weight, groups, epsilon)


def normed_then_gated(out: Array, z: Array, weight: Array | None, groups: int, epsilon: float) -> Float[Array, "T H*V"]:
    """`GroupRMS(out) * SiLU(z)`, without the norm where there is no weight."""
    normed = out if weight is None else group_rms(out, weight, groups, epsilon)
    return normed * jax.nn.silu(z.astype(jnp.float32))


def mamba2_step(state: Float[Array, "H V K"], token: tuple[Array, ...]) -> tuple[Array, Array]:
    """One token of the recurrence: c, b `[G, K]`, x (times its step) `[H, V]`, decay `[H]`.

    Returns the output `[H, V]` without the skip, and the state.
    """
    c, b, x, decay = token
    each = x.shape[0] // b.shape[0]
    b, c = jnp.repeat(b, each, axis=0), jnp.repeat(c, each, axis=0)
    state = jnp.exp(decay)[:, None, None] * state + x[:, :, None] * b[:, None, :]
    return jnp.einsum("hvk,hk->hv", state, c, precision=EXACT), state


def mamba2_chunk(state: Float[Array, "H V K"], token: tuple[Array, ...]) -> tuple[Array, Array]:
    """Up to C tokens of the recurrence, each array with a leading axis C and zeros behind the last token."""
    c, b, x, decay = token
    size, groups = b.shape[:2]
    by_group = (groups, x.shape[1] // groups)
    state_GRVK = state.reshape(*by_group, *state.shape[1:])
    x_CGRV = x.reshape(size, *by_group, -1)
    decay_GRC = decay.T.reshape(*by_group, size)
    i = jnp.arange(size)
    before, until_now = i[:, None] > i[None, :], i[:, None] >= i[None, :]
    # Summed from j + 1 to i, not as a difference of two totals: those lose their digits after one strong decay.
    apart_GRCC = jnp.cumsum(jnp.where(before[None, None], decay_GRC[:, :, :, None], 0), axis=2)
    left_GRCC = jnp.exp(jnp.where(until_now[None, None], apart_GRCC, -jnp.inf))
    since_start_GRC = jnp.exp(jnp.cumsum(decay_GRC, axis=2))
    scores_GRCC = jnp.einsum("igk,jgk->gij", c, b, precision=EXACT)[:, None] * left_GRCC
    recalled = jnp.einsum("grvk,igk->igrv", state_GRVK, c, precision=EXACT)
    out = recalled * since_start_GRC.transpose(2, 0, 1)[..., None]
    out = out + jnp.einsum("grij,jgrv->igrv", scores_GRCC, x_CGRV, precision=EXACT)
    kept = x_CGRV * left_GRCC[:, :, -1].transpose(2, 0, 1)[..., None]
    added = jnp.einsum("jgrv,jgk->grvk", kept, b, precision=EXACT)
    state_GRVK = since_start_GRC[:, :, -1][..., None, None] * state_GRVK + added
    return out.reshape(x.shape), state_GRVK.reshape(state.shape)
