"""Shows what became of steps that were compiled ahead of time: a table of memory, a line a program, the verdict.

Knows the report of `hybrid_jax/aot.py` and nothing of how it was made.
"""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hybrid_jax.aot import Program, Report
from hybrid_jax.memory import GIB, format_bytes

AGREEMENT = 0.03  # between what the compiler says stays on a device and what `plan` says


def render(report: Report, console: Console) -> None:
    """Print the report."""
    console.print(to_table(report))
    for line in describe(report):
        console.print(line, highlight=False, soft_wrap=True)


def to_table(report: Report) -> Table:
    """Bytes of one device: as the compiled programs have them, as planned, and as a share of the device's memory."""
    chip, plan = report.chip, report.plan
    title = f"{report.name} on {report.devices} of {report.topology}: a device has {format_bytes(chip.memory_bytes)}"
    table = Table("part", "compiled", "planned", "share", title=escape(title), title_justify="left")
    temporaries = {program.sort: program.temporaries_bytes for program in report.programs}
    padding_bytes = report.compiled_bytes - report.held_bytes if report.compiled_bytes else 0
    rows = [
        ("weights", report.weights_bytes, plan.weights_bytes),
        (f"pages, {plan.pages:,} of {plan.page_size} tokens", report.pages_bytes, plan.pages_bytes),
        (f"slots, {plan.slots:,}", report.slots_bytes, plan.slots_bytes),
        ("row tables", report.rows_bytes, plan.rows_bytes),
        ("padding of tiles, inputs", padding_bytes, 0),
        *((f"temporaries of {sort}", size, plan.temporaries_bytes) for sort, size in temporaries.items()),
        ("code", sum(program.code_bytes for program in report.programs), 0),
    ]
    for name, size, planned in rows:
        table.add_row(name, _gib(size), _gib(planned), f"{size / chip.memory_bytes:.1%}")
    table.add_row("needed at once", _gib(report.needed_bytes), _gib(plan.total_bytes), _share(report))
    return table


def describe(report: Report) -> list[str]:
    """The programs, the agreement with the plan, and the verdict, a line each."""
    kinds = ", ".join(f"{kind} by {backend}" for kind, backend in report.backends.items())
    lines = [f"{kinds}.", *(f"{note}." for note in report.notes)]
    lines += [_program_line(program, report) for program in report.programs]
    if report.compiled_bytes:
        verdict = "within" if abs(report.deviation) <= AGREEMENT else "NOT within"
        lines.append(
            f"What stays on a device is {report.deviation:+.2%} of what plan says, {verdict} {AGREEMENT:.0%}; "
            "temporaries are estimated there and known here."
        )
    return [*lines, "It fits." if report.fits else "It does NOT fit."]


def _program_line(program: Program, report: Report) -> str:
    head = f"{program.sort} of {program.shape}"
    if program.refused is not None:
        return f"{head}: refused by the compiler after {program.compile_s:.0f} s: {program.refused}"
    listed = ", ".join(f"{one.count} {one.kind} of {format_bytes(one.result_bytes)}" for one in program.collectives)
    return (
        f"{head}: floor {program.step_s * 1e3:.3f} ms a step (memory {program.memory_s * 1e3:.3f}, products "
        f"{program.compute_s * 1e3:.3f}, links {program.links_s * 1e3:.3f}); collectives a step: {listed or 'none'}; "
        f"{program.pool_copies} copies of a pool, {format_bytes(program.aliased_bytes)} updated in place; "
        f"{program.arguments} arguments, compiled in {program.compile_s:.0f} s"
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:,.3f}"


def _share(report: Report) -> str:
    return f"{report.needed_bytes / report.chip.memory_bytes:.1%}"
