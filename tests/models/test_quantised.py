"""Weights of eight bits: products against float64, who has them, and programs that make no wide copy of a weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import quantised_experts as quantised
from models.layers import MLP, Linear, swiglu
from models.moe import Experts
from models.quantised import (
    DTYPES,
    Format,
    QuantisedExperts,
    QuantisedLinear,
    channel_product,
    find_sites,
    group_product,
    quantisable_paths,
    quantise,
)
from models.quantised_experts import Kernels
from models.squared_relu import SquaredReLUExperts, squared_relu
from tests.tpu_topology import compile_for

FORMATS = [Format("int8"), Format("fp8"), Format("fp8", True), Format("int8", True)]
CHIPS = ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1")
BF16_STEP = 2.0**-8


def draw(form, shape, first, last, seed=0):
    """Random values and scales of a kernel, and its weights in float64."""
    rng = np.random.default_rng(seed)
    values = jnp.asarray(rng.integers(-120, 121, shape), jnp.float32).astype(DTYPES[form.name])
    scale = rng.uniform(1e-3, 2e-3, form.scale_shape(shape, first, last)).astype(np.float32)
    factors = scale.astype(np.float64)
    for axis in range(first, last):
        factors = np.repeat(factors, shape[axis] // factors.shape[axis], axis)
    return values, jnp.asarray(scale), np.asarray(values, np.float64) * factors


def near(got, wanted, dtype):
    """Equal up to the rounding of inputs, weights and results in a dtype."""
    step = 2e-6 if dtype == "float32" else 4 * BF16_STEP
    return np.abs(np.asarray(got, np.float64) - wanted).max() <= step * np.abs(wanted).max()


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3, 300])
@pytest.mark.parametrize(("inputs", "outputs"), [((256,), (24,)), ((192,), (2, 12)), ((3, 64), (24,))])
def test_products_are_those_of_the_widened_weights(form, dtype, rows, inputs, outputs):
    values, scale, weights = draw(form, inputs + outputs, 0, len(inputs))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, *inputs)), dtype)
    with jax.default_matmul_precision("highest"):
        if form.block:
            got = group_product(x, values, scale, len(inputs))
        else:
            got = channel_product(x, values, scale.reshape(outputs), len(inputs))
    wanted = np.tensordot(np.asarray(x, np.float64), weights, len(inputs))
    assert got.shape == (rows, *outputs) and got.dtype == dtype and near(got, wanted, dtype)


def experts_in_float64(x, experts, weights, into, out_of, activate):
    """The definition, one choice after the other."""
    x, out = np.asarray(x, np.float64), np.zeros(x.shape)
    for token, choices in enumerate(np.asarray(experts)):
        for choice, expert in enumerate(choices):
            inner = np.tensordot(x[token], into[expert], 1)[None].astype(np.float32)
            inner = np.asarray(activate(jnp.asarray(inner)), np.float64)[0]
            out[token] += float(weights[token, choice]) * (inner @ out_of[expert])
    return out


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("parts", [(2,), ()], ids=["swiglu", "squared relu"])
@pytest.mark.parametrize("tokens", [2, 9, 260], ids=["gathered or looped", "swept", "grouped"])
def test_experts_are_those_of_the_widened_weights(form, parts, tokens):
    rng, count, width, inner, chosen = np.random.default_rng(2), 6, 256, 32, 2
    into_values, into_scale, into = draw(form, (count, width, *parts, inner), 1, 2, 3)
    out_values, out_scale, out_of = draw(form, (count, inner, width), 1, 2, 4)
    kernels = Kernels(into_values, into_scale), Kernels(out_values, out_scale)
    activate = swiglu if parts else squared_relu
    x = jnp.asarray(rng.standard_normal((tokens, width)), jnp.float32)
    experts = jnp.asarray(np.stack([rng.permutation(count)[:chosen] for _ in range(tokens)]), jnp.int32)
    weights = jnp.asarray(rng.uniform(0.1, 1, (tokens, chosen)), jnp.float32)
    with jax.default_matmul_precision("highest"):
        got = quantised.all_experts(x, experts, weights, *kernels, activate)
        halves = [tuple(Kernels(k.values[at : at + 3], k.scale[at : at + 3]) for k in kernels) for at in (0, 3)]
        shares = [
            quantised.some_experts(x, experts, weights, *half, activate, jnp.int32(part))
            for part, half in enumerate(halves)
        ]
    wanted = experts_in_float64(x, experts, weights, into, out_of, activate)
    assert near(got, wanted, "float32") and near(shares[0] + shares[1], wanted, "float32")


# --------------------------------------------------------------------------------------------------------- who has them


class Pair(nnx.Module):
    """What a layer holds: a product that may have eight bits, and two that may not."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.feed_forward = MLP(rngs, 16, 8, "bfloat16")
        self.experts = Experts(rngs, 2, 16, 8, "bfloat16")
        self.flat = SquaredReLUExperts(rngs, 2, 16, 8, "bfloat16")
        self.gates = Linear(rngs, (16,), (4,), ("model", None), "bfloat16")
        self.expansion = Linear(rngs, (16,), (4, 2), ("model", "heads", None), "bfloat16")


