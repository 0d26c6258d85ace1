"""Throughput of a model on mixed traffic: the engine against static batches of the same compiled programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hybrid_jax.assembly import build_engine, plan_engine
from hybrid_jax.bench.run import MeasuredDevice, Run, StepRecord, run_continuous, run_static
from hybrid_jax.bench.subject import Subject
from hybrid_jax.bench.traffic import Arrival, Traffic, draw_traffic
from hybrid_jax.buckets import Bucket
from hybrid_jax.config import EngineConfig
from hybrid_jax.memory import MemoryPlan
from hybrid_jax.scheduler import Scheduler


@dataclass(frozen=True)
class BucketTime:
    """What steps of one shape took. padding_ratio: share of the tokens that were padding."""

    rows: int
    tokens: int
    pages: int
    steps: int
    seconds: float
    padding_ratio: float


@dataclass(frozen=True)
class Outcome:
    """One way to run the traffic. wait_s: the host waited for the device; submit_s: it packed and started steps;
    other_s: the rest, mostly planning.
    """

    seconds: float
    prompt_tokens: int
    generated_tokens: int
    requests: int
    steps: int
    wait_s: float
    submit_s: float
    other_s: float
    buckets: tuple[BucketTime, ...]

    @property
    def rates(self) -> dict[str, float]:
        """Of prompt tokens, generated tokens and requests, each a second."""
        return {
            "prompt_tokens_per_s": self.prompt_tokens / self.seconds,
            "generated_tokens_per_s": self.generated_tokens / self.seconds,
            "requests_per_s": self.requests / self.seconds,
        }

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | self.rates

    def lines(self, name: str) -> list[str]:
        """For people."""
        rates = self.rates
        host_ms, wait_ms = ((self.seconds - self.wait_s) / self.steps * 1e3, self.wait_s / self.steps * 1e3)
        found = [
            f"{name}: {rates['generated_tokens_per_s']:,.1f} tokens/s out, {rates['prompt_tokens_per_s']:,.1f} in, "
            f"{rates['requests_per_s']:.2f} requests/s ({self.seconds:.2f} s, {self.steps} steps of {host_ms:.2f} ms "
            f"host + {wait_ms:.2f} ms waiting for the device; of the host's time {self.submit_s:.2f} s to pack and "
            f"start steps)"
        ]
        for bucket in self.buckets:
            shape = f"{bucket.tokens} tokens" if bucket.tokens else "decode loop"
            found.append(
                f"  {bucket.rows} rows, {shape}, {bucket.pages} pages: {bucket.steps} steps, {bucket.seconds:.2f} s, "
                f"{bucket.padding_ratio:.0%} padding"
            )
        return found


@dataclass(frozen=True)
class Throughput:
    """The engine and static batches on the same traffic: of several runs of each, the one of median time.

    compile_s and compilations: before anything was timed; compiled_in_time: while it was, which must be 0.
    hits: prompts that began in the prefix cache.
    """

    traffic: Traffic
    plan: MemoryPlan
    continuous: Outcome
    static: Outcome
    repeats: int
    seconds: tuple[tuple[float, ...], tuple[float, ...]]
    preemptions: int
    hits: int
    compile_s: float
    compilations: int
    compiled_in_time: int

    @property
    def ratio(self) -> float:
        """Tokens a second of the engine over those of static batches."""
        return self.static.seconds / self.continuous.seconds

    def lines(self) -> list[str]:
        """For people."""
        each = "; ".join(
            f"{name} {', '.join(f'{s:.2f}' for s in seconds)} s"
            for name, seconds in zip(("continuous", "static"), self.seconds, strict=True)
        )
        return [
            f"{self.traffic.description}; up to {self.plan.max_num_seqs} at once",
            *self.continuous.lines("continuous batching"),
            f"  {self.preemptions} preemptions, {self.hits} hits of the prefix cache",
            *self.static.lines("static batches"),
            f"continuous over static: {self.ratio:.2f} (median of {self.repeats}: {each})",
            f"{self.compilations} programs compiled in {self.compile_s:.1f} s before, {self.compiled_in_time} in time",
        ]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "traffic": asdict(self.traffic),
            "max_num_seqs": self.plan.max_num_seqs,
            "continuous": self.continuous.to_json(),
            "static": self.static.to_json(),
            "ratio": self.ratio,
            "repeats": self.repeats,
            "seconds": {"continuous": self.seconds[0], "static": self.seconds[1]},
            "preemptions": self.preemptions,
            "hits": self.hits,
            "compile_s": self.compile_s,
            "compilations": self.compilations,
            "compiled_in_time": self.compiled_in_time,
        }


class Bench:
    """An engine's parts around one subject, ready to run traffic in either way."""

    def __init__(self, subject: Subject, config: EngineConfig):
        self.subject, self.config = subject, config
        self.plan = plan_engine(subject.model, subject.routing, subject.positions, config)
        engine, self.runner = build_engine(subject.model, subject.routing, self.plan, config, ())
        self.scheduler: Scheduler = engine.scheduler
        self.compile_s = 0.0

    def continuous(self, arrivals: Sequence[Arrival]) -> Run:
        """Run the engine, from an empty memory."""
        device = self._fresh_device()
        run = run_continuous(self.scheduler, device, arrivals, self.config.run_ahead)
        self.compile_s += device.compile_s
        return run

    def static(self, arrivals: Sequence[Arrival]) -> Run:
        """Run static batches, from an empty memory."""
        device = self._fresh_device()
        run = run_static(self.scheduler.limits, self.scheduler.pages.count, device, arrivals)
        self.compile_s += device.compile_s
        return run

    def _fresh_device(self) -> MeasuredDevice:
        """The runner, with nothing in the prefix cache. What is left in its memory is arbitrary to the next request."""
        self.scheduler.reset()
        return MeasuredDevice(self.runner)


