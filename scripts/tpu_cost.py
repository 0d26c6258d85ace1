"""Makes the table of kernels in docs/tpu.md: what the TPU compiler's own schedule says of each, without a TPU.

    python scripts/tpu_cost.py report                    the whole table, some minutes
    python scripts/tpu_cost.py case gdn decode v6e:2x2   the lines of one layer

A TPU runs bundles of instructions in the order in which the compiler packed them, so a schedule shows how much code a
kernel has, how well it uses the units, and whether registers were spilled. It does not count how often a loop runs, nor
waits for memory. A kernel is compiled as a layer of a model runs it, at the model's real dimensions: a decode step of
64 rows, each with 4,096 cached tokens, or a prefill of 2,048 tokens in two rows that have seen none. The bytes are
those of its arrays, in and out once, and of the states or cached tokens of these rows.
"""

import dataclasses
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_jax.aot import build
from hybrid_jax.chips import CHIPS, open_slice
from hybrid_jax.config import EngineConfig
from hybrid_jax.formats import pool_format
from hybrid_jax.hlo import ARRAY
from hybrid_jax.published_config import read_published_config
from hybrid_jax.sharding import make_mesh
from kernels_pallas.op import ArraySpec, Cache, KVSpec, Place, RaggedBatch, StateSpec, host_batch, token_positions
from kernels_pallas.rotary import rotary_tables
from models.decoder import Decoder

