"""Routers: the choice among equal scores, the product that scores, and one row among rows of zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import moe
from models.moe import RouterScores, best, by_several_rows


@pytest.mark.parametrize(("shape", "count"), [((3, 16), 4), ((2, 4, 8), 2), ((5, 40), 10)])
def test_best_is_top_k_also_among_equals(monkeypatch, shape, count):
    scores = np.random.default_rng(0).integers(0, 5, shape) / 4.0
    scores[..., 3] = -np.inf
    scores = jnp.asarray(scores, jnp.float32)
    compared = best(scores, count)
    monkeypatch.setattr(moe, "MOST_COMPARISONS", 0)
    for wanted in (jax.lax.top_k(scores, count), best(scores, count)):
        for one, other in zip(compared, wanted, strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scores_are_sums_of_exact_products(dtype, rows):
    router = RouterScores(nnx.Rngs(0), 512, 16, dtype)
    x = jax.random.normal(jax.random.key(1), (rows, 512), jnp.bfloat16)
    wanted = np.asarray(x, np.float64) @ np.asarray(router.kernel[...], np.float64)
    got = router(x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_one_row_is_computed_in_company():
    seen = []

    def double(x):
        seen.append(x.shape)
        return 2 * x

    for rows in (1, 2):
        x = jnp.ones((rows, 3))
        np.testing.assert_array_equal(by_several_rows(double, x), 2 * x)
    assert seen == [(8, 3), (2, 3)]
