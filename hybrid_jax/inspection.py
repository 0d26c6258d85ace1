"""Looks at a checkpoint without loading it: what it is (`inspect`), and whether it is whole (`verify`).

Both read headers, indices and metadata, no weights. `inspect` describes as much as it can; `verify` gathers every
problem instead of stopping at the first. This module knows no family.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from hybrid_jax.checkpoint import Outline, make_outline, orbax_plan, stored_problems
from hybrid_jax.convert import record_problems
from hybrid_jax.hf_directory import check_complete, list_hf
from hybrid_jax.orbax_directory import OTHER, PARAMETERS, is_orbax, open_orbax
from hybrid_jax.orbax_tree import Leaf
from hybrid_jax.published_config import read_published_config
from hybrid_jax.safetensors import DTYPES
from hybrid_jax.spelling import Plan, cut_as_stored, entry_problems, find_spellings

SHOWN = 50  # problems printed


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is. `dtypes` gives tensors and bytes of every stored dtype, `other_spellings` the parameters
    that are not published in the family's usual way, `beside` the safetensors files that are no part of it."""

    path: Path
    architecture: str
    family: str
    form: str
    files: Mapping[str, int]
    beside: tuple[str, ...]
    dtypes: Mapping[str, tuple[int, int]]
    total: int
    parameters: int
    other_spellings: int
    left_out: int
    problems: int

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


@dataclass(frozen=True)
class Verification:
    """What is wrong with a checkpoint; nothing where `problems` is empty."""

    path: Path
    form: str
    tensors: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class _Contents:
    """What a checkpoint of either form holds, as far as it can be read."""

    form: str
    files: Mapping[str, int]
    beside: tuple[str, ...]
    stored: Mapping[str, Leaf]
    plan: Plan
    problems: tuple[str, ...]


# -------------------------------------------------------------------------------------------------------------- reading


def inspect(path: Path) -> Inspection:
    """Describe a checkpoint directory, or the model of a config.json by itself. Raises ValueError without a config."""
    hf = read_published_config(path)
    outline = make_outline(hf)
    contents = _read(path, outline)
    return Inspection(
        path=path,
        architecture=hf["architectures"][0],
        family=outline.family.__name__,
        form=contents.form,
        files=contents.files,
        beside=contents.beside,
        dtypes=_count_dtypes(contents.stored.values()),
        total=outline.total,
        parameters=len(outline.leaves),
        other_spellings=sum(found.source is not found.weight.sources[0] for found in contents.plan.found),
        left_out=len(contents.plan.left_out),
        problems=len(contents.problems),
    )


def verify(path: Path) -> Verification:
    """Check a checkpoint: files, index, names, dtypes and shapes are exactly those that its config asks for."""
    problems: list[str] = []
    outline = _gather(problems, lambda: make_outline(read_published_config(path)))
    if outline is None or not path.is_dir():
        problems = problems or [f"{path}: wanted a checkpoint directory, got a config by itself"]
        return Verification(path, "config", 0, tuple(problems))
    contents = _read(path, outline)
    return Verification(path, contents.form, len(contents.stored), contents.problems)


def _read(path: Path, outline: Outline) -> _Contents:
    if not path.is_dir():
        return _Contents("config", {}, (), {}, Plan((), {}, ()), ())
    return _read_orbax(path, outline) if is_orbax(path) else _read_hf(path, outline)


def _read_hf(directory: Path, outline: Outline) -> _Contents:
    listing = list_hf(directory)
    problems = list(listing.problems)
    _gather(problems, lambda: check_complete(directory))
    stored = {
        name: Leaf(entry.shape, DTYPES[entry.dtype])
        for file in listing.files.values()
        for name, entry in file.header.entries.items()
    }
    plan, gaps = find_spellings(outline.table, stored)
    plan = cut_as_stored(plan, {name: leaf.shape for name, leaf in stored.items()})
    problems += gaps + entry_problems(plan, stored, outline.leaves)
    files = {name: file.header.file_bytes for name, file in listing.files.items()}
    return _Contents("safetensors", files, listing.beside, stored, plan, tuple(problems))


def _read_orbax(directory: Path, outline: Outline) -> _Contents:
    problems: list[str] = []
    files = {PARAMETERS: sum(file.stat().st_size for file in (directory / PARAMETERS).rglob("*") if file.is_file())}
    checkpoint = _gather(problems, lambda: open_orbax(directory))
    if checkpoint is None:
        return _Contents("Orbax", files, (), {}, Plan((), {}, ()), tuple(problems))
    plan = _gather(problems, lambda: orbax_plan(checkpoint, outline.table)) or Plan((), {}, ())
    problems += stored_problems(checkpoint, plan, outline.leaves)
    if checkpoint.published is not None and not problems:
        problems += record_problems(checkpoint, plan, checkpoint.published)
    if checkpoint.other is not None:
        files[OTHER] = checkpoint.other.header.file_bytes
    return _Contents("Orbax", files, (), checkpoint.stored, plan, tuple(problems))


def _gather[T](problems: list[str], read: Callable[[], T]) -> T | None:
    """What a reader gives; its error becomes a problem."""
    try:
        return read()
    except ValueError as error:
        problems.append(str(error))
        return None


def _count_dtypes(leaves: Iterable[Leaf]) -> dict[str, tuple[int, int]]:
    counts: dict[str, tuple[int, int]] = {}
    for leaf in leaves:
        tensors, size_bytes = counts.get(str(leaf.dtype), (0, 0))
        counts[str(leaf.dtype)] = tensors + 1, size_bytes + leaf.size_bytes
    return counts


# ------------------------------------------------------------------------------------------------------------- printing


def render_inspection(found: Inspection, console: Console) -> None:
    """Print an inspection."""
    rows = [
        ("architecture", found.architecture),
        ("family", found.family),
        ("form", found.form),
        ("parameters", f"{found.total:,} numbers in {found.parameters} arrays"),
    ]
    for dtype, (tensors, size_bytes) in sorted(found.dtypes.items()):
        rows.append((f"stored {dtype}", f"{tensors} tensors, {decimal(size_bytes)}"))
    rows += [("file", f"{name}, {decimal(size_bytes)}") for name, size_bytes in found.files.items()]
    rows += [("no part of it", name) for name in found.beside]
    rows.append(("spelling", f"other for {found.other_spellings} arrays" if found.other_spellings else "usual"))
    if found.left_out:
        rows.append(("left out", f"{found.left_out} tensors that the family does not use"))
    if found.problems:
        rows.append(("problems", f"{found.problems}: see verify"))
    table = Table(title=escape(str(found.path)), show_header=False, title_justify="left")
    for name, text in rows:
        table.add_row(name, escape(text))
    console.print(table)


def render_verification(found: Verification, console: Console) -> None:
    """Print a verification: one line where all is well, otherwise the problems."""
    lines = [f"{found.path}: {len(found.problems)} problem(s)", *(f"  {line}" for line in found.problems[:SHOWN])]
    if len(found.problems) > SHOWN:
        lines.append(f"  and {len(found.problems) - SHOWN} more")
    if not found.problems:
        lines = [f"{found.path}: whole, {found.tensors} tensors ({found.form})"]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
