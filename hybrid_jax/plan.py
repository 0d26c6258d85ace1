"""What a model needs of each device, read off its abstract build, and the plan of it as a table, sentences and JSON.

Nothing is loaded: the config is enough. The arithmetic of the plan itself is in `hybrid_jax/memory.py`. What several
devices divide is the business of `hybrid_jax/sharding.py`. This module knows no family or kind.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hybrid_jax.config import Backend, Dtype, Quantization
from hybrid_jax.memory import GIB, MemoryPlan, ModelSizes, format_bytes, parts_bytes
from hybrid_jax.published_config import read_published_config
from hybrid_jax.quantisation import Weights, quantise_model
from hybrid_jax.routing import Routing, keeps_pages, route_model
from hybrid_jax.sharding import Layout, best_split, lay_out, planned_mesh
from models.decoder import TARGET, Decoder, Route
from models.registry import find_family

EXPERTS_A_TOKEN = 8  # assumed in the estimate of temporaries; routers know the real number, their weights do not
ACTIVATION_BYTES = 24  # six arrays of 32 bits: a product's input and output, and what is made of them up to the next
COPIES = (
    4  # of what plain XLA reads of a pool: as it lay, without what is not to be seen, scores or results, in passing
)
SHORT_TOKENS = 2048  # a request of usual length, to say how many fit


@dataclass(frozen=True)
class Model:
    """An abstract model: nothing of it is in memory."""

    decoder: Decoder
    routing: Routing
    positions: int
    weights: Weights = Weights({}, 0)


def build(path: Path, dtype: Dtype, backend: Backend, quantization: Quantization | None = None) -> Model:
    """The abstract model of a checkpoint directory or config.json, its weights as stored or of eight bits if asked for.

    Raises ValueError as `quantise_model`.
    """
    hf = read_published_config(path)
    family = find_family(hf)
    config = family.Config.from_hf(hf)
    decoder = nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0), dtype=dtype, backend=backend))
    weights = quantise_model(decoder, path, hf, family.weight_table(config), quantization)
    return Model(decoder, route_model(decoder), config.max_positions, weights)


def device_bytes(hbm_gib: float, devices: int) -> int:
    """Bytes of one device. Raises ValueError for a size that is no number above 0, and for no devices."""
    if not 0 < hbm_gib < math.inf:
        raise ValueError(f"wanted hbm-gib above 0, got {hbm_gib}: set the memory of one device in GiB")
    if devices < 1:
        raise ValueError(f"wanted at least 1 device, got {devices}: set devices 1")
    return int(hbm_gib * GIB)


def plan_layout(model: Model, devices: int) -> Layout:
    """How so many devices would divide a model, its heads as far as they go. Raises ValueError where it cannot be."""
    return lay_out(model.decoder, planned_mesh(*best_split(model.decoder, devices)))


def measure(model: Model, devices: int = 1) -> ModelSizes:
    """What a model needs of each of so many devices that divide it. Raises ValueError as `plan_layout`."""
    return measure_share(model, plan_layout(model, devices))


def measure_share(model: Model, layout: Layout) -> ModelSizes:
    """What a model needs of each of the devices on which it is laid out."""
    routes = model.routing.routes
    copying = [route for route in routes if route.backend == "xla"]  # plain XLA copies what it reads of the pools
    vocabulary, width = model.decoder.embedding.table.shape
    return ModelSizes(
        positions=model.positions,
        vocabulary=vocabulary,
        weights_bytes=sum(
            _shard_size(leaf, layout) * leaf.dtype.itemsize for _, leaf in nnx.to_flat_state(nnx.state(model.decoder))
        ),
        token_bytes=_memory_bytes(routes, True, layout),
        request_bytes=_memory_bytes(routes, False, layout),
        step_token_bytes=ACTIVATION_BYTES * (width + _widest_product(model.decoder, layout)),
        gathered_token_bytes=COPIES * _copied_bytes(copying, True, layout),
        gathered_request_bytes=COPIES * _copied_bytes(copying, False, layout),
    )


def _shard_size(leaf: Any, layout: Layout) -> int:
    """Numbers of a weight on each device."""
    return math.prod(layout.local_shape(_axes(leaf), leaf.shape))


def _axes(leaf: Any) -> tuple[str | None, ...]:
    return leaf.get_metadata("axes")


def _memory_bytes(routes: Iterable[Route], pages: bool, layout: Layout) -> int:
    """Bytes on each device for one token (`pages`) or one request, over some layers of all roles."""
    arrays = [array for route in routes if keeps_pages(route) is pages for array in route.memory.arrays]
    return sum(layout.array_bytes(array) for array in arrays)


def _widest_product(module: nnx.Module, layout: Layout) -> int:
    """The most numbers that a product makes of one token on each device."""
    widths = [0]
    for _, leaf in nnx.to_flat_state(nnx.state(module)):
        axes = _axes(leaf)
        if "model" not in axes or "vocabulary" in axes:
            continue
        width = leaf.shape[axes.index("model")]
        if "expert" in axes:  # a token's experts lie on any device: none of the products is divided for certain
            widths.append(math.prod(leaf.shape) // width // leaf.shape[axes.index("expert")] * EXPERTS_A_TOKEN)
        else:
            widths.append(_shard_size(leaf, layout) // width)
    return max(widths)


def _copied_bytes(routes: Iterable[Route], pages: bool, layout: Layout) -> int:
    """Bytes of the layer that has most for one token (`pages`) or one request."""
    return max((_memory_bytes([route], pages, layout) for route in routes), default=0)


# ------------------------------------------------------------------------------------------------------------- showing


def to_table(plan: MemoryPlan, title: str) -> Table:
    """The plan of one device as a table: each part in GiB and as a share of the device's memory."""
    table = Table("part", "", "GiB", "share", title=escape(title), title_justify="left")
    counts = {
        "pages": f"{plan.pages:,} of {plan.page_size} tokens" if plan.pages else "none",
        "slots": f"{plan.slots:,}" if plan.slots_bytes else f"{plan.slots:,}, nothing in them",
        "row tables": f"{plan.max_num_seqs + 1:,} rows",
        "temporaries": "of one step",
    }
    parts = parts_bytes(plan)
    kept = {"free": plan.usable_bytes - plan.total_bytes, "not used": plan.memory_bytes - plan.usable_bytes}
    for name, size_bytes in (parts | kept).items():
        share = f"{size_bytes / plan.memory_bytes:.1%}"
        table.add_row(name, counts.get(name, ""), f"{size_bytes / GIB:,.3f}", share)
    return table


