"""Prefill of the delta rules by their Mosaic TPU kernels, interpreted: equal to plain jnp, and the contract of a batch.

Small shapes, but the widths that the kernels want. Every call of a kind and dtype is of one shape, so that one program
serves: a batch is data. The TPU compiler needs no TPU: it is tried at the shapes of models.
"""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import delta_tpu
from kernels_pallas.gdn.tpu_prefill import gdn_prefill
from kernels_pallas.kda.decay import SoftplusDecay
from kernels_pallas.kda.tpu_prefill import kda_prefill
from kernels_pallas.mosaic_tpu import interpreted
from kernels_pallas.op import RaggedBatch
from tests.kernels_pallas.test_gpu_linear_decode import CASES, EPSILON, LAYER, Shape, error, problem
from tests.ragged import checked, make_batch, page_table
from tests.tpu_topology import TOPOLOGIES, as_dtype, compile_in_place

KIND = {"gdn": CASES[0], "kda": CASES[2]}
SHAPE = {"gdn": Shape(2, 1), "kda": Shape(1, 1)}
RUN = {
    "gdn": partial(gdn_prefill, key_heads=1, epsilon=EPSILON, beta_scale=2.0),
    "kda": partial(kda_prefill, decay=SoftplusDecay(), epsilon=EPSILON),
}
DECAY, UPDATE = {"gdn": 3, "kda": 1}, {"gdn": 2, "kda": 2}  # inputs that decide what is forgotten and what is added
TOKENS = 320  # packed tokens in every call
USED = (1, 2, 3, 4, 5)  # slots that hold states; all others hold NaN
# Sums of a few hundred terms of order one in float32. In bfloat16 operands are rounded, 2^-9 each: queries, keys,
# scores and updates, and twice more in the triangular system.
TOLERANCE = {"float32": (1e-5, 1e-5), "bfloat16": (1e-2, 5e-3)}  # of outputs, of states
STRICT = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
# A row that goes on from another slot, with a snapshot in the middle of its chunk; an absent one; a fresh one over two
# chunks, with a snapshot at an odd multiple of 64; one of a single token with a snapshot at its end.
ROWS = {
    "lengths": [100, 0, 200, 1],
    "seen": [3, 9, 0, 7],
    "read": [2, 0, 6, 4],
    "write": [7, 0, 3, 4],
    "snapshot": [(5, 64), (0, 0), (8, 192), (6, 1)],
}


@pytest.fixture(params=["gdn", "kda"])
def name(request) -> str:
    return request.param


def layer(name, backend, weights, inputs, pools, batch):
    if backend == "xla":
        options = {"gdn": {"beta_scale": 2.0}, "kda": {}}[name]
        return KIND[name].run(SHAPE[name], "xla", weights, inputs, pools, batch, **options)
    out, *pools = RUN[name](*inputs, weights, *pools, LAYER, batch)
    return out, tuple(pools)


@cache
def program(name, backend, params):
    return jax.jit(partial(layer, name, backend))


def run(name, backend, given, batch, params=STRICT):
    """Outputs and pools as NumPy arrays in float32; `given` are weights, inputs, pools."""
    batch = jax.tree.map(jnp.asarray, checked(batch, TOKENS))
    with interpreted(params):
        out, pools = program(name, backend, params)(*given, batch)
    assert out.dtype == given[1][0].dtype
    return np.asarray(out.astype(jnp.float32)), tuple(np.asarray(pool.astype(jnp.float32)) for pool in pools)


def given(name, dtype="float32", gates="mixed", repeated=(20, 90), seed=0):
    """Weights, inputs of `TOKENS` tokens, and pools; NaN in the slots that nothing was stored in."""
    weights, inputs, pools = problem(dataclasses.replace(KIND[name], shape=SHAPE[name]), TOKENS, USED, seed)
    inputs = [np.asarray(x, np.float32) for x in inputs]
    inputs[0][slice(*repeated)] = inputs[0][repeated[0]]
    decay, update = inputs[DECAY[name]], inputs[UPDATE[name]]
    if gates == "mixed":
        decay[::7], decay[3::7], update[::5] = (
            60.0,
            -60.0,
            40.0,
        )  # forgets at once, forgets nothing, beta at its largest
        decay[40:80, ..., ::2] = -60.0  # beside heads or channels that forget
    else:
        decay[...], update[...] = {"keep": -60.0, "forget": 150.0}[gates], 40.0
    inputs = tuple(jnp.asarray(x, dtype) for x in inputs)
    return weights, inputs, tuple(pool.astype(dtype) if index else pool for index, pool in enumerate(pools))


