"""Times single steps of a model through the engine's runner: the decode loop and a step that reads prompts.

The steps are made directly, as the schedule would make them at a fixed batch and context; a step is started before the
results of the one before it are read, as the engine does. Pools are as large as one case needs. Their content is
arbitrary numbers, as zeros take less power to read.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.filesize import decimal

from hybrid_jax.bench.ceilings import Ceilings
from hybrid_jax.bench.floors import Moved, decode_moved, prefill_moved
from hybrid_jax.bench.subject import Subject
from hybrid_jax.bench.timing import device_events
from hybrid_jax.config import CHUNK_TOKENS, EngineConfig
from hybrid_jax.request import SamplingParams, make_request
from hybrid_jax.runner import Runner, RunnerSizes, Ticket
from hybrid_jax.step import RowStep, Step
from kernels_pallas.op import Cache

PAGE_SIZE = EngineConfig.page_size
GREEDY = SamplingParams(temperature=0, ignore_eos=True)
ENDLESS = 2**30  # tokens that a request may have: nothing ends while it is measured


@dataclass(frozen=True)
class StepTime:
    """One case. step_s: by the clock, from the start of the first dispatch to the end of the last, a step of a loop.

    device_s: of it, with a kernel at work, by the profiler; None where the platform's profiler does not tell, as in a
    decode loop on a GPU, which is one graph.
    compile_s: of the program, apart.
    """

    sort: str
    rows: int
    context: int
    step_s: float
    device_s: float | None
    compile_s: float
    moved: Moved
    floor_s: float

    @property
    def ratio(self) -> float:
        """The floor over the time: 1 is the limit of the device."""
        return self.floor_s / self.step_s

    @property
    def tokens(self) -> int:
        """Tokens fed in a step."""
        return self.rows * (self.context if self.sort == "prefill" else 1)

    @property
    def line(self) -> str:
        """All in one line."""
        moved = self.moved
        what = (
            f"{self.rows} x {self.context} tokens"
            if self.sort == "prefill"
            else f"batch {self.rows} context {self.context}"
        )
        device = "" if self.device_s is None else f" ({self.device_s * 1e3:.3f} on the device)"
        return (
            f"{self.sort} {what}: {self.step_s * 1e3:.3f} ms a step{device}, {self.tokens / self.step_s:,.0f} "
            f"tokens/s; floor {self.floor_s * 1e3:.3f} ms (weights {decimal(moved.weights_bytes)}, pages "
            f"{decimal(moved.pages_bytes)}, states {decimal(moved.states_bytes)}), {self.ratio:.2f} of it; compiled "
            f"in {self.compile_s:.0f} s"
        )

    def to_json(self) -> dict[str, Any]:
        """The case as plain data."""
        return asdict(self) | {"ratio": self.ratio, "tokens_per_s": self.tokens / self.step_s}


@dataclass(frozen=True)
class Repeats:
    """How often: tokens of a row in one dispatch of the decode loop, and dispatches that are timed."""

    loops: int
    dispatches: int


def time_steps(
    subject: Subject,
    ceilings: Ceilings,
    contexts: tuple[int, ...],
    batches: tuple[int, ...],
    prefill: tuple[int, int],
    repeats: Repeats,
) -> Iterator[StepTime]:
    """Every context with every batch in decode, then one prefill.

    Args:
      prefill: prompts and tokens of each; no prompts for no prefill.
    Raises ValueError for sizes below 1 and for more tokens than the model has positions.
    """
    longest = max([context + repeats.loops for context in contexts] + [prefill[1]])
    if longest > subject.positions or min((*contexts, *batches, *prefill[1:], repeats.loops, repeats.dispatches)) < 1:
        raise ValueError(
            f"wanted batches, contexts and prompts from 1 to the model's {subject.positions} positions, got contexts "
            f"{contexts}, batches {batches}, prompts of {prefill[1]} tokens: with the tokens drawn they reach {longest}"
        )
    for context in contexts:
        for rows in batches:
            yield time_decode(subject, ceilings, rows, context, repeats)
    if prefill[0]:
        yield time_prefill(subject, ceilings, *prefill, repeats.dispatches)


def time_decode(subject: Subject, ceilings: Ceilings, rows: int, context: int, repeats: Repeats) -> StepTime:
    """One decode step of `rows` rows that have seen `context` tokens, in the loop on the device."""
    loops = repeats.loops
    runner = make_runner(subject, rows, context + loops, CHUNK_TOKENS + rows, loops)
    step = decode_step(rows, context, loops)
    compile_s = _compile(runner, step)
    step_s = _time(runner, step, repeats.dispatches)
    device_s = None if jax.default_backend() == "gpu" else _device_s(runner, step)  # not seen inside one graph
    mean_context = context + (loops - 1) / 2  # each step of the loop reads one token more
    moved = decode_moved(subject.model, subject.routing, subject.chosen, rows, mean_context)
    device_s = None if device_s is None else device_s / loops
    return StepTime(
        "decode", rows, context, step_s / loops, device_s, compile_s, moved, ceilings.floor_s(moved.total_bytes)
    )


def time_prefill(subject: Subject, ceilings: Ceilings, rows: int, tokens: int, dispatches: int) -> StepTime:
    """One step that reads `rows` new prompts of `tokens` tokens each."""
    runner = make_runner(subject, rows, tokens, max(rows * tokens, CHUNK_TOKENS), 1)
    step = prefill_step(subject, rows, tokens)
    compile_s = _compile(runner, step)
    step_s, device_s = _time(runner, step, dispatches), _device_s(runner, step)
    moved = prefill_moved(subject.model, subject.routing, subject.chosen, rows, tokens)
    floor_s = ceilings.floor_s(moved.total_bytes, operations=moved.operations)
    return StepTime("prefill", rows, tokens, step_s, device_s, compile_s, moved, floor_s)


# ------------------------------------------------------------------------------------------------- runners and steps


def make_runner(subject: Subject, rows: int, row_tokens: int, step_tokens: int, loops: int) -> Runner:
    """A runner with room for `rows` rows of `row_tokens` tokens, and nothing more; its memory is filled."""
    pages = page_count(row_tokens)
    sizes = RunnerSizes(
        pages=rows * pages + 1,
        slots=rows + 1,
        page_size=PAGE_SIZE,
        rows=rows,
        row_pages=pages,
        step_tokens=step_tokens,
        loops=loops,
        grid=CHUNK_TOKENS,
        canary=False,
    )
    runner = Runner(subject.model, subject.routing, sizes, (), "highest" if subject.dtype == "float32" else None)
    runner._memory = replace(runner._memory, cache=_filled(runner._memory.cache))
    return runner


def page_count(tokens: int) -> int:
    """Pages of a row of so many tokens. A model that keeps none has tables of them all the same, and no pools."""
    return -(-tokens // PAGE_SIZE)


def _filled(cache: Cache) -> Cache:
    """The cache with arbitrary numbers instead of zeros, written in place."""
    write = jax.jit(_waves, donate_argnums=0)
    return Cache(cache.specs, tuple(tuple(write(array) for array in pool) for pool in cache.pools))


def _waves(array: jax.Array) -> jax.Array:
    """Numbers from -1 to 1 by position: unlike those of a generator, they are made without temporaries."""
    phase = jnp.zeros(array.shape, jnp.float32)
    for axis, pace in enumerate((12.9898, 78.233, 37.719, 4.581, 9.377)[: array.ndim]):
        phase += jax.lax.broadcasted_iota(jnp.float32, array.shape, axis) * pace
    return jnp.sin(phase).astype(array.dtype)


def decode_step(rows: int, context: int, loops: int) -> Step:
    """All rows in decode, each for `loops` tokens, with their pages and slots in random places."""
    make = _row_maker(rows, context + loops)
    made = (make(index, (), context, loops) for index in range(rows))
    return Step(1, tuple(made), loops)


def prefill_step(subject: Subject, rows: int, tokens: int) -> Step:
    """All rows read a new prompt of random tokens."""
    make = _row_maker(rows, tokens)
    prompts = np.random.default_rng(1).integers(0, subject.vocabulary, (rows, tokens)).tolist()
    return Step(1, tuple(make(index, tuple(prompt), 0, 0) for index, prompt in enumerate(prompts)), 1)


def _row_maker(rows: int, tokens: int) -> Callable[[int, tuple[int, ...], int, int], RowStep]:
    """Makes a row's share of a step from its index, its prompt, the tokens seen, and those to draw in a loop."""
    places, count = np.random.default_rng(0), page_count(tokens)
    tables = (1 + places.permutation(rows * count)).reshape(rows, count).tolist()
    slots = (1 + places.permutation(rows)).tolist()

    def make(index: int, prompt: tuple[int, ...], seen: int, ahead: int) -> RowStep:
        return RowStep(
            request=make_request(str(index), prompt or (1,), GREEDY, ENDLESS),
            row=index + 1,
            tokens=prompt,
            seen=seen,
            drawn=0 if prompt else 1,
            ahead=ahead,
            draws=True,
            read_slot=slots[index],
            write_slot=slots[index],
            snapshot_slot=0,
            snapshot_length=0,
            pages=tuple(tables[index]),
        )

    return make


