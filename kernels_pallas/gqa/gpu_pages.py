"""Stores this step's tokens in their pages, in place, on a GPU. Knows no kind of attention.

A token's numbers go from the input to shared memory and on to their page by the copy engine. Letters: T tokens, P
pages, S tokens a page, L layers of the pool, n numbers of a token in runs of 64.
"""

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.mosaic_gpu import interpreter, made_once
from kernels_pallas.op import RaggedBatch, token_positions, token_rows

RUN = 64
SHARED_BYTES = 32 * 1024  # of tokens on their way in one program; seven programs share a multiprocessor
PROGRAMS = 7 * 132


def token_places(batch: RaggedBatch, tokens: int, page: int) -> tuple[Int[Array, "T"], Int[Array, "T"]]:
    """The page of each token (0: store nothing) and its place in the page."""
    row, real = token_rows(batch, tokens)
    position = token_positions(batch, tokens)
    return jnp.where(real, batch.pages[row, position // page], 0), position % page


def store_tokens(
    values: Float[Array, "T n 64"],
    page: Int[Array, "T"],
    place: Int[Array, "T"],
    pages: jax.Ref,
    layer: Int[Array, "1"],
) -> None:
    """Store token t at `pages[layer, page[t], place[t]]`; `pages` is `[L, P, S, n, 64]` of the dtype of `values`."""
    tokens, runs, _ = values.shape
    held = min(8, max(1, SHARED_BYTES // (runs * RUN * 2)), -(-tokens // PROGRAMS))

    def body(values: Any, page: Any, place: Any, layer_ref: Any, pages: Any, buffer: Any, arrived: Any) -> None:
        first = lax.axis_index("program") * held

        def each(run: Any) -> None:
            for j in range(held):
                token = first + j
                number = page[jnp.minimum(token, tokens - 1)]
                pl.when((token < tokens) & (number > 0))(partial(run, j, token, number))

        def fetch(j: int, token: Any, number: Any) -> None:
            plgpu.copy_gmem_to_smem(values.at[token], buffer.at[j], arrived.at[j])

        def store(j: int, token: Any, number: Any) -> None:
            plgpu.barrier_wait(arrived.at[j])
            plgpu.copy_smem_to_gmem(buffer.at[j], pages.at[layer_ref[0], number, place[token]])

        each(fetch)
        each(store)
        plgpu.wait_smem_to_gmem(0)

    arguments = (values, page, place, layer, pages)
    kernel = made_once(
        ("store_tokens",),
        arguments,
        lambda: plgpu.kernel(
            body,
            out_type=(),
            scratch_types=[plgpu.SMEM((held, runs, RUN), values.dtype), plgpu.Barrier(num_barriers=held)],
            grid=(-(-tokens // held),),
            grid_names=("program",),
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            kernel_name="store_tokens",
            interpret=interpreter(),
        ),
    )
    kernel(*arguments)
