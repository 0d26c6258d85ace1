"""The one thread that owns the engine, and the ways between it and the event loop.

Orders (add, abort) go in through a queue and are taken between two steps; what answers grew by comes out once a step.
Knows nothing of HTTP but the errors that a request may end with.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from hybrid_jax.answer import Answer
from hybrid_jax.llm import LLM
from hybrid_jax.request import FinishReason, SamplingParams, TokenLogprobs
from hybrid_jax.scheduler import QueueFull
from hybrid_jax.server.errors import ApiError, bad_request, unavailable
from hybrid_jax.server.settings import QUEUE_TIMEOUT_S
from hybrid_jax.stats import Stats
from hybrid_jax.step import Progress

log = logging.getLogger("hybrid_jax.server")
Phase = Literal["compiling", "serving", "draining", "dead"]
Outcome = Literal["done", "worked", "waits"]  # worked: and that took as long as a step
Order = Callable[[], Outcome]
IDLE_TURN_S = 0.5  # a thread without work still shows that it lives
LOOK_S = 0.1  # between two looks at the statistics while there is work


@dataclass(frozen=True, slots=True)
class Piece:
    """What an answer grew by."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    cached_tokens: int

    def then(self, later: "Piece") -> "Piece":
        """Both in one."""
        return Piece(
            self.text + later.text,
            self.token_ids + later.token_ids,
            self.logprobs + later.logprobs,
            later.finish_reason,
            later.stop_reason,
            later.cached_tokens,
        )


class Mailbox:
    """Pieces on their way to one HTTP request, by the index of the choice. Belongs to the event loop.

    A reader that is slow finds one larger piece for each choice: nothing is lost, and nothing piles up.
    """

    def __init__(self) -> None:
        self._pieces: dict[int, Piece] = {}
        self._error: ApiError | None = None
        self._filled = asyncio.Event()
        self.begun = False  # whether a choice has had its turn; the engine's thread sets it

    def put(self, index: int, piece: Piece) -> None:
        """Add a piece of a choice."""
        before = self._pieces.get(index)
        self._pieces[index] = piece if before is None else before.then(piece)
        self._filled.set()

    def fail(self, error: ApiError) -> None:
        """End all choices; the reader gets the error after the pieces."""
        self._error = error
        self._filled.set()

    async def take(self) -> list[tuple[int, Piece]]:
        """Wait for pieces. Raises the ApiError that ended the request."""
        await self._filled.wait()
        self._filled.clear()
        pieces, self._pieces = self._pieces, {}
        if self._error is not None:
            self._filled.set()
            if not pieces:
                raise self._error
        return sorted(pieces.items())


class _Line:
    """An answer that the engine works on: whose it is, since when, and how many of its tokens were sent."""

    def __init__(self, answer: Answer, mailbox: Mailbox, index: int, came_s: float):
        self.answer, self.mailbox, self.index, self.came_s, self.sent = answer, mailbox, index, came_s, 0

    def take(self, progress: Progress) -> Piece:
        """Let the answer grow; what is new of it."""
        self.answer.push(progress)
        cached = progress.cached_tokens or 0
        if self.answer.finish_reason is None:
            self.sent += len(progress.token_ids)
            return Piece(self.answer.take_text(), progress.token_ids, progress.logprobs, None, None, cached)
        done = self.answer.output().outputs[0]  # a stop string may have cut tokens off
        return Piece(
            self.answer.take_text(),
            done.token_ids[self.sent :],
            (done.logprobs or ())[self.sent :],
            done.finish_reason,
            done.stop_reason,
            cached,
        )


