"""Rotary position embedding (RoFormer, arXiv 2104.09864): tables from positions, and the two pairings of channels.

The first `2 r` channels of a head are rotated, the rest pass through. Angles are float32 (positions reach a million).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotary:
    """Cosines and sines of the r angles of each token."""

    cos: Float[Array, "T r"]
    sin: Float[Array, "T r"]


def frequencies(width: int, theta: float) -> np.ndarray:
    """`theta^(-2 j / width)` for j in `[0, width / 2)`: radians a position, float32."""
    return (theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)).astype(np.float32)


def rotary_tables(positions: Int[Array, "T"], inverse: Float[Array, "r"], magnitude: float = 1.0) -> Rotary:
    """The tables for these positions. `magnitude` multiplies both (YaRN's attention temperature, arXiv 2309.00071)."""
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(inverse, jnp.float32)[None, :]
    return Rotary(jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude)


def rotate_halves(x: Float[Array, "T H d"], rotary: Rotary) -> Float[Array, "T H d"]:
    """Rotate the pairs `(x[j], x[j + r])` of the first 2 r channels; float32 out."""
    x = x.astype(jnp.float32)
    r = rotary.cos.shape[-1]
    cos, sin = rotary.cos[:, None, :], rotary.sin[:, None, :]
    a, b, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def rotate_pairs(x: Float[Array, "T H d"], rotary: Rotary) -> Float[Array, "T H d"]:
    """Rotate the interleaved pairs `(x[2 j], x[2 j + 1])` of the first 2 r channels; float32 out.

    The rotated channels come out evens first, then odds. Queries and keys share this order, so products are unchanged.
    """
    x = x.astype(jnp.float32)
    r = rotary.cos.shape[-1]
    halves = jnp.concatenate([x[..., 0 : 2 * r : 2], x[..., 1 : 2 * r : 2], x[..., 2 * r :]], axis=-1)
    return rotate_halves(halves, rotary)
