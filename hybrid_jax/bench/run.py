"""Runs traffic through an engine or through static batches, and records every token and every step.

Both drive the same compiled programs of one runner. A static batch takes requests in the order of their arrival, reads
all their prompts, and decodes until the longest answer is complete; only then the next batch begins. That is how an
engine without continuous batching works.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from hybrid_jax.bench.traffic import Arrival
from hybrid_jax.buckets import Bucket
from hybrid_jax.config import CHUNK_TOKENS
from hybrid_jax.engine import Engine
from hybrid_jax.request import Request, TokenLogprobs
from hybrid_jax.runner import Padding, Runner, Ticket
from hybrid_jax.scheduler import Limits, Scheduler
from hybrid_jax.step import RowStep, Step, StepResult


@dataclass(frozen=True)
class StepRecord:
    """A step. loops: most tokens that a row drew. padded: tokens that its shape has room for, those of a decode loop in
    each of its loops; real: of them, those of requests that had not ended.

    submit_s: packing and starting it. wait_s: waiting for its results. span_s: from the results of the step before it,
    or from its own start where none ran, to its own results.
    """

    bucket: Bucket
    real: int
    padded: int
    loops: int
    submit_s: float
    wait_s: float
    span_s: float


@dataclass
class Run:
    """What traffic gave: seconds in all, the tokens of each request, and the seconds of its arrival and its tokens."""

    seconds: float = 0.0
    tokens: dict[str, list[int]] = field(default_factory=dict)
    times_s: dict[str, list[float]] = field(default_factory=dict)  # from the request's arrival to each of its tokens
    steps: list[StepRecord] = field(default_factory=list)

    def take(self, arrival: Arrival, tokens: Sequence[int], now_s: float) -> None:
        """Note new tokens of a request, `now_s` after the start."""
        self.tokens.setdefault(arrival.request.id, []).extend(tokens)
        self.times_s.setdefault(arrival.request.id, []).extend([now_s - arrival.at_s] * len(tokens))


class MeasuredDevice:
    """A runner that keeps the time of each step. Programs are compiled in its `submit`, apart from all times."""

    def __init__(self, runner: Runner):
        self._runner = runner
        self._started: deque[tuple[Bucket, float, float]] = deque()
        self._last_s = 0.0
        self.steps: list[StepRecord] = []
        self.compile_s = 0.0
        self.compilations, self.compiled_after_ready = runner.compilations, runner.compiled_after_ready

    def submit(self, step: Step) -> Ticket:
        """As the runner's."""
        runner = self._runner
        bucket = runner.ladders.choose(step)
        begin = time.perf_counter()
        runner.compiled(bucket)
        compiled = time.perf_counter()
        ticket = runner.submit(step)
        self._started.append((bucket, compiled, time.perf_counter() - compiled))
        self.compile_s += compiled - begin
        self.compilations, self.compiled_after_ready = runner.compilations, runner.compiled_after_ready
        return ticket

    def collect(self, ticket: Ticket) -> StepResult:
        """As the runner's."""
        bucket, started, submit_s = self._started.popleft()
        begin = time.perf_counter()
        result = self._runner.collect(ticket)
        end = time.perf_counter()
        drawn = [len(row.tokens) for row in result.rows]
        loops = max(drawn)
        real, padded = (ticket.step.tokens, bucket.tokens) if bucket.tokens else (sum(drawn), bucket.rows * loops)
        span_s = end - max(started, self._last_s)
        self.steps.append(StepRecord(bucket, real, padded, loops, submit_s, end - begin, span_s))
        self._last_s = end
        return result

    def score(self, token_ids: Sequence[int], slot: int, pages: Sequence[int]) -> Float[np.ndarray, "T Y"]:
        """As the runner's."""
        return self._runner.score(token_ids, slot, pages)

    def score_prompt(
        self, token_ids: Sequence[int], asked: int, slot: int, pages: Sequence[int]
    ) -> tuple[TokenLogprobs, ...]:
        """As the runner's."""
        return self._runner.score_prompt(token_ids, asked, slot, pages)

    def reset(self) -> None:
        """As the runner's."""
        self._runner.reset()

    @property
    def padding(self) -> dict[Bucket, Padding]:
        """As the runner's."""
        return self._runner.padding


# ------------------------------------------------------------------------------------------------ continuous batching


def run_continuous(
    scheduler: Scheduler, device: MeasuredDevice, arrivals: Sequence[Arrival], run_ahead: bool = True
) -> Run:
    """All traffic through the engine's own loop."""
    engine, run = Engine(scheduler, device, run_ahead), Run(steps=device.steps)
    coming, known = deque(arrivals), {arrival.request.id: arrival for arrival in arrivals}
    begin = time.perf_counter()
    while coming or engine.unfinished:
        while coming and coming[0].at_s <= time.perf_counter() - begin:
            engine.add(coming.popleft().request)
        if not engine.unfinished:
            _sleep_until(begin + coming[0].at_s)
            continue
        for progress in engine.step():
            run.take(known[progress.request_id], progress.token_ids, time.perf_counter() - begin)
    run.seconds = time.perf_counter() - begin
    return run


