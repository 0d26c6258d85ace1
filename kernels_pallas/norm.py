"""Normalisations of the last axis, in float32 whatever comes in. They know no layer and no kind of attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

L2_EPSILON = 1e-6  # inside the root, as in the reference implementations of the delta rule


def rms(x: Float[Array, "*n d"], weight: Float[Array, "d"], epsilon: float) -> Float[Array, "*n d"]:
    """`weight * x / sqrt(mean(x^2) + epsilon)` in float32 (Root Mean Square Layer Normalization, arXiv 1910.07467)."""
    x = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return x * scale * jax.lax.broadcast_in_dim(weight.astype(jnp.float32), x.shape, (x.ndim - 1,))


def group_rms(x: Float[Array, "T c"], weight: Float[Array, "c"], groups: int, epsilon: float) -> Float[Array, "T c"]:
    """RMS norm of each of `groups` equal parts of the channels on its own, with one weight per channel, in float32."""
    parts = x.reshape(x.shape[0], groups, -1)
    normed = rms(parts, jnp.ones((parts.shape[-1],), jnp.float32), epsilon)
    return normed.reshape(x.shape) * weight.astype(jnp.float32)[None, :]


def l2(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """`x / sqrt(sum(x^2) + 1e-6)` in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + L2_EPSILON)
