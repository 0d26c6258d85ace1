"""Decode of Kimi delta attention on a TPU: the gated delta rule with a factor per key channel.

A slab is one head. The channels of a head lie together: its query, its key, its value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from kernels_pallas.gdn.tpu_decode import delta_step, norm_heads, unit_length
from kernels_pallas.kda.decay import Decay
from kernels_pallas.linear_decode_tpu import Group, Kind, lanes, silu, spread

F, B, GATE = 1, 2, 3  # inputs behind the channels
DECAY_LOG, DECAY_BIAS, OUTPUT_NORM = 1, 2, 3  # weights behind those of the convolution


@dataclass(frozen=True)
class Settings:
    """decay: what makes a log decay of `f`."""

    heads: int
    decay: Decay
    epsilon: float


def kda_kind(settings: Settings) -> Kind:
    """Kimi delta attention for `decode`; its vectors are the decays of each head's key channels, and its beta."""
    return Kind("kda", _prepare, _step, _finish, settings, (settings.heads, settings.heads), convolved=True)


def _prepare(settings: Settings, group: Group) -> None:
    decays, betas = group.vectors
    beta = jax.nn.sigmoid(group.inputs[B][...].astype(jnp.float32))
    rate = jnp.exp(group.weights[DECAY_LOG][...])

    def head(number: Any, carry: None) -> None:
        unit_length(group.channels, 3 * number)
        group.channels[3 * number + 2] = silu(group.channels[3 * number + 2])
        f = group.inputs[F][:, lanes(number)].astype(jnp.float32) + group.weights[DECAY_BIAS][pl.ds(number, 1), :]
        decays[number] = jnp.exp(settings.decay(f, spread(rate, number)))
        betas[number] = spread(beta, number)
        return carry

    lax.fori_loop(0, settings.heads, head, None)


def _step(settings: Settings, group: Group, token: Any, head: Any, state: Array) -> tuple[Array, Array]:
    return delta_step(group, token, head, 1, state)


def _finish(settings: Settings, group: Group, store: Callable[[Any, Array], None]) -> None:
    norm_heads(group, group.inputs[GATE], group.weights[OUTPUT_NORM], settings.epsilon, jax.nn.sigmoid, store)
