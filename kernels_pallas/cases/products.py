"""Products of few rows with the matrices of a model, which read weights and little else: XLA computes them.

Each case multiplies by several matrices in turn, so that none is found in the cache, with rows of their own, so that
no two products become one. Weights of one byte are widened in the product and scaled by output channel after it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.cases.case import Case

ROWS = (1, 8, 64)
LEAST_BYTES = 200_000_000  # of the matrices of a case: four times the cache of an H100


@dataclass(frozen=True)
class Matrix:
    """What it is, and its inputs and outputs."""

    name: str
    inputs: int
    outputs: int


MATRICES = (
    Matrix("large", 4096, 24576),
    Matrix("gate and up", 2560, 18432),
    Matrix("down", 9216, 2560),
    Matrix("delta rule's inputs", 2560, 12288),
    Matrix("attention's inputs", 2560, 8192),
    Matrix("output", 4096, 2560),
)


def cases() -> list[Case]:
    """A large matrix and those of Qwen3.5-4B in bfloat16, one of them in int8 and FP8 too."""
    plain = [product_case(matrix, rows, "bfloat16") for matrix in MATRICES for rows in ROWS]
    small = [product_case(MATRICES[1], rows, dtype) for dtype in ("int8", "float8_e4m3fn") for rows in ROWS]
    return plain + small


def product_case(matrix: Matrix, rows: int, dtype: str) -> Case:
    """So many rows times each of several such matrices; every figure is of all of them."""
    size = matrix.inputs * matrix.outputs
    weight_bytes = size * jnp.dtype(dtype).itemsize
    times = -(-LEAST_BYTES // weight_bytes)

    def make() -> tuple[Callable[..., tuple[Any, ...]], tuple[Any, ...], tuple[int, ...]]:
        keys = jax.random.split(jax.random.key(0), times)
        weights = tuple(_weights(key, matrix, dtype) for key in keys)
        xs = tuple(jax.random.normal(key, (rows, matrix.inputs), jnp.bfloat16) for key in keys)
        return multiply_all, (xs, weights), ()

    return Case(
        f"product {dtype}",
        f"{matrix.name}, {rows} x {matrix.inputs} x {matrix.outputs}, {times} in turn",
        make,
        times * (weight_bytes + 2 * rows * matrix.inputs),
        times * 2 * rows * matrix.outputs,
        2.0 * times * rows * size,
    )


def multiply_all(
    xs: tuple[Float[Array, "B D"], ...], weights: tuple[tuple[Array, Float[Array, "F"] | None], ...]
) -> tuple[Float[Array, "B F"], ...]:
    """Each `x W`, with the scale of each output channel where there is one."""
    return tuple(_multiply(x, *weight) for x, weight in zip(xs, weights, strict=True))


def _multiply(x: Array, weight: Array, scale: Array | None) -> Array:
    if scale is None:
        return x @ weight
    return (jnp.dot(x, weight.astype(x.dtype), preferred_element_type=jnp.float32) * scale[None]).astype(x.dtype)


def _weights(key: jax.Array, matrix: Matrix, dtype: str) -> tuple[Array, Array | None]:
    shape = matrix.inputs, matrix.outputs
    if dtype == "int8":
        return jax.random.randint(key, shape, -127, 128, jnp.int8), jnp.full(matrix.outputs, 1e-3)
    values = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16).astype(dtype))(key)
    return values, None if dtype == "bfloat16" else jnp.full(matrix.outputs, 0.1)
