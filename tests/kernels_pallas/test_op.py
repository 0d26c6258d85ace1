"""The contract: what a batch means, and every rule that the host checks before a step."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.op import (
    ArraySpec,
    KVSpec,
    Op,
    Shares,
    prefill_chunks,
    read_states,
    token_positions,
    token_rows,
    write_states,
)
from tests.ragged import PAGES, SLOTS, checked, make_batch


def batch(**change):
    """A legal batch: a row in decode, a continued prefill, a fresh one, an absent one."""
    good = make_batch([1, 64, 70, 0], [5, 64, 0, 0], decodes=1, snapshot=[(0, 0), (0, 0), (8, 64), (0, 0)])
    return replace(good, **{name: np.asarray(value, np.int32) for name, value in change.items()})


def test_a_legal_batch_passes():
    checked(batch(), 135)


def table_with(row, column, page):
    pages = batch().pages.copy()
    pages[row, column] = page
    return pages


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query_start": [0, 1, 65, 200, 200]}, "query_start"),
        ({"query_start": [0, 5, 4, 135, 135]}, "query_start"),
        ({"decodes": 2}, "row in decode"),
        ({"decodes": 9}, "decodes"),
        ({"read_slot": [1, 2, 3, SLOTS]}, "read_slot"),
        ({"read_slot": [-1, 2, 3, 0]}, "read_slot"),
        ({"read_slot": [0, 2, 3, 0]}, "seen tokens"),
        ({"read_slot": [2, 2, 3, 0]}, "written by nobody else"),
        ({"read_slot": [8, 2, 3, 0]}, "written by nobody else"),
        ({"write_slot": [1, 2, 2, 0]}, "distinct"),
        ({"write_slot": [1, 2, 8, 0]}, "distinct"),
        ({"write_slot": [1, 2, 3, 4]}, "absent row"),
        ({"snapshot_length": [0, 0, 50, 0]}, "snapshot_length"),
        ({"snapshot_length": [0, 0, 999, 0]}, "snapshot_length"),
        ({"snapshot_length": [0, 0, 0, 0]}, "snapshot_length"),
        ({"snapshot_slot": [8, 0, 0, 0], "snapshot_length": [0, 0, 0, 0]}, "snapshot_length"),
        ({"seen": [5, -1, 0, 0]}, "seen"),
        ({"seen": [5, 64 * 16, 0, 0]}, "pages of a row"),
        ({"pages": table_with(0, 0, PAGES)}, "page"),
        ({"pages": table_with(1, 2, 0)}, "page in use"),
        ({"pages": table_with(1, 5, int(batch().pages[2, 0]))}, "pages written"),
        ({"pages": table_with(2, 0, int(batch().pages[1, 0]))}, "not in use for earlier tokens"),
    ],
)
def test_a_bad_batch_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        checked(batch(**change), 135)


def test_a_batch_must_hold_what_its_content_says():
    with pytest.raises(ValueError, match="rows past decodes"):
        checked(make_batch([1, 1], decodes=1, content="decode"), 8)
    with pytest.raises(ValueError, match="without decodes"):
        checked(make_batch([1, 1], decodes=1, content="prefill"), 8)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 5), st.data())
def test_chunks_cover_every_prefilled_token_once(lengths, size, data):
    decodes = data.draw(st.integers(0, len(lengths)))
    lengths = [min(n, 1) if row < decodes else n for row, n in enumerate(lengths)]
    tokens = sum(lengths) + data.draw(st.integers(0, 4)) or 1
    ragged = make_batch(lengths, decodes=decodes, pages=np.zeros((len(lengths), 1)))
    rows, real = token_rows(ragged, tokens)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    assert np.asarray(rows)[: len(owner)].tolist() == owner.tolist() and np.asarray(real).sum() == len(owner)
    inside = np.concatenate([np.arange(n) for n in lengths] + [np.zeros(tokens - len(owner), int)])
    assert np.asarray(token_positions(ragged, tokens)).tolist() == inside.tolist()
    plan = prefill_chunks(ragged, tokens, size)
    covered = np.asarray(plan.token).reshape(-1)
    wanted = [t for t in range(len(owner)) if owner[t] >= decodes]
    assert sorted(covered[covered < tokens].tolist()) == wanted
    for chunk in range(len(plan.row)):
        own = [t for t in np.asarray(plan.token[chunk]).tolist() if t < tokens]
        assert len(own) == plan.length[chunk] and all(owner[t] == plan.row[chunk] for t in own)
        assert not own or bool(plan.first[chunk]) == (inside[own[0]] == 0)
        assert not own or plan.end[chunk] == inside[own[-1]] + 1


def test_a_state_is_zero_for_whoever_has_seen_nothing():
    pool = jnp.full((1, SLOTS, 2), jnp.nan).at[0, 2].set(7.0)
    states = read_states(pool, 0, make_batch([3, 3], [0, 4]))
    assert states.tolist() == [[0, 0], [7, 7]]


def test_chunks_are_set_aside_for_the_rows_that_may_prefill():
    batch = make_batch([1, 1, 1, 70, 5, 0], [3, 3, 3, 0, 0, 0], decodes=3)
    few = replace(batch, prefills=2)
    plans = [prefill_chunks(one, 80, 16) for one in (batch, few)]
    assert [len(plan.row) for plan in plans] == [(80 + 6 * 15) // 16, (80 + 2 * 15) // 16]
    held = [np.sort(np.asarray(plan.token).ravel()) for plan in plans]
    assert [tokens[tokens < 80].tolist() for tokens in held] == [list(range(3, 78))] * 2
    checked(few, 80)
    with pytest.raises(ValueError, match="rows that prefill: at most 1, got 2"):
        checked(replace(batch, prefills=1), 80)


def test_slot_zero_is_never_written():
    pool = jnp.zeros((1, SLOTS, 2))
    slots, written = jnp.array([0, 3]), jnp.array([True, True])
    after = write_states(pool, 0, slots, written, jnp.ones((2, 2)))
    assert after[0].sum(-1).tolist() == [0, 0, 0, 2, 0, 0, 0, 0, 0]


def test_a_backend_is_chosen_or_refused_never_swapped():
    backends, fits = {"xla": lambda: "xla", "gpu": lambda: "gpu"}, {"gpu": lambda memory, dtype: dtype == "bfloat16"}
    op = Op("thing", backends, Shares("heads", (), ()), fits)
    memory = KVSpec((ArraySpec("kv", (2,), "bfloat16"),))
    chosen = [op.choose("auto", memory, "bfloat16", platform) for platform in ("cpu", "gpu", "tpu")]
    assert chosen == ["xla", "gpu", "xla"]
    assert op.choose("auto", memory, "float32", "gpu") == "xla"  # 'auto' takes a kernel only where it fits
    assert op.choose("gpu", memory, "float32", "cpu") == "gpu" and op.on("xla")() == "xla"
    with pytest.raises(NotImplementedError, match="thing has no tpu kernel, it has: xla, gpu"):
        op.choose("tpu", memory, "float32", "tpu")
    with pytest.raises(ValueError, match="wanted a backend"):
        op.on("cuda")
