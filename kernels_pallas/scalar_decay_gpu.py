"""Prefill with a scalar decay per head and token on a Hopper GPU: lightning and mamba2, and the delta rule in part.

    o_i = e^{G_i} S_0 q_i + sum_{j <= i} e^{G_i - G_j} (q_i . k_j) v_j
    S_C = e^{G_C} S_0 + sum_j e^{G_C - G_j} v_j k_j^T

Decays stay in the exponent as differences, never positive. This module knows no kind.

Letters: T tokens, H heads, G key heads, K key width, V value width, C chunk, n chunks.
"""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.chunk_scan_gpu import Recurrence, Refs, Stream
from kernels_pallas.chunks_gpu import (
    BF16,
    F32,
    PER_COLUMN,
    PER_ROW,
    TILED,
    C,
    Work,
    along_columns,
    along_rows,
    iota,
    product,
)
from kernels_pallas.op import take

LOG2_E = 1.4426950408889634
LOWEST = -150.0  # log2 of a decay that is zero in float32: sums of 64 keep their digits
UNTIL, TOTAL = 0, 1  # rows of a chunk's gates: e^{G_C - G}, and G in base 2


def decay_gates(decay: Float[Array, "T H"], work: Work) -> Float[Array, "2 n C H"]:
    """Per chunk, token and head: e^{G_C - G}, and G in base 2, which stays beyond the last token."""
    decay_nCH = jnp.maximum(take(decay * LOG2_E, work.tokens), LOWEST)
    total_nCH = jnp.cumsum(decay_nCH, axis=1)
    return jnp.stack([jnp.exp2(total_nCH[:, -1:] - total_nCH), total_nCH])


def scalar_decay(
    q: Float[Array, "T G K"], k: Float[Array, "T G K"], v: Float[Array, "T H V"], gates: Float[Array, "n H 2 C"]
) -> Recurrence:
    """Values written as they are, with the decays of `decay_gates`, heads before rows before tokens."""
    streams = {
        "q": Stream("keys", q),
        "k": Stream("keys", k),
        "v": Stream("values", v),
        "gates": Stream("table", gates),
    }
    return Recurrence(streams, _writes, chunk_decay, decayed_scores, decay_since)


def _writes(refs: Refs, part: Array, state: list[Array], valid: Array, stage: Any) -> tuple[Array, list[Array]]:
    values = plgpu.load(refs["v"].at[part].T, layout=TILED).astype(F32)
    values = jnp.where(iota(1) < valid, values, 0.0)  # what lies past the row may be NaN
    return values, [(values * along_columns(gate(refs, UNTIL))).astype(BF16)]


def chunk_decay(refs: Refs, keys: int) -> Float[Array, ""]:
    """e^{G_C}."""
    return jnp.exp2(refs["gates"][TOTAL, C - 1])


def decayed_scores(refs: Refs, stage: Any) -> Float[Array, "C C"]:
    """e^{G_i - G_j} (q_i . k_j) for j <= i, else zero."""
    tiles = range(refs["q"].shape[0])
    scores = product([(refs["q"].at[h], refs["k"].at[h].T) for h in tiles], stage)
    until_now = iota(0) >= iota(1)
    apart = along_rows(gate(refs, TOTAL, PER_ROW)) - along_columns(gate(refs, TOTAL))
    return jnp.where(until_now, scores * jnp.exp2(jnp.where(until_now, apart, 0.0)), 0.0).astype(BF16)


def decay_since(refs: Refs) -> Float[Array, "C"]:
    """e^G."""
    return jnp.exp2(gate(refs, TOTAL, PER_ROW))


def gate(refs: Refs, row: int, layout: Any = PER_COLUMN) -> Float[Array, "C"]:
    """A row of the chunk's gates."""
    return plgpu.load(refs["gates"].at[row], layout=layout, optimized=False)
