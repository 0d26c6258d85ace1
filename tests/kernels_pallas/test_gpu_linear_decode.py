"""Decode of the linear kinds by their Mosaic GPU kernels, interpreted: equal to plain jnp, and the contract of a batch.

Small shapes, but the widths that the kernels want. Lowering for CUDA needs no GPU: it is tried at the shapes of models.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import linear_decode_gpu
from kernels_pallas.gdn import GDN, GDNWeights
from kernels_pallas.kda import KDA, BoundedDecay, KDAWeights, SoftplusDecay
from kernels_pallas.lightning import LIGHTNING, LightningWeights
from kernels_pallas.linear_decode_gpu import softplus
from kernels_pallas.mamba2 import MAMBA2, Mamba2Weights
from kernels_pallas.op import RaggedBatch, token_positions
from kernels_pallas.rotary import frequencies, rotary_tables
from tests.gpu_kernels import kernels_run
from tests.kernels_pallas.linear_cases import packed_by_head
from tests.ragged import SLOTS, checked, make_batch

LAYERS, LAYER, WIDTH, EPSILON = 2, 1, 128, 1e-6


@dataclass(frozen=True)
class Shape:
    """A layer as the test builds it: how many heads, of them with keys of their own or groups, and value width."""

    heads: int
    keys: int
    width: int = WIDTH


@dataclass(frozen=True)
class Case:
    """A kind. `inputs(T, shape)` and `pools(shape, N)` give names or lists of shapes and dtypes; `run` calls the op."""

    name: str
    shape: Shape
    inputs: Callable
    pools: Callable
    run: Callable
    multiprocessors: int = 132  # 0: more blocks than multiprocessors, so that a block has one warpgroup


def bf16(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def state(shape, slots, layers=LAYERS):
    return f32(layers, slots, shape.heads, shape.width, WIDTH)


# ------------------------------------------------------------------------------------------------------------ the kinds


def gdn_inputs(tokens, shape):
    h, channels = shape.heads, (2 * shape.keys + shape.heads) * WIDTH
    weights = GDNWeights(f32(4, channels), f32(h), f32(h), f32(WIDTH))
    return weights, (bf16(tokens, channels), bf16(tokens, h, WIDTH), bf16(tokens, h), bf16(tokens, h))


def gdn_pools(shape, slots, layers=LAYERS):
    return state(shape, slots, layers), bf16(layers, slots, 3, (2 * shape.keys + shape.heads) * WIDTH)


def run_gdn(shape, backend, weights, inputs, pools, batch, beta_scale=1.0):
    out, *pools = GDN.on(backend)(
        *packed_by_head(*inputs, shape.keys), weights, *pools, LAYER, batch, epsilon=EPSILON, beta_scale=beta_scale
    )
    return out, tuple(pools)


def kda_inputs(tokens, shape):
    h, channels = shape.heads, 3 * shape.heads * WIDTH
    weights = KDAWeights(f32(4, channels), f32(h), f32(h, WIDTH), f32(WIDTH))
    return weights, (bf16(tokens, channels), bf16(tokens, h, WIDTH), bf16(tokens, h), bf16(tokens, h, WIDTH))


def kda_pools(shape, slots, layers=LAYERS):
    return state(shape, slots, layers), bf16(layers, slots, 3, 3 * shape.heads * WIDTH)


def run_kda(decay, shape, backend, weights, inputs, pools, batch):
    out, *pools = KDA.on(backend)(*inputs, weights, *pools, LAYER, batch, decay=decay, epsilon=EPSILON)
    return out, tuple(pools)


def lightning_inputs(tokens, shape):
    weights = LightningWeights(f32(shape.heads), f32(shape.heads * WIDTH), f32(WIDTH), f32(WIDTH))
    return weights, (bf16(tokens, 3, shape.heads, WIDTH), bf16(tokens, shape.heads * WIDTH))


def lightning_pools(shape, slots, layers=LAYERS):
    return (state(shape, slots, layers),)


def run_lightning(shape, backend, weights, inputs, pools, batch):
    rotary = rotary_tables(token_positions(batch, inputs[0].shape[0]), frequencies(WIDTH // 2, 10000.0))
    out, pool = LIGHTNING.on(backend)(
        *inputs, weights, rotary, *pools, LAYER, batch, scale=WIDTH**-0.5, groups=shape.keys, epsilon=EPSILON
    )
    return out, (pool,)


def run_activated_lightning(shape, backend, weights, inputs, pools, batch):
    """The form without norms and rotary of queries and keys, but with SiLU before them."""
    plain = LightningWeights(weights.slopes, weights.output_norm)
    out, pool = LIGHTNING.on(backend)(
        *inputs, plain, None, *pools, LAYER, batch, scale=1.0, groups=1, epsilon=EPSILON, silu=True
    )
    return out, (pool,)


def mamba2_inputs(tokens, shape):
    h, inner = shape.heads, shape.heads * shape.width
    channels = inner + 2 * shape.keys * WIDTH
    weights = Mamba2Weights(f32(4, channels), f32(channels), f32(h), f32(h), f32(h), f32(inner))
    return weights, (bf16(tokens, inner), bf16(tokens, channels), bf16(tokens, h))


def mamba2_pools(shape, slots, layers=LAYERS):
    return state(shape, slots, layers), bf16(layers, slots, 3, (shape.heads * shape.width) + 2 * shape.keys * WIDTH)


def run_mamba2(shape, backend, weights, inputs, pools, batch, norm_first=False):
    out, *pools = MAMBA2.on(backend)(
        *inputs, weights, *pools, LAYER, batch,
        groups=shape.keys, epsilon=EPSILON, norm_first=norm_first, step_limit=(0.01, 5.0),
    )  # fmt: skip
    return out, tuple(pools)


CASES = (
    Case("gdn", Shape(2, 1), gdn_inputs, gdn_pools, run_gdn),
    Case("gdn_own_keys", Shape(2, 2), gdn_inputs, gdn_pools, partial(run_gdn, beta_scale=2.0), 0),
    Case("kda", Shape(2, 2), kda_inputs, kda_pools, partial(run_kda, SoftplusDecay())),
    Case("kda_bounded", Shape(2, 2), kda_inputs, kda_pools, partial(run_kda, BoundedDecay(-5.0)), 0),
    Case("lightning", Shape(2, 2), lightning_inputs, lightning_pools, run_lightning),
    Case("lightning_activated", Shape(2, 1), lightning_inputs, lightning_pools, run_activated_lightning, 0),
    Case("mamba2", Shape(4, 1, 64), mamba2_inputs, mamba2_pools, run_mamba2),
    Case("mamba2_norm_first", Shape(4, 2, 64), mamba2_inputs, mamba2_pools, partial(run_mamba2, norm_first=True), 0),
)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request, monkeypatch) -> Case:
    monkeypatch.setattr(linear_decode_gpu, "MULTIPROCESSORS", request.param.multiprocessors)
    return request.param


# ----------------------------------------------------------------------------------------------------- inputs and calls


def random_like(rng, tree, scale=1.0):
    def draw(spec):
        return jnp.asarray(scale * rng.normal(size=spec.shape), spec.dtype)

    return jax.tree.map(draw, tree)


def problem(case, tokens, used, seed=0):
    """Weights, inputs, and pools in which all slots but those in `used` hold NaN."""
    rng = np.random.default_rng(seed)
    weights, inputs = case.inputs(tokens, case.shape)
    weights = jax.tree.map(jnp.abs, random_like(rng, weights, 0.5))  # slopes and norms are positive
    inputs = random_like(rng, inputs, 2.0)
    pools = []
    for spec in case.pools(case.shape, SLOTS):
        pool = np.full(spec.shape, np.nan, np.float32)
        pool[:, list(used)] = rng.normal(size=(spec.shape[0], len(used), *spec.shape[2:]))
        pools.append(jnp.asarray(pool, spec.dtype))
    return weights, inputs, tuple(pools)


def run(case, backend, weights, inputs, pools, batch):
    """Outputs and pools as NumPy arrays; float32, so that bfloat16 can be compared."""
    tokens = inputs[0].shape[0]
    arrays = jax.tree.map(jnp.asarray, checked(batch, tokens))
    call = jax.jit(partial(case.run, case.shape, backend))
    with kernels_run():
        out, pools = call(weights, inputs, pools, arrays)
    assert out.dtype == jnp.bfloat16
    return np.asarray(out.astype(jnp.float32)), tuple(np.asarray(pool.astype(jnp.float32)) for pool in pools)


def run_eagerly(case, weights, inputs, pools, batch):
    """As `run` on the GPU backend, operation by operation: on few cores, the threads of an interpreted kernel and other
    work of the same program can wait for each other forever."""
    arrays = jax.tree.map(jnp.asarray, checked(batch, inputs[0].shape[0]))
    with kernels_run():
        out, pools = case.run(case.shape, "gpu", weights, inputs, pools, arrays)
    return np.asarray(out.astype(jnp.float32)), tuple(np.asarray(pool.astype(jnp.float32)) for pool in pools)


def error(got, wanted):
    assert (np.isnan(got) == np.isnan(wanted)).all()
    got, wanted = np.nan_to_num(got), np.nan_to_num(wanted)
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def assert_close(got, wanted, prefilled=()):
    """bfloat16 outputs of one mathematics; float32 states, of which only the order of sums differs; equal tails.

    Slots `prefilled` hold states that sums of bfloat16 products made.
    """
    assert error(got[0], wanted[0]) < 1e-2
    stepped = [slot for slot in range(SLOTS) if slot not in prefilled]
    assert error(got[1][0][:, stepped], wanted[1][0][:, stepped]) < 1e-6
    assert not prefilled or error(got[1][0][:, prefilled], wanted[1][0][:, prefilled]) < 5e-3
    for tail, wanted_tail in zip(got[1][1:], wanted[1][1:], strict=True):
        np.testing.assert_array_equal(tail, wanted_tail)


# ------------------------------------------------------------------------------------------------------------ the tests


def decode_batch():
    """A row in place, an absent one, one that goes to another slot with a snapshot, a fresh one; one padding token."""
    return make_batch(
        [1, 0, 1, 1], [7, 0, 9, 0], read=[3, 0, 5, 0], write=[3, 0, 6, 2], decodes=4, content="decode",
        snapshot=[(0, 0), (0, 0), (7, 1), (0, 0)],
    )  # fmt: skip


@functools.cache
def decoded(case):
    """The problem of `decode_batch`, and what the kernel makes of it."""
    weights, inputs, pools = problem(case, 4, used=(3, 5))
    return weights, inputs, pools, run(case, "gpu", weights, inputs, pools, decode_batch())


def test_decode_equals_plain_jnp(case):
    weights, inputs, pools, got = decoded(case)
    assert_close(got, run(case, "xla", weights, inputs, pools, decode_batch()))
    assert (got[0][3:] == 0).all()
    for before, after in zip(pools, got[1], strict=True):
        before = np.asarray(before.astype(jnp.float32))
        np.testing.assert_array_equal(after[1 - LAYER], before[1 - LAYER])
        np.testing.assert_array_equal(after[LAYER, [0, 1, 4, 5, 8]], before[LAYER, [0, 1, 4, 5, 8]])
        np.testing.assert_array_equal(after[LAYER, 7], after[LAYER, 6])


@pytest.mark.parametrize(
    "case",
    [*CASES[::2], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1::2])],
    ids=lambda case: case.name,
    indirect=True,
)
def test_place_and_neighbours_change_no_bit(case):
    """The third row of the batch once more, alone, first, and in other slots."""
    weights, inputs, pools, (out, after) = decoded(case)
    second = jax.tree.map(lambda x: jnp.concatenate([x[1:2], x[:1], x[2:]]), inputs)
    moved = tuple(pool.at[:, 8].set(pool[:, 5]) for pool in pools)
    batch = make_batch([1, 0, 0, 0], [9, 0, 0, 0], read=[8, 0, 0, 0], write=[1, 0, 0, 0], decodes=1, content="decode")
    alone, alone_after = run(case, "gpu", weights, second, moved, batch)
    np.testing.assert_array_equal(alone[0], out[1])
    for one, other in zip(alone_after, after, strict=True):
        np.testing.assert_array_equal(one[LAYER, 1], other[LAYER, 6])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: case.name, indirect=True)
def test_a_mixed_batch_equals_plain_jnp(case):
    weights, inputs, pools = problem(case, 80, used=(1, 3))
    batch = make_batch([1, 1, 3, 66], [5, 0, 8, 0], read=[1, 0, 3, 0], write=[1, 4, 3, 2], decodes=2)
    got = run_eagerly(case, weights, inputs, pools, batch)
    assert_close(got, run(case, "xla", weights, inputs, pools, batch), prefilled=[2, 3])
    assert (got[0][71:] == 0).all()


def test_softplus_is_exact():
    x = np.float32([-80, -30, -16, -8, -1, -1e-3, 0, 1e-3, 1, 8, 16, 30, 80])
    np.testing.assert_allclose(softplus(jnp.asarray(x)), np.logaddexp(0, x.astype(np.float64)), rtol=1e-6)


@pytest.mark.parametrize("wrong", ["dtype", "key width"])
def test_what_the_kernel_cannot_do_is_refused(case, wrong):
    weights, inputs, pools = problem(case, 4, used=())
    if wrong == "dtype":
        inputs = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    else:
        pools = (pools[0][..., :64], *pools[1:])
    with pytest.raises(NotImplementedError, match="on a GPU wants.*use backend 'xla'"):
        case.run(case.shape, "gpu", weights, inputs, pools, jax.tree.map(jnp.asarray, decode_batch()))


# ---------------------------------------------------------------------------------------------------- lowering for CUDA


def config(name):
    path = Path(__file__).parents[1] / "configs" / f"{name}.json"
    values = json.loads(path.read_text())
    return values | values.get("text_config", {})


def gdn_shape(name):
    values = config(name)
    return Shape(values["linear_num_value_heads"], values["linear_num_key_heads"], values["linear_value_head_dim"])


def lightning_shape(name):
    values = config(name)
    return Shape(values["num_attention_heads"], values.get("group_norm_size", 1))


def mamba2_shape(name):
    values = config(name)
    return Shape(values["mamba_num_heads"], values["n_groups"], values["mamba_head_dim"])


MODELS = [
    *((CASES[0], gdn_shape(f"Qwen3.5-{size}")) for size in ("0.8B", "4B", "27B", "397B-A17B")),
    (CASES[0], gdn_shape("Qwen3-Next-80B-A3B-Instruct")),
    (CASES[2], Shape(32, 32)),  # Kimi-Linear-48B-A3B
    (CASES[3], Shape(32, 32)),  # Ling-3.0-flash
    *((CASES[4], lightning_shape(name)) for name in ("Ling-2.6-flash", "Ling-2.6-1T", "Ring-mini-linear-2.0")),
    (CASES[5], lightning_shape("MiniMax-Text-01")),
    *((CASES[6], mamba2_shape(f"Nemotron-3-{size}")) for size in ("Nano-30B-A3B-BF16", "Super-120B-A12B-FP8")),
    (CASES[6], mamba2_shape("Nemotron-3-Ultra-550B-A55B-BF16")),
]


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 64])
@pytest.mark.parametrize("kind,shape", MODELS, ids=lambda value: getattr(value, "name", repr(value)))
def test_models_lower_for_cuda_in_place(kind, shape, rows):
    weights, inputs = kind.inputs(rows, shape)
    pools = kind.pools(shape, 65, layers=3)
    row, scalar = jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    start, pages = jax.ShapeDtypeStruct((rows + 1,), jnp.int32), jax.ShapeDtypeStruct((rows, 4), jnp.int32)
    batch = RaggedBatch(start, row, scalar, row, row, row, row, pages, "decode")
    call = jax.jit(partial(kind.run, shape, "gpu"), donate_argnums=2)
    text = call.trace(weights, inputs, pools, batch).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("tf.aliasing_output") == len(pools)
    assert text.count("@mosaic_gpu") == 1
    assert text.count("output_operand_alias<") == len(pools)
