"""Causal depthwise convolution of packed tokens inside a TPU kernel: 128 channels of one chunk, with what came before.

A chunk starts at any token, but copies from HBM start at a multiple of 16 tokens: the tokens of a chunk lie in a window
of whole tiles, `offset` rows from its top. Rows of a vector register are addressed one by one in memory, so the shift
costs no arithmetic where the channels are 128 wide: the window is stored on a *shelf*, the W - 1 inputs before the
chunk right in front of its first token, and the convolution loads W times C rows, each a row further down.

    shelf rows   HALO + offset - (W - 1) ...      the inputs before the chunk, oldest first
                 HALO + offset ...                the tokens of the chunk

What came before is always handed in: at the first chunk of a request the tail of its slot (zeros for a new request),
else the tail that `tail_after` gave for the chunk before. Knows no pool, no copy, no activation and no kind.

Letters: C tokens of a chunk, W convolution width.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

HALO = 8  # rows of a shelf above the window: one register, so that the window is stored whole registers at a time
ALIGNMENT = 16  # tokens of a tile that copies from HBM start at: of bfloat16, and two tiles of float32
LANES = 128

Ref = Any
Index = Any  # an int32 scalar of the kernel, or an int


def window_rows(size: int) -> int:
    """Rows of a window that holds `size` tokens wherever they start in its first tile."""
    return size + ALIGNMENT


def shelf_rows(size: int) -> int:
    """Rows of the float32 shelf `[rows, 128]` for chunks of `size` tokens."""
    return HALO + window_rows(size)


def shelve(shelf: Ref, window: Float[Array, "w 128"], before: Float[Array, "W-1 128"], offset: Index) -> None:
    """Put a window on the shelf, and right before its token `offset` the inputs that came earlier.

    Args:
      shelf: float32 `[shelf_rows(C), 128]` in VMEM. window: the `window_rows(C)` rows as they came from HBM; those that
      are not the chunk's may hold anything. before: inputs before the chunk, oldest first, in any float dtype.
      offset: of the chunk's first token in the window, 0 to 15.
    """
    shelf[HALO:, :] = window.astype(jnp.float32)
    shelf[pl.ds(HALO + offset - before.shape[0], before.shape[0]), :] = before.astype(jnp.float32)


def convolved(shelf: Ref, weight: Float[Array, "W 128"], offset: Index, size: int) -> Float[Array, "C 128"]:
    """The convolution of the `size` tokens on the shelf, float32. Rows past the last token of a chunk are undefined.

    Sums in the order of the taps, oldest first, whatever the offset: a chunk gives the same bits wherever it lies.
    """
    width = weight.shape[0]
    total = shelved(shelf, offset - (width - 1), size) * weight[0:1].astype(jnp.float32)
    for tap in range(1, width):
        rows = shelved(shelf, offset - (width - 1) + tap, size)
        total = total + rows * weight[tap : tap + 1].astype(jnp.float32)
    return total


def shelved(shelf: Ref, offset: Index, size: int) -> Float[Array, "C 128"]:
    """The inputs themselves, from any row: `size` rows that start `offset` rows into the window."""
    return shelf[pl.ds(HALO + offset, size), :]


def tail_after(shelf: Ref, offset: Index, count: Index, kept: int) -> Float[Array, "W-1 128"]:
    """The last `kept` = W - 1 inputs after `count` tokens of the chunk, float32: old ones where it has fewer tokens.

    `count` is the length of the chunk, or that of a snapshot inside it.
    """
    return shelved(shelf, offset + count - kept, kept)
