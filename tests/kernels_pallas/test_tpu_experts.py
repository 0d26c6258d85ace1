"""The experts of a TPU are those of the definition, whoever is chosen, and take kernels as they lie."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.experts import EXPERTS, choose_backend
from kernels_pallas.op import AUTO_ON_TPU
from models.layers import swiglu

WIDTH, INNER = 16, 8
CASES = [  # tokens, experts a token, experts, range of the choices
    pytest.param(11, 3, 4, (0, 4), id="all here"),
    pytest.param(7, 2, 4, (-3, 9), id="some elsewhere"),
    pytest.param(9, 4, 3, (3, 9), id="all elsewhere"),
    pytest.param(6, 2, 4, (2, 3), id="one for all"),
    pytest.param(2, 1, 8, (0, 8), id="few"),
]


@pytest.mark.parametrize("tokens, chosen, experts, choices", CASES)
@pytest.mark.parametrize("matrices", [1, 2])
def test_the_experts_of_a_tpu_equal_the_definition(tokens, chosen, experts, choices, matrices):
    rng = np.random.default_rng(0)
    x, gate_up, down = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((tokens, WIDTH), (experts, WIDTH, matrices, INNER), (experts, INNER, WIDTH))
    )
    index = jnp.asarray(rng.integers(*choices, size=(tokens, chosen)), jnp.int32)
    activate = swiglu if matrices == 2 else lambda inner: inner[:, 0]
    functions = ["share"] + ["whole"] * (choices[0] >= 0 and choices[1] <= experts)
    for name in functions:
        got, wanted = (getattr(EXPERTS[backend], name)(x, index, gate_up, down, activate) for backend in ("tpu", "xla"))
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "backend, platform, wanted",
    [
        ("auto", "tpu", "tpu"),
        (AUTO_ON_TPU, "cpu", "tpu"),
        ("tpu", "cpu", "tpu"),
        ("xla", "tpu", "xla"),
        ("auto", "cpu", "xla"),
    ],
)
def test_a_tpu_has_experts_of_its_own(backend, platform, wanted):
    assert choose_backend(backend, "bfloat16", (WIDTH, INNER), platform) == wanted
