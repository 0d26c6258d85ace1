"""Prefill of lightning and mamba2, and the short convolution, by Mosaic TPU kernels: equal to plain jnp, the contract.

Small shapes, but the widths that the kernels want. The TPU compiler needs no TPU: it is tried at the shapes of models.
"""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.mosaic_tpu import interpreted
from kernels_pallas.op import ArraySpec, RaggedBatch, StateSpec
from kernels_pallas.scalar_decay_tpu import plan
from kernels_pallas.short_conv import SHORT_CONV
from tests.kernels_pallas.test_gpu_linear_decode import (
    CASES,
    LAYER,
    LAYERS,
    WIDTH,
    Case,
    Shape,
    bf16,
    error,
    f32,
    lightning_shape,
    mamba2_shape,
    problem,
)
from tests.ragged import checked, make_batch
from tests.tpu_topology import TOPOLOGIES, as_dtype, compile_in_place

KIND = {case.name: case for case in CASES if case.name.startswith(("lightning", "mamba2"))}
TOKENS = 216  # with padding; no multiple of a tile of 16
OUTPUT_ERROR = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}  # relative, as docs of the kernels promise
STATE_ERROR = {jnp.float32: 1e-5, jnp.bfloat16: 2e-3}
STRICT = {
    mode: pltpu.InterpretParams(
        dma_execution_mode=mode, detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan"
    )
    for mode in ("on_wait", "eager")
}
kinds = pytest.mark.parametrize("case", [pytest.param(KIND[name], id=name) for name in ("lightning", "mamba2")])


def ragged():
    """Few tokens, an absent row, two chunks and a snapshot inside the first, a fresh row, a state read twice."""
    return make_batch(
        [3, 0, 130, 2, 70], [7, 0, 9, 0, 5], read=[3, 0, 5, 0, 5], write=[3, 0, 6, 2, 1], content="prefill",
        snapshot=[(0, 0), (0, 0), (7, 64), (8, 2), (0, 0)],
    )  # fmt: skip


def convolution_inputs(tokens, shape):
    return f32(3, shape.heads * WIDTH), (bf16(tokens, 3, shape.heads * WIDTH),)


def run_convolution(shape, backend, weights, inputs, pools, batch):
    out, pool = SHORT_CONV.on(backend)(*inputs, weights, *pools, LAYER, batch)
    return out, (pool,)


CONVOLUTION = Case(
    "short_conv",
    Shape(2, 2),
    convolution_inputs,
    lambda shape, slots, layers=LAYERS: (bf16(layers, slots, 2, shape.heads * WIDTH),),
    run_convolution,
)


def in_dtype(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.bfloat16 else x, tree)


def with_nan_behind(inputs, real):
    """Inputs whose padding holds NaN."""
    return jax.tree.map(lambda x: x.at[real:].set(jnp.nan), inputs)


def run(case, backend, weights, inputs, pools, batch, params=None):
    """Outputs and pools as NumPy arrays; float32, so that bfloat16 can be compared."""
    arrays = jax.tree.map(jnp.asarray, checked(batch, inputs[0].shape[0]))
    inputs = with_nan_behind(inputs, int(batch.query_start[-1]))
    with interpreted(params or pltpu.InterpretParams(uninitialized_memory="nan")):
        out, pools = jax.jit(partial(case.run, case.shape, backend))(weights, inputs, pools, arrays)
    assert out.dtype == inputs[0].dtype
    return np.asarray(out.astype(jnp.float32)), tuple(np.asarray(pool.astype(jnp.float32)) for pool in pools)


@cache
def prefilled(case, dtype):
    """The problem of `ragged`, and what the kernel makes of it."""
    weights, inputs, pools = in_dtype(problem(case, TOKENS, used=(3, 5)), dtype)
    return weights, inputs, pools, run(case, "tpu", weights, inputs, pools, ragged())


