"""Multi-head latent attention on TPU: the door to the kernels, which are those of grouped queries with one key head.

Rows in decode and rows that prefill are absorbed alike: every head's query, taken through the expansion, meets the
cached rows themselves, whose first Z lanes are the values as well. Norm, rotary and the products with the expansion are
left to XLA.

A TPU keeps whole registers of 128 lanes: 640 for a row of 512 + 64. So do the pages (`in_registers`), with zeros in the
lanes beyond Z + R: copies move whole registers.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.gqa.tpu import DTYPES, PAGES, attend_rows
from kernels_pallas.gqa.tpu_attend import LANES, Columns
from kernels_pallas.mla.xla import EXACT, MLAWeights, _rotate
from kernels_pallas.norm import rms
from kernels_pallas.op import KVSpec, RaggedBatch, clear_padding
from kernels_pallas.rotary import Rotary

ROWS = (256 + 64, 512 + 64)  # latent and rotary lanes


def mla(
    q: Float[Array, "T H N+R"],
    latent: Float[Array, "T Z+R"],
    weights: MLAWeights,
    rotary: Rotary | None,
    pages: Float[Array, "L P S W"],
    layer: int,
    batch: RaggedBatch,
    *,
    scale: float,
    epsilon: float,
) -> tuple[Float[Array, "T H*V"], Float[Array, "L P S W"]]:
    """One latent attention layer between its projections, as `xla.mla` defines it; the pages are updated in place.

    Raises NotImplementedError for dtypes, latent widths and page sizes without a kernel.
    """
    width, cached, lanes = weights.latent_norm.shape[0], latent.shape[1], pages.shape[3]
    _check(q, pages, width)
    plain = q.shape[2] - (cached - width)
    qn, qr = q[..., :plain], _rotate(q[..., plain:], rotary)
    compressed = rms(latent[:, :width], weights.latent_norm, epsilon).astype(q.dtype)
    shared = _rotate(latent[:, None, width:], rotary)[:, 0]
    new = _padded(jnp.concatenate([compressed, shared], axis=-1), lanes)
    to_keys, to_values = jnp.split(weights.expansion, [plain], axis=2)
    absorbed = _exact("thn,zhn->thz", qn, to_keys)
    queries = jnp.concatenate([absorbed, qr.astype(jnp.float32)], axis=-1) * (scale * math.log2(math.e))
    columns = Columns(1, lanes, width, 0, 0, 0)
    read, pages = attend_rows(_padded(queries.astype(q.dtype), lanes), new, pages, layer, batch, columns)
    out = _exact("thz,zhv->thv", read, to_values).astype(q.dtype)
    return clear_padding(out.reshape(len(q), -1), batch), pages


def _padded(x: Array, lanes: int) -> Array:
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, lanes - x.shape[-1]),))


def _exact(spelled: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spelled, a, b, precision=EXACT, preferred_element_type=jnp.float32)


def _check(q: Array, pages: Array, width: int) -> None:
    if q.dtype != pages.dtype or str(q.dtype) not in DTYPES:
        wanted = f"pages of the same dtype as the activations, of {DTYPES}"
        raise NotImplementedError(f"mla on tpu: wanted {wanted}, got {q.dtype} and pages of {pages.dtype}: use 'xla'")
    if width % LANES:
        raise NotImplementedError(f"mla on tpu: wanted a latent width in {LANES}s, got {width}: use backend 'xla'")
    if pages.shape[2] not in PAGES:
        raise NotImplementedError(f"mla on tpu: wanted a page of {PAGES} tokens, got {pages.shape[2]}: use 'xla'")


def fits(memory: KVSpec, dtype: str) -> bool:
    """Whether the kernels have the shapes and dtypes of a layer that remembers this and computes in `dtype`."""
    return dtype in DTYPES and memory.arrays[0].shape[0] in ROWS


def in_registers(memory: KVSpec) -> KVSpec:
    """What pages keep for a layer that remembers this: rows filled up to whole registers."""
    (row,) = memory.arrays
    return KVSpec((dataclasses.replace(row, shape=(-(-row.shape[0] // LANES) * LANES,)),))
