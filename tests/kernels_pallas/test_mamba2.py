"""The three ways in which a Mamba2 layer ends."""

import jax.numpy as jnp
import numpy as np

from kernels_pallas.mamba2.xla import gated_then_normed, normed_then_gated

EPSILON, GROUPS = 1e-5, 2
rng = np.random.default_rng(4)
OUT, Z = (rng.normal(size=(5, 24)).astype(np.float32) for _ in range(2))
WEIGHT = rng.normal(1, 0.3, 24).astype(np.float32)
GATE = Z / (1 + np.exp(-Z))


def group_rms(x):
    parts = x.reshape(5, GROUPS, -1)
    return (parts / np.sqrt((parts**2).mean(-1, keepdims=True) + EPSILON)).reshape(5, -1) * WEIGHT


def test_the_gate_comes_first():
    got = gated_then_normed(jnp.asarray(OUT), jnp.asarray(Z), jnp.asarray(WEIGHT), GROUPS, EPSILON)
    np.testing.assert_allclose(got, group_rms(OUT * GATE), rtol=1e-5, atol=1e-6)


def test_the_norm_comes_first():
    got = normed_then_gated(jnp.asarray(OUT), jnp.asarray(Z), jnp.asarray(WEIGHT), GROUPS, EPSILON)
    np.testing.assert_allclose(got, group_rms(OUT) * GATE, rtol=1e-5, atol=1e-6)


def test_without_a_weight_there_is_no_norm():
    for finish in (gated_then_normed, normed_then_gated):
        got = finish(jnp.asarray(OUT), jnp.asarray(Z), None, GROUPS, EPSILON)
        np.testing.assert_allclose(got, OUT * GATE, rtol=1e-5, atol=1e-6)
