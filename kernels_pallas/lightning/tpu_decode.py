"""Decode of lightning attention on a TPU: what it does with a group of tokens and with a slab of a state.

The recurrence of `xla.py`; a slab is one head. The output norm over groups of heads, up to all of them, waits until the
outputs of all heads are there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels_pallas.linear_decode_tpu import LANES, Group, Kind, Ref, column, lanes, row, silu, spread, times_state

GATE, COS, SIN = 1, 2, 3  # inputs behind queries, keys and values
SLOPES, OUTPUT_NORM, NORMS = 0, 1, 2  # weights; from NORMS on those of queries and keys, where there are any


@dataclass(frozen=True)
class Settings:
    """groups: of the output norm. normed: whether queries, and keys, have a norm. half: pairs that are rotated."""

    heads: int
    scale: float
    groups: int
    epsilon: float
    activated: bool
    normed: tuple[bool, bool]
    half: int


def lightning_kind(settings: Settings) -> Kind:
    """Lightning attention for `decode`; its vectors are queries, keys, values, and the decay of each head."""
    return Kind("lightning", _prepare, _step, _finish, settings, (settings.heads,) * 4, convolved=False)


def _prepare(settings: Settings, group: Group) -> None:
    queries, keys, values, decays = group.vectors
    decay = jnp.exp(-group.weights[SLOPES][...])
    query_norm = group.weights[NORMS] if settings.normed[0] else None
    key_norm = group.weights[NORMS + settings.normed[0]] if settings.normed[1] else None
    rotation = _rotation(group.inputs[COS][...], group.inputs[SIN][...]) if settings.half else None

    def part(which: int, head: Any) -> Array:
        x = group.inputs[0][:, lanes(which * settings.heads + head)].astype(jnp.float32)
        return silu(x) if settings.activated else x

    def shape(x: Array, norm: Ref | None) -> Array:
        if norm is not None:
            x = x * lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + settings.epsilon) * norm[...]
        return x if rotation is None else _rotated(x, rotation, settings.half)

    def head(number: Any, carry: None) -> None:
        queries[number] = shape(part(0, number), query_norm) * settings.scale
        keys[number] = shape(part(1, number), key_norm)
        values[number] = part(2, number)
        decays[number] = jnp.broadcast_to(spread(decay, number), decays.shape[1:])
        return carry

    lax.fori_loop(0, settings.heads, head, None)


def _rotation(cos: Float[Array, "G r"], sin: Float[Array, "G r"]) -> tuple[Array, Array]:
    """Factors of each channel and of the one that it is paired with: what is past the rotated channels stays."""
    rest = (cos.shape[0], LANES - 2 * cos.shape[1])
    if not rest[1]:
        return jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1)
    own = jnp.concatenate([cos, cos, jnp.ones(rest, jnp.float32)], axis=1)
    return own, jnp.concatenate([-sin, sin, jnp.zeros(rest, jnp.float32)], axis=1)


def _rotated(x: Float[Array, "G 128"], rotation: tuple[Array, Array], half: int) -> Float[Array, "G 128"]:
    """`x` with its pairs `(j, j + half)` rotated."""
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    paired = jnp.where(lane < half, pltpu.roll(x, LANES - half, 1), pltpu.roll(x, half, 1))
    return x * rotation[0] + paired * rotation[1]


def _step(settings: Settings, group: Group, token: Any, head: Any, state: Array) -> tuple[Array, Array]:
    q, k, v, decay = (row(vectors, token, head) for vectors in group.vectors)
    state = state * decay + column(v, group.unit) * k
    return state, times_state(q, state, group.inputs[0].dtype)


def _finish(settings: Settings, group: Group, store: Callable[[Any, Array], None]) -> None:
    each = settings.heads // settings.groups

    def norm_group(number: Any, carry: None) -> None:
        def add(head: Any, total: Array) -> Array:
            out = group.outputs[head]
            return total + jnp.sum(out * out, axis=1, keepdims=True)

        def gate(head: Any, carry: None) -> None:
            opened = jax.nn.sigmoid(group.inputs[GATE][:, lanes(head)].astype(jnp.float32))
            store(lanes(head), group.outputs[head] * scale * group.weights[OUTPUT_NORM][:, lanes(head)] * opened)
            return carry

        first, end = number * each, (number + 1) * each
        total = lax.fori_loop(first, end, add, jnp.zeros((group.outputs.shape[1], 1), jnp.float32))
        scale = lax.rsqrt(total * (1.0 / (each * LANES)) + settings.epsilon)
        return lax.fori_loop(first, end, gate, carry)

    lax.fori_loop(0, settings.groups, norm_group, None)
