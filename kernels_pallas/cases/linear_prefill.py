"""Prefill kernels of the linear kinds at the shapes of models, each checked on the device before it is timed.

The check runs a ragged batch over slots of NaN and compares outputs and states with the kind's definition in plain XLA
on the same inputs. Knows what the kernels consume, nothing of how they work.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.cases.case import Case
from kernels_pallas.gdn import gpu_prefill as gdn
from kernels_pallas.gdn.xla import gdn_chunk, gdn_step
from kernels_pallas.kda import gpu_prefill as kda
from kernels_pallas.kda.xla import kda_chunk, kda_step
from kernels_pallas.lightning import gpu_prefill as lightning
from kernels_pallas.lightning.xla import lightning_chunk, lightning_step
from kernels_pallas.mamba2 import gpu_prefill as mamba2
from kernels_pallas.mamba2.xla import mamba2_chunk, mamba2_step
from kernels_pallas.op import RaggedBatch, host_batch
from kernels_pallas.recurrence import recur

WIDTH, CHUNK = 128, 64
BATCHES = ((1, 8192), (8, 1024), (8, 4096), (1, 65536))  # rows, tokens of each
CHECKED = (300, 64, 1, 129)  # tokens of each row
OUTPUT_ERROR, STATE_ERROR = 1e-2, 2e-3  # relative, of bfloat16 operands and float32 sums

Tokens = tuple[jax.Array, ...]
Recurrence = Callable[[Any, jax.Array, int, RaggedBatch], tuple[jax.Array, jax.Array]]  # tokens, pool, layer, batch


@dataclass(frozen=True)
class Kind:
    """A kind at the shape of a model: its prefill kernel, its definition, and random tokens for both."""

    name: str
    shape: str
    heads: int
    value_width: int
    kernel: Recurrence
    definition: Recurrence
    tokens: Callable[[int], Tokens]
    chunk_operations: int  # of one head and chunk


def cases() -> list[Case]:
    """All kinds at all batches."""
    return [prefill_case(kind, *batch) for kind in kinds() for batch in BATCHES]


def kinds() -> list[Kind]:
    """The kinds at the shapes of Qwen3.5-4B, Ling 2.6, Nemotron 3 and Kimi Linear."""
    scan = 2 * CHUNK * (2 * CHUNK * WIDTH + CHUNK * WIDTH + 2 * WIDTH * WIDTH)
    solved = 2 * CHUNK * (CHUNK * WIDTH + CHUNK * WIDTH + WIDTH * WIDTH)
    return [
        Kind("gdn", "16|32 heads", 32, WIDTH, gdn.prefill, _delta(gdn_step, gdn_chunk), _gdn_tokens, scan + solved),
        Kind("lightning", "32 heads", 32, WIDTH, lightning.prefill, _lightning, _lightning_tokens, scan),
        Kind("mamba2", "8|64 heads", 64, 64, mamba2.prefill, _delta(mamba2_step, mamba2_chunk), _mamba2_tokens, scan),
        Kind("kda", "32 heads", 32, WIDTH, kda.prefill, _delta(kda_step, kda_chunk), _kda_tokens, scan + solved),
    ]


def prefill_case(kind: Kind, rows: int, length: int) -> Case:
    """Rows of equal length from nothing, through one layer."""

    def make() -> tuple[Callable[..., tuple[Any, ...]], tuple[Any, ...], tuple[int, ...]]:
        check(kind)
        batch = prefill_batch((length,) * rows)
        pool = jnp.zeros((1, rows + 1, kind.heads, kind.value_width, WIDTH), jnp.float32)

        def call(pool: jax.Array, tokens: Tokens, batch: RaggedBatch) -> tuple[jax.Array, jax.Array]:
            out, pool = kind.kernel(tokens, pool, 0, batch)
            return pool, out

        return call, (pool, kind.tokens(rows * length), batch), (0,)

    shapes = jax.eval_shape(lambda: kind.tokens(rows * length))
    read = sum(shape.size * shape.dtype.itemsize for shape in shapes)
    values = kind.heads * kind.value_width
    written = rows * length * values * 2 + rows * values * WIDTH * 4
    operations = float(rows * -(-length // CHUNK) * kind.heads * kind.chunk_operations)
    return Case(f"{kind.name} prefill", f"{kind.shape}, {rows} x {length}", make, read, written, operations)


def check(kind: Kind) -> None:
    """Raises ValueError where the kernel and the definition differ by more than bfloat16 operands explain."""
    tokens, batch = kind.tokens(sum(CHECKED)), prefill_batch(CHECKED)
    pool = jnp.full((1, len(CHECKED) + 1, kind.heads, kind.value_width, WIDTH), jnp.nan, jnp.float32)
    out, states = jax.jit(lambda tokens, pool, batch: kind.kernel(tokens, pool, 0, batch))(tokens, pool, batch)
    exact = tuple(x.astype(jnp.float32) for x in tokens)
    wanted, wanted_states = jax.jit(lambda tokens, pool, batch: kind.definition(tokens, pool, 0, batch))(
        exact, pool, batch
    )
    for what, got, want, limit in (
        ("outputs", out, wanted, OUTPUT_ERROR),
        ("states", states[0, 1:], wanted_states[0, 1:], STATE_ERROR),
    ):
        error = float(jnp.linalg.norm(got.astype(jnp.float32).ravel() - want.ravel()) / jnp.linalg.norm(want.ravel()))
        if not error <= limit:
            raise ValueError(f"wanted {kind.name} prefill {what} within {limit:.0e}, got {error:.1e}: do not use it")


def prefill_batch(lengths: tuple[int, ...]) -> RaggedBatch:
    """A batch of rows that start from nothing, each with its slot."""
    rows = len(lengths)
    start = np.concatenate([[0], np.cumsum(lengths)])
    slots, zeros = np.arange(1, rows + 1), np.zeros(rows)
    batch = host_batch(start, zeros, 0, (slots, slots, zeros), zeros, np.zeros((rows, 1)), "prefill")
    return jax.tree.map(jnp.asarray, batch)


# ------------------------------------------------------------------------------------------------------------ the kinds


def _delta(step: Any, chunk: Any) -> Recurrence:
    """The definition of a kind whose tokens say everything; keys are repeated where the kind has none of its own."""

    def run(tokens: Tokens, pool: jax.Array, layer: int, batch: RaggedBatch) -> tuple[jax.Array, jax.Array]:
        q, k, v, *gates = tokens
        each = v.shape[1] // q.shape[1] if step is gdn_step else 1
        q, k = (jnp.repeat(x, each, axis=1) for x in (q, k))
        return recur((q, k, v, *gates), step, chunk, pool, layer, batch)

    return run


def _lightning(tokens: Tokens, pool: jax.Array, layer: int, batch: RaggedBatch) -> tuple[jax.Array, jax.Array]:
    *qkv, slopes = tokens
    present = jnp.ones(qkv[0].shape[:1], jnp.float32)

    def step(state: jax.Array, token: Tokens) -> tuple[jax.Array, jax.Array]:
        return lightning_step(state, token[0], token[1], token[2], slopes)

    def chunk(state: jax.Array, token: Tokens) -> tuple[jax.Array, jax.Array]:
        return lightning_chunk(state, token[0], token[1], token[2], token[3], slopes)

    return recur((*qkv, present), step, chunk, pool, layer, batch)


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _keys(seed: int, tokens: int, heads: int) -> jax.Array:
    x = _normal(seed, tokens, heads, WIDTH)
    scale = jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True))
    return (x * scale).astype(jnp.bfloat16)


def _gdn_tokens(tokens: int) -> Tokens:
    q, k, v = _keys(0, tokens, 16), _keys(1, tokens, 16), _normal(2, tokens, 32, WIDTH).astype(jnp.bfloat16)
    return q, k, v, -jnp.exp(_normal(3, tokens, 32) - 2), jax.nn.sigmoid(_normal(4, tokens, 32))


def _kda_tokens(tokens: int) -> Tokens:
    q, k, v = _keys(0, tokens, 32), _keys(1, tokens, 32), _normal(2, tokens, 32, WIDTH).astype(jnp.bfloat16)
    return q, k, v, -jnp.exp(_normal(3, tokens, 32, WIDTH) - 3), jax.nn.sigmoid(_normal(4, tokens, 32))


def _lightning_tokens(tokens: int) -> Tokens:
    q, k, v = _keys(0, tokens, 32), _keys(1, tokens, 32), _normal(2, tokens, 32, WIDTH).astype(jnp.bfloat16)
    return q, k, v, jnp.exp2(-0.25 * jnp.arange(1, 33, dtype=jnp.float32))


def _mamba2_tokens(tokens: int) -> Tokens:
    c, b, x = _keys(0, tokens, 8), _keys(1, tokens, 8), _normal(2, tokens, 64, 64).astype(jnp.bfloat16)
    return c, b, x, -jnp.exp(_normal(3, tokens, 64) - 2)
