"""Decides who runs in each step: continuous batching with chunked prefill, admission by pages and by slots.

The plan runs ahead of the device. A step is made from what the steps before it are bound to do: a row in decode draws
exactly as many tokens as planned unless it ends, and the device itself skips a row that has ended. So no token needs to
be known to plan the next step; `commit` takes results in one or more steps later.

Order: the most urgent priority first, then arrival, with a bound on overtaking (`WaitingLine`). The first in line waits
for what it lacks; nobody smaller slips past. A request holds the pages of its whole prompt from its admission. Where a
page is missing for decoding, the running request that is last in order gives back everything and starts again later
from its prompt and what it has drawn; the first in order is never the victim of another, so something always finishes.

Imports no JAX. Knows nothing of models, kernels or text.
"""

from collections import Counter, deque
from dataclasses import dataclass
from operator import attrgetter

from hybrid_jax.entry import Entry, WaitingLine
from hybrid_jax.pool import Pool
from hybrid_jax.prefix_cache import Hit, Lease, PrefixCache, snapshot_points
from hybrid_jax.request import FINISH_REASONS, Request
from hybrid_jax.step import Progress, RowResult, RowStep, Step, StepResult


class QueueFull(ValueError):
    """As many requests wait as the engine takes: try again later, or raise `max_waiting`."""


@dataclass(frozen=True)
class Limits:
    """What the schedule keeps to.

    rows: requests that run at once. step_tokens: most tokens of a step that prefills, at least rows and a chunk.
    loops: most tokens that a row draws in one step. interval: prompt tokens between snapshots on a grid, 0 for none.
    waiting: most requests in line. caching: whether prefixes are kept and looked up.
    """

    rows: int
    step_tokens: int
    loops: int
    page_size: int
    keeps_pages: bool
    keeps_states: bool
    interval: int
    waiting: int
    caching: bool


