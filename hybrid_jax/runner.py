"""Runs a model on the device: three compiled programs that hold the model and the sampling, with the cache donated.

`prefill` takes packed tokens and samples one token for each row, `decode` generates up to N tokens per row in a loop on
the device, `score` gives the logits of every token. The runner knows arrays and rows, not requests or text.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from hybrid_jax.cache import allocate
from hybrid_jax.request import RUNNING
from hybrid_jax.routing import Routing
from hybrid_jax.sampling import SamplingRows, finished, sample
from kernels_pallas.op import Cache, RaggedBatch, check_batch
from models.decoder import Decoder


class Runner:
    """One model with its weights, its cache and its compiled programs."""

    def __init__(self, model: Decoder, routing: Routing, pages: int, slots: int, page_size: int, precision: str | None):
        graph, self._state = nnx.split(model)
        self._pages, self._slots, self._page_size = pages, slots, page_size
        self._precision = precision
        self._empty_cache = partial(allocate, model.specs, routing, pages, slots, page_size)
        self._cache = self._empty_cache()
        self._prefill = jax.jit(partial(_prefill, graph), donate_argnums=(1,))
        self._decode = jax.jit(partial(_decode, graph), static_argnames=("steps",), donate_argnums=(1,))
        self._score = jax.jit(partial(_score, graph), donate_argnums=(1,))

    def prefill(self, tokens: np.ndarray, batch: RaggedBatch, rows: SamplingRows) -> tuple[np.ndarray, np.ndarray]:
        """Run packed tokens `[T]`; the next token and the end reason of each row `[B]`."""
        self._check(batch, len(tokens))
        token, reason = self._run(self._prefill, tokens, batch, rows)
        return token, reason

    def decode(
        self, tokens: np.ndarray, batch: RaggedBatch, rows: SamplingRows, steps: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Generate from each row's newest token `[B]`: tokens `[steps, B]`, each row's count and end reason `[B]`."""
        ahead = np.maximum(np.minimum(steps, rows.token_limit - rows.sampled) - 1, 0)
        self._check(replace(batch, seen=batch.seen + np.where(np.diff(batch.query_start) > 0, ahead, 0)), len(tokens))
        made, count, reason = self._run(partial(self._decode, steps=steps), tokens, batch, rows)
        return made, count, reason

    def score(self, tokens: np.ndarray, batch: RaggedBatch) -> np.ndarray:
        """The logits `[T, Y]`, float32, of every packed token."""
        self._check(batch, len(tokens))
        (logits,) = self._run(self._score, tokens, batch)
        return logits

    def _run(self, program: Callable[..., tuple[Any, ...]], *arguments: Any) -> list[np.ndarray]:
        """Call a program, which takes the cache and gives it back as the last result; the other results on the host.

        If anything interrupts the call, the donated cache is lost: what the requests had in it is gone, and the next
        call starts with an empty one.
        """
        try:
            with jax.default_matmul_precision(self._precision):
                *results, self._cache = program(self._state, self._cache, *arguments)
            return [np.asarray(result) for result in results]
        except BaseException:
            self._cache = self._empty_cache()
            raise

    def compiled_decode(self, tokens: np.ndarray, batch: RaggedBatch, rows: SamplingRows, steps: int) -> Any:
        """The compiled decode program for these shapes, to be looked at."""
        with jax.default_matmul_precision(self._precision):
            return self._decode.lower(self._state, self._cache, tokens, batch, rows, steps=steps).compile()

    def _check(self, batch: RaggedBatch, tokens: int) -> None:
        check_batch(batch, tokens, self._slots, self._pages, self._page_size)


def _prefill(
    graph: nnx.GraphDef[Decoder],
    state: nnx.State,
    cache: Cache,
    tokens: Int[Array, "T"],
    batch: RaggedBatch,
    rows: SamplingRows,
) -> tuple[Int[Array, "B"], Int[Array, "B"], Cache]:
    model = nnx.merge(graph, state)
    hidden, cache = model(tokens, cache, batch)
    newest = hidden[jnp.maximum(batch.query_start[1:] - 1, 0)]
    token = sample(model.logits(newest), rows)
    return token, finished(token, rows)[1], cache


def _score(
    graph: nnx.GraphDef[Decoder], state: nnx.State, cache: Cache, tokens: Int[Array, "T"], batch: RaggedBatch
) -> tuple[Float[Array, "T Y"], Cache]:
    model = nnx.merge(graph, state)
    hidden, cache = model(tokens, cache, batch)
    return model.logits(hidden), cache


def _decode(
    graph: nnx.GraphDef[Decoder],
    state: nnx.State,
    cache: Cache,
    tokens: Int[Array, "B"],
    batch: RaggedBatch,
    rows: SamplingRows,
    *,
    steps: int,
) -> tuple[Int[Array, "N B"], Int[Array, "B"], Int[Array, "B"], Cache]:
    """Up to `steps` tokens per row. A row that is done is absent from then on: it writes neither pages nor states."""
    model = nnx.merge(graph, state)
    made = jnp.zeros((steps, batch.rows), jnp.int32)
    reason = jnp.where(batch.lengths > 0, RUNNING, RUNNING - 1)  # a row that never ran has no reason to end

    def unfinished(carry: tuple[Any, ...]) -> Array:
        index, _, _, _, reason, _ = carry
        return (index < steps) & jnp.any(reason == RUNNING)

    def one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        index, newest, made, count, reason, cache = carry
        running = reason == RUNNING
        step = _only(batch, running, count)
        packed = (
            jnp.zeros_like(newest).at[jnp.where(running, step.query_start[:-1], batch.rows)].set(newest, mode="drop")
        )
        hidden, cache = model(packed, cache, step)
        now = rows.advanced(count)
        token = sample(model.logits(hidden[jnp.minimum(step.query_start[:-1], batch.rows - 1)]), now)
        made = made.at[index].set(jnp.where(running, token, 0))
        reason = jnp.where(running, finished(token, now)[1], reason)
        return index + 1, jnp.maximum(token, 0), made, count + running.astype(jnp.int32), reason, cache

    start = (jnp.int32(0), tokens, made, jnp.zeros_like(tokens), reason, cache)
    _, _, made, count, reason, cache = jax.lax.while_loop(unfinished, one, start)
    return made, count, jnp.maximum(reason, RUNNING), cache


def _only(batch: RaggedBatch, running: Array, count: Int[Array, "B"]) -> RaggedBatch:
    """The batch of the rows that still run, each with its one newest token, after `count` tokens in this loop."""
    start = jnp.cumsum(running.astype(jnp.int32), dtype=jnp.int32)
    return replace(
        batch,
        query_start=jnp.concatenate([jnp.zeros((1,), jnp.int32), start]),
        seen=batch.seen + count,
        read_slot=jnp.where(running & (count > 0), batch.write_slot, batch.read_slot),
        decodes=jnp.int32(batch.rows),
        content="decode",
    )
