"""Kimi delta attention beyond the laws of all linear kinds: any decay at all, memory of a chunk, the two gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.kda import BoundedDecay, SoftplusDecay
from kernels_pallas.kda.xla import BLOCK, kda_chunk, kda_step
from kernels_pallas.recurrence import CHUNK

HEADS, WIDTH = 2, 8


def random_tokens(rng, log_decay):
    q, k, v = rng.normal(size=(3, CHUNK, HEADS, WIDTH)).astype(np.float32)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = rng.uniform(size=(CHUNK, HEADS)).astype(np.float32)
    return q, k, v, log_decay.astype(np.float32), beta


@pytest.mark.parametrize("strongest", [0.0, 1e-6, 5.0, 150.0, 1e30, np.inf])
def test_chunk_equals_steps_for_any_decay(strongest):
    rng = np.random.default_rng(0)
    decay = np.where(rng.uniform(size=(CHUNK, HEADS, WIDTH)) < 0.2, -strongest, -0.01)
    tokens, state = random_tokens(rng, decay), rng.normal(size=(HEADS, WIDTH, WIDTH)).astype(np.float32)
    wanted_state, wanted = jax.jit(lambda s, t: jax.lax.scan(lambda s, x: kda_step(s, x)[::-1], s, t))(state, tokens)
    out, final = jax.jit(kda_chunk)(state, tokens)
    np.testing.assert_allclose(out, wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(final, wanted_state, rtol=2e-5, atol=2e-5)


def test_tokens_of_zeros_change_no_bit_of_the_state():
    state = np.random.default_rng(1).normal(size=(HEADS, WIDTH, WIDTH)).astype(np.float32)
    zeros = jax.tree.map(jnp.zeros_like, random_tokens(np.random.default_rng(1), np.zeros((CHUNK, HEADS, WIDTH))))
    np.testing.assert_array_equal(jax.jit(kda_chunk)(state, zeros)[1], state)


def test_a_chunk_of_a_published_size_needs_little_memory():
    heads, width = 32, 128
    vectors, scalars = (jax.ShapeDtypeStruct((CHUNK, heads, *rest), jnp.float32) for rest in ((width,), ()))
    state = jax.ShapeDtypeStruct((heads, width, width), jnp.float32)
    compiled = jax.jit(kda_chunk).lower(state, (vectors, vectors, vectors, vectors, scalars)).compile()
    whole = 4 * heads * CHUNK * CHUNK * width  # what all pairs of a chunk would take
    assert compiled.memory_analysis().temp_size_in_bytes < whole * (BLOCK / CHUNK) ** 2 * 8


@pytest.mark.parametrize("x", [-1e4, -30.0, -1.0, 0.0, 1.0, 30.0, 1e4])
def test_gates(x):
    rate = np.float32([0.05, 1, 7])
    bounded = BoundedDecay(-5.0)(jnp.full(3, x, jnp.float32), jnp.asarray(rate))
    unbounded = SoftplusDecay()(jnp.full(3, x, jnp.float32), jnp.asarray(rate))
    np.testing.assert_allclose(unbounded, -rate * np.logaddexp(0, x), rtol=1e-5, atol=1e-12)
    exponent = np.clip(-rate.astype(np.float64) * x, None, 700)
    np.testing.assert_allclose(bounded, -5 / (1 + np.exp(exponent)), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("lowest", [0.0, 5.0, float("nan")])
def test_a_bound_that_lets_a_state_grow_is_refused(lowest):
    with pytest.raises(ValueError, match="wanted a lowest log decay below 0"):
        BoundedDecay(lowest)
