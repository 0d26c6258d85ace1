"""One kernel at one shape, as a benchmark runs it. Knows no kernel."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """What to run and the least that it must do.

    make: gives a function, its arguments (fresh random inputs), and the indices of those that are donated. The function
      returns the donated arguments first, in order and updated, then its results.
    read_bytes, written_bytes: each input read once, each output written once.
    operations: floating-point operations; a multiply and an add are two.
    """

    name: str
    shape: str
    make: Callable[[], tuple[Callable[..., tuple[Any, ...]], tuple[Any, ...], tuple[int, ...]]]
    read_bytes: int
    written_bytes: int
    operations: float = 0.0
