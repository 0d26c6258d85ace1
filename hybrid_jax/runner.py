"""Carries out steps on the device: packs what the schedule planned into arrays, and calls the compiled programs.

A program is compiled for each bucket of shapes, before the engine says that it is ready or when it is first met; both
are counted. `submit` only starts a step; `collect` waits for its results, so that steps can be planned while others
run. The runner knows arrays and rows, not queues or text.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from hybrid_jax.buckets import Bucket, Ladders, make_ladders, round_up
from hybrid_jax.cache import allocate
from hybrid_jax.canary import Beliefs, empty_stamps
from hybrid_jax.config import CHUNK_TOKENS
from hybrid_jax.programs import DeviceMemory, Drawn, StepPlan, decode_loop, mixed_step, score, score_following
from hybrid_jax.request import Request, TokenLogprobs
from hybrid_jax.routing import Routing, keeps_pages
from hybrid_jax.row_tables import empty_tables, place_mask, place_nothing, place_row, row_contents
from hybrid_jax.sampling import pack
from hybrid_jax.sharding import OneDevice, Placement
from hybrid_jax.step import RowResult, RowStep, Step, StepResult
from kernels_pallas.op import Content, RaggedBatch, check_batch, host_batch
from models.decoder import Decoder

# On one GPU a whole decode loop is one graph, with its branches and our own kernels: nothing waits for the host, and
# launches that do not need one another run side by side (docs/performance.md).
COMPILER_OPTIONS = {
    "gpu": {
        "xla_gpu_enable_command_buffer": (
            "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
        ),
        "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
        "xla_gpu_graph_min_graph_size": 1,
    }
}


@dataclass(frozen=True)
class RunnerSizes:
    """Sizes of what a runner holds. pages, slots: of the pools, the null unit included. rows: most that run at once.

    row_pages: most pages of a row. step_tokens: most tokens of a step that prefills. loops: most tokens that a row
    draws in a decode loop. grid: tokens between the snapshots that decoding may take. page_size: tokens. canary:
    whether pages and slots are stamped and checked.
    """

    pages: int
    slots: int
    page_size: int
    rows: int
    row_pages: int
    step_tokens: int
    loops: int
    grid: int
    canary: bool


@dataclass(frozen=True)
class Ticket:
    """A step that was started, and where its results will be."""

    step: Step
    drawn: Drawn


@dataclass(frozen=True)
class Padding:
    """Steps of one bucket, and the rows or tokens that were real in them out of all."""

    steps: int
    real: int
    padded: int


class Runner:
    """One model with its weights, its memory on the device, and its compiled programs."""

    def __init__(
        self,
        model: Decoder,
        routing: Routing,
        sizes: RunnerSizes,
        eos_token_ids: Sequence[int],
        precision: str | None,
        placement: Placement | None = None,
    ):
        placement = placement or OneDevice()
        graph, self._state = nnx.split(model)
        self._sizes, self._eos, self._precision = sizes, tuple(eos_token_ids), precision
        self._vocabulary = model.logits_width
        make = partial(_allocate, model, routing, sizes, self._vocabulary)
        self._allocate = partial(placement.allocate, make, model.specs)
        self._memory = self._allocate()
        self.ladders = _ladders(routing, sizes, _chooses_experts(self._state))
        self._mixed = placement.program(partial(mixed_step, graph, page_size=sizes.page_size), model, 3)
        loop = partial(decode_loop, graph, loops=sizes.loops, grid=sizes.grid, page_size=sizes.page_size)
        self._decode = placement.program(loop, model, 2)
        self._score = placement.program(partial(score, graph), model, 2)
        following = partial(score_following, graph, block=CHUNK_TOKENS)
        self._score_following = placement.program(following, model, 3)
        self._scorers: dict[int, Callable[..., Any]] = {}
        self._programs: dict[Bucket, Callable[..., Any]] = {}
        self._padding: dict[Bucket, Padding] = {}
        self._ready = False
        self.compilations = 0
        self.compiled_after_ready = 0

    def compile_all(self, threads: int = 4) -> None:
        """Compile the program of every bucket. From then on, a compilation counts as `compiled_after_ready`."""
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(self._program, self.ladders.all()))
        self._memory = replace(self._memory, tables=place_nothing(self._memory.tables))
        self._ready = True

    def compile_scorers(self) -> None:
        """Compile what `score_prompt` runs; before `compile_all`, for it not to count as compiled after ready."""
        for size in self._score_sizes:
            self._scorer(size)

    def submit(self, step: Step) -> Ticket:
        """Start a step. Its rows must be as `Step` says; every index is checked before it goes to the device.

        If anything interrupts the call, the memory on the device is lost: the next step starts with an empty one.
        """
        bucket = self.ladders.choose(step)
        tokens, batch, plan = self._arrays(step, bucket)
        self._check(step, batch, len(tokens))
        self._count(step, bucket)
        arguments = (batch, plan) if step.decode_only else (tokens, batch, plan)
        try:
            self._place(step)
            self._memory, drawn = self._program(bucket)(self._state, self._memory, *arguments)
        except BaseException:
            self.reset()
            raise
        for array in (drawn.tokens, drawn.count, drawn.reason):
            array.copy_to_host_async()
        return Ticket(step, drawn)

    def collect(self, ticket: Ticket) -> StepResult:
        """Wait for a step and give its results."""
        drawn, rows = ticket.drawn, ticket.step.rows
        tokens, count, reason = (np.asarray(array) for array in (drawn.tokens, drawn.count, drawn.reason))
        if self._sizes.canary:
            _require_familiar(np.asarray(drawn.strange), rows)
        logprobs: tuple[np.ndarray, ...] | None = None
        if any(row.request.params.logprobs is not None for row in rows):
            logprobs = tuple(np.asarray(array) for array in (drawn.logprob, drawn.top, drawn.top_ids))
        results = []
        for index, row in enumerate(rows):
            made = tuple(tokens[: count[index], index].tolist())
            results.append(RowResult(made, int(reason[index]), _row_logprobs(row.request, made, index, logprobs)))
        return StepResult(tuple(results))

    def score(self, token_ids: Sequence[int], slot: int, pages: Sequence[int]) -> np.ndarray:
        """The logits `[T, Y]`, float32, after each of the tokens of one new request, which has a slot and pages."""
        parts: list[np.ndarray] = []
        width, most = round_up(max(len(pages), 1), self.ladders.pages), self._score_sizes[-1]
        for start in range(0, len(token_ids), most):
            piece = token_ids[start : start + most]
            packed = _column(piece, round_up(len(piece), self.ladders.tokens))
            batch = self._lone_batch(len(piece), start, slot, pages, width, len(packed))
            with jax.default_matmul_precision(self._precision):
                self._memory, logits = self._score(self._state, self._memory, packed, batch)
            parts.append(np.asarray(logits)[: len(piece)])
        return np.concatenate(parts)

    def score_prompt(
        self, token_ids: Sequence[int], asked: int, slot: int, pages: Sequence[int]
    ) -> tuple[TokenLogprobs, ...]:
        """The log-probability of each token after the first, with those of the `asked` likeliest ones at its place."""
        found: list[TokenLogprobs] = []
        most, width = self._score_sizes[-1], self.ladders.pages[-1]
        for start in range(0, len(token_ids), most):
            piece, following = token_ids[start : start + most], token_ids[start + 1 : start + most + 1]
            size = round_up(len(piece), self._score_sizes)
            batch = self._lone_batch(len(piece), start, slot, pages, width, size)
            arguments = (_column(piece, size), _column(following, size), batch)
            self._memory, logprobs = self._scorer(size)(self._state, self._memory, *arguments)
            chosen, top, ids = (np.asarray(array)[: len(following)] for array in logprobs)
            listed = zip(following, chosen.tolist(), ids[:, :asked].tolist(), top[:, :asked].tolist(), strict=True)
            found += [TokenLogprobs(one, value, tuple(zip(i, v, strict=True))) for one, value, i, v in listed]
        return tuple(found)

    @property
    def _score_sizes(self) -> tuple[int, ...]:
        """Packed tokens of the programs that score: two at most, as each is compiled before it is needed."""
        most = max(self._sizes.step_tokens // CHUNK_TOKENS, 1)
        return tuple(sorted({max(most // 8, min(most, 8)) * CHUNK_TOKENS, most * CHUNK_TOKENS}))

    def _lone_batch(
        self, length: int, seen: int, slot: int, pages: Sequence[int], width: int, size: int
    ) -> RaggedBatch:
        """The batch of a piece of one request that nobody else runs beside."""
        table = np.zeros((1, width), np.int32)
        table[0, : len(pages)] = pages
        one, none = np.array([slot]), np.zeros(1)
        batch = host_batch(np.array([0, length]), np.array([seen]), 0, (one, one, none), none, table, "mixed")
        check_batch(batch, size, self._sizes.slots, self._sizes.pages, self._sizes.page_size)
        return batch

    def reset(self) -> None:
        """Start again with an empty memory. The old one goes first: there is no room for both."""
        for array in jax.tree.leaves(self._memory):
            array.delete()  # and not the attribute: where the new one fails, this can be called again
        self._memory = self._allocate()

    @property
    def padding(self) -> dict[Bucket, Padding]:
        """What each bucket was used for."""
        return dict(self._padding)

    def compiled(self, bucket: Bucket) -> Any:
        """The compiled program of a bucket, to be looked at."""
        return self._program(bucket)

    # ------------------------------------------------------------------------------------------------------ programs

    def _program(self, bucket: Bucket) -> Callable[..., Any]:
        found = self._programs.get(bucket)
        if found is None:
            arguments = self._empty_arguments(bucket)
            function = self._mixed if bucket.tokens else self._decode
            with jax.default_matmul_precision(self._precision):
                lowered = function.lower(self._state, self._memory, *arguments)
                found = lowered.compile(compiler_options=COMPILER_OPTIONS.get(jax.default_backend()))
            self._programs[bucket] = found
            self.compilations += 1
            self.compiled_after_ready += self._ready
        return found

    def _scorer(self, size: int) -> Callable[..., Any]:
        found = self._scorers.get(size)
        if found is None:
            batch = self._lone_batch(0, 0, 0, (), self.ladders.pages[-1], size)
            with jax.default_matmul_precision(self._precision):
                tokens = np.zeros(size, np.int32)
                lowered = self._score_following.lower(self._state, self._memory, tokens, tokens, batch)
                found = lowered.compile(compiler_options=COMPILER_OPTIONS.get(jax.default_backend()))
            self._scorers[size] = found
            self.compilations += 1
            self.compiled_after_ready += self._ready
        return found

    def _empty_arguments(self, bucket: Bucket) -> tuple[Any, ...]:
        tokens, batch, plan = self._arrays(Step(0, (), 1), bucket)
        return (tokens, batch, plan) if bucket.tokens else (batch, plan)

    # -------------------------------------------------------------------------------------------------------- arrays

    def _arrays(self, step: Step, bucket: Bucket) -> tuple[np.ndarray, RaggedBatch, StepPlan]:
        rows, count = step.rows, bucket.rows
        lengths = _column([max(len(row.tokens), 1) for row in rows], count)
        start = np.concatenate([[0], np.cumsum(lengths)])
        tokens = np.zeros(bucket.tokens or count, np.int32)
        for row, first in zip(rows, start, strict=False):
            tokens[first : first + len(row.tokens)] = row.tokens
        pages = np.zeros((count, bucket.pages), np.int32)
        for index, row in enumerate(rows):
            pages[index, : len(row.pages)] = row.pages
        slots = (
            _column([row.read_slot for row in rows], count),
            _column([row.write_slot for row in rows], count),
            _column([row.snapshot_slot for row in rows], count),
        )
        seen = _column([row.seen for row in rows], count)
        snapshot_length = _column([row.snapshot_length for row in rows], count)
        decodes = step.decodes if bucket.tokens else count
        content: Content = "mixed" if bucket.tokens else "decode"
        batch = host_batch(start, seen, decodes, slots, snapshot_length, pages, content, bucket.prefills)
        return tokens, batch, self._plan(rows, bucket)

    def _plan(self, rows: Sequence[RowStep], bucket: Bucket) -> StepPlan:
        count = bucket.rows
        requests, drawn = [row.request for row in rows], [row.drawn for row in rows]
        sampling = pack(requests, drawn, count, self._eos, [row.row for row in rows])
        return StepPlan(
            sampling,
            _column([row.draws for row in rows], count).astype(bool),
            _column([row.ahead for row in rows], count),
            _beliefs(rows, bucket) if self._sizes.canary else None,
            bucket.likeliest,
        )

    def _check(self, step: Step, batch: RaggedBatch, tokens: int) -> None:
        """Check all that the step may touch: a decode loop goes further than its first token."""
        if step.decode_only:
            ahead = np.zeros_like(batch.seen)
            ahead[: len(step.rows)] = [row.ahead - 1 for row in step.rows]
            batch = replace(batch, seen=batch.seen + ahead)
        check_batch(batch, tokens, self._sizes.slots, self._sizes.pages, self._sizes.page_size)

    def _place(self, step: Step) -> None:
        """Put what a fresh row brings along into the tables, where its logits are shaped by it."""
        for row in step.rows:
            request = row.request
            if row.fresh and request.shaped:
                contents = row_contents(request.params, request.prompt_token_ids, row.placed, self._vocabulary)
                tables = place_row(self._memory.tables, row.row, *contents)
                self._memory = replace(self._memory, tables=tables)
            if row.draws and request.constraint is not None:
                tables = place_mask(self._memory.tables, row.row, request.constraint.mask(), request.params)
                self._memory = replace(self._memory, tables=tables)

    def _count(self, step: Step, bucket: Bucket) -> None:
        real, padded = (step.tokens, bucket.tokens) if bucket.tokens else (len(step.rows), bucket.rows)
        old = self._padding.get(bucket, Padding(0, 0, 0))
        self._padding[bucket] = Padding(old.steps + 1, old.real + real, old.padded + padded)


def _allocate(model: Decoder, routing: Routing, sizes: RunnerSizes, vocabulary: int) -> DeviceMemory:
    cache = allocate(model.specs, routing, sizes.pages, sizes.slots, sizes.page_size)
    stamps = empty_stamps(sizes.pages, sizes.slots) if sizes.canary else None
    return DeviceMemory(cache, empty_tables(sizes.rows + 1, vocabulary), stamps)


def _ladders(routing: Routing, sizes: RunnerSizes, chooses_experts: bool) -> Ladders:
    """On a GPU, loops of the likeliest tokens have programs of their own, and loops without experts have two rows or
    more: XLA takes three launches for the norm of one row and one for those of two. A row of padding would choose
    experts, whose weights would be read for nothing.
    """
    gathers = any(keeps_pages(route) and route.backend == "xla" for route in routing.routes)
    gpu = _is_gpu()
    least_rows = 2 if gpu and not chooses_experts else 1
    return make_ladders(sizes.rows, sizes.step_tokens, sizes.row_pages, not gathers, gpu, least_rows)


def _is_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _chooses_experts(state: nnx.State) -> bool:
    leaves = [leaf for path, leaf in nnx.to_flat_state(state) if path[0] == "layers"]
    return any("expert" in leaf.get_metadata("axes") for leaf in leaves)


def _column(values: Sequence[int], count: int) -> np.ndarray:
    """One entry per row, zeros for padding."""
    column = np.zeros(count, np.int32)
    column[: len(values)] = values
    return column


def _beliefs(rows: Sequence[RowStep], bucket: Bucket) -> Beliefs:
    owners = np.zeros((bucket.rows, bucket.pages), np.int32)
    for index, row in enumerate(rows):
        owners[index, : len(row.page_owners)] = row.page_owners
    own, state = [row.owner for row in rows], [row.state_owner for row in rows]
    return Beliefs(_column(own, bucket.rows), _column(state, bucket.rows), owners)


def _require_familiar(strange: np.ndarray, rows: Sequence[RowStep]) -> None:
    found = [row.request.id for row, is_strange in zip(rows, strange, strict=False) if is_strange]
    if found:
        raise RuntimeError(
            f"canary: wanted pages and states that requests {', '.join(found)} or those before them wrote, got others: "
            "the schedule gave out a page or a slot twice, or too early; this is a fault of the engine"
        )


def _row_logprobs(
    request: Request, tokens: tuple[int, ...], row: int, logprobs: tuple[np.ndarray, ...] | None
) -> tuple[TokenLogprobs, ...]:
    asked = request.params.logprobs
    if asked is None or logprobs is None:
        return ()
    chosen, top, ids = logprobs
    return tuple(
        TokenLogprobs(
            token,
            float(chosen[loop, row]),
            tuple(zip(ids[loop, row, :asked].tolist(), top[loop, row, :asked].tolist(), strict=True)),
        )
        for loop, token in enumerate(tokens)
    )
