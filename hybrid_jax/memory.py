"""The memory model: how a device's memory is shared out between weights, temporaries, row tables, pages and slots.

One arithmetic for `hybrid-jax plan`, for the allocation at start and for `docs/memory.md`, which explains the rules.
It knows sizes, not models and not devices, and imports no JAX.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hybrid_jax.config import CHUNK_TOKENS, EngineConfig, step_tokens

GIB = 2**30
DEFAULT_MODEL_LEN = 8192  # longer requests are planned for on demand: pages for one of them are always set aside
MOST_REQUESTS = 256  # more rows a step hardly raise throughput, but each holds a slot and tables over the vocabulary
EXPECTED_SHARE, EXPECTED_LEAST = (
    4,
    1024,
)  # an expected request has a quarter of the longest length, at least 1024 tokens
SLOTS_A_REQUEST = 3  # with a prefix cache: the live state, the snapshot that it leaves, and one that is kept
TABLE_BYTES = 8  # of a row for a token of the vocabulary: a float32 bias and an int32 tally
SCORE_BYTES = 24  # of a row for a token of the vocabulary, in passing: six arrays of 32 bits, from logits to the draw


# Wishes in the order in which they are judged, each with its most modest value.
MODEST = {
    "max_num_batched_tokens": CHUNK_TOKENS,
    "slots": None,
    "pages": None,
    "max_num_seqs": None,
    "max_model_len": 1,
}


@dataclass(frozen=True)
class ModelSizes:
    """What a model needs of one device.

    Args:
      positions: longest request that the model can read. vocabulary: width of its logits.
      weights_bytes: all weights. token_bytes: pages of one token, request_bytes: one slot, each over all layers.
      step_token_bytes: temporaries of one token of a step.
      gathered_token_bytes: temporaries of a cached token, gathered_request_bytes: of a row's state, in the layer that
        has most; 0 where a kernel reads pages and slots where they lie.
    """

    positions: int
    vocabulary: int
    weights_bytes: int
    token_bytes: int
    request_bytes: int
    step_token_bytes: int
    gathered_token_bytes: int = 0
    gathered_request_bytes: int = 0


@dataclass(frozen=True)
class Limits:
    """What the user wishes; None is worked out. Raises ValueError for a value out of range.

    `pages` and `slots` count the null page and the null slot. `memory_fraction` is what the plan may use of the
    device's memory; the rest is for the driver, the compiler and gaps between arrays.
    """

    max_model_len: int | None = None
    max_num_seqs: int | None = None
    pages: int | None = None
    slots: int | None = None
    page_size: int = EngineConfig.page_size
    max_num_batched_tokens: int = EngineConfig.max_num_batched_tokens
    memory_fraction: float = EngineConfig.memory_fraction
    prefix_caching: bool = EngineConfig.prefix_caching

    def __post_init__(self) -> None:
        least = {"max_model_len": 1, "max_num_seqs": 1, "pages": 2, "slots": 2, "page_size": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"wanted {name} of at least {bound}, got {value}: set {name} {bound} or more")
        if self.max_num_batched_tokens < CHUNK_TOKENS or self.max_num_batched_tokens % CHUNK_TOKENS:
            raise ValueError(
                f"wanted max_num_batched_tokens in multiples of {CHUNK_TOKENS}, got {self.max_num_batched_tokens}: "
                f"set max_num_batched_tokens {max(self.max_num_batched_tokens // CHUNK_TOKENS, 1) * CHUNK_TOKENS}"
            )
        if not 0 < self.memory_fraction <= 1:
            raise ValueError(f"wanted memory_fraction above 0 and up to 1, got {self.memory_fraction}: set 0.9")


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes of the pools, the null unit included, and the bytes of everything on one device.

    A model that keeps no pages has 0 of them. One that keeps no states has slots that weigh nothing: they still number
    the running requests.
    """

    sizes: ModelSizes
    memory_bytes: int
    usable_bytes: int
    max_model_len: int
    max_num_seqs: int
    page_size: int
    pages: int
    slots: int
    prefix_caching: bool
    temporaries_bytes: int

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights."""
        return self.sizes.weights_bytes

    @property
    def pages_bytes(self) -> int:
        """Bytes of all pages."""
        return self.pages * self.page_size * self.sizes.token_bytes

    @property
    def slots_bytes(self) -> int:
        """Bytes of all slots."""
        return self.slots * self.sizes.request_bytes

    @property
    def rows_bytes(self) -> int:
        """Bytes of the tables that each running request has over the vocabulary."""
        return table_bytes(self.sizes, self.max_num_seqs)

    @property
    def total_bytes(self) -> int:
        """Bytes of everything."""
        return self.weights_bytes + self.pages_bytes + self.slots_bytes + self.rows_bytes + self.temporaries_bytes

    @property
    def requests_by_slots(self) -> int:
        """Requests that have a slot at once."""
        return self.slots - 1

    def requests_by_pages(self, length: int) -> int | None:
        """Requests of `length` tokens that have pages at once; None for a model that keeps no pages."""
        return (self.pages - 1) // -(-length // self.page_size) if self.sizes.token_bytes else None

    @property
    def limiting(self) -> str:
        """What ends the growth of a batch of requests of the greatest length: max_num_seqs, slots or pages."""
        by_pages = self.requests_by_pages(self.max_model_len)
        counts = {"max_num_seqs": self.max_num_seqs, "slots": self.requests_by_slots}
        counts |= {} if by_pages is None else {"pages": by_pages}
        return min(counts, key=lambda name: counts[name])

    @property
    def snapshot_slots(self) -> int:
        """Slots beside the live ones when all requests run; 0 for a model that keeps no states."""
        return self.slots - 1 - self.max_num_seqs if self.sizes.request_bytes else 0

    @property
    def cacheable_tokens(self) -> int:
        """The longest beginning of a prompt that the prefix cache can keep; 0 where it keeps nothing.

        It ends at the border of a page; with states also at a multiple of the chunk, where a snapshot can be taken, and
        needs a slot for that snapshot beside the live one.
        """
        states = self.sizes.request_bytes > 0
        if not self.prefix_caching or (states and self.slots < 3):
            return 0
        grid = math.lcm(self.page_size, CHUNK_TOKENS if states else 1)
        room = (self.pages - 1) * self.page_size if self.sizes.token_bytes else self.max_model_len
        return min(self.max_model_len, room) // grid * grid


def table_bytes(sizes: ModelSizes, requests: int) -> int:
    """Bytes of the row tables of `requests` running requests and the null row."""
    return (requests + 1) * sizes.vocabulary * TABLE_BYTES


def estimate_temporaries(sizes: ModelSizes, tokens: int, requests: int, length: int, page_size: int) -> int:
    """Bytes that a step of `tokens` tokens and `requests` rows needs in passing, before a compiler says so.

    tokens * step_token_bytes + rows * (24 Y + gathered_request_bytes + context * gathered_token_bytes), where rows and
    the pages of a context of `length` tokens are rounded up to powers of two, as the engine's shapes are.
    """
    context = _power_of_two(-(-length // page_size)) * page_size
    row = sizes.vocabulary * SCORE_BYTES + sizes.gathered_request_bytes + context * sizes.gathered_token_bytes
    return tokens * sizes.step_token_bytes + _power_of_two(requests) * row


def plan_memory(
    sizes: ModelSizes, memory_bytes: int, limits: Limits, temporaries_bytes: int | None = None
) -> MemoryPlan:
    """Share out the memory of one device.

    Args:
      memory_bytes: all memory of the device. limits: what the user wishes.
      temporaries_bytes: what a compiled step needs in passing, where it is known; else it is estimated.
    Raises ValueError for a wish that cannot be met, naming a value that can.
    """
    share = _Share(sizes, memory_bytes, limits, temporaries_bytes)
    share.check()
    requests = limits.max_num_seqs or _most(share.affords, 1, MOST_REQUESTS) or 1
    plan = share.least(requests)
    for pages, slots in share.wishes(requests):
        wish = share.build(requests, pages, slots)
        plan = share.grow(plan, wish)
        if plan != wish:
            break
    return plan


@dataclass(frozen=True)
class _Share:
    """One question to the model: who wishes what of how much memory."""

    sizes: ModelSizes
    memory_bytes: int
    limits: Limits
    temporaries_bytes: int | None

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * self.limits.memory_fraction)

    @property
    def length(self) -> int:
        return self.limits.max_model_len or min(self.sizes.positions, DEFAULT_MODEL_LEN)

    @property
    def length_pages(self) -> int:
        """Pages of one request of the greatest length."""
        return -(-self.length // self.limits.page_size)

    @property
    def expected_pages(self) -> int:
        """Pages of a request of the expected length."""
        expected = min(max(self.length // EXPECTED_SHARE, EXPECTED_LEAST), self.length)
        return -(-expected // self.limits.page_size)

    def build(self, requests: int, pages: int, slots: int) -> MemoryPlan:
        """The plan of these counts; a wish of the user goes before."""
        limits, sizes = self.limits, self.sizes
        pages = (limits.pages or pages) if sizes.token_bytes else 0
        temporaries = self.temporaries_bytes
        if temporaries is None:
            tokens = step_tokens(limits.max_num_batched_tokens, requests)
            temporaries = estimate_temporaries(sizes, tokens, requests, self.length, limits.page_size)
        memory, units = (self.memory_bytes, self.usable_bytes), (limits.page_size, pages, limits.slots or slots)
        return MemoryPlan(sizes, *memory, self.length, requests, *units, limits.prefix_caching, temporaries)

    def least(self, requests: int) -> MemoryPlan:
        """The smallest plan: a slot for each request, pages for one request of the greatest length."""
        return self.build(requests, self.length_pages + 1, requests + 1)

    def wishes(self, requests: int) -> tuple[tuple[int, int], ...]:
        """Pages and slots to which a plan should grow, the most urgent first; each wish holds those before it.

        The expected pages of all requests; a snapshot for each; a kept snapshot for each; and at last all the pages
        that can be of use: those of running requests of the greatest length, and as many again for the cache.
        """
        kept = self.limits.prefix_caching and self.sizes.request_bytes > 0
        two, three = (requests * (most if kept else 1) + 1 for most in (2, SLOTS_A_REQUEST))
        expected = max(self.length_pages, requests * self.expected_pages) + 1
        useful = requests * self.length_pages * (2 if self.limits.prefix_caching else 1) + 1
        return (expected, requests + 1), (expected, two), (expected, three), (useful, three)

    def grow(self, plan: MemoryPlan, wish: MemoryPlan) -> MemoryPlan:
        """The plan with slots and pages up to a wish, as far as they fit."""
        free_bytes = self.usable_bytes - plan.total_bytes
        more_slots = min(wish.slots - plan.slots, free_bytes // max(self.sizes.request_bytes, 1))
        free_bytes -= more_slots * self.sizes.request_bytes
        more_pages = min(wish.pages - plan.pages, free_bytes // max(plan.page_size * self.sizes.token_bytes, 1))
        return replace(plan, pages=plan.pages + more_pages, slots=plan.slots + more_slots)

    def affords(self, requests: int) -> bool:
        """Whether so many requests have their expected pages and all their slots."""
        pages, slots = self.wishes(requests)[2]
        plan = self.build(requests, pages, slots)
        enough = plan.slots >= slots and (plan.pages >= pages or not self.sizes.token_bytes)
        return enough and plan.total_bytes <= self.usable_bytes

    # ------------------------------------------------------------------------------------------------------- refusals

    def changed(self, limits: Mapping[str, Any]) -> "_Share":
        """The same question with other values of some limits."""
        return replace(self, limits=replace(self.limits, **limits))

    def shape_fits(self) -> bool:
        """Whether the wishes agree with one another and with the model, whatever they weigh."""
        plan = self.least(self.limits.max_num_seqs or 1)
        pages = self.length_pages + 1 if self.sizes.token_bytes else 0
        return self.length <= self.sizes.positions and plan.pages >= pages and plan.slots > plan.max_num_seqs

    def fits(self) -> bool:
        return self.shape_fits() and self.least(self.limits.max_num_seqs or 1).total_bytes <= self.usable_bytes

    def check(self) -> None:
        """Raises ValueError for the first wish that cannot be met however modest those after it are."""
        if self.limits.pages is not None and not self.sizes.token_bytes:
            raise ValueError(f"wanted no pages for a model that keeps none, got {self.limits.pages}: leave pages unset")
        if self.fits():
            return
        modest = dict(MODEST)
        if not self.changed(modest).fits():
            raise (self if self.shape_fits() else self.changed(modest)).too_small()
        for flag in MODEST:
            del modest[flag]
            if not self.changed(modest).fits():
                blamed = self.blame(flag)
                raise self.refusal(blamed, self.greatest(blamed) or self.changed(modest).greatest(blamed))

    def blame(self, flag: str) -> str:
        """The wish to refuse: not a length that nobody asked for, where fewer requests or slots would do."""
        asked = [name for name in ("max_num_seqs", "slots") if getattr(self.limits, name) is not None]
        by_default = flag == "max_model_len" and self.limits.max_model_len is None
        return next((name for name in asked if by_default and self.greatest(name)), flag)

    def greatest(self, flag: str) -> int | None:
        """The greatest value of a flag below its own with which the wishes can be met, the others unchanged."""
        unit = CHUNK_TOKENS if flag == "max_num_batched_tokens" else 1
        least = {"slots": (self.limits.max_num_seqs or 1) + 1, "pages": self.length_pages + 1}.get(flag, unit)
        given = self.given(flag)
        count = _most(lambda n: self.changed({flag: n * unit}).fits(), -(-least // unit), given // unit)
        return None if count is None else count * unit

    def given(self, flag: str) -> int:
        return self.length if flag == "max_model_len" else getattr(self.limits, flag)

    def refusal(self, flag: str, greatest: int | None) -> ValueError:
        given = self.given(flag)
        settings = [f"{flag} {greatest}"]
        other = {"max_num_seqs": ("slots", given + 1), "max_model_len": ("pages", self.length_pages + 1)}.get(flag)
        if other is not None and getattr(self.limits, other[0]) is not None:
            settings += [f"{other[0]} {other[1]}"] if self.changed({other[0]: other[1]}).fits() else []
        return ValueError(
            f"wanted {flag} up to {greatest}, got {given}: {self.reason(flag)}; set {' or '.join(settings)}"
        )

    def reason(self, flag: str) -> str:
        """Why a value is too great."""
        limits, given = self.limits, self.given(flag)
        if flag == "max_model_len" and given > self.sizes.positions:
            return f"the model reads {self.sizes.positions} positions"
        if flag == "max_model_len" and limits.pages is not None and limits.pages <= self.length_pages:
            return f"pages {limits.pages}, one of them null, hold {(limits.pages - 1) * limits.page_size} tokens"
        if flag == "max_num_seqs" and limits.slots is not None and limits.slots <= given:
            return f"a running request holds a state slot, and of slots {limits.slots} one is null"
        plan = self.least(limits.max_num_seqs or 1)
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts_bytes(plan).items())
        return (
            f"with pages for a request of {plan.max_model_len} tokens and a state slot for each running request this "
            f"needs {format_bytes(plan.total_bytes)} ({parts}) of {format_bytes(self.usable_bytes)} that can be used"
        )

    def too_small(self) -> ValueError:
        """The error where even the most modest wishes do not fit; it asks for the memory that these need."""
        plan = self.least(self.limits.max_num_seqs or 1)
        needed = math.ceil(plan.total_bytes / self.limits.memory_fraction)
        while int(needed * self.limits.memory_fraction) < plan.total_bytes:
            needed += 1
        got, weights = format_bytes(self.memory_bytes), format_bytes(self.sizes.weights_bytes)
        return ValueError(
            f"wanted at least {needed} bytes of memory ({format_bytes(needed)}) on each device for this, got "
            f"{self.memory_bytes} ({got}): the weights take {weights}; use a larger device, more of them, or a smaller "
            "model"
        )


def parts_bytes(plan: MemoryPlan) -> dict[str, int]:
    """The parts of a plan in the order in which they are shown; they add up to its total."""
    return {
        "weights": plan.weights_bytes,
        "pages": plan.pages_bytes,
        "slots": plan.slots_bytes,
        "row tables": plan.rows_bytes,
        "temporaries": plan.temporaries_bytes,
    }


def format_bytes(size_bytes: int) -> str:
    """Bytes for people: GiB, MiB below one of them, KiB below one of those."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:,.2f} {name}"
    return f"{size_bytes / 1024:,.2f} KiB"


def _most(holds: Callable[[int], bool], least: int, most: int) -> int | None:
    """The greatest number from `least` to `most` that `holds`; None without one. Past a false one all are false."""
    if least > most or not holds(least):
        return None
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if holds(middle) else (least, middle - 1)
    return least


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()
