"""Makes the table of docs/tpu.md: which model fits which slice of TPUs, and what its compiled steps cost there.

    python scripts/aot_table.py plan CONFIG.json …                 a line a slice: what divides, fits, and the floor
    python scripts/aot_table.py compile CONFIG.json TOPOLOGY N     a line a step, compiled for N devices of it

Lines are those of a Markdown table. A plan takes seconds; a compilation takes minutes, and needs libtpu. Where weights
of 16 bits do not fit, a plan has a second line, with weights of eight.
"""

import sys
from pathlib import Path

import tyro

from hybrid_jax.aot import SORTS, Report, build, compile_steps
from hybrid_jax.chips import CHIPS, Chip
from hybrid_jax.config import EngineConfig, Quantization
from hybrid_jax.memory import GIB, Limits, MemoryPlan, plan_memory
from hybrid_jax.plan import Model, measure
from hybrid_jax.published_config import read_published_config

CHIP = {chip.name: chip for chip in CHIPS.values()}
SLICES = (  # chip, topology, devices as JAX counts them
    ("v5e", "v5e:2x2", 4),
    ("v5e", "v5e:4x4", 16),
    ("v5e", "v5e:8x8", 64),
    ("v5e", "v5e:16x16", 256),
    ("v5p", "v5p:2x2x1", 4),
    ("v5p", "v5p:2x2x4", 16),
    ("v5p", "v5p:4x4x4", 64),
    ("v5p", "v5p:4x8x8", 256),
    ("v6e", "v6e:2x2", 4),
    ("v6e", "v6e:4x4", 16),
    ("v6e", "v6e:8x8", 64),
    ("v6e", "v6e:16x16", 256),
    ("TPU7x", "tpu7x:2x2x1", 8),
    ("TPU7x", "tpu7x:2x2x4", 32),
    ("TPU7x", "tpu7x:4x4x4", 128),
    ("TPU7x", "tpu7x:4x8x8", 512),
)
PLAN_HEAD = "| model | weights | slice | devices that divide it | fits | weights GiB | requests | tokens in pages |"
COMPILE_HEAD = (
    "| model | weights | slice | devices | step | stays GiB | of plan | temporaries GiB | fits | collectives a step | "
    "floor ms | copies of a pool | arguments | compiled in s |"
)


def plan(configs: tyro.conf.Positional[tuple[Path, ...]], rows: int = 32, length: int = 8192) -> None:
    """A line for each model and slice: the most devices that divide the model, and the plan of their memory.

    Args:
        configs: config.json files.
        rows: requests at once.
        length: tokens of a request.
    """
    print(PLAN_HEAD + "\n" + "|---" * (PLAN_HEAD.count("|") - 1) + "|")
    for path in configs:
        hf = read_published_config(path)
        wide, narrow = (build(hf, EngineConfig(quantization=weights)) for weights in (None, "int8"))
        for chip, topology, devices in SLICES:
            for model, weights in ((wide, "bf16"), (narrow, "int8")):
                line = plan_line(path.stem, weights, model, CHIP[chip], topology, devices, Limits(length, rows))
                print(line, flush=True)
                if " yes |" in line:
                    break


def plan_line(name: str, weights: str, model: Model, chip: Chip, topology: str, devices: int, limits: Limits) -> str:
    """One line of the table of plans."""
    parts = most_parts(model, devices)
    lead = f"| {name} | {weights} | {topology} | {parts} of {devices} |"
    sizes = measure(model, parts)
    weights_gib = f"{sizes.weights_bytes / GIB:,.1f}"
    try:
        found: MemoryPlan = plan_memory(sizes, chip.memory_bytes, limits)
    except ValueError:
        return f"{lead} no | {weights_gib} | | |"
    tokens = f"{(found.pages - 1) * found.page_size:,}" if found.pages else "none kept"
    return f"{lead} yes | {weights_gib} | {found.max_num_seqs} | {tokens} |"


def most_parts(model: Model, devices: int) -> int:
    """The most devices, by halving, among which the model divides; the others hold copies."""
    while devices > 1:
        try:
            measure(model, devices)
            return devices
        except ValueError:
            devices //= 2
    return 1


def compile(
    config: tyro.conf.Positional[Path],
    topology: tyro.conf.Positional[str],
    tensor_parallel: tyro.conf.Positional[int],
    expert_parallel: int = 1,
    sorts: tuple[str, ...] = SORTS,
    rows: int = 32,
    length: int = 8192,
    quantization: Quantization | None = None,
) -> None:
    """Lines for the steps of a model, compiled for so many devices of a slice.

    Args:
        config: a config.json.
        topology: of the slice.
        tensor_parallel: devices of it that divide the heads.
        expert_parallel: as many times more that divide the rest.
        sorts: of the steps.
        rows: requests at once.
        length: tokens of a request.
        quantization: of the weights.
    """
    engine = EngineConfig(
        tensor_parallel=tensor_parallel,
        expert_parallel=expert_parallel,
        max_num_seqs=rows,
        max_model_len=length,
        quantization=quantization,
    )
    found = compile_steps(config, config.stem, topology, engine, sorts)
    print(COMPILE_HEAD + "\n" + "|---" * (COMPILE_HEAD.count("|") - 1) + "|")
    print(*compile_lines(found, quantization or "bf16"), sep="\n")
    print(*found.notes, *(program.refused for program in found.programs if program.refused), sep="\n", file=sys.stderr)


def compile_lines(report: Report, weights: str) -> list[str]:
    """A line of the table for each program."""
    lines = []
    for program in report.programs:
        listed = ", ".join(f"{one.count} {one.kind} {one.result_bytes / 2**20:.1f} MiB" for one in program.collectives)
        fits = "refused" if program.refused else "yes" if report.fits else "no"
        lines.append(
            f"| {report.name} | {weights} | {report.topology} | {report.devices} | {program.sort}, {program.shape} | "
            f"{program.argument_bytes / GIB:.2f} | {report.deviation:+.2%} | {program.temporaries_bytes / GIB:.2f} | "
            f"{fits} | {listed or 'none'} | {program.step_s * 1e3:.2f} | {program.pool_copies} | "
            f"{program.arguments} | {program.compile_s:.0f} |"
        )
    return lines


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"plan": plan, "compile": compile}, description=__doc__)
