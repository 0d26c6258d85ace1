"""Decode of the gated delta rule on a TPU: what it does with a group of tokens and with a slab of a state.

The recurrence of `xla.py`; a slab is one value head. The channels of a key head lie together: its query, its key, the
values of all heads that read it. What other kinds of delta rule share: `unit_length`, `delta_step`, `norm_heads`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.linear_decode_tpu import LANES, Group, Kind, Ref, lanes, row, silu, spread, times_state
from kernels_pallas.norm import L2_EPSILON

Z, B, A = 1, 2, 3  # inputs behind the channels
DECAY_LOG, DECAY_BIAS, OUTPUT_NORM = 1, 2, 3  # weights behind those of the convolution


@dataclass(frozen=True)
class Settings:
    """heads: of values. each: value heads of a key head."""

    heads: int
    each: int
    epsilon: float
    beta_scale: float


def gdn_kind(settings: Settings) -> Kind:
    """The gated delta rule for `decode`; its vectors are the decay and beta of each head, in every lane."""
    return Kind("gdn", _prepare, _step, _finish, settings, (settings.heads, settings.heads), convolved=True)


def _prepare(settings: Settings, group: Group) -> None:
    decays, betas = group.vectors
    beta = settings.beta_scale * jax.nn.sigmoid(group.inputs[B][...].astype(jnp.float32))
    rate = jax.nn.softplus(group.inputs[A][...].astype(jnp.float32) + group.weights[DECAY_BIAS][...])
    decay = jnp.exp(-jnp.exp(group.weights[DECAY_LOG][...]) * rate)

    def key_head(number: Any, carry: None) -> None:
        first = number * (2 + settings.each)
        unit_length(group.channels, first)
        for value in range(settings.each):
            head, channels = number * settings.each + value, group.channels.at[first + 2 + value]
            channels[...] = silu(channels[...])
            decays[head] = spread(decay, head)
            betas[head] = spread(beta, head)
        return carry

    lax.fori_loop(0, settings.heads // settings.each, key_head, None)


def unit_length(channels: Ref, tile: Any) -> None:
    """SiLU and unit length for a query, which is also scaled by K^-0.5, and for the key behind it, in place."""
    for which, scale in ((tile, LANES**-0.5), (tile + 1, 1.0)):
        x = silu(channels[which])
        channels[which] = x * (scale * lax.rsqrt(jnp.sum(x * x, axis=1, keepdims=True) + L2_EPSILON))


def _step(settings: Settings, group: Group, token: Any, head: Any, state: Array) -> tuple[Array, Array]:
    return delta_step(group, token, head, settings.each, state)


def delta_step(
    group: Group, token: Any, head: Any, each: int, state: Float[Array, "V K"]
) -> tuple[Float[Array, "V K"], Float[Array, "1 V"]]:
    """One token and one value head; the group's vectors are the factors of the state, along key channels, and beta.

    The state's part and the value's part of `v - S k` are one sum over lanes.
    """
    decays, betas = group.vectors
    key_head = lax.div(head, each)
    q = row(group.channels, token, key_head * (2 + each))
    k = row(group.channels, token, key_head * (2 + each) + 1)
    v = row(group.channels, token, 2 * key_head + 2 + head)
    state = state * row(decays, token, head)
    missing = jnp.sum(state * -k + v * group.unit[...], axis=1, keepdims=True)
    state = state + missing * row(betas, token, head) * k
    return state, times_state(q, state, group.inputs[0].dtype)


def _finish(settings: Settings, group: Group, store: Callable[[Any, Array], None]) -> None:
    norm_heads(group, group.inputs[Z], group.weights[OUTPUT_NORM], settings.epsilon, silu, store)


def norm_heads(
    group: Group,
    gate: Ref,
    weight: Ref,
    epsilon: float,
    activation: Callable[[Array], Array],
    store: Callable[[Any, Array], None],
) -> None:
    """`RMS(out) * weight * activation(gate)` of each head."""

    def head(number: Any, carry: None) -> None:
        out = group.outputs[number]
        scale = lax.rsqrt(jnp.mean(out * out, axis=1, keepdims=True) + epsilon)
        store(lanes(number), out * scale * weight[...] * activation(gate[:, lanes(number)].astype(jnp.float32)))
        return carry

    lax.fori_loop(0, group.outputs.shape[0], head, None)
