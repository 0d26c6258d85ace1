"""Prefill of the linear kinds on a Hopper GPU: numbers in the interpreter, lowering for CUDA at the shapes of models.

The interpreter checks what the kernels compute and which slots they touch. Speed, registers and races need a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.gdn import gpu_prefill as gdn
from kernels_pallas.gdn.xla import gdn_chunk, gdn_step
from kernels_pallas.kda import gpu_prefill as kda
from kernels_pallas.kda.xla import kda_chunk, kda_step
from kernels_pallas.lightning import gpu_prefill as lightning
from kernels_pallas.lightning.xla import lightning_step
from kernels_pallas.mamba2 import gpu_prefill as mamba2
from kernels_pallas.mamba2.xla import mamba2_chunk, mamba2_step
from kernels_pallas.recurrence import recur
from tests.gpu_kernels import kernels_run
from tests.ragged import checked, make_batch

SLOTS, LAYERS, LAYER = 9, 2, 1
TOKENS = 112  # packed, the last of them padding
# One row in decode, a fresh one over two chunks with a snapshot at the border, an absent one, and one that goes on from
# a slot of its own with a snapshot at its end.
ROWS = {
    "lengths": [1, 70, 0, 20],
    "seen": [5, 0, 7, 3],
    "decodes": 1,
    "read": [1, 0, 0, 6],
    "write": [1, 4, 0, 2],
    "snapshot": [(0, 0), (7, 64), (0, 0), (8, 20)],
}
# Operands of every product are bfloat16, 2^-9 each; sums and states are float32.
OUTPUT_TOLERANCE, STATE_TOLERANCE = 1e-2, 2e-3


@dataclass(frozen=True)
class Kind:
    """A kind's prefill, its recurrence in plain jnp in float32, and inputs of some heads."""

    name: str
    prefill: Callable
    oracle: Callable
    inputs: Callable
    value_width: int = 128


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def bfloat16(*arrays):
    return tuple(jnp.asarray(array, jnp.bfloat16) for array in arrays)


