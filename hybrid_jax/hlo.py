"""Reads what a compiled program does off its optimised HLO: the collectives of a step with their bytes, and copies.

The text is that of `Compiled.as_text()`: computations, each with a line an instruction, that call one another. An
instruction in a loop counts as often as the loop is known to run, and once where that is not known, as in the loop over
the steps of a decode dispatch. Of the branches of a conditional the one that moves most counts. Knows no model.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "int32": "s32", "int8": "s8", "uint32": "u32"}
COMPUTATION = re.compile(r"^(ENTRY )?%([\w.-]+) .*\{$")
COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
ARRAY = re.compile(r"\b(pred|bf16|[a-z]\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%([\w.-]+)")
BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
COPY = re.compile(r" = \(?([a-z]\w*\[[\d,]*\]).* copy(?:-start)?\(")


@dataclass(frozen=True)
class Collective:
    """Collectives of one sort in a step: how many, and the bytes of their results on a device, all together."""

    kind: str
    count: int
    result_bytes: int

    def link_bytes(self, devices: int) -> float:
        """Bytes that a device sends where so many pass parts on from neighbour to neighbour."""
        others = devices - 1
        share = {
            "all-reduce": 2 * others / devices,
            "reduce-scatter": others,  # the result is one part of what is sent
            "collective-permute": 1.0,
        }
        return self.result_bytes * share.get(self.kind, others / devices)


@dataclass(frozen=True)
class Computation:
    """Collectives of its own, each with bytes, and what it calls: alternatives with how often one of them runs."""

    own: tuple[tuple[str, int], ...]
    calls: tuple[tuple[tuple[str, ...], int], ...]


def collectives(text: str) -> tuple[Collective, ...]:
    """The collectives of one step, those of greatest bytes first."""
    entry, computations = _read(text)

    @cache
    def count(name: str) -> tuple[tuple[tuple[str, int], int], ...]:
        found = Counter(computations[name].own)
        for alternatives, times in computations[name].calls:
            options = [Counter(dict(count(called))) for called in alternatives if called in computations]
            for key, number in max(options, key=_moved, default=Counter()).items():
                found[key] += number * times
        return tuple(found.items())

    sums: dict[str, list[int]] = {}
    for (kind, size_bytes), number in count(entry):
        total = sums.setdefault(kind, [0, 0])
        total[0] += number
        total[1] += number * size_bytes
    listed = (Collective(kind, number, size_bytes) for kind, (number, size_bytes) in sums.items())
    return tuple(sorted(listed, key=lambda one: -one.result_bytes))


def count_copies(text: str, arrays: Iterable[tuple[tuple[int, ...], str]]) -> int:
    """Instructions that copy a whole array of one of these shapes and NumPy names of dtypes."""
    wanted = {f"{NAMES.get(dtype, dtype)}[{','.join(map(str, shape))}]" for shape, dtype in arrays}
    return sum(found[1] in wanted for found in map(COPY.search, text.splitlines()) if found)


def _moved(counts: Counter[tuple[str, int]]) -> int:
    return sum(size_bytes * number for (_, size_bytes), number in counts.items())


def _read(text: str) -> tuple[str, dict[str, Computation]]:
    """The name of the entry, and all computations by name. Raises ValueError for a text without an entry."""
    entry, name = None, None
    lines: dict[str, list[str]] = {}
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            name = head[2]
            lines[name] = []
            entry = name if head[1] else entry
        elif name is not None and line.startswith("  "):
            lines[name].append(line)
    if entry is None:
        raise ValueError("wanted the HLO of a compiled program, got a text without ENTRY: pass Compiled.as_text()")
    return entry, {name: _computation(body) for name, body in lines.items()}


def _computation(lines: list[str]) -> Computation:
    found = filter(None, map(COLLECTIVE.search, lines))
    own = [(one[2], _result_bytes(one[1], one[3] is not None and one[2] != "all-reduce")) for one in found]
    calls: list[tuple[tuple[str, ...], int]] = []
    for line in lines:
        trips = TRIPS.search(line)
        branches = BRANCHES.search(line)
        if branches:
            calls.append((tuple(re.findall(r"%([\w.-]+)", branches[1])), 1))
        names = CALLED.findall(line)
        if "true_computation=" in line:
            calls.append((tuple(names), 1))
        else:
            calls += [((called,), int(trips[1]) if trips else 1) for called in names]
    return Computation(tuple(own), tuple(calls))


def _result_bytes(result: str, with_operands: bool) -> int:
    """Bytes of a result's arrays; where it lists the operands beside them, those of the greatest array."""
    sizes = [_array_bytes(dtype, dims) for dtype, dims in ARRAY.findall(result)]
    return max(sizes, default=0) if with_operands else sum(sizes)


def _array_bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8
