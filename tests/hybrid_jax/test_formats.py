"""Orders of axes that are stated on a TPU: of pools their own, of kernels of experts one matrix after another."""

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from hybrid_jax.chips import open_slice
from hybrid_jax.formats import pool_format, weight_format
from tests import tpu_topology  # noqa: F401 says that there is no TPU, before the library is loaded

GATE_UP = ("expert", "model", None, "expert_mlp")


@pytest.fixture(scope="module")
def tpu():
    return SingleDeviceSharding(open_slice("v6e:2x2").devices[0])


@pytest.mark.parametrize(
    "axes, order",
    [
        (GATE_UP, (0, 2, 1, 3)),
        (("expert", "model", "expert_mlp"), (0, 1, 2)),
        (("expert", "expert_mlp", "model"), (0, 1, 2)),
    ],
)
def test_kernels_of_experts_lie_matrix_after_matrix(tpu, axes, order):
    assert weight_format(tpu, axes).layout.major_to_minor == order


def test_other_weights_lie_as_the_compiler_likes(tpu):
    assert weight_format(tpu, ("model", "heads", None)) is tpu


def test_pools_lie_in_the_order_of_their_axes(tpu):
    assert pool_format(tpu, 4).layout.major_to_minor == (0, 1, 2, 3)


def test_elsewhere_nothing_is_stated():
    cpu = SingleDeviceSharding(jax.devices("cpu")[0])
    assert weight_format(cpu, GATE_UP) is cpu
    assert pool_format(cpu, 4) is cpu
