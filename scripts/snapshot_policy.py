"""Compares orders of eviction of snapshots on synthetic traffic, and prints the table as Markdown.

python scripts/snapshot_policy.py

Drives the real prefix cache and pools on the host, without a model: requests come a few at a time, leave snapshots
where a prefill and the end of an answer leave them, and end. Pages are plentiful, so that only slots are scarce.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from hybrid_jax.pool import Pool
from hybrid_jax.prefix_cache import MAX_SNAPSHOTS_PER_PATH, Hit, Lease, PrefixCache, snapshot_points
from hybrid_jax.prefix_tree import SnapshotOrder, count_superseded_first

PAGE_SIZE = 64
PAGES = 16_384
CONCURRENT = 4  # requests that run at once, each with a live slot
SLOTS = {"chats": (24, 32, 40, 80, 320), "shared prefixes": (8, 12, 16, 32, 128)}
HEAD = """| trace | slots | policy | hit rate | snapshots taken | evictions | trimmed | peak slots |
|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Exchange:
    """One request: the tokens of its prompt and of its answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Policy:
    """An order of eviction, and the most snapshots a path may keep."""

    name: str
    order: SnapshotOrder
    cap: int


@dataclass(frozen=True)
class Outcome:
    """What a policy made of a trace.

    hit_rate: cached tokens of all tokens of prompts.
    taken: snapshots that entered the tree or were found there already; evicted, trimmed: those dropped again, for want
        of slots and by the cap.
    peak_slots: most slots held at once, by running requests and by the tree.
    """

    hit_rate: float
    taken: int
    evicted: int
    trimmed: int
    peak_slots: int


@dataclass
class Running:
    """A request between its look-up and its end."""

    owner: str
    exchange: Exchange
    lease: Lease
    hit: Hit
    live: int | None
    own_pages: set[int] = field(default_factory=set)


def least_recently_used(superseded: bool, used: int) -> tuple[int, int]:
    """The order without regard to deeper snapshots."""
    return (0, used)


POLICIES = (
    Policy(f"superseded first, {MAX_SNAPSHOTS_PER_PATH} a path", count_superseded_first, MAX_SNAPSHOTS_PER_PATH),
    Policy(f"least recently used, {MAX_SNAPSHOTS_PER_PATH} a path", least_recently_used, MAX_SNAPSHOTS_PER_PATH),
    Policy("least recently used", least_recently_used, PAGES),
)


def make_chats(conversations: int = 30, turns: int = 20, seed: int = 0) -> list[Exchange]:
    """Conversations whose turns come in rounds, shuffled; each prompt is the whole history and a new message."""
    draw = random.Random(seed)
    histories = [make_tokens(draw, 20, 60) for _ in range(conversations)]
    trace = []
    for _ in range(turns):
        for index in draw.sample(range(conversations), conversations):
            exchange = Exchange(histories[index] + make_tokens(draw, 20, 200), make_tokens(draw, 50, 300))
            histories[index] = exchange.prompt + exchange.answer
            trace.append(exchange)
    return trace


def make_shared_prefixes(prefixes: int = 6, requests: int = 400, seed: int = 0) -> list[Exchange]:
    """Requests that begin with one of a few system prompts of 300 to 3000 tokens, and end each in its own way."""
    draw = random.Random(seed)
    shared = [make_tokens(draw, 300, 3000) for _ in range(prefixes)]
    return [
        Exchange(draw.choice(shared) + make_tokens(draw, 20, 400), make_tokens(draw, 20, 200)) for _ in range(requests)
    ]


def make_tokens(draw: random.Random, least: int, most: int) -> tuple[int, ...]:
    """Between `least` and `most` random tokens."""
    return tuple(draw.choices(range(32_000), k=draw.randint(least, most)))


TRACES = {"chats": make_chats, "shared prefixes": make_shared_prefixes}


class Driver:
    """Runs exchanges through a prefix cache, without a model."""

    def __init__(self, slots: int, policy: Policy) -> None:
        self.pages, self.slots = Pool("pages", PAGES), Pool("slots", slots + 1)
        self.cache = PrefixCache(
            self.pages,
            self.slots,
            PAGE_SIZE,
            keeps_pages=True,
            keeps_states=True,
            max_snapshots_per_path=policy.cap,
            snapshot_order=policy.order,
        )
        self.taken = self.peak_slots = 0

    def run(self, owner: str, exchanges: Sequence[Exchange]) -> None:
        """Run these at once: all start before the first ends."""
        running = [self.start(f"{owner}.{index}", exchange) for index, exchange in enumerate(exchanges)]
        for request in running:
            self.compute(request)
        for request in running:
            self.finish(request)

    def start(self, owner: str, exchange: Exchange) -> Running:
        """Look up the prompt and take the live slot."""
        lease, hit = self.cache.open(exchange.prompt, "", owner)
        return Running(owner, exchange, lease, hit, self.take_slot(owner))

    def take_slot(self, owner: str) -> int | None:
        slot = self.cache.take_slot(owner)
        self.peak_slots = max(self.peak_slots, self.slots.count - 1 - self.slots.free)
        return slot

    def compute(self, request: Running) -> None:
        """Prefill and generate, with snapshots at the prefill's points and the last grid position of the whole."""
        hit, prompt = request.hit, request.exchange.prompt
        tokens = prompt + request.exchange.answer
        self.cache.started(request.lease)
        table = list(hit.pages)
        while len(table) < len(tokens) // PAGE_SIZE and (page := self.cache.take_page(request.owner)) is not None:
            table.append(page)
        request.own_pages.update(table[len(hit.pages) :])
        points = {*snapshot_points(hit.length, len(prompt), hit.branch, self.cache.grid, 0)}
        for point in sorted(points | {len(tokens) // self.cache.grid * self.cache.grid} - {0}):
            slot = self.take_slot(request.owner) or 0
            self.taken += slot > 0
            passed = self.cache.publish(request.lease, tokens, table, point, slot)
            request.own_pages.difference_update(passed)

    def finish(self, request: Running) -> None:
        """Close the lease and give back what the request still owns."""
        self.cache.close(request.lease)
        for page in request.own_pages:
            self.pages.give_back(page, request.owner)
        if request.live is not None:
            self.slots.give_back(request.live, request.owner)


def run_trace(trace: Sequence[Exchange], slots: int, policy: Policy) -> Outcome:
    """Run a trace, `CONCURRENT` requests at a time, with so many slots for live states and snapshots together."""
    driver = Driver(slots, policy)
    for index, exchanges in enumerate(itertools.batched(trace, CONCURRENT)):
        driver.run(str(index), exchanges)
    driver.cache.check()
    counts = driver.cache.statistics
    return Outcome(
        hit_rate=counts.hit_tokens / counts.looked_up_tokens,
        taken=driver.taken,
        evicted=counts.evicted_snapshots,
        trimmed=counts.trimmed_snapshots,
        peak_slots=driver.peak_slots,
    )


def table() -> str:
    """All traces, slots and policies."""
    rows = [HEAD]
    for name, make in TRACES.items():
        trace = make()
        for slots, policy in itertools.product(SLOTS[name], POLICIES):
            got = run_trace(trace, slots, policy)
            rows.append(
                f"| {name} | {slots} | {policy.name} | {got.hit_rate:.1%} | {got.taken} | {got.evicted} | "
                f"{got.trimmed} | {got.peak_slots} |"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
