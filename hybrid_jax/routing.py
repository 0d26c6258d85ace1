"""The routing of a model: for each role and layer its kind, what it keeps, where that lies, and who computes it.

It is read off the model once, before anything runs; nothing looks it up while a step runs. The same layer index means
different layers in different roles: a draft's layer 0 is not the target's layer 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jax
from flax import nnx
from rich.markup import escape
from rich.table import Table

from kernels_pallas.op import KVSpec, Place, StateSpec
from models.decoder import DRAFT, TARGET, Decoder, Route


@dataclass(frozen=True)
class Routing:
    """All routes of a model, target layers first, and its parameter counts per role."""

    routes: tuple[Route, ...]
    parameters: dict[str, int]

    def layer(self, role: str, layer: int) -> tuple[Route, ...]:
        """The routes of one layer: mostly one, several where it mixes tokens in several ways side by side.

        Raises ValueError where the role has no such layer.
        """
        found = tuple(route for route in self.routes if (route.role, route.layer) == (role, layer))
        if not found:
            raise ValueError(f"wanted a layer of role {role} that mixes tokens, got layer {layer}: see the routing")
        return found

    def page_place(self, role: str, layer: int) -> Place:
        """Where a full-attention layer's pages lie. Raises ValueError for a layer that keeps only a slot."""
        return self._place(role, layer, pages=True)

    def slot_place(self, role: str, layer: int) -> Place:
        """Where a linear layer's slots lie. Raises ValueError for a layer that keeps only pages."""
        return self._place(role, layer, pages=False)

    def _place(self, role: str, layer: int, pages: bool) -> Place:
        routes = self.layer(role, layer)
        for route in routes:
            if keeps_pages(route) is pages:
                return route.place
        wanted, got = ("pages", "a slot") if pages else ("a slot", "pages")
        kind = routes[0].kind
        raise ValueError(f"wanted a layer that keeps {wanted}, got {role} layer {layer} ({kind}), which keeps {got}")

    @property
    def token_bytes(self) -> int:
        """Bytes of pages for one token, over all layers."""
        return sum(unit_bytes(route) for route in self.routes if keeps_pages(route))

    @property
    def request_bytes(self) -> int:
        """Bytes of one slot, over all layers."""
        return sum(unit_bytes(route) for route in self.routes if not keeps_pages(route))


def keeps_pages(route: Route) -> bool:
    """Whether a layer's memory grows with the tokens."""
    return type(route.memory) is KVSpec


def unit_bytes(route: Route) -> int:
    """Bytes that a layer keeps: for one token in pages, for one request in a slot."""
    match route.memory:
        case KVSpec() as spec:
            return spec.token_bytes
        case StateSpec() as spec:
            return spec.request_bytes


def route_model(model: Decoder) -> Routing:
    """The routing of a model; it may be abstract."""
    draft = 0 if model.draft is None else count_parameters(model.draft)
    total = count_parameters(model)
    counts = {TARGET: total - draft} | ({} if model.draft is None else {DRAFT: draft})
    return Routing(model.routes(), counts)


def count_parameters(module: nnx.Module) -> int:
    """Learned weights, without the routers' selection biases, as published totals count."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def to_json(routing: Routing) -> dict[str, Any]:
    """The routing as plain data: one entry per layer, the parameters in all and per role."""
    layers = [
        {
            "role": route.role,
            "layer": route.layer,
            "kind": route.kind,
            "keeps": "pages" if keeps_pages(route) else "slot",
            "bytes": unit_bytes(route),
            "backend": route.backend,
        }
        for route in routing.routes
    ]
    return {
        "layers": layers,
        "parameters": sum(routing.parameters.values()),
        "parameters_by_role": routing.parameters,
        "token_bytes": routing.token_bytes,
        "request_bytes": routing.request_bytes,
    }


def to_table(routing: Routing, title: str) -> Table:
    """The routing as a table; neighbouring layers with the same route share a line."""
    table = Table("role", "layer", "kind", "keeps", "bytes", "backend", title=escape(title), title_justify="left")
    for first, last, route in _runs(routing.routes):
        index = str(first) if first == last else f"{first}-{last}"
        arrays = " + ".join(array.name for array in route.memory.arrays)
        place, unit = ("pages", "token") if keeps_pages(route) else ("slot", "request")
        table.add_row(
            route.role, index, route.kind, f"{arrays} in {place}", f"{unit_bytes(route):,} a {unit}", route.backend
        )
    return table


def summary(routing: Routing) -> str:
    """Parameters and memory in one line."""
    counts = " + ".join(f"{count:,} {role}" for role, count in routing.parameters.items())
    return (
        f"{counts} parameters; memory {routing.token_bytes:,} bytes a token in pages, "
        f"{routing.request_bytes:,} bytes a request in a slot"
    )


def _runs(routes: tuple[Route, ...]) -> Iterator[tuple[int, int, Route]]:
    for _, same in groupby(routes, key=lambda route: (route.role, route.kind, route.memory, route.backend)):
        run = list(same)
        yield run[0].layer, run[-1].layer, run[0]
