"""Decode of the linear kinds at the shapes of models: a step of all rows through several layers, as a model runs them.

The layers keep one step from finding in the cache what the step before it left there: a model's weights pass through it
in between. Before anything is timed, one layer is compared with its definition in plain jnp. Knows the kinds'
arguments, no kernel.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.cases.case import Case
from kernels_pallas.gdn import GDN, GDNWeights
from kernels_pallas.kda import KDA, KDAWeights, SoftplusDecay
from kernels_pallas.lightning import LIGHTNING, LightningWeights
from kernels_pallas.mamba2 import MAMBA2, Mamba2Weights
from kernels_pallas.op import RaggedBatch, host_batch

ROWS = (1, 8, 32, 64, 128, 256)
STATES_BYTES = 2**27  # of all layers, at least: more than twice the cache of an H100
EPSILON, WIDTH = 1e-6, 128

OUTPUT_ERROR, STATE_ERROR = 1e-2, 1e-5  # relative, of bfloat16 outputs and of float32 states

Call = Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]  # backend, inputs, weights, pools, layer, batch


@dataclass(frozen=True)
class Layer:
    """A kind at the shape of a model. Shapes of inputs are of one token, those of pools of one slot."""

    name: str
    shape: str
    inputs: tuple[tuple[int, ...], ...]
    weights: Any
    pools: tuple[jax.ShapeDtypeStruct, ...]
    out_width: int
    call: Call


def cases() -> list[Case]:
    """All kinds at all batches."""
    layers = (gdn(16, 32), lightning(32, 4), kda(32), mamba2(64, 8))
    return [decode_case(layer, rows) for layer in layers for rows in ROWS]


def decode_case(layer: Layer, rows: int, backend: str = "gpu") -> Case:
    """One step of `rows` rows through enough layers of their own memory; every figure is of all of them.

    Its `make` raises RuntimeError where the backend's outputs or memory are not those of the definition.
    """
    states = prod(layer.pools[0].shape) * 4 * rows
    count = max(1, -(-STATES_BYTES // states))
    moved = rows * sum(prod(pool.shape) * pool.dtype.itemsize for pool in layer.pools)
    inputs = rows * sum(prod(shape) for shape in layer.inputs) * 2
    weights = sum(prod(w.shape) * 4 for w in jax.tree.leaves(layer.weights))

    def make() -> tuple[Callable[..., tuple[Any, ...]], tuple[Any, ...], tuple[int, ...]]:
        arguments = _random_arguments(layer, rows, count)
        _require_definition(layer, backend, *arguments)

        def step(*arguments: Any) -> tuple[Any, ...]:
            pools, (inputs, weights, batch) = arguments[:-3], arguments[-3:]
            outs = []
            for index in range(count):
                out, pools = layer.call(backend, inputs, weights, pools, index, batch)
                outs.append(out)
            return *pools, outs

        return step, arguments, tuple(range(len(layer.pools)))

    shape = f"{layer.shape}, B={rows}, {count} layers"
    read, written = moved + inputs + weights, moved + rows * layer.out_width * 2
    return Case(f"{layer.name} decode", shape, make, read * count, written * count)


def _require_definition(layer: Layer, backend: str, *arguments: Any) -> None:
    def run(which: str, *arguments: Any) -> tuple[jax.Array, ...]:
        pools, (inputs, weights, batch) = arguments[:-3], arguments[-3:]
        out, after = layer.call(which, inputs, weights, pools, 0, batch)
        return out, *after

    with jax.default_matmul_precision("highest"):
        got, wanted = (jax.jit(partial(run, which))(*arguments) for which in (backend, "xla"))
    output, *memory = (float(error) for error in map(_relative_error, got, wanted))
    if not (output <= OUTPUT_ERROR and max(memory) <= STATE_ERROR):
        raise RuntimeError(
            f"wanted {layer.name} on {backend!r} within {OUTPUT_ERROR} of its definition, its memory within"
            f" {STATE_ERROR}, got {output:.1e} and {max(memory):.1e}: the kernel is wrong here"
        )


def _relative_error(got: jax.Array, wanted: jax.Array) -> jax.Array:
    got, wanted = got.astype(jnp.float32), wanted.astype(jnp.float32)
    return jnp.linalg.norm((got - wanted).reshape(-1)) / jnp.linalg.norm(wanted.reshape(-1))


def _random_arguments(layer: Layer, rows: int, count: int) -> tuple[Any, ...]:
    keys = _keys()
    slots = rows + 1
    pools = tuple(_normal(keys, (count, slots, *pool.shape), pool.dtype) for pool in layer.pools)
    inputs = tuple(_normal(keys, (rows, *shape), jnp.bfloat16) for shape in layer.inputs)
    weights = jax.tree.map(lambda spec: jnp.abs(_normal(keys, spec.shape, spec.dtype)) * 0.5, layer.weights)
    return *pools, inputs, weights, decode_batch(np.random.default_rng(0).permutation(rows).astype(np.int32) + 1)


def decode_batch(slots: np.ndarray) -> RaggedBatch:
    """A batch of rows in decode, each with its slot."""
    rows = len(slots)
    start, zeros, seen = np.arange(rows + 1, dtype=np.int32), np.zeros(rows, np.int32), np.full(rows, 99, np.int32)
    pages = np.zeros((rows, 1), np.int32)
    batch = host_batch(start, seen, rows, (slots, slots, zeros), zeros, pages, "decode")
    return jax.tree.map(jnp.asarray, batch)


def _keys() -> Iterator[jax.Array]:
    key = jax.random.key(0)
    while True:
        key, own = jax.random.split(key)
        yield own


def _normal(keys: Iterator[jax.Array], shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(next(keys), shape, dtype)


def _f32(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _tail(channels: int) -> Any:
    return jax.ShapeDtypeStruct((3, channels), jnp.bfloat16)


# ------------------------------------------------------------------------------------------------------------ the kinds


def gdn(key_heads: int, heads: int) -> Layer:
    """The gated delta rule: Qwen3-Next and Qwen3.5."""
    channels = (2 * key_heads + heads) * WIDTH
    each = heads // key_heads
    inputs = ((key_heads, 2 * (1 + each) * WIDTH), (key_heads, 2, each))
    weights = GDNWeights(_f32(4, channels), _f32(heads), _f32(heads), _f32(WIDTH))

    def call(backend: str, inputs: Any, weights: Any, pools: Any, index: int, batch: RaggedBatch) -> Any:
        out, *pools = GDN.on(backend)(*inputs, weights, *pools, index, batch, epsilon=EPSILON)
        return out, tuple(pools)

    pools = (_f32(heads, WIDTH, WIDTH), _tail(channels))
    return Layer("gdn", f"{key_heads}|{heads} heads", inputs, weights, pools, heads * WIDTH, call)


def kda(heads: int) -> Layer:
    """Kimi delta attention: Kimi-Linear."""
    channels = 3 * heads * WIDTH
    inputs = ((channels,), (heads, WIDTH), (heads,), (heads, WIDTH))
    weights = KDAWeights(_f32(4, channels), _f32(heads), _f32(heads, WIDTH), _f32(WIDTH))

    def call(backend: str, inputs: Any, weights: Any, pools: Any, index: int, batch: RaggedBatch) -> Any:
        out, *pools = KDA.on(backend)(*inputs, weights, *pools, index, batch, decay=SoftplusDecay(), epsilon=EPSILON)
        return out, tuple(pools)

    pools = (_f32(heads, WIDTH, WIDTH), _tail(channels))
    return Layer("kda", f"{heads} heads", inputs, weights, pools, heads * WIDTH, call)


def lightning(heads: int, groups: int) -> Layer:
    """Lightning attention with norms of queries and keys: Ling and Ring."""
    weights = LightningWeights(_f32(heads), _f32(heads * WIDTH), _f32(WIDTH), _f32(WIDTH))

    def call(backend: str, inputs: Any, weights: Any, pools: Any, index: int, batch: RaggedBatch) -> Any:
        options = {"scale": WIDTH**-0.5, "groups": groups, "epsilon": EPSILON}
        out, pool = LIGHTNING.on(backend)(*inputs, weights, None, *pools, index, batch, **options)
        return out, (pool,)

    inputs, pools = ((3, heads, WIDTH), (heads * WIDTH,)), (_f32(heads, WIDTH, WIDTH),)
    return Layer("lightning", f"{heads} heads", inputs, weights, pools, heads * WIDTH, call)


def mamba2(heads: int, groups: int) -> Layer:
    """Mamba2 with heads of 64 channels: Nemotron."""
    inner = heads * 64
    channels = inner + 2 * groups * WIDTH
    inputs = ((inner,), (channels,), (heads,))
    weights = Mamba2Weights(_f32(4, channels), _f32(channels), _f32(heads), _f32(heads), _f32(heads), _f32(inner))

    def call(backend: str, inputs: Any, weights: Any, pools: Any, index: int, batch: RaggedBatch) -> Any:
        out, *pools = MAMBA2.on(backend)(*inputs, weights, *pools, index, batch, groups=groups, epsilon=EPSILON)
        return out, tuple(pools)

    return Layer("mamba2", f"{heads} heads", inputs, weights, (_f32(heads, 64, WIDTH), _tail(channels)), inner, call)