class EngineThread:
    """Runs the engine of an `LLM` until it is stopped or breaks.

    Methods are for the event loop's thread. on_death is called there when the engine broke.
    queue_timeout_s: a request of which nothing has begun for so long ends with a 503.
    """

    def __init__(
        self,
        llm: LLM,
        loop: asyncio.AbstractEventLoop,
        on_death: Callable[[], None],
        queue_timeout_s: float = QUEUE_TIMEOUT_S,
    ):
        self.phase: Phase = "compiling"
        self.stats: Stats = llm.stats()
        self.live = 0  # choices that wait or run
        self.most_waiting = llm.config.max_waiting
        self.most_live = self.most_waiting + llm.memory.max_num_seqs
        self._llm, self._engine = llm, llm.engine  # nobody else drives it from here on
        self._loop, self._on_death, self._queue_timeout_s = loop, on_death, queue_timeout_s
        self._beat_s: float | None = None  # of the last turn
        self._looked_s = 0.0
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()  # bounded by most_live, as the next one
        self._aborts: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
        self._held: Order | None = None  # one that waits for room, and all behind it with it
        self._lines: dict[str, _Line] = {}  # of the engine's thread alone
        self._mailboxes: set[Mailbox] = set()  # of the event loop alone, as the next one
        self._admissions: set[asyncio.Future[Any]] = set()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ------------------------------------------------------------------------------------------------ the event loop

    def start(self) -> None:
        """Begin to compile."""
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> bool:
        """End the thread after its step, and wait for it for a while; whether it ended."""
        self._stopping = True
        self._orders.put(_nothing)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def drain(self) -> None:
        """Take no new request."""
        if self.phase != "dead":
            self.phase = "draining"

    @property
    def beat_age_s(self) -> float:
        """Seconds since the engine's loop last took a turn; 0 while it compiles, which may take long."""
        beat_s = self._beat_s
        return 0.0 if beat_s is None else time.monotonic() - beat_s

    @property
    def in_flight(self) -> list[str]:
        """The requests that the engine works on; of any thread, where the engine's own is stuck or over."""
        return sorted(self._lines)

    def require_serving(self) -> None:
        """Raises ApiError 503 in any other phase."""
        match self.phase:
            case "compiling":
                raise unavailable("the model is being compiled: try again soon", "loading", "loading")
            case "draining":
                raise unavailable("the server is shutting down: try another one", "draining", "draining")
            case "dead":
                raise unavailable("the engine broke and the server ends: try another one", "engine_dead", "engine_dead")

    async def add(self, answers: Sequence[Answer], mailbox: Mailbox) -> None:
        """Hand the choices of a request to the engine, all or none; `end` must be called if this returns.

        Raises ApiError: 503 for a full queue and outside of service, 400 for a request that no queue or pool can hold.
        """
        self.require_serving()
        if len(answers) > self.most_waiting:  # they come in together, and each of them waits until the next step
            raise bad_request(
                f"wanted at most max_waiting={self.most_waiting} choices of all prompts together, got {len(answers)}:"
                " lower n, send fewer prompts, or start the server with a larger --max-waiting",
                "n",
            )
        if self.live + len(answers) > self.most_live:
            raise unavailable(f"{self.most_live} requests run and wait already: try again", "queue_full", "queue_full")
        self.live += len(answers)
        self._mailboxes.add(mailbox)
        try:
            await self._order(partial(self._admit, tuple(answers), mailbox, time.monotonic()))
        except BaseException:
            self.end(answers, mailbox)
            raise

    async def score(self, prompt: Sequence[int], asked: int) -> tuple[TokenLogprobs, ...]:
        """The log-probability of each token of a prompt after the first, computed anew between two steps.

        Raises ApiError as `add`, and 400 for a prompt that no pool can hold.
        """
        self.require_serving()
        if self.live >= self.most_live:
            raise unavailable(f"{self.most_live} requests run and wait already: try again", "queue_full", "queue_full")
        self.live += 1
        try:
            return await self._order(partial(self._score, tuple(prompt), asked))
        finally:
            self.live -= 1

    async def _order[Result](self, order: "Callable[[asyncio.Future[Result]], Outcome]") -> Result:
        """Wait until the engine's thread has done it."""
        done: asyncio.Future[Result] = self._loop.create_future()
        self._admissions.add(done)
        self._orders.put(partial(order, done))
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                return await done
        except TimeoutError:
            raise _waited(self._queue_timeout_s) from None
        finally:
            self._admissions.discard(done)

    def end(self, answers: Sequence[Answer], mailbox: Mailbox) -> None:
        """Forget a request; what of it still runs is aborted."""
        self.live -= len(answers)
        self._mailboxes.discard(mailbox)
        self._aborts.put([answer.request.id for answer in answers])
        self._orders.put(_nothing)

    def fail_all(self, error: ApiError) -> None:
        """End every request with an error."""
        for admission in self._admissions:
            if not admission.done():
                admission.set_exception(error)
        for mailbox in self._mailboxes:
            mailbox.fail(error)

    def _deliver(self, pieces: list[tuple[Mailbox, int, Piece]]) -> None:
        for mailbox, index, piece in pieces:
            mailbox.put(index, piece)

    def _die(self) -> None:
        self.fail_all(ApiError(500, "the engine broke: try again later", "engine_dead", "engine_dead"))
        self._on_death()

    def give_up(self) -> None:
        """Take the engine for dead, since it does not move any more, and say so to every request."""
        self.phase = "dead"
        self.fail_all(ApiError(500, "the engine is stuck: try again later", "engine_dead", "engine_stuck"))

    # ------------------------------------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        try:
            self._llm.get_ready(prompt_scores=True)
            self._llm.generate([[0]], SamplingParams(temperature=0, max_tokens=1))  # all parts work together
            self._beat_s = time.monotonic()
            if self.phase == "compiling":
                self.phase = "serving"
            log.info("ready")
            while not self._stopping:
                self._turn()
        except BaseException:
            log.critical(f"the engine broke with these requests in flight: {self.in_flight}", exc_info=True)
            self.phase = "dead"
            self._loop.call_soon_threadsafe(self._die)

    def _turn(self) -> None:
        """Take orders, make one step, send what came of it."""
        self._take_orders()
        if self._engine.unfinished:
            pieces = [self._piece(progress) for progress in self._engine.step()]
            if pieces:
                self._loop.call_soon_threadsafe(self._deliver, pieces)
        self._beat_s = now_s = time.monotonic()
        if not self._engine.unfinished or now_s - self._looked_s > LOOK_S:
            self._end_late(now_s)
            self.stats, self._looked_s = self._engine.stats(), now_s

    def _take_orders(self) -> None:
        """Wait for an order where there is nothing else to do; then take those that are there, a score at most.

        What comes meanwhile is left for the next turn: requests that run would wait for it.
        """
        if self._held is None:
            idle = not self._engine.unfinished
            self._held = _next_of(self._orders, IDLE_TURN_S if idle else 0.0)
        outcome: Outcome = "done"
        for _ in range(self._orders.qsize() + 1):
            if self._held is None or outcome != "done":
                break
            outcome = self._held()
            if outcome != "waits":
                self._held = _next_of(self._orders, 0.0)
        while not self._aborts.empty():
            self._abort(self._aborts.get())

    def _score(self, prompt: tuple[int, ...], asked: int, done: asyncio.Future[tuple[TokenLogprobs, ...]]) -> Outcome:
        """Score a prompt; it waits while there is no room for it beside those that run."""
        if done.done():
            return "done"
        if not self._engine.has_room(len(prompt)):
            if self._engine.unfinished:
                return "waits"
            error = bad_request(f"wanted a prompt that fits the pools, got {len(prompt)} tokens: shorten it")
            self._loop.call_soon_threadsafe(_settle, done, (), error)
            return "done"
        scores = self._engine.score_prompt(prompt, asked)
        self._loop.call_soon_threadsafe(_settle, done, scores, None)
        return "worked"

    def _admit(
        self, answers: tuple[Answer, ...], mailbox: Mailbox, came_s: float, admitted: asyncio.Future[None]
    ) -> Outcome:
        if admitted.done():  # taken back before it was its turn
            return "done"
        error: ApiError | None = None
        try:
            for index, answer in enumerate(answers):
                self._engine.add(answer.request)
                self._lines[answer.request.id] = _Line(answer, mailbox, index, came_s)
        except QueueFull as full:
            error = unavailable(str(full), "queue_full", "queue_full")
        except ValueError as refused:
            error = bad_request(str(refused))
        if error is not None:
            self._abort([answer.request.id for answer in answers])
        self._loop.call_soon_threadsafe(_settle, admitted, None, error)
        return "done"

    def _abort(self, ids: list[str]) -> None:
        for request_id in ids:
            if self._lines.pop(request_id, None) is not None:
                self._engine.abort(request_id)

    def _end_late(self, now_s: float) -> None:
        """End the requests of which no choice has had a turn in too long; one that was preempted had its turn."""
        for entry in self._engine.scheduler.running:
            if (line := self._lines.get(entry.id)) is not None:
                line.mailbox.begun = True
        limit_s = self._queue_timeout_s
        late = {one.mailbox for one in self._lines.values() if not one.mailbox.begun and now_s - one.came_s > limit_s}
        for mailbox in late:
            self._abort([key for key, line in self._lines.items() if line.mailbox is mailbox])
            self._loop.call_soon_threadsafe(mailbox.fail, _waited(self._queue_timeout_s))

    def _piece(self, progress: Progress) -> tuple[Mailbox, int, Piece]:
        line = self._lines[progress.request_id]
        line.mailbox.begun = True
        piece = line.take(progress)
        if piece.finish_reason is not None:
            del self._lines[progress.request_id]
            if progress.finish_reason is None:
                self._engine.abort(progress.request_id)  # a stop string, which the engine does not know
        return line.mailbox, line.index, piece


def _next_of(orders: "queue.SimpleQueue[Order]", timeout_s: float) -> Order | None:
    """The next order, None where none comes in time."""
    try:
        return orders.get(timeout_s > 0, timeout_s)
    except queue.Empty:
        return None


def _waited(timeout_s: float) -> ApiError:
    return unavailable(f"the request waited {timeout_s:g} s for its turn: try again", "queue_timeout", "queue_timeout")


def _nothing() -> Outcome:
    """An order that only wakes the thread."""
    return "done"


def _settle[Result](done: "asyncio.Future[Result]", result: Result, error: ApiError | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(result)
    else:
        done.set_exception(error)