# ------------------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize(
    "case,dtype",
    [
        pytest.param(case, dtype, id=f"{name}-{dtype.__name__}", marks=[pytest.mark.slow] * (name not in quick))
        for dtype, quick in ((jnp.bfloat16, ("lightning", "mamba2")), (jnp.float32, ("lightning_activated",)))
        for name, case in KIND.items()
    ],
)
def test_prefill_equals_plain_jnp(case, dtype):
    """Outputs, states and tails; zeros for padding; no other slot and no other layer changes."""
    weights, inputs, pools, (out, after) = prefilled(case, dtype)
    wanted, wanted_after = run(case, "xla", weights, inputs, pools, ragged())
    assert error(out, wanted) < OUTPUT_ERROR[dtype]
    assert (out[205:] == 0).all()
    for slot in (1, 2, 3, 6, 7, 8):
        assert error(after[0][LAYER, slot], wanted_after[0][LAYER, slot]) < STATE_ERROR[dtype], slot
    for tail, wanted_tail in zip(after[1:], wanted_after[1:], strict=True):
        np.testing.assert_array_equal(tail, wanted_tail)
    for before, pool in zip(pools, after, strict=True):
        before = np.asarray(before.astype(jnp.float32))
        np.testing.assert_array_equal(pool[1 - LAYER], before[1 - LAYER])
        np.testing.assert_array_equal(pool[LAYER, [0, 4, 5]], before[LAYER, [0, 4, 5]])
        np.testing.assert_array_equal(pool[LAYER, 8], pool[LAYER, 2])


@kinds
def test_place_and_neighbours_change_no_bit(case):
    """The long row alone, at another offset in its tile and without a snapshot; and only up to where that was taken."""
    weights, inputs, pools, (out, after) = prefilled(case, jnp.bfloat16)
    moved = jax.tree.map(lambda x: jnp.roll(x, -3, axis=0), inputs)
    rest = {"read": [5, 0], "write": [4, 0], "content": "prefill"}
    whole, states = run(case, "tpu", weights, moved, pools, make_batch([130, 0], [9, 0], **rest))
    np.testing.assert_array_equal(whole[:130], out[3:133])
    part, first = run(case, "tpu", weights, moved, pools, make_batch([64, 0], [9, 0], **rest))
    np.testing.assert_array_equal(part[:64], out[3:67])
    for pool, alone, begun in zip(after, states, first, strict=True):
        np.testing.assert_array_equal(alone[LAYER, 4], pool[LAYER, 6])
        np.testing.assert_array_equal(begun[LAYER, 4], pool[LAYER, 7])


@pytest.mark.slow
@kinds
def test_pieces_equal_the_whole(case):
    """Cut where chunks meet: not a bit changes. Cut elsewhere: only the order of sums does."""
    weights, inputs, pools = in_dtype(problem(case, 134, used=(5,)), jnp.float32)
    rows = {"read": [5], "write": [5], "content": "prefill"}
    whole, after = run(case, "tpu", weights, inputs, pools, make_batch([134], [9], **rows))
    for cut in (128, 61):
        begun, middle = run(case, "tpu", weights, inputs, pools, make_batch([cut], [9], **rows))
        left = jax.tree.map(lambda x, cut=cut: jnp.roll(x, -cut, axis=0), inputs)
        middle = tuple(jnp.asarray(pool) for pool in middle)
        if case.name == "lightning":  # positions go on
            batch = make_batch([134 - cut], [9 + cut], **rows)
        else:
            batch = make_batch([134 - cut], [9], **rows)
        ended, end = run(case, "tpu", weights, left, middle, batch)
        assert error(np.concatenate([begun[:cut], ended[: 134 - cut]]), whole) < (1e-7 if cut == 128 else 1e-5)
        assert error(end[0][LAYER, 5], after[0][LAYER, 5]) < (1e-7 if cut == 128 else 1e-5)