def prefill(**rows):
    return make_batch(**rows, pages=page_table(4, 16), content="prefill")


def with_nan_behind(given, end):
    weights, inputs, pools = given
    return weights, tuple(x.at[end:].set(jnp.nan) for x in inputs), pools


def assert_close(got, wanted, dtype):
    """Outputs, states, tails, against plain jnp."""
    outputs, states = TOLERANCE[dtype]
    assert error(got[0], wanted[0]) < outputs
    np.testing.assert_array_equal(np.isnan(got[1][0]), np.isnan(wanted[1][0]))
    for slot in np.flatnonzero(~np.isnan(wanted[1][0][LAYER]).any((1, 2, 3))):
        assert error(got[1][0][LAYER, slot], wanted[1][0][LAYER, slot]) < states
    np.testing.assert_array_equal(got[1][1], wanted[1][1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_equal_plain_jnp(name, dtype):
    """All rows, slots and snapshots of a ragged batch; padding is zero and what nobody owns stays as it was."""
    weights, inputs, pools = with_nan_behind(given(name, dtype), 301)
    batch = prefill(**ROWS)
    got = run(name, "tpu", (weights, inputs, pools), batch)
    exact = tuple(pool.astype(jnp.float32) for pool in pools)
    wanted = run(name, "xla", (weights, tuple(x.astype(jnp.float32) for x in inputs), exact), batch)
    assert_close(got, wanted, dtype)
    assert (got[0][301:] == 0).all()


@pytest.mark.slow
def test_a_row_does_not_know_its_neighbours(name):
    """The same bits from another place of the batch, other slots, and beside other rows."""
    weights, inputs, pools = given(name)
    first = run(name, "tpu", (weights, inputs, pools), prefill(**ROWS))
    moved = tuple(jnp.roll(x, 11, 0).at[:11].set(x[-11:][::-1]) for x in inputs)
    pools = tuple(pool.at[:, 1].set(pool[:, 2]) for pool in pools)
    batch = prefill(lengths=[11, 100, 200, 0], seen=[0, 3, 0, 0], read=[0, 1, 0, 0], write=[2, 3, 7, 0])
    second = run(name, "tpu", (weights, moved, pools), batch)
    np.testing.assert_array_equal(first[0][:300], second[0][11:311])
    for old, new in zip(first[1], second[1], strict=True):
        np.testing.assert_array_equal(old[LAYER, 7], new[LAYER, 3])
        np.testing.assert_array_equal(old[LAYER, 3], new[LAYER, 7])


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [(64,), (128,), (5, 70, 199)])
def test_pieces_equal_the_whole(name, cuts):
    weights, inputs, pools = given(name)
    whole = run(name, "tpu", (weights, inputs, pools), prefill(lengths=[200, 0, 0, 0]))
    outputs, begin, stored = [], 0, pools
    for end in (*cuts, 200):
        shifted = tuple(jnp.roll(x, -begin, 0) for x in inputs)
        batch = prefill(lengths=[end - begin, 0, 0, 0], seen=[begin, 0, 0, 0])
        out, stored = run(name, "tpu", (weights, shifted, tuple(jnp.asarray(x) for x in stored)), batch)
        outputs.append(out[: end - begin])
        begin = end
    assert error(np.concatenate(outputs), whole[0][:200]) < 1e-5
    assert error(stored[0], whole[1][0]) < 1e-5
    np.testing.assert_array_equal(stored[1], whole[1][1])


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[127, 128, 2, 63], [129, 64, 65, 1], [256, 15, 16, 17]])
def test_lengths_around_a_chunk(name, lengths):
    everything = given(name)
    batch = prefill(lengths=lengths)
    assert_close(run(name, "tpu", everything, batch), run(name, "xla", everything, batch), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("gates", ["keep", "forget"])
def test_one_key_over_and_over(name, gates):
    """The triangular system at its worst: its powers are huge, its inverse is not; beta is 2 (gdn) or 1 (kda)."""
    weights, inputs, pools = given(name, gates=gates, repeated=(0, TOKENS))
    batch = prefill(lengths=[200, 0, 0, 0])
    got, wanted = (run(name, backend, (weights, inputs, pools), batch) for backend in ("tpu", "xla"))
    assert error(got[0], wanted[0]) < 1e-4
    assert error(got[1][0][LAYER, 1], wanted[1][0][LAYER, 1]) < 1e-4


@pytest.mark.slow
def test_no_row_writes_nothing(name):
    weights, inputs, pools = given(name)
    out, stored = run(name, "tpu", (weights, inputs, pools), prefill(lengths=[0, 0, 0, 0]))
    assert (out == 0).all()
    for old, new in zip(pools, stored, strict=True):
        np.testing.assert_array_equal(np.asarray(old), new)


@pytest.mark.slow
@pytest.mark.parametrize("name,mode", [("gdn", "on_wait"), ("kda", "eager")])
def test_copies_do_not_race(name, mode):
    strict = pltpu.InterpretParams(
        dma_execution_mode=mode, detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan"
    )
    everything, batch = given(name), prefill(**ROWS)
    got = run(name, "tpu", everything, batch, strict)
    assert not interpret_pallas_call.races.races_found
    first = run(name, "tpu", everything, batch)
    np.testing.assert_array_equal(got[0], first[0])


@pytest.mark.slow
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_the_triangular_system_of_one_key(beta):
    """A token that repeats the key before it takes back what that one stored."""
    system = jnp.asarray(beta * np.tril(np.ones((128, 128)), -1), jnp.float32)
    wanted = np.random.default_rng(0).normal(size=(128, 128)).astype(np.float32)
    (got,) = delta_tpu.solve([system], [jnp.asarray(wanted)], jnp.float32)
    exact = np.linalg.solve(np.eye(128) + np.asarray(system, np.float64), wanted.astype(np.float64))
    assert error(np.asarray(got), exact) < 1e-5
    (rounded,) = delta_tpu.solve([system], [jnp.asarray(wanted)], jnp.bfloat16)
    assert error(np.asarray(rounded), exact) < 2e-2


@pytest.mark.parametrize("heads,widths", [(4, (64, 128)), (4, (128, 96)), (130, (128, 128))])
def test_other_widths_are_refused(heads, widths):
    with pytest.raises(NotImplementedError, match="128"):
        delta_tpu.check_widths("gdn", heads, widths)


# ---------------------------------------------------------------------------------------- compiled for chips not there

NEXT, LARGEST, KIMI = Shape(32, 16), Shape(64, 16), Shape(32, 32)
MODELS = [
    *(("gdn", NEXT, topology, "bfloat16") for topology in TOPOLOGIES),
    ("gdn", LARGEST, "tpu7x:2x2x1", "bfloat16"),
    ("gdn", Shape(4, 2), "v6e:2x2", "bfloat16"),  # an eighth of the heads
    ("gdn", Shape(8, 8), "v5e:2x2", "float32"),
    ("kda", KIMI, "v5e:2x2", "bfloat16"),
    ("kda", KIMI, "tpu7x:2x2x1", "bfloat16"),
    ("kda", Shape(4, 4), "v5p:2x2x1", "bfloat16"),
    ("kda", Shape(4, 4), "v6e:2x2", "float32"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name,shape,topology,dtype", MODELS, ids=str)
def test_models_compile_in_place(name, shape, topology, dtype):
    case, rows, tokens = KIND[name], 8, 1024
    weights, inputs = case.inputs(tokens, shape)
    row, start, scalar = (jax.ShapeDtypeStruct(axes, jnp.int32) for axes in ((rows,), (rows + 1,), ()))
    table = jax.ShapeDtypeStruct((rows, 4), jnp.int32)
    batch = RaggedBatch(start, row, scalar, row, row, row, row, table, "prefill", prefills=4)
    given = as_dtype((weights, inputs, case.pools(shape, 65, layers=3)), jnp.dtype(dtype))
    compile_in_place(topology, partial(case.run, shape, "tpu"), *given, batch, pools=2)
