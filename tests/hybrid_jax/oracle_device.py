"""A device without a model that notices every mix-up: the next token is a hash of the request and the position.

It keeps pages, slots and rows as the real one does, and in each place *what history it stands for*: a chain of hashes
over the tokens before. Steps run in the order in which they were submitted, but only when they are collected, so that
nothing can be known early. Before a row goes on, the history in its pages, in its slot and in its row must be its own;
what a unit held is forgotten when it is given out anew. Imports nothing that computes.
"""

import zlib
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from hybrid_jax.config import CHUNK_TOKENS
from hybrid_jax.engine import Engine
from hybrid_jax.pool import Pool
from hybrid_jax.prefix_cache import CACHE, PrefixCache
from hybrid_jax.request import ERROR, FINISH_REASONS, LENGTH, RUNNING, STOP, Request
from hybrid_jax.scheduler import Limits, Scheduler
from hybrid_jax.step import RowResult, RowStep, Step, StepResult

VOCABULARY = 40
EOS = (0,)


class MixUp(AssertionError):
    """The engine gave a row something that is not its own."""


@dataclass(frozen=True)
class Setup:
    """Sizes of an engine on the oracle; pages and slots count the null unit."""

    pages: int = 33
    slots: int = 9
    rows: int = 4
    page_size: int = 16
    loops: int = 4
    step_tokens: int = 128
    keeps_pages: bool = True
    keeps_states: bool = True
    interval: int = 0
    waiting: int = 64
    caching: bool = True
    run_ahead: bool = True


