"""The loop: plans a step, starts it, and takes in the results of the step before, while the device works.

The one place where the schedule, which knows no device, meets the runner, which knows no queue. Requests may be added
and aborted at any time between two calls of `step`.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
from jax.errors import JaxRuntimeError
from jaxtyping import Float

from hybrid_jax.buckets import Bucket
from hybrid_jax.prefix_cache import CACHE
from hybrid_jax.request import Request, TokenLogprobs
from hybrid_jax.runner import Padding, Ticket
from hybrid_jax.scheduler import Scheduler
from hybrid_jax.stats import BucketUse, Stats, Units
from hybrid_jax.step import Progress, Step, StepResult

log = logging.getLogger("hybrid_jax.engine")
SCORER = "score"  # who holds the slot and the pages while logits are computed
EXHAUSTED = "RESOURCE_EXHAUSTED"  # how the device says that its memory is full
REMEMBERED_STEPS = 128  # over which times are averaged


class Device(Protocol):
    """What the engine asks of a runner."""

    compilations: int
    compiled_after_ready: int

    def submit(self, step: Step) -> Ticket:
        """Start a step."""

    def collect(self, ticket: Ticket) -> StepResult:
        """Wait for its results."""

    def score(self, token_ids: Sequence[int], slot: int, pages: Sequence[int]) -> Float[np.ndarray, "T Y"]:
        """The logits of every token of a new request."""

    def score_prompt(
        self, token_ids: Sequence[int], asked: int, slot: int, pages: Sequence[int]
    ) -> tuple[TokenLogprobs, ...]:
        """The log-probabilities of the tokens of a new request."""

    def reset(self) -> None:
        """Lose all memory."""

    @property
    def padding(self) -> dict[Bucket, Padding]:
        """What each bucket was used for."""


class Engine:
    """Requests in, progress out; `step` until nothing is `unfinished`."""

    def __init__(self, scheduler: Scheduler, device: Device, run_ahead: bool):
        self.scheduler = scheduler
        self._device = device
        self._ahead = int(run_ahead)
        self._flying: deque[Ticket] = deque()
        self._times: deque[tuple[float, float, float]] = deque(maxlen=REMEMBERED_STEPS)
        self._steps = self._generated = self._prompted = 0
        self._started_over = False  # and no step was done since

    def add(self, request: Request) -> None:
        """Put a request in line. Raises as `Scheduler.add`, and for an id that stands for a part of the engine."""
        if request.id in (CACHE, SCORER):
            raise ValueError(f"wanted a request id other than {CACHE!r} and {SCORER!r}, got it: take another")
        self.scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        """End a request; whether it was there."""
        return self.scheduler.abort(request_id)

    @property
    def unfinished(self) -> bool:
        """Whether anything waits, runs or is still to come back from the device."""
        return self.scheduler.unfinished or bool(self._flying)

    def step(self) -> list[Progress]:
        """Start a step if one can run, and take in the oldest that is due.

        Where the device runs out of memory, all that runs goes back in line, once: it starts again on a device that was
        emptied, and nothing is lost. If that happens again before a step is done, or if anything else interrupts this,
        every request is dropped and the memory on the device is new.
        """
        try:
            return self._step(time.perf_counter())
        except JaxRuntimeError as error:
            if self._started_over or not str(error).startswith(EXHAUSTED):
                self.reset()
                raise
            self._start_over(error)
            return []
        except BaseException:
            self.reset()
            raise

    def _step(self, begin: float) -> list[Progress]:
        step = self.scheduler.schedule()
        if step is not None:
            self._flying.append(self._device.submit(step))
        elif not self._flying and self.scheduler.unfinished:
            raise RuntimeError("the schedule has requests, and nothing that can run: this is a fault of the engine")
        due = bool(self._flying) and (step is None or len(self._flying) > self._ahead)
        return self._collect(begin) if due else []

    def _start_over(self, error: JaxRuntimeError) -> None:
        log.warning(f"the device ran out of memory; {len(self.scheduler.running)} requests start again: {error}")
        self._started_over = True
        try:
            self._flying.clear()
            self.scheduler.start_over()
            self._device.reset()
        except BaseException:
            self.reset()
            raise

    def reset(self) -> list[str]:
        """Drop every request and start with an empty memory; the ids of the dropped."""
        self._flying.clear()
        dropped = self.scheduler.reset()
        self._device.reset()
        return dropped

    def score(self, token_ids: Sequence[int]) -> Float[np.ndarray, "T Y"]:
        """The logits `[T, Y]`, float32, after each of the tokens. Raises ValueError where the pools are too full.

        If anything interrupts this, every request is dropped and the memory on the device is new, as in `step`.
        """
        return self._in_room(len(token_ids), partial(self._device.score, token_ids))

    def score_prompt(self, token_ids: Sequence[int], asked: int) -> tuple[TokenLogprobs, ...]:
        """The log-probability of each token after the first, with those of the `asked` likeliest ones at its place.

        Everything is computed anew: the prefix cache is neither read nor filled. Raises as `score`.
        """
        return self._in_room(len(token_ids), partial(self._device.score_prompt, token_ids, asked))

    def has_room(self, tokens: int) -> bool:
        """Whether so many tokens could be scored now."""
        cache = self.scheduler.cache
        return bool(cache.available_slots) and cache.available_pages >= self.scheduler.page_count(tokens)

    def _in_room[Scores](self, tokens: int, work: Callable[[int, list[int]], Scores]) -> Scores:
        """What `work` gives for a slot and pages of its own."""
        scheduler, cache = self.scheduler, self.scheduler.cache
        needed = scheduler.page_count(tokens)
        if not self.has_room(tokens):
            raise ValueError(f"wanted room for {tokens} tokens beside those that run, got none: wait")
        try:
            slot = cache.take_slot(SCORER)
            pages = [page for _ in range(needed) if (page := cache.take_page(SCORER)) is not None]
            assert slot is not None and len(pages) == needed
            scores = work(slot, pages)
            for page in pages:
                scheduler.pages.give_back(page, SCORER)
            scheduler.slots.give_back(slot, SCORER)
            return scores
        except BaseException:
            self.reset()
            raise

    def stats(self) -> Stats:
        """One look at everything."""
        scheduler, cache = self.scheduler, self.scheduler.cache
        pages = _units(scheduler.pages.count - 1, cache.evictable_pages, scheduler.pages.free)
        slots = _units(scheduler.slots.count - 1, cache.evictable_slots, scheduler.slots.free)
        step_s, host_s, wait_s = np.mean(self._times, axis=0).tolist() if self._times else (0.0, 0.0, 0.0)
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages=pages,
            slots=slots,
            cache=cache.statistics,
            preemptions=scheduler.preemptions,
            blocked=dict(scheduler.blocked),
            compilations=self._device.compilations,
            compiled_after_ready=self._device.compiled_after_ready,
            buckets=tuple(_use(bucket, padding) for bucket, padding in self._device.padding.items()),
            steps=self._steps,
            generated_tokens=self._generated,
            prompt_tokens=self._prompted,
            step_s=step_s,
            host_s=host_s,
            wait_s=wait_s,
        )

    def _collect(self, begin: float) -> list[Progress]:
        ticket = self._flying.popleft()
        planned = time.perf_counter()
        result = self._device.collect(ticket)
        waited = time.perf_counter()
        progress = self.scheduler.commit(ticket.step, result)
        self._steps += 1
        self._generated += sum(len(row.tokens) for row in result.rows)
        self._prompted += sum(len(row.tokens) for row in ticket.step.rows)
        end = time.perf_counter()
        self._started_over = False
        self._times.append((end - begin, end - begin - (waited - planned), waited - planned))
        return progress


def _units(all_units: int, evictable: int, free: int) -> Units:
    return Units(all_units - evictable - free, evictable, free)


def _use(bucket: Bucket, padding: Padding) -> BucketUse:
    ratio = 1 - padding.real / padding.padded
    return BucketUse(bucket.rows, bucket.tokens, bucket.pages, bucket.likeliest, padding.steps, ratio)