@pytest.mark.parametrize(
    "case,params",
    [
        pytest.param(KIND[name], params, id=f"{name}-{mode}", marks=[pytest.mark.slow] * ((name, mode) != quick))
        for quick in [("mamba2", "on_wait")]
        for name in ("lightning", "mamba2")
        for mode, params in STRICT.items()
    ],
)
def test_copies_race_with_nothing(case, params):
    weights, inputs, pools, (out, after) = prefilled(case, jnp.bfloat16)
    try:
        strict, pools = run(case, "tpu", weights, inputs, pools, ragged(), params)
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    np.testing.assert_array_equal(strict, out)
    jax.tree.map(np.testing.assert_array_equal, pools, after)


@pytest.mark.slow
def test_decays_at_their_extremes():
    """Steps at both limits: states that are kept whole and states forgotten at once, between tokens of all kinds."""
    case = KIND["mamba2"]
    weights, inputs, pools = in_dtype(problem(case, TOKENS, used=(3, 5)), jnp.float32)
    inputs = (inputs[0], inputs[1], 60 * inputs[2])
    weights = replace(weights, decay_log=jnp.float32([-20, -3, 1, 5]))
    got = run(case, "tpu", weights, inputs, pools, ragged())
    wanted = run(case, "xla", weights, inputs, pools, ragged())
    assert error(got[0], wanted[0]) < 1e-5
    assert error(got[1][0], wanted[1][0]) < 1e-5


@kinds
def test_a_batch_of_absent_rows_changes_nothing(case):
    weights, inputs, pools = problem(case, 20, used=(3, 5))
    out, after = run(case, "tpu", weights, inputs, pools, make_batch([0, 0], content="prefill"))
    assert (out == 0).all()
    for before, pool in zip(pools, after, strict=True):
        np.testing.assert_array_equal(pool, np.asarray(before.astype(jnp.float32)))


# ----------------------------------------------------------------------------------------- the convolution as a kind


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
def test_convolution_equals_plain_jnp(dtype):
    """Rows in decode, absent, fresh, with snapshots, beside rows that prefill; the former give the same bits alone."""
    weights, inputs, pools = in_dtype(problem(CONVOLUTION, TOKENS, used=(1, 5, 8)), dtype)
    rows = {"seen": [4, 0, 0, 9, 3], "read": [1, 0, 0, 5, 8], "write": [1, 0, 3, 6, 8], "decodes": 3}
    snapshot = [(7, 1), (0, 0), (0, 0), (2, 64), (0, 0)]
    batch = make_batch([1, 0, 1, 130, 1], snapshot=snapshot, **rows)
    out, (after,) = run(CONVOLUTION, "tpu", weights, inputs, pools, batch)
    wanted, (wanted_after,) = run(CONVOLUTION, "xla", weights, inputs, pools, batch)
    assert error(out, wanted) < OUTPUT_ERROR[dtype]
    assert (out[133:] == 0).all()
    np.testing.assert_array_equal(after, wanted_after)
    alone = make_batch([1, 0, 1], [4, 0, 0], [1, 0, 0], [1, 0, 3], snapshot[:3], decodes=3, content="decode")
    decoded, (decoded_after,) = run(CONVOLUTION, "tpu", weights, inputs, pools, alone)
    np.testing.assert_array_equal(decoded[:2], out[:2])
    assert (decoded[2:] == 0).all()
    np.testing.assert_array_equal(decoded_after[LAYER, [1, 3, 7]], after[LAYER, [1, 3, 7]])


def test_convolutions_that_fit_are_known_before():
    specs = [StateSpec((ArraySpec("tail", (2, channels), "bfloat16"),)) for channels in (2048, 96)]
    assert [SHORT_CONV.choose("auto", spec, "bfloat16", "tpu") for spec in specs] == ["tpu", "xla"]
    weights, inputs, pools = problem(CONVOLUTION, 4, used=(1,))
    batch = jax.tree.map(jnp.asarray, make_batch([1], decodes=1, content="decode"))
    with pytest.raises(NotImplementedError, match="on a TPU wants.*use backend 'xla'"):
        run_convolution(CONVOLUTION.shape, "tpu", weights, inputs, (pools[0].astype(jnp.float32),), batch)