def test_products_and_experts_are_found_and_the_gates_of_a_state_are_not():
    mlp = ("feed_forward.gate_up.kernel", "feed_forward.down.kernel")
    assert set(quantisable_paths(Pair())) == {
        *mlp,
        *("experts.gate_up", "experts.down"),
        *("flat.up", "flat.down"),
    }


def test_modules_are_replaced_by_their_formats_and_keep_their_axes():
    model = nnx.eval_shape(Pair)
    formats = dict.fromkeys(quantisable_paths(model), Format("int8")) | {"flat.up": Format("fp8")}
    del formats["feed_forward.down.kernel"]
    quantise(model, formats)
    assert {type(site.holder).__name__ for site in find_sites(model)} == {"MLP", "Pair"}
    assert set(quantisable_paths(model)) == {"feed_forward.down.kernel", "flat.up", "flat.down"}
    assert type(model.experts) is QuantisedExperts and type(model.feed_forward.gate_up) is QuantisedLinear
    assert model.experts.gate_up.dtype == jnp.int8 and model.experts.gate_up_scale.shape == (2, 1, 2, 8)
    assert model.experts.gate_up_scale.get_metadata("axes") == ("expert", None, None, "expert_mlp")
    assert model.feed_forward.gate_up.kernel_scale.get_metadata("axes") == (None, None, "mlp")


def test_scales_of_blocks_divide_with_their_input_channels():
    assert Format("fp8", True).scale_shape((3, 192, 256), 0, 2) == (3, 3, 256)
    assert Format("fp8", True).scale_shape((512, 2, 256), 0, 1) == (4, 2, 256)
    linear = nnx.eval_shape(lambda: Linear(nnx.Rngs(0), (256,), (16,), ("mlp", "model"), "bfloat16"))
    assert QuantisedLinear(linear, Format("fp8", True)).kernel_scale.get_metadata("axes") == ("mlp", "model")


def test_groups_that_would_weigh_more_than_the_weights_are_refused():
    with pytest.raises(ValueError, match="wanted input channels in multiples of 8 for scales of blocks, got 12"):
        Format("fp8", True).scale_shape((12, 256), 0, 1)


# ----------------------------------------------------------------------------------------------------------- programs


def shapes(form, rows, shape, first, last):
    values = jax.ShapeDtypeStruct(shape, DTYPES[form.name])
    scale = jax.ShapeDtypeStruct(form.scale_shape(shape, first, last), jnp.float32)
    return jax.ShapeDtypeStruct((rows, shape[last - 1]), jnp.bfloat16), values, scale


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("form", FORMATS[:3], ids=str)
def test_a_tpu_widens_weights_within_the_product_of_a_decode_step(chip, form):
    def product(x, values, scale):
        if form.block:
            return group_product(x, values, scale, 1)
        return channel_product(x, values, scale.reshape(-1), 1)

    compiled = compile_for(chip, product, *shapes(form, 16, (2048, 4096), 0, 1))
    assert compiled.memory_analysis().temp_size_in_bytes < 2048 * 4096 / 4


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("form", FORMATS[1:3], ids=str)
def test_a_tpu_reads_the_experts_of_a_decode_step_where_they_lie(chip, form):
    count, width, inner, tokens = 16, 1024, 512, 64
    _, *into = shapes(form, tokens, (count, width, 2, inner), 1, 2)
    _, *out_of = shapes(form, tokens, (count, inner, width), 1, 2)
    choice = jax.ShapeDtypeStruct((tokens, 2), jnp.int32), jax.ShapeDtypeStruct((tokens, 2), jnp.float32)

    def product(x, experts, weights, *kernels):
        return quantised.all_experts(x, experts, weights, Kernels(*kernels[:2]), Kernels(*kernels[2:]), swiglu)

    x = jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16)
    compiled = compile_for(chip, product, x, *choice, *into, *out_of)
    assert compiled.memory_analysis().temp_size_in_bytes < count * width * 3 * inner / 4