# ------------------------------------------------------------------------------------------------------------ timing


def _compile(runner: Runner, step: Step) -> float:
    begin = time.perf_counter()
    runner.compiled(runner.ladders.choose(step))
    return time.perf_counter() - begin


def _time(runner: Runner, step: Step, dispatches: int) -> float:
    """Seconds a dispatch, by the clock, after as many untimed ones: the first are slower by 2 to 3 % on a GPU."""
    _run(runner, step, dispatches)
    begin = time.perf_counter()
    _run(runner, step, dispatches)
    return (time.perf_counter() - begin) / dispatches


def _run(runner: Runner, step: Step, dispatches: int) -> None:
    """Start each dispatch before the one before it is read. Raises RuntimeError where a row drew less than it should:
    a time of half the work is no time."""
    flying: list[Ticket] = []
    for index in range(dispatches + 1):
        if index < dispatches:
            flying.append(runner.submit(step))
        if index > 0:
            drawn = [len(row.tokens) for row in runner.collect(flying.pop(0)).rows]
            wanted = [max(row.ahead, 1) for row in step.rows]
            if drawn != wanted:
                raise RuntimeError(f"wanted {wanted} tokens drawn by the rows, got {drawn}: are the logits finite?")


def _device_s(runner: Runner, step: Step) -> float | None:
    """Seconds in which a kernel or copy was at work during a dispatch; None where the profiler sees none."""
    if jax.default_backend() == "cpu":
        return None
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            _run(runner, step, 1)
        events = device_events(Path(folder))
    return busy_s([(start, end) for start, end, _ in events]) if events else None


def busy_s(spans_ns: list[tuple[int, int]]) -> float:
    """Seconds covered by spans of nanoseconds that may overlap."""
    busy, reached = 0, 0
    for start, end in sorted(spans_ns):
        busy += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return busy * 1e-9
