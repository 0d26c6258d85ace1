"""Builds ragged batches and NaN-filled pools for tests."""

import jax.numpy as jnp
import numpy as np

from kernels_pallas.op import Cache, KVSpec, RaggedBatch, check_batch
from models.decoder import Decoder

PAGE = 16  # tokens a page in tests
SLOTS = 9
PAGES = 65


def make_batch(lengths, seen=None, read=None, write=None, snapshot=None, pages=None, decodes=0, content="mixed"):
    """A batch from plain lists, one entry per row; slots default to row + 1, snapshots are (slot, length) pairs."""
    rows = len(lengths)
    lengths = np.asarray(lengths, np.int32)
    own = np.where(lengths > 0, np.arange(1, rows + 1), 0)
    seen = np.zeros(rows, np.int32) if seen is None else np.asarray(seen, np.int32)
    snapshot = [(0, 0)] * rows if snapshot is None else snapshot
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    table = page_table(rows) if pages is None else pages
    return RaggedBatch(
        start,
        seen,
        np.int32(decodes),
        np.asarray(own if read is None else read, np.int32),
        np.asarray(own if write is None else write, np.int32),
        np.asarray([slot for slot, _ in snapshot], np.int32),
        np.asarray([length for _, length in snapshot], np.int32),
        np.asarray(table, np.int32),
        content,
    )


def page_table(rows, width=12):
    """Distinct pages for each row, scattered over the pool."""
    order = np.random.default_rng(5).permutation(np.arange(1, PAGES))[: min(rows, 5) * width]
    table = np.zeros((rows, width), np.int32)
    table[: min(rows, 5)] = order.reshape(-1, width)
    return table


def checked(batch, tokens):
    """The batch, after the checks that the host makes before each step."""
    check_batch(batch, tokens, SLOTS, PAGES, PAGE)
    return batch


def nan_cache(model: Decoder, slots=SLOTS, pages=PAGES, page=PAGE) -> Cache:
    """A cache filled with NaN: whatever reads what was never written shows at once."""
    routes, pools = model.routes(), []
    for index, spec in enumerate(model.specs):
        layers = 1 + max(route.place.layer for route in routes if route.place.pool == index)
        lead = (layers, pages, page) if type(spec) is KVSpec else (layers, slots)
        pools.append(tuple(jnp.full(lead + spec.pool_shape(array), jnp.nan, array.dtype) for array in spec.arrays))
    return Cache(model.specs, tuple(pools))