def test_the_work_list_of_a_batch():
    """Chunks of 128 tokens from the start of each row; a snapshot lies in the chunk that reaches it."""
    work = jax.tree.map(lambda x: np.asarray(x).tolist(), plan(1, jax.tree.map(jnp.asarray, ragged()), 208))
    used = sum(length > 0 for length in work.length)
    assert (work.layer, work.end, used) == ([1], [205], 5)
    assert work.start[:5] == [0, 3, 131, 133, 135]
    assert work.length[:6] == [3, 128, 2, 2, 70, 0]
    assert work.first[:5] == [1, 1, 0, 1, 1]
    assert work.buffer[:5] == [1, 0, 0, 1, 0]
    assert work.read[:5] == [3, 5, 0, 0, 5]
    assert work.write[:5] == [3, 0, 6, 2, 1]
    assert work.snapshot[:5] == [0, 7, 0, 8, 0]
    assert work.taken[:5] == [0, 64, 0, 2, 0]


def test_a_snapshot_in_a_later_chunk_counts_from_its_start():
    """At 192 tokens it lies inside the second chunk; at 128 it is the end of the first and no part of the second."""
    batch = make_batch([200, 140], snapshot=[(8, 192), (7, 128)], content="prefill")
    work = jax.tree.map(lambda x: np.asarray(x).tolist(), plan(0, jax.tree.map(jnp.asarray, batch), 352))
    assert work.length[:5] == [128, 72, 128, 12, 0]
    assert work.snapshot[:5] == [0, 8, 7, 0, 0]
    assert work.taken[:5] == [0, 64, 128, 0, 0]


# ------------------------------------------------------------------------------------------ compiled for TPUs, in place

NANO = mamba2_shape("Nemotron-3-Nano-30B-A3B-BF16")
MODELS = [
    ("lightning", lightning_shape("Ling-2.6-1T"), TOPOLOGIES),
    ("mamba2", NANO, TOPOLOGIES),
    ("lightning", lightning_shape("Ling-2.6-flash"), TOPOLOGIES[:1]),
    ("lightning_activated", lightning_shape("MiniMax-Text-01"), TOPOLOGIES[1:2]),
    ("lightning", Shape(16, 2), TOPOLOGIES[2:3]),  # a quarter, and an eighth, of the heads
    ("lightning", Shape(4, 1), TOPOLOGIES[3:]),
    ("mamba2", Shape(16, 2, 64), TOPOLOGIES[2:3]),
    ("mamba2", Shape(8, 1, 64), TOPOLOGIES[3:]),
    ("short_conv", Shape(16, 16), TOPOLOGIES),  # LFM2, of 2048 channels
]


def compiled(case, shape, topology, tokens, rows, dtype=jnp.bfloat16):
    """The op compiled for a topology, its pools updated where they lie."""
    weights, inputs = case.inputs(tokens, shape)
    row, start, scalar = (jax.ShapeDtypeStruct(axes, jnp.int32) for axes in ((rows,), (rows + 1,), ()))
    batch = RaggedBatch(start, row, scalar, row, row, row, row, jax.ShapeDtypeStruct((rows, 4), jnp.int32), "prefill")
    given = as_dtype((weights, inputs, case.pools(shape, 65, layers=3)), dtype)
    return compile_in_place(topology, partial(case.run, shape, "tpu"), *given, batch, pools=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,shape,topology",
    [(name, shape, topology) for name, shape, topologies in MODELS for topology in topologies],
    ids=str,
)
def test_models_compile_in_place(name, shape, topology):
    compiled({**KIND, "short_conv": CONVOLUTION}[name], shape, topology, 1024, 4)


@pytest.mark.parametrize("name,shape", [("lightning", Shape(128, 2)), ("mamba2", Shape(256, 8, 64))])
def test_a_layer_that_no_chip_holds_is_refused(name, shape):
    with pytest.raises(NotImplementedError, match="within .* bytes of VMEM"):
        compiled(KIND[name], shape, "v6e:2x2", 1024, 4)
