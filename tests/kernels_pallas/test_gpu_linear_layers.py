"""Whole layers of the linear kinds on a Hopper GPU where rows prefill: the ops by their kernels against plain jnp."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.gdn import GDN, GDNWeights
from kernels_pallas.kda import KDA, KDAWeights, SoftplusDecay
from kernels_pallas.lightning import LIGHTNING, LightningWeights
from kernels_pallas.mamba2 import MAMBA2, Mamba2Weights
from kernels_pallas.op import token_positions
from kernels_pallas.rotary import frequencies, rotary_tables
from tests.gpu_kernels import kernels_run
from tests.kernels_pallas.test_gpu_linear_prefill import (
    LAYER,
    LAYERS,
    OUTPUT_TOLERANCE,
    SLOTS,
    STATE_TOLERANCE,
    TOKENS,
    relative_error,
    spoil,
)
from tests.ragged import checked, make_batch


def draw(rng, shape, dtype=jnp.bfloat16, middle=0.0, spread=1.0):
    return jnp.asarray(rng.normal(middle, spread, shape), dtype)


def positive(rng, *shape):
    return draw(rng, shape, jnp.float32, 0.5, 0.2)


def gdn_layer(rng):
    """Two value heads of one key head."""
    channels = 4 * 128
    weights = GDNWeights(positive(rng, 4, channels), positive(rng, 2), positive(rng, 2), positive(rng, 128))
    inputs = draw(rng, (TOKENS, 1, 6 * 128)), draw(rng, (TOKENS, 1, 2, 2))

    def run(backend, inputs, pools, batch):
        out, *pools = GDN.on(backend)(*inputs, weights, *pools, LAYER, batch, epsilon=1e-6)
        return out, pools

    return run, inputs, (2, 128), channels


def lightning_layer(rng):
    weights = LightningWeights(jnp.float32([1.03, 0.01]), positive(rng, 256), positive(rng, 128), positive(rng, 128))
    inputs = draw(rng, (TOKENS, 3, 2, 128)), draw(rng, (TOKENS, 256))

    def run(backend, inputs, pools, batch):
        rotary = rotary_tables(token_positions(batch, TOKENS), frequencies(64, 10000.0))
        options = {"scale": 128**-0.5, "groups": 2, "epsilon": 1e-6}
        out, pool = LIGHTNING.on(backend)(*inputs, weights, rotary, *pools, LAYER, batch, **options)
        return out, (pool,)

    return run, inputs, (2, 128), None


def mamba2_layer(rng):
    """Two heads of one group."""
    channels = 2 * 64 + 2 * 128
    heads = [positive(rng, 2) for _ in range(3)]
    weights = Mamba2Weights(positive(rng, 4, channels), positive(rng, channels), *heads, positive(rng, 128))
    inputs = draw(rng, (TOKENS, 128)), draw(rng, (TOKENS, channels)), draw(rng, (TOKENS, 2))

    def run(backend, inputs, pools, batch):
        out, *pools = MAMBA2.on(backend)(*inputs, weights, *pools, LAYER, batch, groups=1, epsilon=1e-6)
        return out, pools

    return run, inputs, (2, 64), channels


def kda_layer(rng):
    """One head."""
    channels = 3 * 128
    weights = KDAWeights(positive(rng, 4, channels), positive(rng, 1), positive(rng, 1, 128), positive(rng, 128))
    shapes = (TOKENS, channels), (TOKENS, 1, 128), (TOKENS, 1), (TOKENS, 1, 128)
    inputs = tuple(draw(rng, shape) for shape in shapes)

    def run(backend, inputs, pools, batch):
        options = {"decay": SoftplusDecay(), "epsilon": 1e-6}
        out, *pools = KDA.on(backend)(*inputs, weights, *pools, LAYER, batch, **options)
        return out, pools

    return run, inputs, (1, 128), channels


LAYER_KINDS = {"gdn": gdn_layer, "lightning": lightning_layer, "mamba2": mamba2_layer, "kda": kda_layer}


def layer_pools(rng, state, channels):
    """Random states and tails in slots 1 and 6, NaN in all others."""
    shapes = [((LAYERS, SLOTS, *state, 128), jnp.float32)]
    shapes += [((LAYERS, SLOTS, 3, channels), jnp.bfloat16)] if channels else []
    kept = jnp.zeros(SLOTS, bool).at[jnp.array([1, 6])].set(True)
    return tuple(
        jnp.where(kept.reshape(1, -1, *(1,) * (len(shape) - 2)), draw(rng, shape, dtype), jnp.nan)
        for shape, dtype in shapes
    )


def run_layer(run, backend, inputs, pools, batch):
    with kernels_run():
        out, pools = jax.jit(partial(run, backend))(inputs, pools, checked(batch, TOKENS))
    return np.asarray(out, np.float32), [np.asarray(pool, np.float32) for pool in pools]


def as_float(run, inputs, pools, batch):
    """The op by plain jnp from the same numbers in float32, and the pools as it leaves them in their own dtypes."""
    wanted, (states, *_) = run_layer(run, "xla", *jax.tree.map(lambda x: x.astype(jnp.float32), (inputs, pools)), batch)
    return wanted, states, run_layer(run, "xla", inputs, pools, batch)[1][1:]


@pytest.mark.parametrize(
    "name", ["gdn", *(pytest.param(name, marks=pytest.mark.slow) for name in LAYER_KINDS if name != "gdn")]
)
def test_a_layer_equals_its_definition(name):
    """Rows that prefill: fresh with a snapshot in the middle, absent, and from a slot into another, shorter than W."""
    rng = np.random.default_rng(2)
    run, inputs, *memory = LAYER_KINDS[name](rng)
    pools = layer_pools(rng, *memory)
    batch = make_batch(
        [70, 0, 2], [0, 7, 3], read=[4, 0, 6], write=[4, 0, 2], snapshot=[(7, 64), (0, 0), (8, 2)], content="prefill"
    )
    out, (states, *tails) = run_layer(run, "gpu", spoil(inputs, 72), pools, batch)
    wanted, wanted_states, wanted_tails = as_float(run, inputs, pools, batch)
    assert relative_error(out[:72], wanted[:72]) < OUTPUT_TOLERANCE
    assert not out[72:].any()
    for slot in (2, 4, 7, 8):  # of queries, keys and values that are rounded too
        assert relative_error(states[LAYER, slot], wanted_states[LAYER, slot]) < 2 * STATE_TOLERANCE, slot
    for slot in (0, 1, 3, 5, 6):
        np.testing.assert_array_equal(states[LAYER, slot], pools[0][LAYER, slot])
    np.testing.assert_array_equal(tails, wanted_tails)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYER_KINDS)
def test_pieces_are_the_whole(name):
    """64 tokens and then 6 leave the bits of 70 at once: the state is carried in float32."""
    rng = np.random.default_rng(3)
    run, inputs, *memory = LAYER_KINDS[name](rng)
    pools = layer_pools(rng, *memory)
    whole, after = run_layer(run, "gpu", inputs, pools, make_batch([70], [3], read=[6], write=[2], content="prefill"))
    piece = make_batch([64], [3], read=[6], write=[2], content="prefill")
    first, between = run_layer(run, "gpu", inputs, pools, piece)
    rest = tuple(jnp.roll(x, -64, axis=0) for x in inputs)
    between = tuple(jnp.asarray(x, pool.dtype) for x, pool in zip(between, pools, strict=True))
    second, end = run_layer(run, "gpu", rest, between, make_batch([6], [67], read=[2], write=[2], content="prefill"))
    np.testing.assert_array_equal(np.concatenate([first[:64], second[:6]]), whole[:70])
    for one, other in zip(end, after, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYER_KINDS)
def test_rows_in_decode_beside_rows_that_prefill(name):
    """Operation by operation: on few cores, an interpreted kernel and other work of one program can wait for each other
    forever."""
    rng = np.random.default_rng(4)
    run, inputs, *memory = LAYER_KINDS[name](rng)
    pools = layer_pools(rng, *memory)
    batch = checked(make_batch([1, 3, 66], [5, 8, 0], read=[1, 6, 0], write=[1, 2, 3], decodes=1), TOKENS)
    with kernels_run():
        out, (states, *tails) = run("gpu", spoil(inputs, 70), pools, jax.tree.map(jnp.asarray, batch))
    wanted, wanted_states, wanted_tails = as_float(run, inputs, pools, batch)
    assert relative_error(np.asarray(out, np.float32)[:70], wanted[:70]) < OUTPUT_TOLERANCE
    assert not np.asarray(out)[70:].any()
    for slot in (1, 2, 3):
        assert relative_error(states[LAYER, slot], wanted_states[LAYER, slot]) < 2 * STATE_TOLERANCE, slot
    for tail, wanted_tail in zip(tails, wanted_tails, strict=True):
        np.testing.assert_array_equal(np.asarray(tail, np.float32), wanted_tail)


def shaped(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def delta_layer(keys, heads, tokens=8192):
    channels, f32 = (2 * keys + heads) * 128, jnp.float32
    vectors = [shaped(heads, dtype=f32)] * 2
    weights = GDNWeights(shaped(4, channels, dtype=f32), *vectors, shaped(128, dtype=f32))
    inputs = shaped(tokens, keys, 2 * channels // keys - 2 * 128), shaped(tokens, keys, 2, heads // keys)
    pools = shaped(2, 9, heads, 128, 128, dtype=f32), shaped(2, 9, 3, channels)

    def call(pools, inputs, weights, batch):
        return GDN.on("gpu")(*inputs, weights, *pools, 1, batch, epsilon=1e-6)[::-1]

    return call, pools, inputs, weights


LARGER = [pytest.param(heads, marks=pytest.mark.slow) for heads in (48, 64)]


@pytest.mark.parametrize("heads", [32, *LARGER])
def test_a_layer_lowers_for_cuda_with_both_pools_in_place(heads):
    call, pools, inputs, weights = delta_layer(16, heads)
    batch = make_batch([1024] * 8, content="prefill")
    text = jax.jit(call, donate_argnums=0).trace(pools, inputs, weights, batch).lower(lowering_platforms=("cuda",))
    assert text.as_text().count("tf.aliasing_output") == 2
