"""Compiles the real steps of a model for TPUs that are not there, and says whether they fit and what they would cost.

From the config alone: weights and pools are abstract. The programs are those of the runner, at the largest shapes of
its ladders: the decode loop with all rows, and the step that reads prompts with the most tokens. The TPU compiler tells
their memory and collectives; times are floors, from bytes and operations, and no promise. Knows no family and no kind.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hybrid_jax.bench.floors import Moved, decode_moved, prefill_moved
from hybrid_jax.bench.subject import chosen_experts
from hybrid_jax.cache import allocate
from hybrid_jax.chips import Chip, Slice, open_slice
from hybrid_jax.config import EngineConfig, step_tokens
from hybrid_jax.hlo import Collective, collectives, count_copies
from hybrid_jax.memory import Limits, MemoryPlan, ModelSizes, plan_memory
from hybrid_jax.plan import Model, measure, measure_share
from hybrid_jax.programs import DeviceMemory, StepPlan, decode_loop, mixed_step
from hybrid_jax.published_config import read_published_config
from hybrid_jax.quantisation import quantise_model
from hybrid_jax.routing import keeps_pages, route_model
from hybrid_jax.row_tables import empty_tables
from hybrid_jax.sampling import pack
from hybrid_jax.sharding import Layout, OneDevice, divide, lay_out, make_mesh, planned_mesh
from kernels_pallas.op import AUTO_ON_TPU, Content, RaggedBatch, host_batch
from models.decoder import Decoder
from models.registry import find_family

SORTS = ("decode", "prefill")
ENDLESS_BYTES = 2**60  # of a device on which every model fits


class NoRoom(Exception):
    """A model does not fit: its memory cannot be planned, for the reason that the message says."""


@dataclass(frozen=True)
class Subject:
    """An abstract model on the devices that share it.

    state, memory: shapes with shardings, of pools with formats. placement: where they lie. sizes, whole_sizes: of one
    device of these, and of one that would do alone.
    """

    name: str
    slice: Slice
    engine: EngineConfig
    model: Model
    chosen: int
    mesh: Mesh
    sizes: ModelSizes
    whole_sizes: ModelSizes
    plan: MemoryPlan
    placement: OneDevice | Layout
    state: nnx.State
    memory: DeviceMemory

    @property
    def devices(self) -> int:
        """How many devices share the model."""
        return self.mesh.size


@dataclass(frozen=True)
class Program:
    """A compiled step. Bytes are those of one device, seconds are floors of one step; of a refused program all are 0.

    arguments: how many arrays it takes. aliased_bytes: of the pools and tables that are updated where they lie.
    pool_copies: instructions that copy a whole pool. refused: why the compiler made none.
    """

    sort: str
    shape: str
    compile_s: float
    arguments: int
    argument_bytes: int = 0
    aliased_bytes: int = 0
    temporaries_bytes: int = 0
    code_bytes: int = 0
    pool_copies: int = 0
    collectives: tuple[Collective, ...] = ()
    memory_s: float = 0.0
    compute_s: float = 0.0
    links_s: float = 0.0
    refused: str | None = None

    @property
    def step_s(self) -> float:
        """The floor of a step: memory and products side by side, collectives after them."""
        return max(self.memory_s, self.compute_s) + self.links_s


@dataclass(frozen=True)
class Report:
    """What became of both programs. Bytes are those of one device."""

    name: str
    topology: str
    chip: Chip
    devices: int
    backends: dict[str, str]
    plan: MemoryPlan
    weights_bytes: int
    pages_bytes: int
    slots_bytes: int
    rows_bytes: int
    programs: tuple[Program, ...]
    notes: tuple[str, ...]

    @property
    def held_bytes(self) -> int:
        """What stays on a device, by shapes and shardings."""
        return self.weights_bytes + self.pages_bytes + self.slots_bytes + self.rows_bytes

    @property
    def compiled_bytes(self) -> int:
        """What stays on a device, as the compiler lays it out: with the padding of its tiles."""
        return max(program.argument_bytes for program in self.programs)

    @property
    def needed_bytes(self) -> int:
        """The most that a device needs at once."""
        temporaries_bytes = max(program.temporaries_bytes for program in self.programs)
        return self.compiled_bytes + temporaries_bytes + sum(program.code_bytes for program in self.programs)

    @property
    def planned_bytes(self) -> int:
        """What `plan` says stays on a device."""
        return self.plan.total_bytes - self.plan.temporaries_bytes

    @property
    def deviation(self) -> float:
        """By how much the compiler's figure of what stays lies over the plan's, as a share of that."""
        return self.compiled_bytes / self.planned_bytes - 1

    @property
    def fits(self) -> bool:
        """Whether the compiler made both programs, and they fit together with all that stays."""
        refused = any(program.refused for program in self.programs)
        return not refused and self.needed_bytes <= self.chip.memory_bytes

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        properties = ("held_bytes", "compiled_bytes", "needed_bytes", "planned_bytes", "deviation", "fits")
        data = asdict(self) | {name: getattr(self, name) for name in properties}
        data["plan"] = {name: value for name, value in data["plan"].items() if name != "sizes"}
        for program, found in zip(data["programs"], self.programs, strict=True):
            program["step_s"] = found.step_s
        return data


def compile_steps(path: Path, name: str, topology: str, engine: EngineConfig, sorts: tuple[str, ...] = SORTS) -> Report:
    """Compile the decode step and the prefill step of a model.

    The first `tensor_parallel * expert_parallel` devices of the topology share the model.
    Args:
      path: a checkpoint directory or config.json. name: of the model, to be shown. sorts: of the steps to compile.
    Raises ValueError for a topology, a number of devices or a wish that cannot be, and NoRoom as `prepare`.
    """
    found, wanted = open_slice(topology), engine.tensor_parallel * engine.expert_parallel
    if wanted > len(found.devices):
        raise ValueError(
            f"wanted {wanted} devices of {topology}, which has {len(found.devices)}: set fewer, or a larger topology"
        )
    subject = prepare(read_published_config(path), name, found, engine)
    return _report(subject, tuple(compile_program(subject, sort) for sort in sorts))


def prepare(hf: dict[str, Any], name: str, found: Slice, engine: EngineConfig) -> Subject:
    """The abstract model of a published config on devices of a slice, and the plan of their memory.

    Raises NoRoom where the memory of the chips is too small, ValueError for a wish that no memory meets and for a model
    that does not divide among so many devices.
    """
    split = engine.tensor_parallel, engine.expert_parallel
    model = build(hf, engine)
    whole_sizes, sizes = measure(model), measure_share(model, lay_out(model.decoder, planned_mesh(*split)))
    limits = _limits(engine)
    plan_memory(sizes, ENDLESS_BYTES, limits)  # raises for a wish that no memory meets
    try:
        plan = plan_memory(sizes, found.chip.memory_bytes, limits)
    except ValueError as error:
        raise NoRoom(str(error)) from None
    mesh = make_mesh(found.devices[: split[0] * split[1]], *split)
    placement = OneDevice(mesh.devices.flat[0]) if mesh.size == 1 else divide(model.decoder, mesh)
    placed = Model(model.decoder, route_model(model.decoder), model.positions)
    state, memory = _place(model.decoder, placement, plan)
    return Subject(
        name, found, engine, placed, chosen_experts(hf), mesh, sizes, whole_sizes, plan, placement, state, memory
    )


def build(hf: dict[str, Any], engine: EngineConfig) -> Model:
    """The abstract model of a published config as a TPU would run it: 'auto' takes TPU kernels where they fit."""
    family = find_family(hf)
    config = family.Config.from_hf(hf)
    backend = AUTO_ON_TPU if engine.backend == "auto" else engine.backend
    decoder = nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0), dtype=engine.dtype, backend=backend))
    weights = quantise_model(decoder, None, hf, family.weight_table(config), engine.quantization)
    return Model(decoder, route_model(decoder), config.max_positions, weights)


def _limits(engine: EngineConfig) -> Limits:
    return Limits(
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        pages=engine.pages,
        slots=engine.slots,
        page_size=engine.page_size,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        memory_fraction=engine.memory_fraction,
        prefix_caching=engine.prefix_caching,
    )


# ------------------------------------------------------------------------------------------------------------- placing


def _place(decoder: Decoder, placement: OneDevice | Layout, plan: MemoryPlan) -> tuple[nnx.State, DeviceMemory]:
    """State and memory as shapes with shardings and formats."""
    state, memory = nnx.state(decoder), _abstract_memory(decoder, plan)
    cache = jax.tree.map(_shape, memory.cache, placement.memory(decoder.specs).cache)
    tables = _placed(memory.tables, placement.everywhere)
    return jax.tree.map(_shape, state, placement.weights(state)), DeviceMemory(cache, tables, None)


def _abstract_memory(decoder: Decoder, plan: MemoryPlan) -> DeviceMemory:
    routing = route_model(decoder)

    def make() -> DeviceMemory:
        cache = allocate(decoder.specs, routing, plan.pages, plan.slots, plan.page_size)
        return DeviceMemory(cache, empty_tables(plan.max_num_seqs + 1, decoder.logits_width), None)

    return jax.eval_shape(make)


def _placed(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda leaf: _shape(leaf, sharding), tree)


def _shape(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _device_bytes(tree: Any) -> int:
    """Bytes of shapes with shardings on each of their devices."""
    shards = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree))
    return sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in shards)


# ----------------------------------------------------------------------------------------------------------- compiling


def compile_program(subject: Subject, sort: str) -> Program:
    """Compile the step of one sort, `decode` or `prefill`, at the largest shape of the engine."""
    begin = time.perf_counter()
    lowered, count, shape = lower_program(subject, sort)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return Program(sort, shape, time.perf_counter() - begin, count, refused=_refusal(error))
    return _describe(subject, sort, shape, time.perf_counter() - begin, count, compiled)


def lower_program(subject: Subject, sort: str) -> tuple[jax.stages.Lowered, int, str]:
    """The step of one sort before it is compiled, the number of its arguments, and its shape in words."""
    function, arguments, shape = _program(subject, sort)
    count = len(jax.tree.leaves((subject.state, subject.memory, arguments)))
    precision = "highest" if subject.engine.dtype == "float32" else None
    inputs = _placed(arguments, subject.placement.everywhere)
    with jax.sharding.use_abstract_mesh(subject.mesh.abstract_mesh), jax.default_matmul_precision(precision):
        jitted = subject.placement.program(function, subject.model.decoder, len(arguments), keep_unused=True)
        traced = jitted.trace(subject.state, subject.memory, *inputs)
        return traced.lower(lowering_platforms=("tpu",)), count, shape


def _program(subject: Subject, sort: str) -> tuple[Callable[..., Any], tuple[Any, ...], str]:
    """The function of a step, its arguments behind state and memory, and its shape in words."""
    plan, engine = subject.plan, subject.engine
    graph, _ = nnx.split(subject.model.decoder)
    rows, size = plan.max_num_seqs, plan.page_size
    pages = -(-plan.max_model_len // size) if plan.pages else 1
    tokens = step_tokens(engine.max_num_batched_tokens, rows)
    if sort == "decode":
        loop = partial(decode_loop, graph, loops=engine.decode_steps, grid=size, page_size=size)
        return loop, _batch(rows, pages, "decode"), f"{rows} rows of up to {plan.max_model_len} tokens"
    step = partial(mixed_step, graph, page_size=size)
    arguments = (np.zeros(tokens, np.int32), *_batch(rows, pages, "mixed"))
    return step, arguments, f"{tokens} tokens of up to {rows} rows"


def _batch(rows: int, pages: int, content: Content) -> tuple[RaggedBatch, StepPlan]:
    """A batch in which nobody takes part; only its shapes count."""
    none = np.zeros(rows)
    batch = host_batch(np.zeros(rows + 1), none, 0, (none, none, none), none, np.zeros((rows, pages)), content)
    plan = StepPlan(pack([], [], rows, (), []), none.astype(bool), none.astype(np.int32), None)
    return batch, plan


def _describe(
    subject: Subject, sort: str, shape: str, compile_s: float, arguments: int, compiled: jax.stages.Compiled
) -> Program:
    stats: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    pools = [leaf for pool in subject.memory.cache.pools for leaf in pool]
    shards = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.name) for leaf in pools]  # type: ignore[union-attr]
    found, chip = collectives(text), subject.slice.chip
    moved = _moved(subject, sort)
    return Program(
        sort,
        shape,
        compile_s,
        arguments,
        argument_bytes=stats.argument_size_in_bytes,
        aliased_bytes=stats.alias_size_in_bytes,
        temporaries_bytes=stats.temp_size_in_bytes,
        code_bytes=stats.generated_code_size_in_bytes,
        pool_copies=count_copies(text, shards),
        collectives=found,
        memory_s=moved.total_bytes / chip.memory_bytes_s,
        compute_s=moved.operations / chip.operations_s,
        links_s=sum(one.link_bytes(subject.devices) for one in found) / chip.link_bytes_s,
    )


def _moved(subject: Subject, sort: str) -> Moved:
    """What one of the devices must move and compute in a step.

    In decode all rows run, at the longest context that the pages hold for all of them. A prefill reads one prompt.
    """
    plan, model = subject.plan, subject.model
    rows, parts = plan.max_num_seqs, (model.decoder, model.routing, subject.chosen)
    if sort == "decode":
        room = (plan.pages - 1) * plan.page_size // rows if plan.pages else plan.max_model_len
        whole = decode_moved(*parts, rows, min(room, plan.max_model_len))
    else:
        whole = prefill_moved(*parts, 1, step_tokens(subject.engine.max_num_batched_tokens, rows))
    one, all_ = subject.sizes, subject.whole_sizes
    return Moved(
        whole.weights_bytes * one.weights_bytes // all_.weights_bytes,
        whole.pages_bytes * one.token_bytes // max(all_.token_bytes, 1),
        whole.states_bytes * one.request_bytes // max(all_.request_bytes, 1),
        whole.operations / subject.devices,
    )


def _refusal(error: Exception) -> str:
    """The sentence in which the compiler says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "Used" in line or "xceeded" in line), lines[0] if lines else repr(error))


def _report(subject: Subject, programs: tuple[Program, ...]) -> Report:
    cache = subject.memory.cache
    pages = {route.place.pool for route in subject.model.routing.routes if keeps_pages(route)}
    pools = [_device_bytes(pool) for pool in cache.pools]
    return Report(
        subject.name,
        subject.slice.topology,
        subject.slice.chip,
        subject.devices,
        {route.kind: route.backend for route in subject.model.routing.routes},
        subject.plan,
        weights_bytes=_device_bytes(subject.state),
        pages_bytes=sum(size for index, size in enumerate(pools) if index in pages),
        slots_bytes=sum(size for index, size in enumerate(pools) if index not in pages),
        rows_bytes=_device_bytes(subject.memory.tables),
        programs=programs,
        notes=subject.placement.whole,
    )