def measure_throughput(bench: Bench, traffic: Traffic, repeats: int = 3) -> Throughput:
    """Run the traffic in both ways, by turns.

    A rehearsal goes before that, in which programs are compiled: all of them where requests come at a rate, as the
    shapes of steps then depend on time. Raises ValueError where the traffic does not fit the engine.
    """
    if repeats < 1:
        raise ValueError(f"wanted at least 1 repeat, got {repeats}: set repeats 1")
    arrivals = draw_traffic(traffic, bench.subject.vocabulary)
    rehearse(bench, arrivals, traffic)
    compiled, compile_s = bench.runner.compilations, bench.compile_s
    hits, preemptions = bench.scheduler.cache.statistics.hits, bench.scheduler.preemptions
    runs = [(bench.continuous(arrivals), bench.static(arrivals)) for _ in range(repeats)]
    each = tuple(tuple(run.seconds for run in way) for way in zip(*runs, strict=True))
    return Throughput(
        traffic=traffic,
        plan=bench.plan,
        continuous=outcome(median_run([run for run, _ in runs]), arrivals),
        static=outcome(median_run([run for _, run in runs]), arrivals),
        repeats=repeats,
        seconds=(each[0], each[1]),
        preemptions=(bench.scheduler.preemptions - preemptions) // repeats,
        hits=(bench.scheduler.cache.statistics.hits - hits) // repeats,
        compile_s=compile_s,
        compilations=compiled,
        compiled_in_time=bench.runner.compilations - compiled,
    )


def rehearse(bench: Bench, arrivals: Sequence[Arrival], traffic: Traffic) -> None:
    """Compile what the traffic needs, and run it once in each way."""
    if traffic.rate is not None:
        bench.runner.compile_all()
    bench.continuous(arrivals)
    bench.static(arrivals)


def median_run(runs: Sequence[Run]) -> Run:
    """The run of median time; of two in the middle, the slower one."""
    return sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]


def outcome(run: Run, arrivals: Sequence[Arrival]) -> Outcome:
    """What a run says, against the requests that it was given. Raises RuntimeError where an answer is not complete."""
    for arrival in arrivals:
        wanted, got = arrival.request.token_limit, len(run.tokens.get(arrival.request.id, []))
        if got != wanted:
            raise RuntimeError(f"wanted {wanted} tokens of request {arrival.request.id}, got {got}: a fault of the run")
    wait_s, submit_s = sum(step.wait_s for step in run.steps), sum(step.submit_s for step in run.steps)
    return Outcome(
        seconds=run.seconds,
        prompt_tokens=sum(len(arrival.request.prompt_token_ids) for arrival in arrivals),
        generated_tokens=sum(map(len, run.tokens.values())),
        requests=len(arrivals),
        steps=len(run.steps),
        wait_s=wait_s,
        submit_s=submit_s,
        other_s=run.seconds - wait_s - submit_s,
        buckets=bucket_times(run.steps),
    )


def bucket_times(steps: Sequence[StepRecord]) -> tuple[BucketTime, ...]:
    """The steps by shape, the one that took most time first."""
    by_bucket: dict[Bucket, list[StepRecord]] = {}
    for step in steps:
        by_bucket.setdefault(step.bucket, []).append(step)
    times = []
    for bucket, same in by_bucket.items():
        real, padded = sum(step.real for step in same), sum(step.padded for step in same)
        seconds = sum(step.span_s for step in same)
        times.append(
            BucketTime(bucket.rows, bucket.tokens, bucket.pages, len(same), seconds, 1 - real / max(padded, 1))
        )
    return tuple(sorted(times, key=lambda time: -time.seconds))
