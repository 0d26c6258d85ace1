"""Latency of a model at fixed batches: time to the first token, time of each further token, times of steps."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hybrid_jax.bench.run import Run
from hybrid_jax.bench.throughput import Bench, outcome
from hybrid_jax.bench.traffic import Traffic, draw_traffic


@dataclass(frozen=True)
class Spread:
    """Median and 90th percentile, in seconds."""

    median_s: float
    p90_s: float


@dataclass(frozen=True)
class Latency:
    """Requests that come at once, `batch` of them, over several runs.

    first_token: from arrival to the first token. token: of each request, the mean time of its further tokens; none
    where answers have one token. They come to the host in groups, as many as one dispatch draws. prompt_step,
    decode_step: of a step that reads prompts, and of one step of the decode loop. decode_host: the host's own work for
    one dispatch of that loop; while it is less than the loop takes, the device has the next one before it ends this.
    """

    batch: int
    prompt: int
    answer: int
    repeats: int
    first_token: Spread
    token: Spread | None
    prompt_step: Spread
    decode_step: Spread | None
    decode_host: Spread | None
    tokens_per_dispatch: float
    compile_s: float
    compiled_in_time: int

    @property
    def line(self) -> str:
        """In one line."""
        parts = [f"first token {_ms(self.first_token)}", f"further token {_ms(self.token)}"]
        parts += [f"prompt step {_ms(self.prompt_step)}", f"decode step {_ms(self.decode_step)}"]
        parts += [f"host {_ms(self.decode_host)} a dispatch of decode steps"]
        return (
            f"batch {self.batch}, {self.prompt} tokens in, {self.answer} out: {'; '.join(parts)} (median / p90); "
            f"{self.tokens_per_dispatch:.1f} tokens a dispatch; compiled in {self.compile_s:.1f} s before, "
            f"{self.compiled_in_time} programs in time"
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def measure_latency(bench: Bench, batch: int, prompt: int, answer: int, repeats: int = 5) -> Latency:
    """Requests of one length, all at once, after a rehearsal that compiles what they need.

    Raises ValueError where they do not fit the engine, and for fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"wanted at least 1 repeat, got {repeats}: set repeats 1")
    arrivals = draw_traffic(Traffic(batch, (prompt, prompt), (answer, answer)), bench.subject.vocabulary)
    bench.continuous(arrivals)
    compile_s, compiled = bench.compile_s, bench.runner.compilations
    runs = [bench.continuous(arrivals) for _ in range(repeats)]
    for run in runs:
        outcome(run, arrivals)
    first, further = token_times(runs)
    steps = [step for run in runs for step in run.steps]
    loops = [step for step in steps if not step.bucket.tokens and step.loops]
    return Latency(
        batch=batch,
        prompt=prompt,
        answer=answer,
        repeats=repeats,
        first_token=spread(first),
        token=spread(further) if further else None,
        prompt_step=spread([step.span_s for step in steps if step.bucket.tokens]),
        decode_step=spread([step.span_s / step.loops for step in loops]) if loops else None,
        decode_host=spread([step.span_s - step.wait_s for step in loops]) if loops else None,
        tokens_per_dispatch=statistics.mean(step.loops for step in loops) if loops else 0.0,
        compile_s=compile_s,
        compiled_in_time=bench.runner.compilations - compiled,
    )


def token_times(runs: Sequence[Run]) -> tuple[list[float], list[float]]:
    """Seconds to the first token of each request, and the mean seconds of the further ones of those that have any."""
    times = [times_s for run in runs for times_s in run.times_s.values()]
    first = [request[0] for request in times]
    further = [(request[-1] - request[0]) / (len(request) - 1) for request in times if len(request) > 1]
    return first, further


def spread(values_s: Sequence[float]) -> Spread:
    """Median and 90th percentile of at least one value."""
    median, p90 = np.percentile(values_s, [50, 90]).tolist()
    return Spread(median, p90)


def _ms(values: Spread | None) -> str:
    return "none" if values is None else f"{values.median_s * 1e3:.2f} / {values.p90_s * 1e3:.2f} ms"