def make_engine(setup: Setup) -> tuple[Engine, "OracleDevice"]:
    """The real engine, schedule, cache and pools on an oracle."""
    pages, slots = Pool("pages", setup.pages if setup.keeps_pages else 1), Pool("slots", setup.slots)
    cache = PrefixCache(pages, slots, setup.page_size, setup.keeps_pages, setup.keeps_states)
    limits = Limits(
        rows=setup.rows,
        step_tokens=setup.step_tokens,
        loops=setup.loops,
        page_size=setup.page_size,
        keeps_pages=setup.keeps_pages,
        keeps_states=setup.keeps_states,
        interval=-(-setup.interval // cache.grid) * cache.grid,
        waiting=setup.waiting,
        caching=setup.caching,
    )
    device = OracleDevice(setup, cache.grid)
    for name, pool in (("pages", pages), ("slots", slots)):
        forget_what_is_taken(pool, name, device)
    return Engine(Scheduler(limits, pages, slots, cache), device, setup.run_ahead), device


def forget_what_is_taken(pool: Pool, name: str, device: "OracleDevice") -> None:
    """Have the device forget, in the order of its work, what a unit held when the pool gives it out."""
    take = pool.take

    def taken(owner: str) -> int | None:
        unit = take(owner)
        if unit is not None:
            device.queue.append((name, unit))
        return unit

    pool.take = taken


# -------------------------------------------------------------------------------------------------------- what is right


def draw(request: Request, index: int) -> int:
    """The token that a request draws as its `index`th, from 0."""
    position = len(request.prompt_token_ids) + index
    token = zlib.crc32(f"{request.id}/{position}".encode()) % VOCABULARY
    while index + 1 < request.params.min_tokens and token in stop_ids(request):
        token = (token + 1) % VOCABULARY
    return token


def stop_ids(request: Request) -> tuple[int, ...]:
    """The tokens that end a request."""
    return (*request.params.stop_token_ids, *(() if request.params.ignore_eos else EOS))


def reason_after(request: Request, index: int) -> int:
    """Why a request ends with its `index`th token, or that it goes on."""
    if draw(request, index) in stop_ids(request) and index + 1 >= request.params.min_tokens:
        return STOP
    return LENGTH if index + 1 >= request.token_limit else RUNNING


def answer(request: Request, fails_at: int | None = None) -> tuple[tuple[int, ...], str | None]:
    """All tokens of a request and why it ends; the token at the position `fails_at` gives no number to draw from."""
    tokens: list[int] = []
    while fails_at is None or len(request.prompt_token_ids) + len(tokens) <= fails_at:
        tokens.append(draw(request, len(tokens)))
        if reason := reason_after(request, len(tokens) - 1):
            return tuple(tokens), FINISH_REASONS[reason]
    return tuple(tokens), "error"


def chain(request: Request, fails_at: int | None) -> list[object]:
    """What stands for the history of each length, from 0 on; past a failure it is of no use to anyone else."""
    history: list[object] = [zlib.crc32(request.cache_salt.encode())]
    for position, token in enumerate((*request.prompt_token_ids, *answer(request, fails_at)[0])):
        failed = fails_at is not None and position >= fails_at
        history.append(("nan", request.id, position) if failed else hash((history[-1], token)))
    return history


# ----------------------------------------------------------------------------------------------------------- the device


@dataclass(frozen=True)
class Ticket:
    """A step that was started."""

    step: Step


@dataclass
class TableRow:
    """What the device remembers of a row."""

    owner: str = ""
    newest: int = -1
    reason: int = RUNNING


@dataclass
class OracleDevice:
    """What the engine asks of a runner. fails: position of the token of a request that gives no numbers, by its id."""

    setup: Setup
    grid: int
    fails: dict[str, int] = field(default_factory=dict)
    compilations: int = 0
    compiled_after_ready: int = 0
    padding: dict = field(default_factory=dict)
    resets: int = 0

    def __post_init__(self) -> None:
        self.queue: deque[tuple[str, int] | Step] = deque()
        self._results: dict[int, StepResult] = {}
        self._histories: dict[str, list[object]] = {}
        self._allocate()

    def _allocate(self) -> None:
        self.pages: list[list[object]] = [[None] * self.setup.page_size for _ in range(self.setup.pages)]
        self.slots: list[object] = [None] * self.setup.slots
        self.rows = [TableRow() for _ in range(self.setup.rows + 1)]

    def submit(self, step: Step) -> Ticket:
        """Start a step, which does nothing before it is collected."""
        check_step(step, self.setup)
        self.queue.append(step)
        return Ticket(step)

    def collect(self, ticket: Ticket) -> StepResult:
        """Do all that was started up to this step."""
        while ticket.step.number not in self._results:
            work = self.queue.popleft()
            if isinstance(work, Step):
                self._results[work.number] = self._run(work)
            elif work[0] == "pages":
                self.pages[work[1]] = [None] * self.setup.page_size
            else:
                self.slots[work[1]] = None
        return self._results.pop(ticket.step.number)

    def score(self, token_ids, slot, pages):
        """Nothing to say of tokens."""
        return np.zeros((len(token_ids), VOCABULARY), np.float32)

    def reset(self) -> None:
        """Lose all memory."""
        self.resets += 1
        self.queue.clear()
        self._allocate()

    # ------------------------------------------------------------------------------------------------------------- rows

    def _run(self, step: Step) -> StepResult:
        present = [row for row in step.rows if not row.in_decode or self.rows[row.row].reason == RUNNING]
        for row in present:
            self._check_row(row)
            self._check_pages(row, row.seen)
            self._check_slot(row)
        results = {row.row: self._run_row(row, step) for row in present}
        for row in present:
            self._check_pages(row, row.seen + (len(row.tokens) or max(len(results[row.row].tokens), 1)))
        return StepResult(tuple(results.get(row.row, RowResult((), RUNNING)) for row in step.rows))

    def history(self, request: Request) -> list[object]:
        """`chain` of a request."""
        if request.id not in self._histories:
            self._histories[request.id] = chain(request, self.fails.get(request.id))
        return self._histories[request.id]

    def _check_row(self, row: RowStep) -> None:
        request, table = row.request, self.rows[row.row]
        known = (*request.prompt_token_ids, *answer(request, self.fails.get(request.id))[0])
        if row.fresh:
            _same(row.placed, known[len(request.prompt_token_ids) :][: row.drawn], f"what {request.id} brings along")
            table.owner = request.id
        _same(table.owner, request.id, f"owner of row {row.row}")
        if row.in_decode:
            _same(row.seen, len(request.prompt_token_ids) + row.drawn - 1, f"tokens seen by {request.id}")
            _same(table.newest, known[row.seen], f"newest token of {request.id}")
        else:
            _same(row.tokens, known[row.seen : row.seen + len(row.tokens)], f"prompt of {request.id}")

    def _check_pages(self, row: RowStep, length: int) -> None:
        if self.setup.keeps_pages:
            size, history = self.setup.page_size, self.history(row.request)
            for position in range(length):
                found = self.pages[row.pages[position // size]][position % size]
                _same(found, history[position + 1], f"page of {row.request.id} at {position}")

    def _check_slot(self, row: RowStep) -> None:
        if self.setup.keeps_states and row.seen:
            wanted = (row.seen, self.history(row.request)[row.seen])
            _same(self.slots[row.read_slot], wanted, f"slot {row.read_slot} of {row.request.id}")

    def _run_row(self, row: RowStep, step: Step) -> RowResult:
        for position in range(row.seen, row.seen + len(row.tokens)):
            self._feed(row, position)
            if position + 1 == row.seen + row.snapshot_length:
                self._store(row, row.snapshot_slot, position + 1)
        if not row.in_decode:
            self._store(row, row.write_slot, row.seen + len(row.tokens))
            return self._draw(row, row.drawn, row.seen + len(row.tokens))
        drawn: list[int] = []
        reason = RUNNING
        while reason == RUNNING and len(drawn) < row.ahead:
            position = row.seen + len(drawn)
            self._feed(row, position)
            if row.snapshot_slot and ((position + 1) % self.grid == 0 or not step.decode_only):
                self._store(row, row.snapshot_slot, position + 1)
            self._store(row, row.write_slot, position + 1)
            one = self._draw(row, row.drawn + len(drawn), position + 1)
            reason = one.reason
            if not one.tokens:
                break
            drawn += one.tokens
        return RowResult(tuple(drawn), reason)

    def _feed(self, row: RowStep, position: int) -> None:
        if self.setup.keeps_pages:
            page, place = divmod(position, self.setup.page_size)
            self.pages[row.pages[page]][place] = self.history(row.request)[position + 1]

    def _store(self, row: RowStep, slot: int, length: int) -> None:
        if slot:
            self.slots[slot] = (length, self.history(row.request)[length])

    def _draw(self, row: RowStep, index: int, length: int) -> RowResult:
        """What a row draws as its `index`th token, if it does, after so many tokens."""
        request, table, tokens = row.request, self.rows[row.row], ()
        fails_at = self.fails.get(request.id)
        if fails_at is not None and length > fails_at:
            table.reason = ERROR
        elif not row.draws:
            table.reason = RUNNING
        else:
            table.newest, table.reason = draw(request, index), reason_after(request, index)
            tokens = (table.newest,)
        return RowResult(tokens, table.reason)


def _same(got: object, wanted: object, what: str) -> None:
    if got != wanted:
        raise MixUp(f"{what}: wanted {wanted}, got {got}")


# ------------------------------------------------------------------------------------------- what holds of every step


def check_step(step: Step, setup: Setup) -> None:
    """What holds of every step that a device is given, whatever was before it. Raises MixUp."""
    rows = step.rows
    _holds(0 < len(rows) <= setup.rows, "a number of rows")
    _holds(
        [row.in_decode for row in rows] == sorted((row.in_decode for row in rows), reverse=True), "decode goes first"
    )
    _holds(len({row.row for row in rows}) == len({row.request.id for row in rows}) == len(rows), "one row a request")
    _holds(step.decode_only or step.tokens <= setup.step_tokens, "too many tokens in a step")
    _holds(step.loops == 1 or step.decode_only, "loops beside a prefill")
    written = [slot for row in rows for slot in (row.write_slot, row.snapshot_slot) if slot]
    _holds(len(set(written)) == len(written), "a slot written twice")
    for row in rows:
        _check_share(row, step, setup)
        others = set(written) - {row.write_slot}
        _holds(not row.seen or row.read_slot not in others, f"{row.request.id} reads a slot that is written")
    if setup.keeps_pages:
        _check_tables(rows, setup)


def _check_share(row: RowStep, step: Step, setup: Setup) -> None:
    name, limit = row.request.id, len(row.request.prompt_token_ids) + row.request.token_limit
    end = row.seen + (len(row.tokens) or row.ahead)
    _holds(0 < row.row <= setup.rows and 0 < row.write_slot < setup.slots, f"row or slot of {name}")
    _holds(0 <= row.snapshot_slot < setup.slots, f"snapshot slot of {name}")
    _holds(row.seen == 0 or 0 < row.read_slot < setup.slots, f"{name} reads the null slot")
    _holds(row.fresh or row.read_slot == row.write_slot, f"{name} leaves its slot")
    _holds(end < limit and row.drawn < row.request.token_limit, f"{name} goes past its limit")
    if row.in_decode:
        _holds(1 <= row.ahead <= step.loops and row.draws, f"{name} decodes {row.ahead} tokens")
        return
    _holds(row.draws or len(row.tokens) % CHUNK_TOKENS == 0, f"{name} is cut inside a chunk")
    _holds(row.ahead == 0, f"{name} prefills and decodes")
    if row.snapshot_slot:
        _holds(0 < row.snapshot_length <= len(row.tokens), f"snapshot of {name} outside its tokens")
        _holds(row.snapshot_length % CHUNK_TOKENS == 0, f"snapshot of {name} off the chunks")


def _check_tables(rows: tuple[RowStep, ...], setup: Setup) -> None:
    written: set[int] = set()
    for row in rows:
        end, first = row.seen + (len(row.tokens) or row.ahead), row.seen // setup.page_size
        _holds(len(row.pages) == -(-end // setup.page_size), f"{row.request.id} has {len(row.pages)} pages for {end}")
        _holds(all(0 < page < setup.pages for page in row.pages), f"pages of {row.request.id}")
        _holds(len(set(row.pages)) == len(row.pages), f"{row.request.id} has a page twice")
        _holds(written.isdisjoint(row.pages[first:]), f"{row.request.id} writes a page of another row")
        written.update(row.pages[first:])
    for row in rows:
        _holds(written.isdisjoint(row.pages[: row.seen // setup.page_size]), f"a page read by {row.request.id}")


def _holds(condition: bool, what: str) -> None:
    if not condition:
        raise MixUp(f"a step breaks its contract: {what}")


def check_balance(engine: Engine) -> None:
    """Every unit is free, of the cache, or of one request that runs. Raises AssertionError."""
    scheduler = engine.scheduler
    scheduler.cache.check()
    entries = list(scheduler._entries.values())
    flying = [row for ticket in engine._flying for row in ticket.step.rows]
    snapshots = [row.snapshot_slot for row in flying if row.snapshot_slot and not row.in_decode]
    held = {
        "pages": [page for entry in entries for page in entry.own],
        "slots": [slot for entry in entries for slot in (entry.slot, entry.carried) if slot] + snapshots,
        "rows": [entry.row for entry in entries if entry.row],
    }
    for pool in (scheduler.pages, scheduler.slots, scheduler.rows):
        units, cached = held[pool.name], [u for u, owner in pool.owners().items() if owner == CACHE]
        _same(len(set(units)), len(units), f"{pool.name} held twice")
        _same(pool.free + len(units) + len(cached), pool.count - 1, f"balance of {pool.name}")
        _same(sorted([*units, *cached]), sorted(pool.owners()), f"{pool.name} that are not free")
    for entry in entries:
        _same(entry.own <= set(entry.table), True, f"pages of {entry.id} outside its table")
        owners = scheduler.pages.owners()
        _same({owners[page] for page in set(entry.table) - entry.own} <= {CACHE}, True, f"borrowed pages of {entry.id}")
    _same(sorted(entry.row for entry in scheduler.running), sorted(held["rows"]), "rows of those that run")


def check_empty(engine: Engine) -> None:
    """Once nothing runs and the cache is cleared, everything is free."""
    assert not engine.unfinished
    engine.scheduler.cache.clear()
    for pool in (engine.scheduler.pages, engine.scheduler.slots, engine.scheduler.rows):
        _same(pool.free, pool.count - 1, f"{pool.name} that came back")
