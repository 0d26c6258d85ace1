"""The experts of a step's tokens on a TPU: XLA's products, put so that no kernel is copied.

A grouped product reads matrices one after another, each `[D, F]` in whole tiles. Kernels `[E, D, c, F]` lie there as
`[E, c, D, F]` (`hybrid_jax/formats.py`): E c matrices, each of which is a group of its own. A row of an expert takes
part once with each of the expert's c matrices. Put as `[E, D, c F]`, all kernels would have to be copied into tiles of
another form. Knows no router and no model.

Letters: T tokens, D model width, E experts, k experts a token, c matrices of the activation, F expert width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.experts import xla
from kernels_pallas.experts.xla import Activation


def grouped_experts(
    x: Float[Array, "T D"],
    chosen: Int[Array, "T k"],
    gate_up: Float[Array, "E D c F"],
    down: Float[Array, "E F D"],
    activate: Activation,
) -> Float[Array, "T k D"]:
    """As `xla.grouped_experts`."""
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=gate_up.shape[0]).astype(jnp.int32)
    place = _places(flat[order], sizes, gate_up.shape[2])
    token = jnp.zeros(place.size, jnp.int32).at[place].set((order // chosen.shape[1])[:, None])
    matrices = gate_up.swapaxes(1, 2).reshape(-1, gate_up.shape[1], gate_up.shape[3])
    inner = jax.lax.ragged_dot(x[token], matrices, jnp.repeat(sizes, gate_up.shape[2]))
    out = jax.lax.ragged_dot(activate(inner[place]), down, sizes)
    return jnp.zeros_like(out).at[order].set(out).reshape(*chosen.shape, -1)


def _places(expert: Int[Array, "n"], sizes: Int[Array, "E"], matrices: int) -> Int[Array, "n c"]:
    """Where each choice, of n sorted by expert, is a row for each matrix of its expert.

    Behind all rows of the experts before, and those of the matrices before for as many choices as the expert has.
    Choices out of range come last.
    """
    index = jnp.arange(len(expert), dtype=jnp.int32)
    sizes = jnp.append(sizes, jnp.int32(len(expert)) - sizes.sum())  # the last: of no expert here
    begin, size = (jnp.cumsum(sizes) - sizes)[expert], sizes[expert]
    parts = jnp.arange(matrices, dtype=jnp.int32)
    return (index + (matrices - 1) * begin)[:, None] + parts[None, :] * size[:, None]


experts = partial(xla.experts, grouped=grouped_experts)
share = partial(xla.share, grouped=grouped_experts)
