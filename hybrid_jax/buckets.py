"""The few shapes that steps are rounded up to, so that few programs are compiled. Imports no JAX."""

from dataclasses import dataclass
from itertools import product

from hybrid_jax.config import CHUNK_TOKENS
from hybrid_jax.step import Step

FEW_PREFILLS = 2


@dataclass(frozen=True)
class Bucket:
    """Shape of a program: rows, packed tokens (0 for a decode loop, which has one a row), pages of a row.

    prefills: most rows that prefill; None: all may. likeliest: it knows no other way to take a token.
    """

    rows: int
    tokens: int
    pages: int
    prefills: int | None = None
    likeliest: bool = False


@dataclass(frozen=True)
class Ladders:
    """The sizes to choose from, rising; the last of each is the most there can be.

    decode_rows, tokens: by factors of 2, as padding costs time there. step_rows: of steps that prefill, by factors of
    8. pages: one width where a kernel reads only the pages in use, else by factors of 4. prefills: few, as where
    prompts come one by one beside many rows in decode, or all: chunks are set aside for as many rows. likeliest:
    whether decode loops have programs of their own for rows that take the likeliest token, which meet no branch.
    """

    decode_rows: tuple[int, ...]
    step_rows: tuple[int, ...]
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    prefills: tuple[int | None, ...]
    likeliest: bool = False

    def choose(self, step: Step) -> Bucket:
        """The smallest bucket that holds a step."""
        pages = round_up(max(len(row.pages) for row in step.rows), self.pages)
        if step.decode_only:
            likeliest = self.likeliest and all(row.request.takes_likeliest for row in step.rows)
            return Bucket(round_up(len(step.rows), self.decode_rows), 0, pages, likeliest=likeliest)
        reading = len(step.rows) - step.decodes
        prefills = next(most for most in self.prefills if most is None or reading <= most)
        rows, tokens = round_up(len(step.rows), self.step_rows), round_up(step.tokens, self.tokens)
        return Bucket(rows, tokens, pages, prefills)

    def all(self) -> tuple[Bucket, ...]:
        """Every bucket, the decode loops first."""
        ways = (True, False) if self.likeliest else (False,)
        shapes = product(self.decode_rows, self.pages, ways)
        decodes = [Bucket(rows, 0, pages, likeliest=way) for rows, pages, way in shapes]
        sizes = product(self.step_rows, self.tokens, self.pages, self.prefills)
        return (*decodes, *(Bucket(*size) for size in sizes))


def make_ladders(
    rows: int, step_tokens: int, pages: int, one_width: bool, likeliest: bool = False, least_rows: int = 1
) -> Ladders:
    """The ladders up to so many rows, tokens of a step that prefills, and pages of a row.

    one_width: kernels skip what is not in use, so that page tables and steps that prefill may have one width each.
    likeliest: as in `Ladders`. least_rows: of a decode loop, be there fewer or not.
    """
    return Ladders(
        decode_rows=ladder(least_rows, max(rows, least_rows), 2),
        step_rows=(rows,) if one_width else ladder(min(8, rows), rows, 8),
        tokens=ladder(CHUNK_TOKENS, step_tokens, 2),
        pages=(max(pages, 1),) if one_width else ladder(8, max(pages, 1), 4),
        prefills=(FEW_PREFILLS, None) if rows > 2 * FEW_PREFILLS else (None,),
        likeliest=likeliest,
    )


def ladder(least: int, most: int, factor: int) -> tuple[int, ...]:
    """`least`, `least * factor`, … up to and including `most`."""
    steps = []
    while least < most:
        steps.append(least)
        least *= factor
    return (*steps, most)


def round_up(count: int, steps: tuple[int, ...]) -> int:
    """The first step that holds `count`. Raises ValueError where none does."""
    for step in steps:
        if count <= step:
            return step
    raise ValueError(f"wanted at most {steps[-1]}, got {count}: the schedule went over its limits")
