"""Requests to measure with: seeded, of mixed lengths, all at once or one after another at a rate. Imports no JAX.

Lengths are log-uniform between two bounds, so that short requests are many and long ones have most of the tokens, as in
the logs of real services. Prompts are random tokens, and an answer is as long as it was drawn, so that two ways to run
the same traffic do the same work.
"""

from dataclasses import dataclass

import numpy as np

from hybrid_jax.request import Request, SamplingParams, make_request


@dataclass(frozen=True)
class Traffic:
    """requests: how many. prompt, answer: least and most tokens of each. rate: requests a second in the mean, with
    exponential gaps; None for all at once. seed: of everything that is drawn. Raises ValueError for what is out of
    range.
    """

    requests: int
    prompt: tuple[int, int]
    answer: tuple[int, int]
    rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.requests < 1:
            raise ValueError(f"wanted at least 1 request, got {self.requests}: set requests 1")
        for name, (least, most) in (("prompt", self.prompt), ("answer", self.answer)):
            if not 1 <= least <= most:
                raise ValueError(
                    f"wanted {name} tokens from at least 1 up to no less, got {least} to {most}: swap them"
                )
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ValueError(f"wanted a rate above 0 requests a second, got {self.rate}: leave it out for all at once")

    @property
    def longest(self) -> int:
        """Most tokens that a request may have, prompt and answer together."""
        return self.prompt[1] + self.answer[1]

    @property
    def description(self) -> str:
        """In words."""
        arrival = "all at once" if self.rate is None else f"{self.rate:g} a second"
        return (
            f"{self.requests} requests, {arrival}; prompts of {self.prompt[0]} to {self.prompt[1]} tokens, answers of "
            f"{self.answer[0]} to {self.answer[1]}, both log-uniform, seed {self.seed}"
        )


@dataclass(frozen=True)
class Arrival:
    """A request and the second, from the start, at which it comes."""

    request: Request
    at_s: float


def draw_traffic(traffic: Traffic, vocabulary: int) -> tuple[Arrival, ...]:
    """The requests, by arrival; the same ones for the same traffic."""
    random = np.random.default_rng(traffic.seed)
    prompts, answers = (_lengths(random, traffic.requests, span) for span in (traffic.prompt, traffic.answer))
    gaps = (
        np.zeros(traffic.requests) if traffic.rate is None else random.exponential(1 / traffic.rate, traffic.requests)
    )
    arrivals = []
    for index, at_s in enumerate(np.cumsum(gaps).tolist()):
        tokens = random.integers(0, vocabulary, prompts[index]).tolist()
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=answers[index])
        arrivals.append(Arrival(make_request(str(index), tokens, params, traffic.longest), at_s))
    return tuple(arrivals)


def _lengths(random: np.random.Generator, count: int, span: tuple[int, int]) -> list[int]:
    """Whole numbers from the least to the most, log-uniform."""
    low, high = np.log(span[0]), np.log(span[1] + 1)
    drawn = np.exp(random.uniform(low, high, count)).astype(int)
    return np.clip(drawn, *span).tolist()
