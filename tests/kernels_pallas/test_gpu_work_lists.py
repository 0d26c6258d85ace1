"""How attention on a GPU is dealt out to its multiprocessors: parts of rows in decode, chunks of rows that prefill."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.gqa.gpu_prefill import CHUNK, plan_units
from kernels_pallas.gqa.gpu_splits import BLOCK, MULTIPROCESSORS, split_rows
from tests.ragged import make_batch


@pytest.mark.parametrize("lengths", ([0, 1, 64, 65], [8192] * 4, [131072, 1, 0, 5000], [0, 0, 0, 0]))
def test_items_cover_every_block_once(lengths):
    blocks = 2048
    items = split_rows(jnp.asarray(lengths, jnp.int32), blocks, 4, 1.0)
    covered = [[] for _ in lengths]
    for i in range(int(items.count[0])):
        row, first, n = (int(x[i]) for x in (items.row, items.first, items.blocks))
        assert n > 0
        covered[row] += range(first, first + n)
    assert covered == [list(range(-(-n // BLOCK))) for n in lengths]


def test_items_of_a_row_depend_on_its_own_length_alone():
    alone = split_rows(jnp.asarray([5000, 0, 0, 0], jnp.int32), 2048, 4, 1.0)
    among = split_rows(jnp.asarray([131072, 77, 5000, 1], jnp.int32), 2048, 4, 1.0)
    own = slice(int(among.start[2]), int(among.start[2] + among.splits[2]))
    np.testing.assert_array_equal(among.blocks[own], alone.blocks[: int(alone.splits[0])])


@pytest.mark.parametrize("context", (8192, 131072))
def test_one_row_fills_the_chip(context):
    items = split_rows(jnp.asarray([context], jnp.int32), context // BLOCK, 4, 1.0)
    assert int(items.count[0]) * 4 >= 0.9 * MULTIPROCESSORS


def test_units_hold_every_token_once_and_the_longest_first():
    batch = make_batch([1, 1, 70, 130, 5], [9, 9, 100, 0, 64], decodes=2)
    units = plan_units(batch, 210)
    used = int(units.used[0])
    held = np.sort(np.asarray(units.token)[np.asarray(units.order)[:used]].ravel())
    np.testing.assert_array_equal(held[held < 210], np.arange(2, 207))
    contexts = np.asarray(units.context)[np.asarray(units.order)]
    assert (np.diff(contexts) <= 0).all() and (contexts[used:] == 0).all() and (contexts[:used] > 0).all()
    token = np.arange(2, 207)
    np.testing.assert_array_equal(np.asarray(units.token).ravel()[np.asarray(units.place)[token]], token)
    assert units.token.shape[1] == CHUNK
