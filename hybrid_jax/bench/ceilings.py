"""What the device can do at most, measured: bandwidth of reading and of copying, and the rate of a matrix product.

Floors of steps and kernels are computed from these, never from a data sheet.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

CALLS = 10  # one after another without a wait between them, so that starting them costs nothing
ROUNDS = 5


@dataclass(frozen=True)
class Size:
    """Numbers of the array that is read, rows and columns of the matrices that are multiplied, dtype of both."""

    numbers: int
    width: int
    dtype: str


DEVICE = Size(2**30, 8192, "bfloat16")  # 2 GiB: far beyond any cache
CPU = Size(2**25, 1024, "float32")  # which a CPU computes in, whatever is stored


@dataclass(frozen=True)
class Ceilings:
    """Of one device: bytes a second read, bytes a second read and written by a copy, operations a second."""

    device: str
    read: float
    copy: float
    products: float
    dtype: str

    @property
    def description(self) -> str:
        """All in one line."""
        return (
            f"{self.device}, JAX {jax.__version__}: read {self.read / 1e9:,.0f} GB/s, copy "
            f"{self.copy / 1e9:,.0f} GB/s, {self.dtype} products {self.products / 1e12:,.2f} TFLOP/s"
        )

    def floor_s(self, read_bytes: float, written_bytes: float = 0.0, operations: float = 0.0) -> float:
        """Seconds that so many bytes and operations take at least, where moving and computing overlap.

        What is written moves at the speed of a copy together with as many bytes read; other reads at that of reading.
        """
        copied = 2 * min(read_bytes, written_bytes)
        rest = read_bytes + written_bytes - copied
        return max(copied / self.copy + rest / self.read, operations / self.products)


def measure_ceilings(size: Size | None = None) -> Ceilings:
    """Measure the first device. `size` None: large arrays, and smaller ones on a CPU."""
    size = size or (CPU if jax.default_backend() == "cpu" else DEVICE)
    wide = jax.random.normal(jax.random.key(0), (size.numbers,), size.dtype)
    read = wide.nbytes / call_s(jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32)), wide)
    copy = 2 * wide.nbytes / call_s(jax.jit(lambda x: -x), wide)
    del wide
    square = jax.random.normal(jax.random.key(1), (size.width, size.width), size.dtype)
    products = 2 * size.width**3 / call_s(jax.jit(lambda x: x @ x), square)
    return Ceilings(jax.devices()[0].device_kind, read, copy, products, size.dtype)


def call_s(function: Callable[[jax.Array], jax.Array], array: jax.Array) -> float:
    """Seconds a call of a compiled function, median over rounds of several calls in a row."""
    function(array).block_until_ready()
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            last = function(array)
        last.block_until_ready()
        seconds.append((time.perf_counter() - begin) / CALLS)
    return statistics.median(seconds)