CONFIGS = Path(__file__).parents[1] / "tests" / "configs"
MODELS = {  # a model of each kind
    "gdn": "Qwen3-Next-80B-A3B-Instruct",
    "kda": "Kimi-Linear-48B-A3B",
    "lightning": "Ling-2.6-flash",
    "mamba2": "Nemotron-3-Nano-30B-A3B-BF16",
    "gqa": "Qwen3-Next-80B-A3B-Instruct",
    "mla": "Kimi-Linear-48B-A3B",
}
SORTS = ("decode", "prefill")
CHIP = {chip.name.lower(): chip for chip in CHIPS.values()}
TOPOLOGIES = ("v5e:2x2", "v6e:2x2")
ROWS, PREFILLS, TOKENS = 64, 2, 2048  # rows; those that prefill, and tokens of such a step
PAGE_SIZE, ROW_PAGES = 64, 64
PASSES = "--xla_jf_dump_llo_pass_label_regex=.*final.*"  # of some seventy passes
UNITS = ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE", "SALU")
HEAD = "| kernel | model | step | chip | bundles | empty | inner loops | spills | fills | MB | floor kcycles | "
HEAD += " | ".join(UNITS) + " |"
CALL = re.compile(
    r"^ *(?:ROOT )?%([\w-]+)[\w.]* = (.*?) custom-call\(.*custom_call_target=\"tpu_custom_call\"(.*)$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Cost:
    """The schedule of one kernel. used: of each unit, the share of its places that are filled.

    loops: bundles of the innermost stretches of code, the longest first. spills, fills: stores and loads of registers.
    moved_bytes: between HBM and the core in a step.
    """

    kernel: str
    bundles: int
    empty: int
    loops: tuple[int, ...]
    spills: int
    fills: int
    used: dict[str, float]
    moved_bytes: int = 0


def report(topologies: tuple[str, ...] = TOPOLOGIES, kinds: tuple[str, ...] = tuple(MODELS)) -> None:
    """Print the table.

    Args:
        topologies: slices, of which one chip is compiled for.
        kinds: of attention.
    """
    print(HEAD + "\n" + "|---" * (HEAD.count("|") - 1) + "|")
    for kind in kinds:
        for sort in SORTS:
            for topology in topologies:
                print(*lines(kind, sort, topology), sep="\n", flush=True)


def case(kind: tyro.conf.Positional[str], sort: tyro.conf.Positional[str], topology: tyro.conf.Positional[str]) -> None:
    """Print the lines of the kernels of one layer and step.

    Args:
        kind: of attention.
        sort: of the step: decode or prefill.
        topology: a slice, of which one chip is compiled for.
    """
    print(*lines(kind, sort, topology), sep="\n")


def lines(kind: str, sort: str, topology: str) -> list[str]:
    """Lines of the table."""
    name = topology.split(":")[0]
    chip = CHIP[name]
    return [
        f"| {cost.kernel} | {MODELS[kind]} | {sort} | {name} | {cost.bundles} | {cost.empty} | "
        f"{', '.join(map(str, cost.loops))} | {cost.spills} | {cost.fills} | {cost.moved_bytes / 1e6:.1f} | "
        f"{cost.moved_bytes / chip.memory_bytes_s * chip.clock_hz / 1e3:.0f} | "
        + " | ".join(f"{cost.used[unit]:.0%}" for unit in UNITS)
        + " |"
        for cost in measure(kind, sort, topology)
    ]


def measure(kind: str, sort: str, topology: str) -> list[Cost]:
    """The costs of the kernels of a layer, compiled in a process of its own: its library dumps from its start on.

    Raises ValueError with the end of what the process said where it failed, and where no kernel computes the layer.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = f"LIBTPU_INIT_ARGS=--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true {PASSES}"
        command = ["env", "-u", "TPU_LIBRARY_PATH", dump, sys.executable, __file__, "compile-layer"]
        done = subprocess.run(
            [*command, kind, sort, topology], capture_output=True, text=True, cwd=Path(__file__).parents[1]
        )
        costs = list(read_costs(Path(folder)))
        if done.returncode or not costs:
            raise ValueError(f"wanted the kernels of {kind} {sort} compiled for {topology}, got: {done.stderr[-2000:]}")
        moved = json.loads(done.stdout)
        return [dataclasses.replace(cost, moved_bytes=moved[cost.kernel]) for cost in costs]


# ----------------------------------------------------------------------------------------------------------- compiling


def compile_layer(
    kind: tyro.conf.Positional[str], sort: tyro.conf.Positional[str], topology: tyro.conf.Positional[str]
) -> None:
    """Compile the first layer of a kind of its model, for one chip of a topology, and print the bytes of its kernels.

    Args:
        kind: of attention.
        sort: of the step: decode or prefill.
        topology: a slice.
    """
    decoder = build(read_published_config(CONFIGS / f"{MODELS[kind]}.json"), EngineConfig()).decoder
    mixer = next(mixer for layer in decoder.layers for mixer in layer.mixers if mixer.kind == kind)
    mixer.place = Place(0, 0)
    graph, state = nnx.split(mixer)
    mesh = make_mesh(open_slice(topology).devices[:1], 1)

    def step(state: nnx.State, cache: Cache, x: jax.Array, batch: RaggedBatch) -> Any:
        return nnx.merge(graph, state)(x, _rotary(decoder, x.shape[0], batch), cache, batch)

    one = NamedSharding(mesh, PartitionSpec())

    def shaped(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), tree)

    cache, tokens = _cache(mixer, one), ROWS if sort == "decode" else TOKENS
    x = jax.ShapeDtypeStruct((tokens, decoder.embedding.table.shape[1]), jnp.bfloat16)
    formats = jax.tree.map(lambda leaf: leaf.format, cache)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jitted = jax.jit(step, donate_argnums=(1,), out_shardings=(one, formats))
        traced = jitted.trace(shaped(state), cache, shaped(x), shaped(_batch(sort)))
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text() or ""
    pools = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)]
    print(json.dumps(moved_bytes(text, pools, _traffic(mixer.memory, sort))))


def _rotary(decoder: Decoder, tokens: int, batch: RaggedBatch) -> Any:
    if decoder.frequencies is None:
        return None
    inverse = jnp.asarray(decoder.frequencies, jnp.float32)
    return rotary_tables(token_positions(batch, tokens), inverse, decoder.magnitude)


def _cache(mixer: Any, sharding: Any) -> Cache:
    """A pool of one layer with room for all rows, as it lies on a TPU."""
    memory = mixer.memory
    lead = (1, ROWS * ROW_PAGES + 1, PAGE_SIZE) if type(memory) is KVSpec else (1, ROWS + 1)

    def pool(array: ArraySpec) -> Any:
        shape = lead + memory.pool_shape(array)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(array.dtype), sharding=pool_format(sharding, len(shape)))

    return Cache((memory,), (tuple(pool(array) for array in memory.arrays),))


def _traffic(memory: Any, sort: str) -> tuple[float, float, float]:
    """The shares of a pool that a step reads where it also writes it, reads where it does not, and writes."""
    if type(memory) is StateSpec:
        rows = ROWS if sort == "decode" else PREFILLS
        return rows / (ROWS + 1), 0.0, rows / (ROWS + 1)
    pool_tokens = (ROWS * ROW_PAGES + 1) * PAGE_SIZE
    if sort == "decode":
        return ROWS * ROW_PAGES * PAGE_SIZE / pool_tokens, 0.0, ROWS / pool_tokens
    return 0.0, TOKENS / pool_tokens, TOKENS / pool_tokens


def _batch(sort: str) -> RaggedBatch:
    none = np.zeros(ROWS)
    pages = np.zeros((ROWS, ROW_PAGES))
    batch = host_batch(np.zeros(ROWS + 1), none, 0, (none, none, none), none, pages, "decode")
    return batch if sort == "decode" else dataclasses.replace(batch, content="prefill", prefills=PREFILLS)


# ------------------------------------------------------------------------------------------------------------- reading


def moved_bytes(text: str, pools: Sequence[int], traffic: tuple[float, float, float]) -> dict[str, int]:
    """The bytes that each kernel of an optimised HLO moves: of arrays all, of pools, told by their bytes, shares."""
    read_written, read, written = traffic
    found: dict[str, int] = {}
    for name, results, rest in CALL.findall(text):
        given, made = (
            [_array_bytes(*array) for array in ARRAY.findall(part)]
            for part in (re.findall(r"operand_layout_constraints=\{(.*?\})\}", rest)[0], results)
        )
        total = sum(size * (written if size in pools else 1) for size in made)
        total += sum(size * ((read_written if size in made else read) if size in pools else 1) for size in given)
        found[name] = found.get(name, 0) + int(total)
    return found


def _array_bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8


def read_costs(folder: Path) -> Iterator[Cost]:
    """The costs of all Pallas kernels of which the compiler dumped the final schedule."""
    for analysis in sorted(folder.glob("*-schedule-analysis_final_bundles.txt")):
        if 'custom_call_target="tpu_custom_call"' not in analysis.read_text() or "-TLP-" in analysis.name:
            continue
        kernel = re.sub(r"^\d+-(.*)-\d+-schedule.*$", r"\1", analysis.name)
        stem = analysis.name[: analysis.name.index(kernel) + len(kernel)]
        usage = next(folder.glob(f"{stem}-*-final_hlo-static-per-bundle-utilization.txt"))
        bundles = next(path for path in folder.glob(f"{stem}-*-final_bundles.txt") if path != analysis)
        yield read_cost(kernel.split(".")[0], usage.read_text(), bundles.read_text())


def read_cost(kernel: str, usage: str, bundles: str) -> Cost:
    """The cost of a kernel from the compiler's table of units and its final bundles."""
    lines = usage.splitlines()
    units = [name.strip() for name in lines[1].split(",")]
    capacity = np.array([int(number) for number in lines[2].split()])
    table = np.array([[int(number) for number in line.split()] for line in lines[4:] if line.strip()])
    totals = dict(zip(units, table.sum(axis=0).tolist(), strict=True))
    shares = dict(zip(units, (table.sum(axis=0) / (capacity * len(table))).tolist(), strict=True))
    return Cost(
        kernel,
        bundles=len(table),
        empty=int((table.sum(axis=1) == 0).sum()),
        loops=_loops(bundles),
        spills=totals["VSTORE:SPILL"],
        fills=totals["VLOAD:FILL"],
        used={unit: shares[unit] for unit in UNITS},
    )


def _loops(bundles: str, most: int = 3) -> tuple[int, ...]:
    """Lengths of the longest stretches of code in a loop that hold no further loop."""
    depths = [
        len(found[1]) for found in map(re.compile(r"^ *0x[0-9a-f]+ +\S* *: (>*)").match, bundles.splitlines()) if found
    ]
    runs: list[list[int]] = []
    for depth in depths:
        if runs and runs[-1][0] == depth:
            runs[-1][1] += 1
        else:
            runs.append([depth, 1])
    return tuple(sorted(_innermost(runs), reverse=True)[:most])


def _innermost(runs: Sequence[Sequence[int]]) -> Iterator[int]:
    around = [0, *(depth for depth, _ in runs), 0]
    for before, (depth, length), after in zip(around, runs, around[2:], strict=False):
        if depth > before and depth > after:
            yield length


if __name__ == "__main__":
    verbs = {"report": report, "case": case, "compile-layer": compile_layer}
    tyro.extras.subcommand_cli_from_dict(verbs, description=__doc__)
