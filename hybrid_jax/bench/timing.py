"""Times a program on the device by the profiler's own clock, without the launch and the host around it."""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax

from kernels_pallas.cases.case import Case


def time_case(case: Case, calls: int = 20) -> tuple[float, float]:
    """Seconds a call, medians over `calls`: with the device at work, and from first kernel to last kernel's end."""
    function, arguments, donated = case.make()
    program = jax.jit(function, donate_argnums=donated)
    held = list(arguments)

    def call() -> Any:
        results = program(*held)
        for index, value in zip(donated, results, strict=False):
            held[index] = value
        return results

    for _ in range(3):
        jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(call())
        events = device_events(Path(folder))
    return _medians(events, calls)


def device_events(folder: Path) -> list[tuple[int, int, str]]:
    """Start and end in nanoseconds, and name, of every kernel and copy in a trace, by start."""
    (file,) = folder.rglob("*.xplane.pb")
    found = []
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if plane.name.startswith("/device:"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    found += [(int(e.start_ns), int(e.start_ns + e.duration_ns), e.name) for e in line.events]
    return sorted(found)


def _medians(events: list[tuple[int, int, str]], calls: int) -> tuple[float, float]:
    if not events or len(events) % calls:
        raise ValueError(f"wanted the same kernels in each of {calls} calls, got {len(events)} in all: is it a GPU?")
    size = len(events) // calls
    groups = [events[i : i + size] for i in range(0, len(events), size)]
    busy = [sum(end - start for start, end, _ in group) for group in groups]
    span = [max(end for _, end, _ in group) - group[0][0] for group in groups]
    return statistics.median(busy) * 1e-9, statistics.median(span) * 1e-9
