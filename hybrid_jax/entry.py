"""A request on its way through the schedule, and the line in which it waits. Imports no JAX."""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from hybrid_jax.config import CHUNK_TOKENS
from hybrid_jax.prefix_cache import Lease
from hybrid_jax.request import FinishReason, Request

MAX_OVERTAKES = 64  # admissions that may pass a waiting request, beside those that were in line before it


@dataclass(eq=False)
class Entry:
    """A request, what is known of it, and, while it runs, what it holds and what was planned for it."""

    request: Request
    arrival: int
    drawn: list[int] = field(default_factory=list)  # tokens known to be drawn
    cached_tokens: int | None = None  # at the first admission
    ended: FinishReason | None = None
    in_flight: int = 0  # steps issued and not yet committed
    # While it runs:
    row: int = 0
    slot: int = 0
    read_slot: int = 0
    table: list[int] = field(default_factory=list)
    own: set[int] = field(default_factory=set)  # pages of the table that are not the cache's
    owner: int = 0  # number of this start, for the canary
    state_owner: int = 0  # who wrote the state in `read_slot`
    page_owners: list[int] = field(default_factory=list)  # who wrote each page of the table
    lease: Lease | None = None
    fresh: bool = False  # no step was made since it was admitted
    target: int = 0  # tokens to prefill
    fed: int = 0  # tokens fed by the steps issued
    planned: int = 0  # tokens drawn by the steps issued, if the request does not end
    points: deque[int] = field(default_factory=deque)  # where the prefill is to leave snapshots
    carried: int = 0  # slot of the snapshot that decoding takes along
    carried_at: int = 0  # position of that snapshot; 0 while there is none

    @property
    def id(self) -> str:
        """The request's."""
        return self.request.id

    @property
    def order(self) -> tuple[int, int]:
        """Place in line: by priority, then by arrival."""
        return self.request.priority, self.arrival

    @property
    def tokens(self) -> list[int]:
        """All tokens that are known."""
        return [*self.request.prompt_token_ids, *self.drawn]

    def span(self, start: int, end: int) -> tuple[int, ...]:
        """Known tokens from one position to another."""
        prompt = self.request.prompt_token_ids
        after = len(prompt)
        return prompt[start:end] + tuple(self.drawn[max(start - after, 0) : max(end - after, 0)])

    def take(self, tokens: Sequence[int]) -> None:
        """Take in tokens that were drawn."""
        self.drawn += tokens
        if self.request.constraint is not None:
            self.request.constraint.push(tokens)

    @property
    def prefilling(self) -> bool:
        """Whether tokens of the prompt are still to be fed."""
        return self.fed < self.target

    @property
    def decodable(self) -> bool:
        """Whether a further token may be drawn, as far as is known: under a constraint, once the last one is."""
        known = not self.in_flight or self.request.constraint is None
        return known and not self.prefilling and self.ended is None and self.planned < self.request.token_limit

    @property
    def fed_for_sure(self) -> int:
        """Tokens fed once all issued steps are committed: the newest drawn token is not fed yet."""
        if self.prefilling or not self.drawn:
            return self.fed
        return len(self.request.prompt_token_ids) + len(self.drawn) - 1

    def ahead(self, loops: int) -> int:
        """Tokens that may be drawn in a step of so many loops."""
        return min(loops, self.request.token_limit - self.planned)

    def piece(self, room: int) -> int:
        """Prompt tokens to feed in a step: cut at multiples of the chunk only, with one snapshot point at most."""
        left = self.target - self.fed
        length = left if left <= room else max(room, 0) // CHUNK_TOKENS * CHUNK_TOKENS
        if len(self.points) > 1 and self.points[1] <= self.fed + length:
            length = self.points[1] - CHUNK_TOKENS - self.fed
        return length

    def rest(self) -> None:
        """Be one that waits: hold nothing, have nothing planned."""
        self.row = self.slot = self.read_slot = self.carried = self.carried_at = 0
        self.target = self.fed = self.planned = self.in_flight = 0
        self.table, self.page_owners, self.own, self.points, self.lease = [], [], set(), deque(), None


class WaitingLine:
    """The requests that wait, first the most urgent, then the oldest; nobody is overtaken without end."""

    def __init__(self) -> None:
        self._due: dict[Entry, int] = {}
        self._by_order: list[tuple[tuple[int, int], Entry]] = []
        self._by_arrival: list[tuple[int, Entry]] = []
        self._admissions = 0

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._due

    def add(self, entry: Entry) -> None:
        """Put an entry in line. One that was preempted keeps its arrival."""
        self._due[entry] = self._admissions + len(self._due) + MAX_OVERTAKES
        heapq.heappush(self._by_order, (entry.order, entry))
        heapq.heappush(self._by_arrival, (entry.arrival, entry))

    def first(self) -> Entry | None:
        """Who is next: the oldest if it was overtaken too often, else the first in order."""
        while self._by_order and self._by_order[0][1] not in self._due:
            heapq.heappop(self._by_order)
        while self._by_arrival and self._by_arrival[0][1] not in self._due:
            heapq.heappop(self._by_arrival)
        if not self._due:
            return None
        oldest = self._by_arrival[0][1]
        return oldest if self._due[oldest] <= self._admissions else self._by_order[0][1]

    def admit(self, entry: Entry) -> None:
        """Take an entry out of the line to run."""
        self.remove(entry)
        self._admissions += 1

    def remove(self, entry: Entry) -> None:
        """Take an entry out of the line."""
        del self._due[entry]
