"""Decode of Mamba2 on a TPU: what it does with a group of tokens and with a slab of a state.

The recurrence of `xla.py`; a slab is one head of width 128 or two of width 64, which share their group's B and C. The
channels of a group lie together: x of its heads, then B, then C. The output norm of a group waits until the outputs of
all its heads are there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.linear_decode_tpu import LANES, Group, Kind, column, lanes, row, silu, spread, times_state

Z, STEP = 1, 2  # inputs behind the channels
BIAS, DECAY_LOG, STEP_BIAS, SKIP, OUTPUT_NORM = 1, 2, 3, 4, 5  # weights behind those of the convolution


@dataclass(frozen=True)
class Settings:
    """slabs: of all groups. each: heads of a slab. normed: whether outputs are; norm_first: before the gate."""

    slabs: int
    each: int
    groups: int
    epsilon: float
    normed: bool
    norm_first: bool
    step_limit: tuple[float, float]

    @property
    def group_slabs(self) -> int:
        """Slabs of a group."""
        return self.slabs // self.groups


def mamba2_kind(settings: Settings) -> Kind:
    """Mamba2 for `decode`; its vectors are the decay of each head, in every lane, and the steps times x."""
    vectors = (settings.slabs * settings.each, settings.slabs)
    return Kind("mamba2", _prepare, _step, _finish, settings, vectors, convolved=True)


def _prepare(settings: Settings, group: Group) -> None:
    decays, added = group.vectors
    channels, bias = group.channels, group.weights[BIAS]
    steps = jax.nn.softplus(group.inputs[STEP][...].astype(jnp.float32) + group.weights[STEP_BIAS][...])
    steps = jnp.clip(steps, *settings.step_limit)
    decay = jnp.exp(-jnp.exp(group.weights[DECAY_LOG][...]) * steps)

    def activate(tile: Any, carry: None) -> None:
        channels[tile] = silu(channels[tile] + bias[:, lanes(tile)])
        return carry

    def slab(number: Any, carry: None) -> None:
        for which in range(settings.each):
            decays[number * settings.each + which] = spread(decay, number * settings.each + which)
        added[number] = channels[_tile(settings, number)] * _of_heads(steps, number, settings.each)
        return carry

    lax.fori_loop(0, channels.shape[0], activate, None)
    lax.fori_loop(0, settings.slabs, slab, None)


def _tile(settings: Settings, slab: Any) -> Any:
    """The tile of the channels with x of a slab."""
    return slab + 2 * lax.div(slab, settings.group_slabs)


def _of_heads(scalars: Float[Array, "n H"], slab: Any, each: int) -> Float[Array, "n 128"]:
    """The scalar of its head in each lane of a slab's channels."""
    first = spread(scalars, slab * each)
    if each == 1:
        return first
    lane = lax.broadcasted_iota(jnp.int32, first.shape, 1)
    return jnp.where(lane < LANES // 2, first, spread(scalars, slab * each + 1))


def _step(settings: Settings, group: Group, token: Any, slab: Any, state: Array) -> tuple[Array, Array]:
    decays, added = group.vectors
    shared = (lax.div(slab, settings.group_slabs) + 1) * (settings.group_slabs + 2)  # the end of the group's channels
    b, c = row(group.channels, token, shared - 2), row(group.channels, token, shared - 1)
    width = LANES // settings.each
    heads = [
        state[which * width : (which + 1) * width] * row(decays, token, slab * settings.each + which)
        for which in range(settings.each)
    ]
    kept = heads[0] if settings.each == 1 else jnp.concatenate(heads, axis=0)
    state = kept + column(row(added, token, slab), group.unit) * b
    return state, times_state(c, state, group.inputs[0].dtype)


def _finish(settings: Settings, group: Group, store: Callable[[Any, Array], None]) -> None:
    each, outputs = settings.group_slabs, group.outputs

    def gate(slab: Any) -> Array:
        return silu(group.inputs[Z][:, lanes(slab)].astype(jnp.float32))

    def norm_group(number: Any, carry: None) -> None:
        def skip(slab: Any, total: Array) -> Array:
            skipped = _of_heads(group.weights[SKIP][...], slab, settings.each) * group.channels[_tile(settings, slab)]
            out = outputs[slab] + skipped
            outputs[slab] = out if settings.norm_first else out * gate(slab)
            return total + jnp.sum(outputs[slab] * outputs[slab], axis=1, keepdims=True)

        def norm(slab: Any, carry: None) -> None:
            out = outputs[slab]
            if settings.normed:
                out = out * scale * group.weights[OUTPUT_NORM][:, lanes(slab)]
            store(lanes(slab), out * gate(slab) if settings.norm_first else out)
            return carry

        first, end = number * each, (number + 1) * each
        total = lax.fori_loop(first, end, skip, jnp.zeros((outputs.shape[1], 1), jnp.float32))
        scale = lax.rsqrt(total * (1.0 / (each * LANES)) + settings.epsilon)
        return lax.fori_loop(first, end, norm, carry)

    lax.fori_loop(0, settings.groups, norm_group, None)