def _sleep_until(moment: float) -> None:
    time.sleep(max(moment - time.perf_counter(), 0.0))


# ----------------------------------------------------------------------------------------------------- static batches


def run_static(limits: Limits, pages: int, device: MeasuredDevice, arrivals: Sequence[Arrival]) -> Run:
    """All traffic in static batches of as many requests as have rows and pages.

    Args:
      limits: the schedule's, for rows, tokens of a step and loops. pages: of the pool, the null page included.
    """
    run = Run(steps=device.steps)
    begin = time.perf_counter()
    for batch in _batches(limits, pages, arrivals):
        _sleep_until(begin + batch[-1].at_s)
        flying: deque[Ticket] = deque()
        for step in _batch_steps(limits, [arrival.request for arrival in batch]):
            flying.append(device.submit(step))
            if len(flying) > 1:
                _take_in(run, batch, device, flying.popleft(), begin)
        while flying:
            _take_in(run, batch, device, flying.popleft(), begin)
    run.seconds = time.perf_counter() - begin
    return run


def _take_in(run: Run, batch: Sequence[Arrival], device: MeasuredDevice, ticket: Ticket, begin: float) -> None:
    known = {arrival.request.id: arrival for arrival in batch}
    result = device.collect(ticket)
    for row, done in zip(ticket.step.rows, result.rows, strict=True):
        run.take(known[row.request.id], done.tokens, time.perf_counter() - begin)


def _batches(limits: Limits, pages: int, arrivals: Sequence[Arrival]) -> Iterator[list[Arrival]]:
    batch: list[Arrival] = []
    needed = 0
    for arrival in arrivals:
        own = _page_count(limits, _length(arrival.request))
        if batch and (len(batch) == limits.rows or needed + own > pages - 1):
            yield batch
            batch, needed = [], 0
        batch.append(arrival)
        needed += own
    yield batch


def _page_count(limits: Limits, tokens: int) -> int:
    return -(-tokens // limits.page_size) if limits.keeps_pages else 0


def _length(request: Request) -> int:
    return len(request.prompt_token_ids) + request.token_limit


def _batch_steps(limits: Limits, requests: Sequence[Request]) -> Iterator[Step]:
    """All steps of one batch: first all prompts, then decoding with every row until the longest answer is complete."""
    counts = [_page_count(limits, _length(request)) for request in requests]
    ends = np.cumsum(counts).tolist()
    tables = [tuple(range(1 + end - count, 1 + end)) for end, count in zip(ends, counts, strict=True)]
    yield from _prompt_steps(limits, requests, tables)
    longest = max(request.token_limit for request in requests)
    for drawn in range(1, longest, limits.loops):
        rows = []
        for index, request in enumerate(requests):
            known = min(drawn, request.token_limit)  # a row that has ended stays in the batch
            seen, ahead = len(request.prompt_token_ids) + known - 1, min(limits.loops, request.token_limit - known)
            pages = tables[index][: _page_count(limits, seen + max(ahead, 1))]
            rows.append(_row(index, request, (), (seen, known, ahead), True, pages))
        yield Step(0, tuple(rows), limits.loops)


def _prompt_steps(limits: Limits, requests: Sequence[Request], tables: Sequence[tuple[int, ...]]) -> Iterator[Step]:
    """Steps that read all prompts, each as full as the limit allows; prompts are cut at multiples of the chunk."""
    fed: Counter[int] = Counter()
    left = deque(range(len(requests)))
    while left:
        room, rows = limits.step_tokens, []
        for index in list(left):
            prompt = requests[index].prompt_token_ids
            length = len(prompt) - fed[index]
            length = length if length <= room else room // CHUNK_TOKENS * CHUNK_TOKENS
            if length == 0:
                break
            seen, fed[index], room = fed[index], fed[index] + length, room - length
            draws, pages = fed[index] == len(prompt), tables[index][: _page_count(limits, fed[index])]
            rows.append(_row(index, requests[index], prompt[seen : fed[index]], (seen, 0, 0), draws, pages))
            if draws:
                left.popleft()
        yield Step(0, tuple(rows), 1)


def _row(
    index: int,
    request: Request,
    tokens: tuple[int, ...],
    counts: tuple[int, int, int],
    draws: bool,
    pages: tuple[int, ...],
) -> RowStep:
    """The share of one request. counts: tokens seen, drawn before, and to draw."""
    seen, drawn, ahead = counts
    slot = index + 1
    return RowStep(
        request, slot, tokens, seen, drawn, ahead, draws, slot, slot, 0, 0, pages, fresh=bool(tokens) and seen == 0
    )