class Scheduler:
    """All requests of an engine: waiting, running, ending."""

    def __init__(self, limits: Limits, pages: Pool, slots: Pool, cache: PrefixCache):
        self.limits, self.pages, self.slots, self.cache = limits, pages, slots, cache
        self.rows = Pool("rows", limits.rows + 1)
        self.waiting = WaitingLine()
        self.running: list[Entry] = []
        self.blocked: Counter[str] = Counter()  # times that the first in line had to wait, by what it lacked
        self.preemptions = 0
        self._entries: dict[str, Entry] = {}
        self._starts = 0
        self._page_writers: dict[int, int] = {}  # of pages and slots that were handed to the cache
        self._slot_writers: dict[int, int] = {}
        self._arrivals = 0
        self._steps = 0
        self._reading: list[Entry] = []  # their first step is made: once it is issued, the snapshot is free

    # ------------------------------------------------------------------------------------------------- from outside

    def add(self, request: Request) -> None:
        """Put a request in line.

        Raises QueueFull where the line is full, ValueError for an id in use and for a request that no pool can hold.
        """
        if len(self.waiting) >= self.limits.waiting:
            raise QueueFull(f"wanted at most max_waiting={self.limits.waiting} waiting requests, got one more: retry")
        if request.id in self._entries:
            raise ValueError(f"wanted a new request id, got {request.id!r}, which is in use: take another")
        needed = self.page_count(len(request.prompt_token_ids) + request.token_limit - 1)  # the last is never fed
        if needed > self.pages.count - 1:
            raise ValueError(
                f"wanted a request of at most {self.pages.count - 1} pages of {self.limits.page_size} tokens, got one "
                f"of {needed}: shorten it, lower max_tokens, or set pages={needed + 1}"
            )
        entry = Entry(request, self._arrivals)
        self._arrivals += 1
        self._entries[request.id] = entry
        self.waiting.add(entry)

    def abort(self, request_id: str) -> bool:
        """End a request wherever it is. Whether it was there. What it holds comes back when its last step does."""
        entry = self._entries.get(request_id)
        if entry is None or entry.ended is not None:
            return False
        entry.ended = "abort"
        if entry in self.waiting:
            self.waiting.remove(entry)
        self._release_if_over(entry)
        return True

    @property
    def unfinished(self) -> bool:
        """Whether any request waits, runs, or still holds something."""
        return bool(self._entries)

    def schedule(self) -> Step | None:
        """The next step, to be issued before this is called again.

        None where nothing can run before a step in flight is committed, or nothing is left.
        """
        self._release_readers()
        self._admit()
        decodes, loops = self._reserve()
        if decodes is None:
            return None
        if not self.running:
            self._admit()  # the only one that ran held pages twice, its own and the cache's, and gave all back
        rows = [self._decode_row(entry, loops) for entry in decodes]
        rows += self._prefill_rows(self.limits.step_tokens - len(rows))
        if not rows:
            return None
        self._steps += 1
        return Step(self._steps, tuple(rows), loops)

    def commit(self, step: Step, result: StepResult) -> list[Progress]:
        """Take in what a step did, in the order in which steps were made; the requests that made progress."""
        found = []
        for row, done in zip(step.rows, result.rows, strict=True):
            entry = self._entries[row.request.id]
            entry.in_flight -= 1
            heard = entry.ended is None  # an aborted request is not spoken of any more
            self._take_in(entry, row, done)
            if heard and (done.tokens or entry.ended is not None):
                found.append(Progress(entry.id, done.tokens, entry.ended, done.logprobs, entry.cached_tokens))
            self._release_if_over(entry)
        return found

    def reset(self) -> list[str]:
        """Drop every request and everything cached, after the device has lost its memory; the ids of the dropped."""
        # Nothing is given back one by one: whatever was interrupted may have left it half handed over.
        dropped = list(self._entries)
        self._entries.clear()
        self.running.clear()
        self._reading.clear()
        self.waiting = WaitingLine()
        self.cache.reset()
        for pool in (self.pages, self.slots, self.rows):
            pool.reset()
        return dropped

    def start_over(self) -> None:
        """Put what runs back in line, after the device has lost its memory: to go on from the tokens that are known."""
        alive = [entry for entry in self._entries.values() if entry.ended is None]
        self.preemptions += len(self.running)
        self.reset()
        for entry in alive:
            entry.rest()
            self._entries[entry.id] = entry
            self.waiting.add(entry)

    # ---------------------------------------------------------------------------------------------------- admission

    def _admit(self) -> None:
        while (entry := self.waiting.first()) is not None:
            lack = self._start(entry)
            if lack is not None:
                self.blocked[lack] += 1
                return
            self.waiting.admit(entry)
            self.running.append(entry)

    def _start(self, entry: Entry) -> str | None:
        """Give a waiting request all that it needs to run; if anything is missing, nothing, and the name of it."""
        if self.rows.free == 0:
            return "rows"
        if self.cache.available_slots == 0:
            return "slots"
        tokens, salt = entry.tokens, entry.request.cache_salt
        known = tokens if self.limits.caching else []
        needed = self.page_count(len(tokens)) - len(self.cache.match(known, salt).pages)
        decoding = sum(other.decodable for other in self.running)  # each may soon need one more page
        if needed + decoding * self.limits.keeps_pages > self.cache.available_pages:
            return "pages"
        entry.lease, hit = self.cache.open(known, salt, entry.id)
        entry.owner = self._starts = self._starts + 1
        entry.table, entry.page_owners = list(hit.pages), [self._page_writers[page] for page in hit.pages]
        if self.page_count(len(tokens)) - len(entry.table) > self.cache.available_pages:
            return self._stay(entry, entry.lease, "pages")  # the hit has locked the very pages that were available
        slot = self.cache.take_slot(entry.id)
        if slot is None:
            return self._stay(entry, entry.lease, "slots")  # and so with the snapshot
        self._grow(entry, len(tokens))
        self._set_out(entry, hit, slot)
        return None

    def _stay(self, entry: Entry, lease: Lease, lack: str) -> str:
        self.cache.uncount(lease)
        self._give_back(entry)
        return lack

    def _set_out(self, entry: Entry, hit: Hit, slot: int) -> None:
        row = self.rows.take(entry.id)
        assert row is not None
        length = len(entry.request.prompt_token_ids) + len(entry.drawn)
        entry.row, entry.slot, entry.read_slot, entry.fresh = row, slot, hit.slot or slot, True
        entry.state_owner = self._slot_writers[hit.slot] if hit.slot else entry.owner
        entry.target, entry.fed, entry.planned = length, hit.length, len(entry.drawn)
        if entry.cached_tokens is None:
            entry.cached_tokens = hit.length
        if self._snapshots:
            entry.points = deque(snapshot_points(hit.length, length, hit.branch, self.cache.grid, self.limits.interval))

    @property
    def _snapshots(self) -> bool:
        return self.limits.caching and self.limits.keeps_states

    def _spare_slot(self, entry: Entry) -> int:
        """A slot for a snapshot, 0 if there is none to spare: one is left for every request that may still start."""
        if self.cache.available_slots <= self.rows.free:
            return 0
        return self.cache.take_slot(entry.id) or 0

    def _release_readers(self) -> None:
        """The steps made so far are issued: what comes later on the device cannot disturb what they read."""
        for entry in self._reading:
            if entry.lease is not None:
                self.cache.started(entry.lease)
        self._reading.clear()

    # --------------------------------------------------------------------------------------------------------- pages

    def page_count(self, tokens: int) -> int:
        """Pages of a request of so many tokens."""
        return -(-tokens // self.limits.page_size) if self.limits.keeps_pages else 0

    def _grow(self, entry: Entry, tokens: int) -> bool:
        """Pages for so many tokens; whether there were enough. What was found stays with the entry."""
        while len(entry.table) < self.page_count(tokens):
            page = self.cache.take_page(entry.id)
            if page is None:
                return False
            entry.table.append(page)
            entry.own.add(page)
            entry.page_owners.append(entry.owner)
        return True

    def _reserve(self) -> tuple[list[Entry] | None, int]:
        """The entries that decode and how many tokens each draws, with pages for them.

        No entries at all where a step in flight must end before a request can be preempted.
        """
        loops = self._loops()
        while True:
            decodes = sorted((entry for entry in self.running if entry.decodable), key=_order)
            if all(self._grow(entry, entry.fed + entry.ahead(loops)) for entry in decodes):
                return decodes, loops
            if loops > 1:
                loops = 1
            elif any(entry.in_flight for entry in self.running):
                return None, loops
            else:
                self._preempt(max(self.running, key=_order))

    def _loops(self) -> int:
        """Tokens a row may draw in one step: one where a prompt is on its way or the host must see every token."""
        waits = any(entry.prefilling and entry.ended is None for entry in self.running)
        looks = any(entry.request.watched for entry in self.running if entry.decodable)
        return 1 if waits or looks else self.limits.loops

    def _preempt(self, entry: Entry) -> None:
        self.preemptions += 1
        self._publish_fed(entry)
        self._give_back(entry)
        self.waiting.add(entry)

    # ---------------------------------------------------------------------------------------------------------- rows

    def _decode_row(self, entry: Entry, loops: int) -> RowStep:
        ahead = entry.ahead(loops)
        snapshot = 0
        if self._snapshots and (entry.fed + ahead) // self.cache.grid > entry.fed // self.cache.grid:
            snapshot = entry.carried = entry.carried or self._spare_slot(entry)
        return self._row(entry, (), ahead, snapshot, min(snapshot, 1))

    def _prefill_rows(self, room: int) -> list[RowStep]:
        rows = []
        for entry in sorted((e for e in self.running if e.prefilling and e.ended is None), key=_order):
            length = entry.piece(room)
            if length == 0:
                continue
            end = entry.fed + length
            point = entry.points.popleft() if entry.points and entry.points[0] <= end else 0
            snapshot = self._spare_slot(entry) if point else 0
            snapshot_length = point - entry.fed if snapshot else 0
            rows.append(self._row(entry, entry.span(entry.fed, end), 0, snapshot, snapshot_length))
            room -= length
        return rows

    def _row(self, entry: Entry, tokens: tuple[int, ...], ahead: int, snapshot: int, snapshot_length: int) -> RowStep:
        """The entry's share of the step, which counts as done from now on."""
        fed = len(tokens) + ahead
        pages = self.page_count(entry.fed + fed)
        row = RowStep(
            request=entry.request,
            row=entry.row,
            tokens=tokens,
            seen=entry.fed,
            drawn=entry.planned,
            ahead=ahead,
            draws=entry.fed + fed >= entry.target,
            read_slot=entry.read_slot if entry.fresh else entry.slot,
            write_slot=entry.slot,
            snapshot_slot=snapshot,
            snapshot_length=snapshot_length,
            pages=tuple(entry.table[:pages]),
            fresh=entry.fresh,
            placed=tuple(entry.drawn) if entry.fresh else (),
            owner=entry.owner,
            state_owner=entry.state_owner if entry.fresh else entry.owner,
            page_owners=tuple(entry.page_owners[:pages]),
        )
        if entry.fresh:
            self._reading.append(entry)
        entry.fresh = False
        entry.fed += fed
        entry.planned += ahead or int(row.draws)
        entry.in_flight += 1
        return row

    # ------------------------------------------------------------------------------------------------------- results

    def _take_in(self, entry: Entry, row: RowStep, done: RowResult) -> None:
        entry.take(done.tokens)
        reason = FINISH_REASONS[done.reason]
        if reason == "error":
            entry.ended = reason  # even of a request that was aborted: nothing of it may get into the cache any more
        if entry.ended == "error":
            self._drop_snapshot(entry, row)
        elif row.in_decode:
            grid = self.cache.grid
            now = row.seen + len(done.tokens)
            if row.snapshot_slot and now // grid > row.seen // grid:
                entry.carried_at = now // grid * grid
        else:
            if row.snapshot_slot:
                self._publish(entry, row.seen + row.snapshot_length, row.snapshot_slot)
            self._publish(entry, row.seen + len(row.tokens), 0)
        if reason is not None and entry.ended is None:
            entry.ended = reason

    def _drop_snapshot(self, entry: Entry, row: RowStep) -> None:
        """States with a NaN must not get into the cache."""
        if row.snapshot_slot and not row.in_decode:
            self.slots.give_back(row.snapshot_slot, entry.id)

    def _publish(self, entry: Entry, position: int, slot: int) -> None:
        if self.limits.caching:
            assert entry.lease is not None
            taken = self.cache.publish(entry.lease, entry.tokens, entry.table, position, slot)
            entry.own.difference_update(taken)
            self._page_writers.update(dict.fromkeys(taken, entry.owner))
            if slot:
                self._slot_writers[slot] = entry.owner

    def _publish_fed(self, entry: Entry) -> None:
        """Hand all that is known of an entry that stops running to the cache."""
        if entry.carried_at:
            slot, entry.carried = entry.carried, 0
            self._publish(entry, entry.carried_at, slot)
        self._publish(entry, entry.fed_for_sure, 0)

    def _release_if_over(self, entry: Entry) -> None:
        if entry.ended is None or entry.in_flight:
            return
        if entry.row:
            if entry.ended != "error":
                self._publish_fed(entry)
            self._give_back(entry)
        del self._entries[entry.id]

    def _give_back(self, entry: Entry) -> None:
        """Return everything that an entry holds to the pools, and leave it as one that waits."""
        if entry.lease is not None:
            self.cache.close(entry.lease)
        for page in entry.own:
            self.pages.give_back(page, entry.id)
        for slot in (entry.slot, entry.carried):
            if slot:
                self.slots.give_back(slot, entry.id)
        if entry.row:
            self.rows.give_back(entry.row, entry.id)
            self.running.remove(entry)
        entry.rest()


_order = attrgetter("order")
