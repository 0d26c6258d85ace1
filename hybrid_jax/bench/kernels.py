"""Runs the cases of all kernels against the floor of their bytes and operations, and other libraries beside them.

A file of this package that defines `cases()` has kernel cases; one that also defines `peers()` knows other libraries
that do the same. Files are found by name; this one knows no kernel.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import jax

from hybrid_jax.bench.case import Case
from hybrid_jax.bench.ceilings import Ceilings
from hybrid_jax.bench.timing import time_case

FILES = ("linear_decode", "linear_prefill", "attention", "products")


@dataclass(frozen=True)
class Peer:
    """What another library does in place of a case of the same name and shape.

    library: its import name. time_s: seconds a call on the device; called only where the library is installed.
    """

    library: str
    name: str
    shape: str
    time_s: Callable[[], float]


@dataclass(frozen=True)
class KernelTime:
    """A case that was run. device_s: kernels at work; span_s: from the first to the end of the last, gaps included."""

    name: str
    shape: str
    device_s: float
    span_s: float
    moved_bytes: int
    operations: float
    floor_s: float

    @property
    def ratio(self) -> float:
        """The floor over the span."""
        return self.floor_s / self.span_s

    @property
    def line(self) -> str:
        """In one line."""
        rate = f"{self.moved_bytes / self.span_s / 1e9:,.0f} GB/s"
        if self.operations:
            rate += f", {self.operations / self.span_s / 1e12:,.1f} TFLOP/s"
        return (
            f"{self.name}, {self.shape}: {self.span_s * 1e6:,.1f} us ({self.device_s * 1e6:,.1f} at work), {rate}; "
            f"floor {self.floor_s * 1e6:,.1f} us, {self.ratio:.2f} of it"
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"ratio": self.ratio}


def require_kernels() -> None:
    """Raises ValueError on a platform without kernels."""
    platform = jax.default_backend()
    if platform == "cpu":
        raise ValueError(f"wanted a GPU, got platform {platform!r}: kernels need one, on a CPU plain XLA computes")


def kernel_files() -> list[ModuleType]:
    """The files with kernel cases that are there."""
    names = [f"{__package__}.{name}" for name in FILES]
    return [importlib.import_module(name) for name in names if importlib.util.find_spec(name)]


def wanted_cases(only: str) -> list[Case]:
    """The cases whose name and shape contain `only`. Raises ValueError where there are none."""
    cases = [case for file in kernel_files() for case in file.cases()]
    found = [case for case in cases if only in f"{case.name}, {case.shape}"]
    if not found:
        names = ", ".join(dict.fromkeys(case.name for case in cases))
        raise ValueError(f"wanted a part of the name of a case, got {only!r}: there are {names}")
    return found


def time_kernel(case: Case, ceilings: Ceilings) -> KernelTime:
    """Run one case."""
    device_s, span_s = time_case(case)
    floor_s = ceilings.floor_s(case.read_bytes, case.written_bytes, case.operations)
    moved_bytes = case.read_bytes + case.written_bytes
    return KernelTime(case.name, case.shape, device_s, span_s, moved_bytes, case.operations, floor_s)


def peer_lines(only: str) -> Iterator[str]:
    """The times of other libraries where they are installed, and a note of each that is not."""
    files = [file for file in kernel_files() if "peers" in vars(file)]
    peers = [peer for file in files for peer in file.peers() if only in f"{peer.name}, {peer.shape}"]
    missing = {peer.library for peer in peers if importlib.util.find_spec(peer.library) is None}
    for peer in peers:
        if peer.library not in missing:
            yield f"{peer.name}, {peer.shape}, by {peer.library}: {peer.time_s() * 1e6:,.1f} us"
    for library in sorted(missing):
        yield f"{library} is not installed: nothing is run beside"
    if not peers:
        yield "no case names another library to run beside"