def scalar_oracle(step, chunk):
    def oracle(tokens, pool, layer, batch):
        q, k, v, *gates = (x.astype(jnp.float32) for x in tokens)
        if step is gdn_step:
            q, k = (jnp.repeat(x, v.shape[1] // x.shape[1], axis=1) for x in (q, k))
        return recur((q, k, v, *gates), step, chunk, pool, layer, batch)

    return oracle


def lightning_oracle(tokens, pool, layer, batch):
    q, k, v, slopes = (x.astype(jnp.float32) for x in tokens)

    def step(state, token):
        return lightning_step(state, *token, slopes)

    def chunk(state, token):
        state, out = jax.lax.scan(lambda s, t: skip_absent(s, t, step), state, token)
        return out, state

    return recur((q, k, v), step, chunk, pool, layer, batch)


def skip_absent(state, token, step):
    out, after = step(state, token)
    return jnp.where(jnp.any(token[1] != 0), after, state), out


def delta_inputs(rng, tokens, heads, channels=None):
    q, k = unit(rng.normal(size=(tokens, 1, 128))) * 128**-0.5, unit(rng.normal(size=(tokens, 1, 128)))
    k[30:50] = k[30:31]  # repeated keys
    v = rng.normal(size=(tokens, heads, 128))
    decay = -np.abs(rng.normal(size=(tokens, heads, *(channels or ()))) * 0.2)
    decay[::9] = -150.0  # the state is forgotten at once
    decay[4::9] = 0.0
    beta = sigmoid(2 * rng.normal(size=(tokens, heads)))
    beta[30:50] = 1.0
    beta[36:40] = 2.0
    return q, k, v, decay.astype(np.float32), beta.astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gdn_inputs(rng, tokens, heads=2):
    q, k, v, decay, beta = delta_inputs(rng, tokens, heads)
    return (*bfloat16(q, k, v), jnp.asarray(decay), jnp.asarray(beta))


def kda_inputs(rng, tokens, heads=1):
    q, k, v, decay, beta = delta_inputs(rng, tokens, heads, (128,))
    q, k = np.repeat(q, heads, axis=1), np.repeat(k, heads, axis=1)
    decay[2::9, :, ::3] = -150.0  # some channels alone
    return (*bfloat16(q, k, v), jnp.asarray(decay), jnp.asarray(beta))


def lightning_inputs(rng, tokens, heads=2):
    q, k, v = rng.normal(size=(3, tokens, heads, 128))
    return (*bfloat16(q * 128**-0.5, k, v), jnp.asarray([1.03, 0.01][:heads], jnp.float32))


def mamba2_inputs(rng, tokens, heads=2):
    c, b = rng.normal(size=(2, tokens, 1, 128))
    decay = -np.exp(2 * rng.normal(size=(tokens, heads)) - 2)
    decay[::9], decay[4::9] = -150.0, 0.0
    return (*bfloat16(c * 128**-0.5, b, rng.normal(size=(tokens, heads, 64))), jnp.asarray(decay, jnp.float32))


KINDS = [
    Kind("gdn", gdn.prefill, scalar_oracle(gdn_step, gdn_chunk), gdn_inputs),
    Kind("lightning", lightning.prefill, lightning_oracle, lightning_inputs),
    Kind("mamba2", mamba2.prefill, scalar_oracle(mamba2_step, mamba2_chunk), mamba2_inputs, 64),
    Kind("kda", kda.prefill, scalar_oracle(kda_step, kda_chunk), kda_inputs),
]


def random_pool(kind, heads, filled, seed=1):
    """States, random in the `filled` slots and NaN in all others."""
    pool = np.full((LAYERS, SLOTS, heads, kind.value_width, 128), np.nan, np.float32)
    for slot in filled:
        pool[:, slot] = np.random.default_rng(seed + slot).normal(size=pool.shape[2:])
    return jnp.asarray(pool)


def run(kind, tokens, pool, batch):
    with kernels_run():
        out, pool = jax.jit(lambda *arguments: kind.prefill(*arguments[:2], LAYER, arguments[2]))(tokens, pool, batch)
    return np.asarray(out, np.float32), np.asarray(pool)


def spoil(tokens, first):
    """NaN in the padding."""
    return tuple(x.at[first:].set(jnp.nan) if x.shape[0] == TOKENS else x for x in tokens)


def relative_error(got, wanted):
    return np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_ragged_batch_follows_the_contract(kind):
    tokens = kind.inputs(np.random.default_rng(0), TOKENS)
    batch, used = checked(make_batch(**ROWS), TOKENS), sum(ROWS["lengths"])
    heads = tokens[2].shape[1]
    pool = random_pool(kind, heads, filled=(6,))
    out, after = run(kind, spoil(tokens, used), pool, batch)
    wanted, wanted_pool = jax.jit(kind.oracle, static_argnums=2)(tokens, jnp.nan_to_num(pool), LAYER, batch)
    assert relative_error(out[1:used], wanted[1:used]) < OUTPUT_TOLERANCE
    assert not out[:1].any()
    assert not out[used:].any()
    for slot in (2, 4, 7, 8):
        assert relative_error(after[LAYER, slot], wanted_pool[LAYER, slot]) < STATE_TOLERANCE, slot
    np.testing.assert_array_equal(after[LAYER, 8], after[LAYER, 2])  # a snapshot at the end is the final state
    for slot in (0, 1, 3, 5, 6):
        np.testing.assert_array_equal(after[LAYER, slot], pool[LAYER, slot])
    np.testing.assert_array_equal(after[0], pool[0])


def test_a_row_goes_on_from_a_slot_and_into_another():
    kind = KINDS[0]
    tokens = kind.inputs(np.random.default_rng(0), TOKENS)
    batch = checked(make_batch([20], [3], read=[6], write=[2], content="prefill"), TOKENS)
    pool = random_pool(kind, 2, filled=(6,))
    out, after = run(kind, spoil(tokens, 20), pool, batch)
    wanted, wanted_pool = jax.jit(kind.oracle, static_argnums=2)(tokens, jnp.nan_to_num(pool), LAYER, batch)
    assert relative_error(out[:20], wanted[:20]) < OUTPUT_TOLERANCE
    assert not out[20:].any()
    assert relative_error(after[LAYER, 2], wanted_pool[LAYER, 2]) < STATE_TOLERANCE
    np.testing.assert_array_equal(np.delete(after[LAYER], 2, axis=0), np.delete(pool[LAYER], 2, axis=0))


@pytest.mark.slow
def test_a_row_knows_neither_neighbours_nor_slots():
    """The row of 20 tokens alone, first in the batch and in other slots, has the same bits."""
    kind = KINDS[0]
    tokens = kind.inputs(np.random.default_rng(0), TOKENS)
    pool = random_pool(kind, 2, filled=(6,))
    out, after = run(kind, tokens, pool, checked(make_batch(**ROWS), TOKENS))
    other = make_batch([20, 0, 0, 0], [3, 0, 0, 0], read=[3, 0, 0, 0], write=[3, 0, 0, 0], content="prefill")
    moved = tuple(jnp.roll(x, -71, axis=0) for x in tokens)
    moved_out, moved_after = run(kind, spoil(moved, 20), pool.at[:, 3].set(pool[:, 6]), checked(other, TOKENS))
    np.testing.assert_array_equal(moved_out[:20], out[71:91])
    np.testing.assert_array_equal(moved_after[LAYER, 3], after[LAYER, 2])
    np.testing.assert_array_equal(moved_after[LAYER, 6], pool[LAYER, 6])


# ----------------------------------------------------------------------------------------------------- shapes of models


def shapes(key_heads, heads, value_width, gates, tokens=8192):
    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    gate_shapes = [array(*((tokens, *gate) if gate != "slopes" else (heads,)), dtype=jnp.float32) for gate in gates]
    q = array(tokens, key_heads, 128)
    return (q, q, array(tokens, heads, value_width), *gate_shapes)


MODELS = {
    "Qwen3.5-4B": (gdn, shapes(16, 32, 128, [(32,), (32,)])),
    "Qwen3.5-27B": (gdn, shapes(16, 48, 128, [(48,), (48,)])),
    "Qwen3.5-397B": (gdn, shapes(16, 64, 128, [(64,), (64,)])),
    "Ling-2.6-flash": (lightning, shapes(32, 32, 128, ["slopes"])),
    "MiniMax-Text-01": (lightning, shapes(64, 64, 128, ["slopes"])),
    "Nemotron-3-Nano": (mamba2, shapes(8, 64, 64, [(64,)])),
    "Nemotron-3-Ultra": (mamba2, shapes(8, 256, 64, [(256,)])),
    "Kimi-Linear": (kda, shapes(32, 32, 128, [(32, 128), (32,)])),
}


@pytest.mark.parametrize("model", MODELS)
def test_lowers_for_cuda_with_the_pool_in_place(model):
    module, tokens = MODELS[model]
    rows = 8 if "Qwen" in model else 1
    batch = make_batch([8192 // rows] * rows, content="prefill")
    pool = jax.ShapeDtypeStruct((2, 9, *tokens[2].shape[1:], 128), jnp.float32)
    call = jax.jit(lambda tokens, pool, batch: module.prefill(tokens, pool, 1, batch), donate_argnums=1)
    text = call.trace(tokens, pool, batch).lower(lowering_platforms=("cuda",)).as_text()
    assert "tf.aliasing_output" in text
    assert "output_operand_alias" in text


@pytest.mark.parametrize("width", [64, 96, 256])
def test_other_key_widths_are_refused(width):
    tokens = tuple(jnp.zeros(shape, jnp.bfloat16) for shape in [(64, 2, width)] * 2 + [(64, 2, 128)])
    pool = jnp.zeros((1, 2, 2, 128, width), jnp.float32)
    with pytest.raises(NotImplementedError, match="use backend 'xla'"):
        lightning.prefill((*tokens, jnp.ones(2)), pool, 0, make_batch([64], content="prefill"))


def test_other_dtypes_are_refused():
    tokens = (jnp.zeros((64, 2, 128), jnp.float32),) * 3
    pool = jnp.zeros((1, 2, 2, 128, 128), jnp.float32)
    with pytest.raises(NotImplementedError, match="use backend 'xla'"):
        lightning.prefill((*tokens, jnp.ones(2)), pool, 0, make_batch([64], content="prefill"))
