"""Lightning attention on a TPU: rows in decode by a kernel of one token a row, the others by chunks."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.lightning.tpu_decode import Settings, lightning_kind
from kernels_pallas.lightning.tpu_prefill import lightning_prefill
from kernels_pallas.lightning.xla import LightningWeights
from kernels_pallas.linear_decode_tpu import check_decode, decode, has_decode
from kernels_pallas.op import RaggedBatch, StateSpec
from kernels_pallas.rotary import Rotary
from kernels_pallas.rows import by_rows


def lightning(
    qkv: Float[Array, "T 3 H K"],
    gate: Float[Array, "T H*V"],
    weights: LightningWeights,
    rotary: Rotary | None,
    pool: Float[Array, "L N H V K"],
    layer: int,
    batch: RaggedBatch,
    *,
    scale: float,
    groups: int,
    epsilon: float,
    silu: bool = False,
) -> tuple[Float[Array, "T H*V"], Float[Array, "L N H V K"]]:
    """One lightning layer between its projections, as `xla.lightning`.

    Raises NotImplementedError unless activations are all bfloat16 or all float32, states float32, and heads 128 wide.
    """
    check_decode("lightning", (qkv, gate), (), pool)
    norms = (weights.query_norm, weights.key_norm)
    tables = () if rotary is None else (rotary.cos, rotary.sin)
    half = 0 if rotary is None else rotary.cos.shape[1]
    normed = (norms[0] is not None, norms[1] is not None)
    kind = lightning_kind(Settings(pool.shape[2], scale, groups, epsilon, silu, normed, half))
    vectors = (weights.slopes, weights.output_norm, *(norm for norm in norms if norm is not None))
    lines = tuple(jnp.reshape(vector, (1, -1)) for vector in vectors)

    def prefill(pools: tuple[Array, ...], batch: RaggedBatch) -> tuple[Array, tuple[Array, ...]]:
        out, pool = lightning_prefill(
            qkv, gate, weights, rotary, pools[0], layer, batch, scale=scale, groups=groups, epsilon=epsilon, silu=silu
        )
        return out, (pool,)

    def step(pools: tuple[Array, ...], batch: RaggedBatch) -> tuple[Array, tuple[Array, ...]]:
        inputs = (qkv.reshape(qkv.shape[0], -1), gate, *tables)
        return decode(kind, inputs, lines, pools, layer, batch)

    out, (pool,) = by_rows(step, prefill, (pool,), batch)
    return out, pool


def fits(memory: StateSpec, dtype: str) -> bool:
    """Whether the kernels have the shapes and dtypes of a layer that remembers this and computes in `dtype`."""
    return has_decode(memory.arrays[0], dtype)
