"""The model that is measured: a checkpoint, or random weights from a config.json alone.

Time does not depend on the values of weights, as long as they are neither zeros, which a device multiplies with less
power, nor so large that an activation overflows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrid_jax import checkpoint
from hybrid_jax.config import Backend, Dtype
from hybrid_jax.hub import find_model
from hybrid_jax.published_config import read_published_config
from hybrid_jax.routing import Routing, route_model
from models.decoder import Decoder
from models.registry import find_family

CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token")  # published names of one number
MATRIX_DEVIATION = 0.02  # keeps the activations of random matrices of usual widths near 1
HOST_NUMBERS = 2**18  # of an array that is drawn on the host faster than a program for it is compiled
VECTOR_DEVIATION = 0.1  # around 1, where norms and gates start from


@dataclass(frozen=True)
class Subject:
    """A model with its weights. positions: longest request. chosen: experts of a token, 0 for a model without."""

    name: str
    model: Decoder
    routing: Routing
    positions: int
    vocabulary: int
    chosen: int
    dtype: Dtype

    @property
    def description(self) -> str:
        """Name, size, dtype and who computes each kind, in one line."""
        count = sum(self.routing.parameters.values())
        kinds = ", ".join(f"{kind} by {backend}" for kind, backend in self.backends.items())
        return f"{self.name}: {len(self.model.layers)} layers, {count:,} parameters in {self.dtype}; {kinds}"

    @property
    def backends(self) -> dict[str, str]:
        """Who computes each kind."""
        return {route.kind: route.backend for route in self.routing.routes}


def open_subject(name: str, dtype: Dtype, backend: Backend, layers: int | None = None) -> Subject:
    """The model of a checkpoint, or of a config.json with random weights.

    Args:
      name: a checkpoint directory, a config.json, a hub repository, or 'demo'.
      layers: so many first layers only, of a config.json. None: all.
    A config.json is built without its draft, which none of the steps measured here runs.
    Raises ValueError for a checkpoint of which only some layers are wanted, and as the reading of either does.
    """
    path = find_model(name)
    hf = read_published_config(path)
    family = find_family(hf)
    config = family.Config.from_hf(hf)
    if path.is_file():
        model = fill(
            nnx.eval_shape(
                lambda: _first_layers(family.Model(config, rngs=nnx.Rngs(0), dtype=dtype, backend=backend), layers)
            )
        )
    elif layers is None:
        model = _loaded(path, family, config, dtype, backend)
    else:
        raise ValueError(f"wanted layers with a config.json, got them with {name}: give the path of its config.json")
    return Subject(name, model, route_model(model), config.max_positions, config.vocabulary, chosen_experts(hf), dtype)


def _loaded(path: Path, family: ModuleType, config: Any, dtype: Dtype, backend: Backend) -> Decoder:
    abstract = nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0), dtype=dtype, backend=backend))
    graph, state = nnx.split(abstract)
    return nnx.merge(graph, checkpoint.load(path, state, family.weight_table(config)))


def _first_layers(model: Decoder, layers: int | None) -> Decoder:
    """The model with some of its layers and without its draft: its parts put together again by the skeleton."""
    parts = list(model.layers)
    if layers is not None and not 0 < layers <= len(parts):
        raise ValueError(f"wanted 1 to {len(parts)} layers, got {layers}: the config has no more")
    Decoder.__init__(
        model,
        model.embedding,
        parts[:layers],
        model.norm,
        model.head,
        None,
        model.frequencies,
        model.magnitude,
    )
    return model


def chosen_experts(hf: dict[str, Any]) -> int:
    """Experts that each token takes, as a published config states it; 0 for a model without."""
    fields = hf.get("text_config", hf)
    stated = [fields[name] for name in CHOSEN_EXPERTS if fields.get(name)]
    return int(stated[0]) if stated else 0


def fill(abstract: Decoder) -> Decoder:
    """The model with random weights. Small ones are drawn on the host, the others by one program for each shape."""
    graph, state = nnx.split(abstract)
    leaves, structure = jax.tree.flatten(state)
    programs: dict[Any, Callable[[int], jax.Array]] = {}
    drawn = []
    for seed, leaf in enumerate(leaves):
        form = leaf.shape, leaf.dtype
        if form not in programs:
            programs[form] = _program(*form) if leaf.size > HOST_NUMBERS else partial(_draw_on_host, *form)
        drawn.append(programs[form](seed))
    jax.block_until_ready(drawn)
    return nnx.merge(graph, jax.tree.unflatten(structure, drawn))


def _draw_on_host(shape: tuple[int, ...], dtype: Any, seed: int) -> jax.Array:
    normal = np.random.default_rng(seed).normal(size=shape)
    return jax.device_put(_scaled(normal).astype(dtype))


def _program(shape: tuple[int, ...], dtype: Any) -> Callable[[int], jax.Array]:
    def draw(seed: jax.Array) -> jax.Array:
        return _scaled(jax.random.normal(jax.random.key(seed), shape, dtype))

    program = jax.jit(draw)
    return lambda seed: program(jnp.uint32(seed))


def _scaled(normal: Any) -> Any:
    return normal * MATRIX_DEVIATION if normal.ndim > 1 else 1 + VECTOR_DEVIATION * normal
