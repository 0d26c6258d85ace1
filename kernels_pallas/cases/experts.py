"""Experts at the sizes of models: tokens that choose at random, several times, so that choices do not repeat.

Few tokens read the weights of the chosen experts and little else; many tokens are limited by arithmetic. Before
anything is timed, some outputs are compared with float32 products. Knows the arguments of the operation, no kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kernels_pallas.cases.case import Case
from kernels_pallas.experts import EXPERTS

TOKENS = (1, 8, 64, 256, 8192)
FEW_TIMES = 3  # times that up to 64 tokens choose: what one leaves in the cache is not what the next reads
TOLERANCE = 1e-2  # relative L2 of the outputs checked
ELEMENT_BYTES = 2

Made = tuple[Callable[..., tuple[Any, ...]], tuple[Any, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """The experts of a layer: model width, experts, experts a token, width of an expert."""

    width: int
    experts: int
    chosen: int
    inner: int

    @property
    def elements(self) -> int:
        """Weights of one expert."""
        return 3 * self.width * self.inner


def cases(backend: str = "gpu") -> list[Case]:
    """Qwen3-Next and Ling-2.6-flash at all numbers of tokens."""
    layers = (Sizes(2048, 512, 10, 512), Sizes(4096, 256, 8, 1024))
    return [experts_case(sizes, tokens, backend) for sizes in layers for tokens in TOKENS]


def experts_case(sizes: Sizes, tokens: int, backend: str) -> Case:
    """The experts of so many tokens; every figure is of all times that they choose.

    Its `make` raises RuntimeError where the backend's outputs are not those of the definition.
    """
    times = FEW_TIMES if tokens <= 64 else 1
    drawn = np.random.default_rng(0).random((times, tokens, sizes.experts)).argsort(-1)[..., : sizes.chosen]
    used = sum(len(np.unique(choices)) for choices in drawn)

    def make() -> Made:
        x, gate_up, down = _random_arguments(sizes, tokens)
        choices = jnp.asarray(drawn, jnp.int32)

        def compute(x: Array, choices: Array, gate_up: Array, down: Array) -> tuple[Array, ...]:
            return tuple(EXPERTS[backend].whole(x, chosen, gate_up, down, _swiglu) for chosen in choices)

        _require_definition(jax.jit(compute)(x, choices[:1], gate_up, down)[0], x, drawn[0], gate_up, down)
        return compute, (x, choices, gate_up, down), ()

    rows = times * tokens * sizes.width
    return Case(
        "experts",
        f"{tokens} tokens, {sizes.chosen} of {sizes.experts} experts of {sizes.width}x{sizes.inner}, {times} times",
        make,
        ELEMENT_BYTES * (used * sizes.elements + rows),
        ELEMENT_BYTES * rows * sizes.chosen,
        2.0 * times * tokens * sizes.chosen * sizes.elements,
    )


def _random_arguments(sizes: Sizes, tokens: int) -> tuple[Array, Array, Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    gate_up = (sizes.experts, sizes.width, 2, sizes.inner)
    x = jax.random.normal(keys[0], (tokens, sizes.width), jnp.bfloat16)
    down = _draw(keys[2], (sizes.experts, sizes.inner, sizes.width), sizes.inner**-0.5)
    return x, _draw(keys[1], gate_up, sizes.width**-0.5), down


def _draw(key: Array, shape: tuple[int, ...], deviation: float) -> Array:
    return jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(deviation))(key)


def _swiglu(gate_up: Array) -> Array:
    gate, up = gate_up[:, 0].astype(jnp.float32), gate_up[:, 1].astype(jnp.float32)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)


def _require_definition(out: Array, x: Array, chosen: np.ndarray, gate_up: Array, down: Array) -> None:
    """Compare the first and the last token's outputs."""
    for token in {0, len(chosen) - 1}:
        for place, expert in enumerate(chosen[token]):
            wanted = _one_expert(x[token], gate_up[expert], down[expert])
            error = float(jnp.linalg.norm(out[token, place].astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted))
            if not error <= TOLERANCE:
                raise RuntimeError(
                    f"wanted experts within {TOLERANCE} of their definition, got {error:.1e} for choice {place} of "
                    f"token {token}: the kernel is wrong here"
                )


@jax.jit
def _one_expert(x: Array, gate_up: Array, down: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        inner = jnp.einsum("d,dcf->cf", x.astype(jnp.float32), gate_up.astype(jnp.float32))
        return _swiglu(inner[None])[0] @ down.astype(jnp.float32)
