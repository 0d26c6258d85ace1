"""The least that a step of a model must move and compute, read off its weights and its routing. Knows no kernel.

A step reads each weight that its tokens use once. A row in decode reads the pages of all that it has seen, and reads
and writes its state. Experts are chosen at random: of E experts, n tokens that choose k each read the share
1 - (1 - k / E) ** n.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from flax import nnx

from hybrid_jax.routing import Routing, keeps_pages, unit_bytes
from models.decoder import TARGET, Decoder


@dataclass(frozen=True)
class Moved:
    """Bytes that a step must read, and of the states also write, and its floating-point operations in products."""

    weights_bytes: int
    pages_bytes: int
    states_bytes: int
    operations: float

    @property
    def total_bytes(self) -> int:
        """All bytes."""
        return self.weights_bytes + self.pages_bytes + self.states_bytes


def decode_moved(model: Decoder, routing: Routing, chosen: int, rows: int, context: float) -> Moved:
    """One decode step of `rows` rows that have seen `context` tokens each."""
    token_bytes, request_bytes = target_bytes(routing)
    return Moved(
        weights_bytes=weights_bytes(model, chosen, rows),
        pages_bytes=round(rows * context * token_bytes),
        states_bytes=2 * rows * request_bytes,
        operations=rows * token_operations(model, chosen) + rows * head_operations(model),
    )


def prefill_moved(model: Decoder, routing: Routing, chosen: int, rows: int, tokens: int) -> Moved:
    """One step that reads `rows` new prompts of `tokens` tokens; attention and recurrences are not counted."""
    token_bytes, request_bytes = target_bytes(routing)
    return Moved(
        weights_bytes=weights_bytes(model, chosen, rows * tokens),
        pages_bytes=rows * tokens * token_bytes,
        states_bytes=rows * request_bytes,
        operations=rows * tokens * token_operations(model, chosen) + rows * head_operations(model),
    )


def weights_bytes(model: Decoder, chosen: int, tokens: int) -> int:
    """Bytes of weights that a step of `tokens` tokens is expected to read."""
    read = 0.0
    for leaf, experts in _used(model):
        share = 1 - (1 - chosen / experts) ** tokens if experts else 1.0
        read += share * leaf.size * leaf.dtype.itemsize
    head = model.embedding.table if model.head is None else model.head.kernel
    return round(read + head.size * head.dtype.itemsize)


def token_operations(model: Decoder, chosen: int) -> float:
    """Floating-point operations of the products of one token, without the head: two for each weight that it uses."""
    matrices = ((leaf, experts) for leaf, experts in _used(model) if leaf.ndim > 1)
    return sum(2 * leaf.size * (chosen / experts if experts else 1.0) for leaf, experts in matrices)


def head_operations(model: Decoder) -> float:
    """Floating-point operations of the scores of one token."""
    return 2 * math.prod(model.embedding.table.shape)


def target_bytes(routing: Routing) -> tuple[int, int]:
    """Bytes that the target's layers keep for a token and for a request."""
    routes = [route for route in routing.routes if route.role == TARGET]
    pages = sum(unit_bytes(route) for route in routes if keeps_pages(route))
    return pages, sum(unit_bytes(route) for route in routes) - pages


def _used(model: Decoder) -> Iterator[tuple[nnx.Variable, int]]:
    """The weights of the target's layers and last norm, and how many experts lie in each; 0 for one without."""
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        if path[0] in ("layers", "norm"):
            axes = leaf.get_metadata("axes")
            yield leaf, leaf.shape[axes.index("expert")] if "expert" in axes else 0
