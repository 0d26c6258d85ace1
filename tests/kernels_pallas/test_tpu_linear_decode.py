"""Decode of the linear kinds by their Mosaic TPU kernels, interpreted: equal to plain jnp, and the contract of a batch.

Small shapes, but the widths that the kernels want. The TPU compiler needs no TPU: it is tried at the shapes of models.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import linear_decode_tpu
from kernels_pallas.gdn import GDN
from kernels_pallas.lightning import LIGHTNING
from kernels_pallas.linear_decode_tpu import ring_depth, times_state
from kernels_pallas.mamba2 import MAMBA2
from kernels_pallas.mosaic_tpu import interpreted
from kernels_pallas.op import ArraySpec, RaggedBatch, StateSpec
from tests.kernels_pallas.test_gpu_linear_decode import (
    CASES,
    LAYER,
    Shape,
    decode_batch,
    error,
    gdn_shape,
    lightning_shape,
    mamba2_shape,
    problem,
)
from tests.ragged import checked, make_batch
from tests.tpu_topology import TOPOLOGIES, as_dtype, compile_in_place

KIND = {case.name: case for case in CASES}
GATES = {"gdn": (2, 3), "kda": (1, 2), "mamba2": (2,)}  # inputs that decide what is forgotten and what is added
STRICT = {
    mode: pltpu.InterpretParams(
        dma_execution_mode=mode, detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan"
    )
    for mode in ("on_wait", "eager")
}


def in_dtype(tree, dtype):
    """Arrays with `dtype` for bfloat16."""
    return jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.bfloat16 else x, tree)


def run(case, backend, weights, inputs, pools, batch, params=None):
    """Outputs and pools as NumPy arrays; float32, so that bfloat16 can be compared."""
    arrays = jax.tree.map(jnp.asarray, checked(batch, inputs[0].shape[0]))
    with interpreted(params or pltpu.InterpretParams(uninitialized_memory="nan")):
        out, pools = jax.jit(partial(case.run, case.shape, backend))(weights, inputs, pools, arrays)
    assert out.dtype == inputs[0].dtype
    return np.asarray(out.astype(jnp.float32)), tuple(np.asarray(pool.astype(jnp.float32)) for pool in pools)


def assert_close(got, wanted, dtype):
    """Outputs to the dtype; float32 states, of which only the order of sums differs; equal tails."""
    assert error(got[0], wanted[0]) < (1e-5 if dtype == jnp.float32 else 1e-2)
    assert error(got[1][0], wanted[1][0]) < 1e-6
    for tail, wanted_tail in zip(got[1][1:], wanted[1][1:], strict=True):
        np.testing.assert_array_equal(tail, wanted_tail)


def params(cases, others, quick):
    """Every case with every one of `others`; slow but for those that `quick` names."""
    return [
        pytest.param(case, other, id=f"{case.name}-{name}", marks=[pytest.mark.slow] * ((case.name, name) not in quick))
        for case in cases
        for name, other in others.items()
    ]


CASES_AND_DTYPES = params(
    CASES,
    {"bfloat16": jnp.bfloat16, "float32": jnp.float32},
    [(name, "bfloat16") for name in ("gdn", "kda", "lightning", "mamba2")] + [("lightning_activated", "float32")],
)
CASES_AND_MODES = params(CASES[::2], STRICT, [("gdn", "on_wait")])
first_cases = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES[::2]])
every_case = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (index > 0)) for index, case in enumerate(CASES)],
)


@cache
def decoded(case, dtype):
    """The problem of `decode_batch`, and what the kernel makes of it."""
    weights, inputs, pools = in_dtype(problem(case, 4, used=(3, 5)), dtype)
    return weights, inputs, pools, run(case, "tpu", weights, inputs, pools, decode_batch())


# ------------------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("case,dtype", CASES_AND_DTYPES)
def test_decode_equals_plain_jnp(case, dtype):
    """In place, absent, to another slot with a snapshot, fresh, padding; no other slot and no other layer changes."""
    weights, inputs, pools, got = decoded(case, dtype)
    assert_close(got, run(case, "xla", weights, inputs, pools, decode_batch()), dtype)
    assert (got[0][3:] == 0).all()
    for before, after in zip(pools, got[1], strict=True):
        before = np.asarray(before.astype(jnp.float32))
        np.testing.assert_array_equal(after[1 - LAYER], before[1 - LAYER])
        np.testing.assert_array_equal(after[LAYER, [0, 1, 4, 5, 8]], before[LAYER, [0, 1, 4, 5, 8]])
        np.testing.assert_array_equal(after[LAYER, 7], after[LAYER, 6])


@every_case
def test_place_and_neighbours_change_no_bit(case):
    """The third row of the batch once more, alone, first, and in other slots."""
    weights, inputs, pools, (out, after) = decoded(case, jnp.bfloat16)
    second = jax.tree.map(lambda x: jnp.concatenate([x[1:2], x[:1], x[2:]]), inputs)
    moved = tuple(pool.at[:, 8].set(pool[:, 5]) for pool in pools)
    batch = make_batch([1, 0, 0, 0], [9, 0, 0, 0], read=[8, 0, 0, 0], write=[1, 0, 0, 0], decodes=1, content="decode")
    alone, alone_after = run(case, "tpu", weights, second, moved, batch)
    np.testing.assert_array_equal(alone[0], out[1])
    for one, other in zip(alone_after, after, strict=True):
        np.testing.assert_array_equal(one[LAYER, 1], other[LAYER, 6])


@pytest.mark.parametrize("case,params", CASES_AND_MODES)
def test_groups_tiles_and_a_ring_that_turns_change_no_bit(case, params, monkeypatch):
    """Three groups of tokens, tiles of one slab and a ring shorter than the items, under a strict interpreter."""
    weights, inputs, pools = problem(case, 5, used=(3, 5, 7))
    batch = make_batch(
        [1, 1, 1, 1, 1], [7, 4, 9, 0, 3], read=[3, 5, 5, 0, 7], write=[3, 1, 6, 2, 8], decodes=5, content="decode",
        snapshot=[(0, 0), (4, 1), (0, 0), (0, 0), (0, 0)],
    )  # fmt: skip
    whole = run(case, "tpu", weights, inputs, pools, batch)
    assert_close(whole, run(case, "xla", weights, inputs, pools, batch), jnp.bfloat16)
    monkeypatch.setattr(linear_decode_tpu, "GROUP", 2)
    monkeypatch.setattr(linear_decode_tpu, "TILE_BYTES", 2**16)
    monkeypatch.setattr(linear_decode_tpu, "RING_BYTES", 2**18)
    try:
        cut = run(case, "tpu", weights, inputs, pools, batch, params)
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    np.testing.assert_array_equal(cut[0], whole[0])
    jax.tree.map(np.testing.assert_array_equal, cut[1], whole[1])


@pytest.mark.slow
@first_cases
def test_prefills_in_the_batch_change_no_bit_of_a_row_in_decode(case):
    weights, inputs, pools = problem(case, 80, used=(1, 3))
    rows = {"seen": [5, 0, 8, 0], "read": [1, 0, 3, 0], "write": [1, 4, 3, 2], "decodes": 2}
    got = run(case, "tpu", weights, inputs, pools, make_batch([1, 1, 3, 66], **rows))
    wanted = run(case, "xla", weights, inputs, pools, make_batch([1, 1, 3, 66], **rows))
    assert error(got[0], wanted[0]) < 1e-2
    assert all(error(*both) < 2e-3 for both in zip(got[1], wanted[1], strict=True))  # prefill multiplies bfloat16
    assert (got[0][71:] == 0).all()
    rows |= {"read": [1, 0, 0, 0], "write": [1, 4, 0, 0]}
    alone = run(case, "tpu", weights, inputs, pools, make_batch([1, 1, 0, 0], **rows, content="decode"))
    np.testing.assert_array_equal(alone[0][:2], got[0][:2])
    assert (alone[0][2:] == 0).all()
    for one, other in zip(alone[1], got[1], strict=True):
        np.testing.assert_array_equal(one[LAYER, [1, 4]], other[LAYER, [1, 4]])


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES[::2] if case.name in GATES])
def test_gates_at_their_extremes(case):
    """From a state that is kept whole to one that is forgotten at once, and nothing or all added."""
    weights, inputs, pools = in_dtype(problem(case, 4, used=(3, 5)), jnp.float32)
    inputs = tuple(60 * x if index in GATES[case.name] else x for index, x in enumerate(inputs))
    got = run(case, "tpu", weights, inputs, pools, decode_batch())
    assert_close(got, run(case, "xla", weights, inputs, pools, decode_batch()), jnp.float32)


@pytest.mark.parametrize("case", [pytest.param(KIND["lightning"], id="lightning")])
def test_a_batch_of_absent_rows_changes_nothing(case):
    weights, inputs, pools = problem(case, 4, used=(3, 5))
    batch = make_batch([0, 0, 0, 0], decodes=2, content="decode")
    out, after = run(case, "tpu", weights, inputs, pools, batch)
    assert (out == 0).all()
    for before, pool in zip(pools, after, strict=True):
        np.testing.assert_array_equal(pool, np.asarray(before.astype(jnp.float32)))


def test_the_matrix_unit_may_round_an_output_to_bfloat16():
    """What the interpreter does not show: on a TPU, `times_state` rounds operands of bfloat16 activations."""
    rng = np.random.default_rng(3)
    query, slab = (
        jnp.asarray(rng.normal(size=(1, 128)), jnp.float32),
        jnp.asarray(rng.normal(size=(128, 128)), jnp.float32),
    )
    rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (query, slab)]
    exact = times_state(query, slab, jnp.dtype("float32"))
    assert error(np.asarray(times_state(*rounded, jnp.dtype("float32"))), np.asarray(exact)) < 4e-3
    np.testing.assert_allclose(exact, np.asarray(query) @ np.asarray(slab).T, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------- shapes and sizes


@pytest.mark.parametrize("wrong", ["dtype", "key width"])
@first_cases
def test_what_the_kernel_cannot_do_is_refused(case, wrong):
    weights, inputs, pools = problem(case, 4, used=())
    if wrong == "dtype":
        inputs = tuple(x.astype(jnp.float16) for x in inputs)
    else:
        pools = (pools[0][..., :64], *pools[1:])
    with pytest.raises(NotImplementedError, match="on a TPU wants.*use backend 'xla'"):
        case.run(case.shape, "tpu", weights, inputs, pools, jax.tree.map(jnp.asarray, decode_batch()))


def memory(*shapes):
    dtypes = ("float32", "bfloat16")
    return StateSpec(tuple(ArraySpec(f"{n}", shape, dtypes[n]) for n, shape in enumerate(shapes)))


@pytest.mark.parametrize(
    "op,spec,dtype,fits",
    [
        (GDN, memory((32, 128, 128), (3, 8192)), "bfloat16", True),
        (GDN, memory((32, 128, 128), (3, 8192)), "float32", True),
        (GDN, memory((32, 128, 128), (3, 8192)), "float16", False),
        (GDN, memory((32, 64, 128), (3, 6144)), "bfloat16", False),
        (LIGHTNING, memory((64, 128, 128)), "bfloat16", True),
        (LIGHTNING, memory((64, 64, 64)), "bfloat16", False),
        (MAMBA2, memory((64, 64, 128), (3, 6144)), "bfloat16", True),
        (MAMBA2, memory((256, 64, 256), (3, 20480)), "bfloat16", False),
        (MAMBA2, memory((4, 64, 128), (3, 1280)), "bfloat16", False),  # groups of one head of width 64
    ],
)
def test_what_fits_is_known_before(op, spec, dtype, fits):
    assert op.choose("auto", spec, dtype, "tpu") == ("tpu" if fits else "xla")


def test_a_ring_holds_work_and_copies_in_both_directions():
    assert [ring_depth(size) for size in (2**16, 2**18, 2**19, 2**20, 2**22)] == [32, 32, 16, 8, 4]


# ------------------------------------------------------------------------------------------ compiled for TPUs, in place

NANO = mamba2_shape("Nemotron-3-Nano-30B-A3B-BF16")
MODELS = [
    ("gdn", gdn_shape("Qwen3.5-4B"), TOPOLOGIES),  # and Qwen3-Next, of the same heads
    ("lightning", lightning_shape("Ling-2.6-1T"), TOPOLOGIES[2:3]),
    ("kda", Shape(32, 32), TOPOLOGIES[2:3]),  # Kimi-Linear-48B-A3B
    ("mamba2", NANO, TOPOLOGIES[2:3]),
    ("lightning", lightning_shape("Ling-2.6-flash"), TOPOLOGIES[:1]),
    ("lightning_activated", lightning_shape("MiniMax-Text-01"), TOPOLOGIES[1:2]),
    ("gdn", gdn_shape("Qwen3.5-27B"), TOPOLOGIES[3:]),
    ("mamba2", mamba2_shape("Nemotron-3-Ultra-550B-A55B-BF16"), TOPOLOGIES[3:]),
    ("kda_bounded", Shape(32, 32), TOPOLOGIES[3:]),  # Ling-3.0-flash
    ("gdn", Shape(8, 4), TOPOLOGIES[2:3]),  # a quarter, and an eighth, of the heads
    ("gdn", Shape(4, 2), TOPOLOGIES[:1]),
    ("lightning", Shape(16, 2), TOPOLOGIES[2:3]),
    ("lightning", Shape(4, 1), TOPOLOGIES[3:]),
    ("kda", Shape(4, 4), TOPOLOGIES[1:2]),
    ("mamba2", Shape(16, 2, 64), TOPOLOGIES[2:3]),
    ("mamba2", Shape(8, 1, 64), TOPOLOGIES[3:]),
]


def compiled(case, shape, topology, rows, dtype=jnp.bfloat16):
    """The op compiled for a topology, its pools updated where they lie."""
    weights, inputs = case.inputs(rows, shape)
    row, start, scalar = (jax.ShapeDtypeStruct(axes, jnp.int32) for axes in ((rows,), (rows + 1,), ()))
    batch = RaggedBatch(start, row, scalar, row, row, row, row, jax.ShapeDtypeStruct((rows, 4), jnp.int32), "decode")
    given = as_dtype((weights, inputs, case.pools(shape, 65, layers=3)), dtype)
    return compile_in_place(topology, partial(case.run, shape, "tpu"), *given, batch, pools=2)


@pytest.mark.parametrize(
    "name,shape,topology",
    [
        pytest.param(name, shape, topology, marks=[pytest.mark.slow] * (index > 3 or topology != "v6e:2x2"))
        for index, (name, shape, topologies) in enumerate(MODELS)
        for topology in topologies
    ],
    ids=str,
)
def test_models_compile_in_place(name, shape, topology):
    compiled(KIND[name], shape, topology, 64)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3, 12, 256])
def test_every_bucket_compiles(rows):
    compiled(KIND["gdn"], Shape(4, 2), "v6e:2x2", rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gdn", "lightning", "kda", "mamba2"])
def test_float32_compiles(name):
    compiled(KIND[name], NANO if name == "mamba2" else Shape(8, 8), "v5e:2x2", 8, jnp.float32)
