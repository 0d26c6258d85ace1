"""What an engine says of itself: a value for people, servers and tests. Imports no JAX."""

from dataclasses import dataclass

from hybrid_jax.prefix_cache import Statistics


@dataclass(frozen=True)
class Units:
    """Pages or slots: given to running requests, kept by the prefix cache alone and free to be taken, and free."""

    used: int
    evictable: int
    free: int


@dataclass(frozen=True)
class BucketUse:
    """A compiled program: its shape, how often it ran, and the share of its rows or tokens that was padding.

    likeliest: it is the one of that shape for rows that all take the likeliest token.
    """

    rows: int
    tokens: int
    pages: int
    likeliest: bool
    steps: int
    padding_ratio: float


@dataclass(frozen=True)
class Stats:
    """One look at an engine.

    blocked: times that the first in line had to wait, by what it lacked (rows, slots or pages).
    cache: hits and evictions of the prefix cache since the start. compilations: programs compiled so far.
    compiled_after_ready: of those, since the engine said that it was ready; must stay 0.
    generated_tokens, prompt_tokens: since the start; a prompt's cached tokens do not count.
    step_s: time of a call that took in a step, host_s: of it, the host's own work, wait_s: of it, waiting for the
    device; means over the last steps.
    """

    running: int
    waiting: int
    pages: Units
    slots: Units
    cache: Statistics
    preemptions: int
    blocked: dict[str, int]
    compilations: int
    compiled_after_ready: int
    buckets: tuple[BucketUse, ...]
    steps: int
    generated_tokens: int
    prompt_tokens: int
    step_s: float
    host_s: float
    wait_s: float
