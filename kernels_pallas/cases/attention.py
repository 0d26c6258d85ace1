"""Full attention at the shapes of models: rows in decode by the ops, rows that prefill by their kernels alone.

Pages are scattered over the pool. Before a prefill kernel is timed, some of its outputs are compared with float64
attention over the same pages. Knows the kinds' arguments and the kernels' plans.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kernels_pallas.cases.case import Case
from kernels_pallas.gqa import GQA, GQAWeights
from kernels_pallas.gqa.gpu_prefill import attend_chunks, plan_units
from kernels_pallas.mla import MLA, MLAWeights
from kernels_pallas.mla.gpu_prefill import prefill
from kernels_pallas.op import RaggedBatch, host_batch, take

PAGE, LATENT, ROTATED, PLAIN, VALUE, EPSILON = 64, 512, 64, 128, 128, 1e-6
CONTEXTS = ((1, 8192), (1, 131072), (8, 8192), (64, 8192))  # rows in decode, and what each has seen with this step
GROUPED = ((32, 4, 128), (32, 2, 128), (16, 4, 256), (16, 2, 256))  # query heads, key heads, head width
PROMPTS = ((8192,), (1024,) * 8, (1300, 547, 2048, 963, 271, 3063))
TOLERANCE = 1e-2  # relative L2 of the outputs checked
CHECKED = 8  # tokens whose outputs are checked

Make = Callable[[], tuple[Callable[..., tuple[Any, ...]], tuple[Any, ...], tuple[int, ...]]]


def cases(backend: str = "gpu") -> list[Case]:
    """Decode of all shapes at all contexts, then the prefill kernels."""
    found = [gqa_decode(*shape, *rows, backend) for shape in GROUPED for rows in CONTEXTS]
    found += [mla_decode(heads, *rows, backend) for heads in (32, 64) for rows in CONTEXTS]
    found += [gqa_prefill(*shape, prompts) for shape in (GROUPED[0], GROUPED[2]) for prompts in PROMPTS]
    return found + [mla_prefill(32, prompts) for prompts in PROMPTS]


def gqa_decode(heads: int, key_heads: int, width: int, rows: int, context: int, backend: str) -> Case:
    """A step of rows in decode through one layer of grouped-query attention."""

    def make() -> Any:
        batch = paged_batch((1,) * rows, context - 1, rows)
        q, k, v = (_normal(i, rows, n, width) for i, n in enumerate((heads, key_heads, key_heads)))
        pages = _normal(3, 1, int(batch.pages.max()) + 1, PAGE, key_heads * 2 * width)

        def step(pages: Array, q: Array, k: Array, v: Array, batch: RaggedBatch) -> tuple[Array, Array]:
            options = {"scale": width**-0.5, "epsilon": EPSILON}
            out, pages = GQA.on(backend)(q, k, v, None, GQAWeights(), None, pages, 0, batch, **options)
            return pages, out

        return step, (pages, q, k, v, batch), (0,)

    shape = f"{heads}|{key_heads} heads of {width}, B={rows}, context {context}"
    read = rows * (context * 2 * key_heads + heads) * width * 2
    return Case("gqa decode", shape, make, read, rows * (heads + 2 * key_heads) * width * 2)


def mla_decode(heads: int, rows: int, context: int, backend: str) -> Case:
    """A step of rows in decode through one layer of latent attention, the products with the expansion included."""

    def make() -> Any:
        batch = paged_batch((1,) * rows, context - 1, rows)
        q, latent = _normal(0, rows, heads, PLAIN + ROTATED), _normal(1, rows, LATENT + ROTATED)
        expansion = _normal(2, LATENT, heads, PLAIN + VALUE) * jnp.bfloat16(LATENT**-0.5)
        pages = _normal(3, 1, int(batch.pages.max()) + 1, PAGE, LATENT + ROTATED)

        def step(pages: Array, q: Array, latent: Array, expansion: Array, batch: RaggedBatch) -> tuple[Array, Array]:
            weights = MLAWeights(jnp.ones((LATENT,), jnp.float32), expansion)
            options = {"scale": (PLAIN + ROTATED) ** -0.5, "epsilon": EPSILON}
            out, pages = MLA.on(backend)(q, latent, weights, None, pages, 0, batch, **options)
            return pages, out

        return step, (pages, q, latent, expansion, batch), (0,)

    read = (rows * context * (LATENT + ROTATED) + LATENT * heads * (PLAIN + VALUE)) * 2
    written = rows * (heads * VALUE + LATENT + ROTATED) * 2
    return Case("mla decode", f"{heads} heads, B={rows}, context {context}", make, read, written)


def gqa_prefill(heads: int, key_heads: int, width: int, prompts: tuple[int, ...]) -> Case:
    """The kernel for rows of grouped-query attention that prefill, on pages that hold their tokens."""
    tokens = sum(prompts)

    def make() -> Any:
        batch = paged_batch(prompts, 0, 0)
        q = _normal(0, tokens, heads, width)
        pages = _normal(1, 1, int(batch.pages.max()) + 1, PAGE, key_heads, 2, width)

        def step(q: Array, pages: Array, batch: RaggedBatch) -> tuple[Array]:
            units = plan_units(batch, tokens)
            layer = jnp.zeros((1,), jnp.int32)
            out = attend_chunks(take(q, units.token), batch.pages, units, pages, layer, width**-0.5)
            return (take(out.reshape(-1, heads, width), units.place),)

        def wanted(row: int, position: int, query: np.ndarray) -> np.ndarray:
            cached = _cached(pages, batch, row, position)
            key_head = np.arange(heads) // (heads // key_heads)
            return _dense(query, cached[:, key_head, 0], cached[:, key_head, 1], width**-0.5)

        check(jax.jit(step)(q, pages, batch)[0], q, prompts, wanted)
        return step, (q, pages, batch), ()

    moved = tokens * heads * width * 2
    shape = f"{heads}|{key_heads} heads of {width}, {_words(prompts)}"
    operations = 4.0 * heads * width * _pairs(prompts)
    return Case("gqa prefill kernel", shape, make, moved + tokens * 4 * key_heads * width, moved, operations)


def mla_prefill(heads: int, prompts: tuple[int, ...]) -> Case:
    """The absorbed kernel for rows of latent attention that prefill, on pages that hold their tokens."""
    tokens, width = sum(prompts), LATENT + ROTATED

    def make() -> Any:
        batch = paged_batch(prompts, 0, 0)
        q, pages = _normal(0, tokens, heads, width), _normal(1, 1, int(batch.pages.max()) + 1, PAGE, width)

        def step(q: Array, pages: Array, batch: RaggedBatch) -> tuple[Array]:
            return (prefill(q, pages, jnp.zeros((1,), jnp.int32), batch, width**-0.5, LATENT),)

        def wanted(row: int, position: int, query: np.ndarray) -> np.ndarray:
            cached = np.repeat(_cached(pages, batch, row, position)[:, None], heads, axis=1)
            return _dense(query, cached, cached[..., :LATENT], width**-0.5)

        check(jax.jit(step)(q, pages, batch)[0], q, prompts, wanted)
        return step, (q, pages, batch), ()

    operations = 2.0 * heads * (width + LATENT) * _pairs(prompts)
    read, written = tokens * (heads + 1) * width * 2, tokens * heads * LATENT * 2
    return Case("mla prefill kernel", f"{heads} heads, {_words(prompts)}", make, read, written, operations)


def paged_batch(lengths: tuple[int, ...], seen: int, decodes: int) -> RaggedBatch:
    """Rows of new tokens that have all seen as many, their pages scattered over a pool that holds no others."""
    rows = len(lengths)
    start = np.concatenate([[0], np.cumsum(lengths)])
    needed = -(-(np.asarray(lengths) + seen) // PAGE)
    order = np.random.default_rng(0).permutation(int(needed.sum())) + 1
    table = np.zeros((rows, int(needed.max())), np.int32)
    table[np.arange(table.shape[1])[None, :] < needed[:, None]] = order
    zeros, past = np.zeros(rows, np.int32), np.full(rows, seen, np.int32)
    batch = host_batch(start, past, decodes, (zeros,) * 3, zeros, table, "decode" if decodes else "prefill")
    return jax.tree.map(jnp.asarray, batch)


def check(out: Array, q: Array, prompts: tuple[int, ...], wanted: Callable[[int, int, np.ndarray], np.ndarray]) -> None:
    """Compare some tokens' outputs `[T, H, ...]` with dense attention; `wanted` takes row, position and query.

    Raises ValueError where they are further apart than bfloat16 explains, or where any output is not finite.
    """
    if not bool(jnp.isfinite(out).all()):
        raise ValueError("wanted finite outputs, got others: the kernel is wrong on this device, do not call it")
    starts, rng = np.concatenate([[0], np.cumsum(prompts)]), np.random.default_rng(1)
    got, want = [], []
    for row in rng.integers(0, len(prompts), CHECKED):
        position = int(rng.integers(0, prompts[row]))
        token = int(starts[row]) + position
        got.append(np.asarray(out[token], np.float64))
        want.append(wanted(int(row), position, np.asarray(q[token], np.float64)))
    error = np.linalg.norm(np.subtract(got, want)) / np.linalg.norm(want)
    if not error <= TOLERANCE:
        raise ValueError(
            f"wanted outputs within {TOLERANCE} of dense attention, got {error:.1e}: do not call the kernel"
        )


def _cached(pages: Array, batch: RaggedBatch, row: int, position: int) -> np.ndarray:
    """What the pages hold of a row up to a position, float64."""
    held = np.asarray(pages[0, batch.pages[row, : position // PAGE + 1]], np.float64)
    return held.reshape(-1, *held.shape[2:])[: position + 1]


def _dense(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """One query `[H, D]` over `[s, H, ...]`."""
    scores = np.einsum("hd,shd->hs", q, k) * scale
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hs,shd->hd", shares / shares.sum(-1, keepdims=True), v)


def _pairs(prompts: tuple[int, ...]) -> int:
    """Pairs of a query and a token that it sees."""
    return sum(n * (n + 1) // 2 for n in prompts)


def _words(prompts: tuple[int, ...]) -> str:
    return f"{len(prompts)}x{prompts[0]}" if len(set(prompts)) == 1 else f"ragged {sum(prompts)}"


def _normal(seed: int, *shape: int) -> Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