def describe(plan: MemoryPlan) -> list[str]:
    """What fits, in sentences."""
    slots = f"{plan.slots:,} slots, one of them null: {plan.max_num_seqs:,} live"
    slots += f" and {plan.snapshot_slots:,} for snapshots" if plan.prefix_caching else ", the prefix cache is off"
    lines = [f"{plan.max_num_seqs:,} requests run at once, of up to {plan.max_model_len:,} tokens ({slots})."]
    by_pages = plan.requests_by_pages(plan.max_model_len)
    if by_pages is not None:
        short = min(SHORT_TOKENS, plan.max_model_len)
        lines.append(
            f"Requests that pages hold: {by_pages:,} of {plan.max_model_len:,} tokens, "
            f"{plan.requests_by_pages(short):,} of {short:,}; that slots hold: {plan.requests_by_slots:,}. With the "
            f"longest requests the bound is {plan.limiting}."
        )
    if plan.prefix_caching:
        lines.append(f"The longest beginning of a prompt that can be cached has {plan.cacheable_tokens:,} tokens.")
    return lines


def describe_model(routing: Routing, sizes: ModelSizes, layout: Layout) -> list[str]:
    """What a token and a request weigh on each device, and how several devices divide the model."""
    lines = [f"A token takes {sizes.token_bytes:,} bytes of pages, a request {sizes.request_bytes:,} bytes of a slot."]
    even = break_even_tokens(routing, layout)
    if even is not None:
        lines.append(f"In the model itself, without a draft, a slot weighs as much as the pages of {even:,} tokens.")
    if layout.parts > 1:
        whole = {array.name for route in routing.routes for array in route.memory.arrays if not any(array.axes)}
        lines.append(
            f"{layout.parts} devices divide weights along heads, channels, experts, MLP and vocabulary; other weights "
            "are whole on each. States, convolution tails, keys and values divide; heads of the latter are repeated "
            "where there are too few"
            + "".join(f"; {name} pages are whole on each" for name in sorted(whole))
            + "; row tables are whole on each."
        )
        if layout.head_parts < layout.parts:
            times = layout.parts // layout.head_parts
            lines.append(f"Heads divide over {layout.head_parts} devices and are repeated: expert_parallel {times}.")
        lines += [f"{line[0].upper()}{line[1:]}." for line in layout.whole]
    return lines


def break_even_tokens(routing: Routing, layout: Layout) -> int | None:
    """Tokens whose pages weigh as much as a slot, in the target layers; None where one of the two weighs nothing."""
    target = [route for route in routing.routes if route.role == TARGET]
    request_bytes, token_bytes = (_memory_bytes(target, pages, layout) for pages in (False, True))
    return request_bytes // token_bytes if request_bytes and token_bytes else None


def to_json(plan: MemoryPlan, routing: Routing, layout: Layout) -> dict[str, Any]:
    """The plan of one device as plain data."""
    return {
        "devices": layout.parts,
        "memory_bytes": plan.memory_bytes,
        "usable_bytes": plan.usable_bytes,
        "total_bytes": plan.total_bytes,
        "weights_bytes": plan.weights_bytes,
        "pages_bytes": plan.pages_bytes,
        "slots_bytes": plan.slots_bytes,
        "rows_bytes": plan.rows_bytes,
        "temporaries_bytes": plan.temporaries_bytes,
        "max_model_len": plan.max_model_len,
        "max_num_seqs": plan.max_num_seqs,
        "page_size": plan.page_size,
        "pages": plan.pages,
        "slots": plan.slots,
        "token_bytes": plan.sizes.token_bytes,
        "request_bytes": plan.sizes.request_bytes,
        "break_even_tokens": break_even_tokens(routing, layout),
        "requests_by_slots": plan.requests_by_slots,
        "requests_by_pages": plan.requests_by_pages(plan.max_model_len),
        "limiting": plan.limiting,
        "cacheable_tokens": plan.cacheable_tokens,
        "parameters": sum(routing.parameters.values()),
    }


def render(plan: MemoryPlan, routing: Routing, layout: Layout, title: str, console: Console) -> None:
    """Print the table and the sentences."""
    console.print(to_table(plan, title))
    for line in describe(plan) + describe_model(routing, plan.sizes, layout):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        f"{format_bytes(plan.total_bytes)} of {format_bytes(plan.usable_bytes)} a device. Temporaries are an estimate.",
        highlight=False,
        soft_wrap=True,
    )
