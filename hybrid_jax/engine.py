"""Runs requests that start together: prompts first, packed into prefill steps, then all rows decode to their end.

Each request holds one slot and the pages of its whole length from the start. Shapes are rounded up to powers of two, so
that few programs are compiled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hybrid_jax.config import CHUNK_TOKENS, EngineConfig
from hybrid_jax.request import FINISH_REASONS, FinishReason, Request
from hybrid_jax.runner import Runner
from hybrid_jax.sampling import SamplingRows, pack
from kernels_pallas.op import Content, RaggedBatch, host_batch


@dataclass(frozen=True)
class Progress:
    """New tokens of one row, and why it ended if it did."""

    row: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


class Engine:
    """Requests on their way, one row each. `step` until nothing is `unfinished`."""

    def __init__(self, runner: Runner, config: EngineConfig, requests: Sequence[Request], eos_token_ids: Sequence[int]):
        if not 0 < len(requests) <= config.max_num_seqs:
            raise ValueError(
                f"wanted 1 to max_num_seqs={config.max_num_seqs} requests, got {len(requests)}: split them"
            )
        self._runner, self._config = runner, config
        self._requests, self._eos = list(requests), tuple(eos_token_ids)
        self._rows = power_of_two(len(requests))
        self._seen = np.zeros(self._rows, np.int32)
        self._newest = np.zeros(self._rows, np.int32)
        self._sampled = np.zeros(self._rows, np.int32)
        self._running = np.arange(self._rows) < len(requests)
        self._pages = _page_table(self._requests, self._rows, config.page_size)

    @property
    def unfinished(self) -> bool:
        """Whether any row still runs."""
        return bool(self._running.any())

    def stop(self, row: int) -> None:
        """End a row: it generates nothing more."""
        self._running[row] = False

    def step(self) -> list[Progress]:
        """One dispatch to the device; the rows that made progress."""
        missing = np.array([len(r.prompt_token_ids) for r in self._requests]) - self._seen[: len(self._requests)]
        waiting = (missing > 0) & self._running[: len(self._requests)]
        return self._prefill(np.where(waiting, missing, 0)) if waiting.any() else self._decode()

    def _prefill(self, missing: np.ndarray) -> list[Progress]:
        lengths = np.zeros(self._rows, np.int32)
        lengths[: len(missing)] = cut_prompts(missing, self._config.max_num_batched_tokens)
        parts = [
            self._requests[row].prompt_token_ids[self._seen[row] :][: lengths[row]] for row in np.flatnonzero(lengths)
        ]
        tokens = np.zeros(max(CHUNK_TOKENS, power_of_two(int(lengths.sum()))), np.int32)
        tokens[: lengths.sum()] = np.concatenate(parts)
        token, reason = self._runner.prefill(tokens, self._batch(lengths, "prefill"), self._sampling())
        self._seen += lengths
        done = [row for row in np.flatnonzero(lengths).tolist() if lengths[row] == missing[row]]
        return [self._record(row, token[row : row + 1], reason[row]) for row in done]

    def _decode(self) -> list[Progress]:
        batch = self._batch(self._running.astype(np.int32), "decode")
        made, count, reason = self._runner.decode(self._newest, batch, self._sampling(), self._config.decode_steps)
        rows = np.flatnonzero(self._running).tolist()
        self._seen += count
        return [self._record(row, made[: count[row], row], reason[row]) for row in rows]

    def _record(self, row: int, tokens: np.ndarray, reason: int) -> Progress:
        finish_reason = FINISH_REASONS[reason]
        self._running[row] = finish_reason is None
        self._sampled[row] += len(tokens)
        self._newest[row] = tokens[-1]
        kept = tokens[:-1] if finish_reason == "error" else tokens  # an error drew no token
        return Progress(row, tuple(kept.tolist()), finish_reason)

    def _sampling(self) -> SamplingRows:
        return pack(self._requests, self._sampled[: len(self._requests)].tolist(), self._rows, self._eos)

    def _batch(self, lengths: np.ndarray, content: Content) -> RaggedBatch:
        slot = np.where(lengths > 0, np.arange(1, self._rows + 1), 0)
        none = np.zeros(self._rows)
        start = np.concatenate([[0], np.cumsum(lengths)])
        decodes = self._rows if content == "decode" else 0
        return host_batch(start, self._seen, decodes, (slot, slot, none), none, self._pages, content)


def cut_prompts(missing: np.ndarray, budget: int) -> np.ndarray:
    """How many tokens of each prompt go into a step of `budget` tokens; a prompt is cut at multiples of a chunk only.

    In order of the rows, as many as fit. `budget` is a multiple of the chunk, so that at least one prompt advances.
    """
    lengths = np.zeros_like(missing)
    for row, count in enumerate(missing):
        room = budget - int(lengths.sum())
        lengths[row] = count if count <= room else room // CHUNK_TOKENS * CHUNK_TOKENS
    return lengths


def power_of_two(count: int) -> int:
    """The least power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()


def _page_table(requests: Sequence[Request], rows: int, page_size: int) -> np.ndarray:
    """Pages for the whole length of each request, from page 1 on; 0 where a row needs none."""
    needed = [-(-(len(r.prompt_token_ids) + r.token_limit) // page_size) for r in requests]
    table = np.zeros((rows, power_of_two(max(needed))), np.int32)
    first = 1
    for row, count in enumerate(needed):
        table[row, :count] = np.arange(first, first + count)
        first += count
    return table


def score(runner: Runner, config: EngineConfig, tokens: Sequence[int]) -> np.ndarray:
    """The logits `[T, Y]`, float32, after each of the tokens of one new request."""
    pages = -(-len(tokens) // config.page_size)
    table = np.zeros((1, power_of_two(pages)), np.int32)
    table[0, :pages] = np.arange(1, pages + 1)
    one, none = np.ones(1), np.zeros(1)
    parts: list[np.ndarray] = []
    seen = 0
    while seen < len(tokens):
        length = int(cut_prompts(np.array([len(tokens) - seen]), config.max_num_batched_tokens)[0])
        packed = np.zeros(max(CHUNK_TOKENS, power_of_two(length)), np.int32)
        packed[:length] = tokens[seen : seen + length]
        start = np.array([0, length])
        batch = host_batch(start, np.array([seen]), 0, (one, one, none), none, table, "prefill")
        parts.append(runner.score(packed, batch)[:length])
        seen += length
    return np.concatenate(parts)
