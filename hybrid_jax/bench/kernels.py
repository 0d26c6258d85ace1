"""Runs the cases of all kernels against the floor of their bytes and operations. Knows no kernel."""

from dataclasses import asdict, dataclass
from typing import Any

import jax

from hybrid_jax.bench.ceilings import Ceilings
from hybrid_jax.bench.timing import time_case
from kernels_pallas.cases import attention, experts, linear_decode, linear_prefill, products
from kernels_pallas.cases.case import Case


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


def wanted_cases(only: str) -> list[Case]:
    """The cases whose name and shape contain `only`. Raises ValueError where there are none."""
    cases = [case for file in (linear_decode, linear_prefill, attention, experts, products) for case in file.cases()]
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
