"""Laws 1 and 2 for every linear kind in plain jnp: token-by-token oracle, pieces, mixed batches, slots, snapshots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels_pallas.linear_cases import CASES, LAYERS, Case, fresh_states, packed, part
from tests.ragged import SLOTS, checked, make_batch

LENGTHS = (1, 63, 64, 65, 127, 130)
BUCKET = 192  # packed tokens in every call, so that few shapes are compiled
LAYER = 1
# float32 sums of a few hundred terms of order one, compared with float64
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


def run(case, parts, batch, pools, tokens=BUCKET):
    out, pools = case.run(packed(parts, tokens), pools, checked(batch, tokens), LAYER)
    return np.asarray(out), pools


def slot(pools, index):
    return tuple(np.asarray(pool)[LAYER, index] for pool in pools)


def assert_same_bits(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


def alone(case, inputs, cuts=(), decode_from=None):
    """Outputs and final states of one request, prefilled in pieces that end at `cuts`, then decoded token by token."""
    length = len(next(iter(inputs.values())))
    prefill_end = length if decode_from is None else decode_from
    pools, outs, seen = case.pools(), [], 0
    for end in (*[cut for cut in cuts if cut < prefill_end], prefill_end):
        if end > seen:
            batch = make_batch([end - seen, 0, 0, 0], [seen, 0, 0, 0])
            out, pools = run(case, [part(inputs, seen, end)], batch, pools)
            outs.append(out[: end - seen])
            seen = end
    for t in range(seen, length):
        batch = make_batch([1, 0, 0, 0], [t, 0, 0, 0], decodes=1, content="decode")
        out, pools = run(case, [part(inputs, t, t + 1)], batch, pools, tokens=4)
        outs.append(out[:1])
    return np.concatenate(outs), slot(pools, 1)


@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_equals_the_oracle(case, length):
    inputs = case.inputs(np.random.default_rng(length), length)
    out, states = alone(case, inputs)
    wanted, wanted_states = case.oracle(inputs, 0, fresh_states(case))
    np.testing.assert_allclose(out, wanted, **TOLERANCE)
    for state, want in zip(states, wanted_states, strict=True):
        np.testing.assert_allclose(state, want, **TOLERANCE)


def test_bfloat16_inputs_keep_a_float32_state(case):
    """Outputs are rounded to bfloat16 once; states come from the rounded inputs in float32."""
    inputs = case.inputs(np.random.default_rng(6), 130)
    rounded = {name: value.astype(jnp.bfloat16) for name, value in inputs.items()}
    out, states = alone(case, rounded)
    wanted, wanted_states = case.oracle(rounded, 0, fresh_states(case))
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, wanted) < 1e-2
    for state, want in zip(states, wanted_states, strict=True):
        assert relative_error(state, want) < 2e-3


def relative_error(got, wanted):
    got = np.asarray(got, np.float64)
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("length", LENGTHS)
def test_token_by_token_equals_one_prefill(case, length):
    inputs = case.inputs(np.random.default_rng(length), length)
    whole, states = alone(case, inputs)
    stepped, stepped_states = alone(case, inputs, decode_from=0)
    np.testing.assert_allclose(stepped, whole, **TOLERANCE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), stepped_states, states)


@pytest.mark.parametrize("cuts", [(64,), (128,), (64, 128)])
def test_pieces_on_chunk_borders_change_no_bit(case, cuts):
    inputs = case.inputs(np.random.default_rng(3), 130)
    assert_same_bits(alone(case, inputs, cuts), alone(case, inputs))


@pytest.mark.parametrize("cuts", [(1,), (63, 65), (7, 100, 129)])
def test_pieces_anywhere_agree(case, cuts):
    inputs = case.inputs(np.random.default_rng(3), 130)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), alone(case, inputs, cuts), alone(case, inputs)
    )


def mixed_batch(case, order=(0, 1, 2, 3)):
    """Two rows in decode with states, a continued prefill and a fresh one on a NaN slot; `order` permutes the last two.

    Returns each row's outputs and its final states.
    """
    rng = np.random.default_rng(8)
    inputs = [case.inputs(rng, 130) for _ in range(4)]
    seen, lengths = [70, 64, 64, 0], [1, 1, 63, 65]
    pools = case.pools()
    for row in range(3):
        history = make_batch([seen[row], 0, 0, 0], write=[row + 1, 0, 0, 0], read=[row + 1, 0, 0, 0])
        _, pools = run(case, [part(inputs[row], 0, seen[row])], history, pools)
    batch = make_batch(
        [lengths[row] for row in order],
        [seen[row] for row in order],
        read=[row + 1 if seen[row] else 0 for row in order],
        write=[row + 5 for row in order],
        decodes=2,
    )
    out, pools = run(case, [part(inputs[r], seen[r], seen[r] + lengths[r]) for r in order], batch, pools)
    starts = dict(zip(order, batch.query_start, strict=False))
    results = [(out[starts[row] : starts[row] + lengths[row]], slot(pools, row + 5)) for row in range(4)]
    return inputs, seen, lengths, results, out, pools


def test_mixed_batch_equals_the_oracle(case):
    inputs, seen, lengths, results, out, _ = mixed_batch(case)
    for row in range(4):
        _, states = (
            case.oracle(part(inputs[row], 0, seen[row]), 0, fresh_states(case))
            if seen[row]
            else (0, fresh_states(case))
        )
        wanted = case.oracle(part(inputs[row], seen[row], seen[row] + lengths[row]), seen[row], states)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), results[row], wanted)
    assert (out[sum(lengths) :] == 0).all()


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (0, 1, 3, 2), (1, 0, 3, 2)])
def test_place_in_the_batch_changes_no_bit(case, order):
    assert_same_bits(mixed_batch(case, order)[3], mixed_batch(case)[3])


def test_neighbours_change_no_bit(case):
    inputs, seen, lengths, results, _, _ = mixed_batch(case)
    out, states = alone(case, part(inputs[3], 0, 65))
    assert_same_bits((out, states), results[3])


def test_a_step_touches_only_its_own_slots(case):
    inputs = case.inputs(np.random.default_rng(1), 66)
    before = case.pools()
    batch = make_batch([1, 0, 65, 0], write=[4, 0, 6, 0], read=[0, 0, 0, 0], decodes=1)
    _, after = run(case, [inputs], batch, before)
    for pool_before, pool_after in zip(before, after, strict=True):
        kept = [index for index in range(SLOTS) if index not in (4, 6)]
        assert_same_bits(pool_before[LAYER, kept], pool_after[LAYER, kept])
        assert_same_bits(pool_before[LAYERS - 1 - LAYER], pool_after[LAYERS - 1 - LAYER])
        assert np.isfinite(np.asarray(pool_after[LAYER, [4, 6]])).all()


def test_reading_one_slot_and_writing_another_leaves_the_first(case):
    inputs = case.inputs(np.random.default_rng(2), 100)
    _, pools = run(case, [part(inputs, 0, 64)], make_batch([64, 0, 0, 0]), case.pools())
    before = slot(pools, 1)
    out, pools = run(case, [part(inputs, 64, 100)], make_batch([36, 0, 0, 0], [64, 0, 0, 0], write=[7, 0, 0, 0]), pools)
    whole, states = alone(case, inputs, (64,))
    assert_same_bits(slot(pools, 1), before)
    assert_same_bits((out[:36], slot(pools, 7)), (whole[64:], states))


@pytest.mark.parametrize("length", [64, 128, 130])
def test_snapshot_is_the_final_state_of_a_shorter_run(case, length):
    inputs = case.inputs(np.random.default_rng(4), 130)
    batch = make_batch([130, 0, 0, 0], snapshot=[(5, length), (0, 0), (0, 0), (0, 0)])
    _, pools = run(case, [inputs], batch, case.pools())
    assert_same_bits(slot(pools, 5), alone(case, part(inputs, 0, length))[1])


def test_snapshot_of_a_row_in_decode(case):
    inputs = case.inputs(np.random.default_rng(4), 2)
    batch = make_batch([1, 0, 0, 0], decodes=1, snapshot=[(5, 1), (0, 0), (0, 0), (0, 0)])
    _, pools = run(case, [part(inputs, 0, 1)], batch, case.pools())
    assert_same_bits(slot(pools, 5), slot(pools, 1))
