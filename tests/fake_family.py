"""A small family of models for the tests of checkpoints: dense matrices, biases in float32, experts in two spellings.

Its published names may bear the prefix `model.`; tensors under `vision.` are not used.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from flax import nnx
from jax import numpy as jnp

from hybrid_jax.checkpoint import read_state
from hybrid_jax.spelling import match
from models import registry
from models.weights import Source, Weight, WeightTable, weight

ARCHITECTURES = ("FakeForCausalLM",)
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Config:
    """Sizes of a fake model."""

    layers: int
    width: int
    inner: int
    experts: int

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        return cls(hf["layers"], hf["width"], hf["inner"], hf["experts"])


class Layer(nnx.Module):
    """A matrix `[D, D]`, a bias in float32, experts `[E, D, 2, F]`."""

    def __init__(self, config: Config, dtype: str):
        shape = (config.experts, config.width, 2, config.inner)
        self.kernel = nnx.Param(jnp.zeros((config.width, config.width), dtype), axes=("model", None))
        self.bias = nnx.Param(jnp.zeros((config.width,), jnp.float32), axes=("model",))
        self.gate_up = nnx.Param(jnp.zeros(shape, dtype), axes=("expert", "model", None, "mlp"))


class Model(nnx.Module):
    """Layers that compute nothing."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: str, backend: str):
        self.layers = nnx.List([Layer(config, dtype) for _ in range(config.layers)])


def weight_table(config: Config) -> WeightTable:
    rows = []
    for layer in range(config.layers):
        ours = theirs = f"layers.{layer}"
        names = tuple(f"{theirs}.experts.{e}.{part}.weight" for e in range(config.experts) for part in ("gate", "up"))
        packed = Source((f"{theirs}.experts.gate_up",), "e (c f) d -> e d c f")
        rows += [
            weight(f"{ours}.kernel", f"{theirs}.dense.weight", "o d -> d o"),
            weight(f"{ours}.bias", f"{theirs}.dense.bias", "d -> d"),
            Weight(f"{ours}.gate_up", (Source(names, "e c f d -> e d c f", (config.experts, 2)), packed)),
        ]
    return WeightTable(tuple(rows), canonical)


def canonical(name: str) -> str | None:
    return None if name.startswith("vision.") else name.removeprefix("model.")


# ----------------------------------------------------------------------------------------------- checkpoints on disk

HF = {"architectures": ["FakeForCausalLM"], "layers": 2, "width": 6, "inner": 4, "experts": 3}
INT8 = {"quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}}


def install(monkeypatch: Any) -> None:
    """Make the family known beside the real ones."""
    family = SimpleNamespace(**{name: globals()[name] for name in ("Config", "Model", "weight_table", "__name__")})
    known = registry.families() | dict.fromkeys(ARCHITECTURES, family)
    monkeypatch.setattr(registry, "families", lambda: known)


def abstract_state(hf: Mapping[str, Any] = HF, dtype: str = "bfloat16") -> nnx.State:
    config = Config.from_hf(hf)
    return nnx.state(nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0), dtype=dtype, backend="xla")))


def table(hf: Mapping[str, Any] = HF) -> WeightTable:
    return weight_table(Config.from_hf(hf))


def random_tensors(
    hf: Mapping[str, Any] = HF, *, packed: bool = False, dtype: Any = ml_dtypes.bfloat16, prefix: str = ""
) -> Tensors:
    """The tensors of a published checkpoint; biases are stored in float32."""
    config, rng = Config.from_hf(hf), np.random.default_rng(5)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(dtype)

    tensors: Tensors = {}
    for layer in range(config.layers):
        name = f"{prefix}layers.{layer}"
        tensors[f"{name}.dense.weight"] = normal(config.width, config.width)
        tensors[f"{name}.dense.bias"] = normal(config.width).astype(np.float32)
        if packed:
            tensors[f"{name}.experts.gate_up"] = normal(config.experts, 2 * config.inner, config.width)
            continue
        for expert in range(config.experts):
            for part in ("gate", "up"):
                tensors[f"{name}.experts.{expert}.{part}.weight"] = normal(config.inner, config.width)
    return tensors


def quantize(tensors: Tensors) -> Tensors:
    """The same tensors with every `.weight` in int8 and one scale per row beside it."""
    found: Tensors = {}
    rng = np.random.default_rng(6)
    for name, tensor in tensors.items():
        if not name.endswith(".weight"):
            found[name] = tensor
            continue
        found[name] = rng.integers(-128, 128, tensor.shape, np.int8)
        found[f"{name}_scale"] = rng.uniform(0.1, 1, (tensor.shape[0], 1)).astype(ml_dtypes.bfloat16)
    return found


def write_hf(directory: Path, tensors: Tensors, hf: Mapping[str, Any] = HF, shards: int = 1) -> Path:
    """A published directory: one file, or shards with an index that deal the tensors out in turn."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf, indent=3))
    if shards == 1:
        safetensors.numpy.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for at, (name, tensor) in enumerate(tensors.items()) if at % shards == shard}
        safetensors.numpy.save_file(part, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return directory


# ------------------------------------------------------------------------------------------------------- what is loaded


def values(state: nnx.State) -> Tensors:
    """The arrays of a state by dotted path."""
    return {".".join(map(str, keys)): np.asarray(leaf[...]) for keys, leaf in nnx.to_flat_state(state)}


def expected(tensors: Tensors) -> Tensors:
    """The parameters by the table's own definition, in the dtypes that the model wants."""
    leaves = read_state(abstract_state())
    return {
        found.weight.path: found.source.assemble(
            [tensors[name] for name in found.names], leaves[found.weight.path].shape
        ).astype(leaves[found.weight.path].dtype)
        for found in match(table(), tensors).found
    }


def assert_same(got: Tensors, wanted: Tensors) -> None:
    """Equal names, dtypes and bytes."""
    assert set(got) == set(wanted)
    for path, value in wanted.items():
        assert got[path].dtype == value.dtype, path
        assert np.ascontiguousarray(got[path]).tobytes() == np.ascontiguousarray(value).tobytes(), path
