"""Puts an engine together: from a model and a config to pools, schedule, runner and loop.

Knows how the parts fit, and none of what they do.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax

from hybrid_jax.config import EngineConfig, step_tokens
from hybrid_jax.engine import Engine
from hybrid_jax.memory import Limits as MemoryLimits
from hybrid_jax.memory import MemoryPlan, plan_memory
from hybrid_jax.plan import Model, measure_share
from hybrid_jax.pool import Pool
from hybrid_jax.prefix_cache import PrefixCache
from hybrid_jax.routing import Routing, summary
from hybrid_jax.runner import Runner, RunnerSizes
from hybrid_jax.scheduler import Limits, Scheduler
from hybrid_jax.sharding import Placement, lay_out, planned_mesh
from models.decoder import Decoder

CPU_REQUESTS = 16  # rows of a step cost time on a CPU one by one
CPU_SHARE = 4  # of a machine's memory, which it needs for other things too, a CPU device gets one part


def plan_engine(model: Decoder, routing: Routing, positions: int, config: EngineConfig) -> MemoryPlan:
    """How the memory of the device is shared out. Raises ValueError for wishes of the config that cannot be met."""
    rows = CPU_REQUESTS if config.max_num_seqs is None and jax.default_backend() == "cpu" else config.max_num_seqs
    limits = MemoryLimits(
        max_model_len=config.max_model_len,
        max_num_seqs=rows,
        pages=config.pages,
        slots=config.slots,
        page_size=config.page_size,
        max_num_batched_tokens=config.max_num_batched_tokens,
        memory_fraction=config.memory_fraction,
        prefix_caching=config.prefix_caching,
    )
    layout = lay_out(model, planned_mesh(config.tensor_parallel, config.expert_parallel))
    sizes = measure_share(Model(model, routing, positions), layout)
    return plan_memory(sizes, _device_memory_bytes(), limits)


def _device_memory_bytes() -> int:
    """Memory of a device of this process: what it reports, and for a CPU a part of the machine's."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if device.platform != "cpu":
        raise ValueError(f"wanted a device that reports its memory, got {device.device_kind}: it cannot be planned for")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // CPU_SHARE // jax.local_device_count()


def build_engine(
    model: Decoder,
    routing: Routing,
    plan: MemoryPlan,
    config: EngineConfig,
    eos_token_ids: Sequence[int],
    placement: Placement | None = None,
) -> tuple[Engine, Runner]:
    """The engine of a loaded model, with its pools as planned; without a placement, on one device."""
    if config.compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.compilation_cache).expanduser()))
    keeps_pages, keeps_states = routing.token_bytes > 0, routing.request_bytes > 0
    pages, slots = Pool("pages", max(plan.pages, 1)), Pool("slots", plan.slots)
    cache = PrefixCache(pages, slots, plan.page_size, keeps_pages, keeps_states)
    limits = Limits(
        rows=plan.max_num_seqs,
        step_tokens=step_tokens(config.max_num_batched_tokens, plan.max_num_seqs),
        loops=config.decode_steps,
        page_size=plan.page_size,
        keeps_pages=keeps_pages,
        keeps_states=keeps_states,
        interval=math.ceil(config.snapshot_interval / cache.grid) * cache.grid,
        waiting=config.max_waiting,
        caching=config.prefix_caching,
    )
    row_pages = -(-plan.max_model_len // plan.page_size) if keeps_pages else 0
    sizes = RunnerSizes(
        plan.pages,
        plan.slots,
        plan.page_size,
        limits.rows,
        row_pages,
        limits.step_tokens,
        limits.loops,
        cache.grid,
        config.canary,
    )
    precision = "highest" if config.dtype == "float32" else None
    runner = Runner(model, routing, sizes, eos_token_ids, precision, placement)
    return Engine(Scheduler(limits, pages, slots, cache), runner, config.run_ahead), runner


def start_line(name: str, config: EngineConfig, routing: Routing, plan: MemoryPlan) -> str:
    """What an engine is, in one line."""
    return (
        f"{name}: {config.dtype} on {_devices(config)}, {_backends(routing)}; {summary(routing)}; "
        f"{plan.max_num_seqs} requests of up to {plan.max_model_len} tokens at once, {plan.pages} pages of "
        f"{plan.page_size} tokens, {plan.slots} slots; {plan.limiting} come to their end first"
    )


def _devices(config: EngineConfig) -> str:
    platform = jax.default_backend()
    devices = config.tensor_parallel * config.expert_parallel
    return platform if devices == 1 else f"{devices} {platform} devices"


def _backends(routing: Routing) -> str:
    pairs = dict.fromkeys((route.kind, route.backend) for route in routing.routes)
    return ", ".join(f"{kind} by {backend}" for kind, backend in pairs)
