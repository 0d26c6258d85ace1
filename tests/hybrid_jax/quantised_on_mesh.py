"""Prints how far logits on four devices are from those of one: `python -m tests.hybrid_jax.quantised_on_mesh FOLDER`.

The checkpoints in the folder have weights of eight bits. A process of its own, since the number of virtual CPU
devices is fixed when JAX starts. One line of JSON: the error over the standard deviation for each checkpoint.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrid_jax import checkpoint
from hybrid_jax.hf_directory import read_config
from hybrid_jax.quantisation import quantise_model
from hybrid_jax.sharding import OneDevice, divide, make_mesh
from models.quantised import Scale
from models.registry import find_family
from tests.ragged import make_batch, nan_cache

TOKENS = 48


def logits(path: Path, devices: int) -> np.ndarray:
    hf = read_config(path)
    family = find_family(hf)
    config = family.Config.from_hf(hf)
    model = nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0), dtype="float32", backend="xla"))
    table = family.weight_table(config)
    quantise_model(model, path, hf, table, None)
    assert nnx.to_flat_state(nnx.state(model, Scale))
    place = OneDevice() if devices == 1 else divide(model, make_mesh(jax.devices()[:devices], 2, devices // 2))
    graph, abstract = nnx.split(model)
    state = checkpoint.load(path, abstract, table, place.put)
    tokens = np.random.default_rng(0).integers(0, config.vocabulary, TOKENS, np.int32)
    cache = nan_cache(model)

    def run(state, tokens, batch):
        model = nnx.merge(graph, state)
        return model.logits(model(tokens, cache, batch)[0])

    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(run)(state, jnp.asarray(tokens), make_batch([TOKENS])))


def main() -> None:
    errors = {}
    for path in sorted(Path(sys.argv[1]).iterdir()):
        one, four = logits(path, 1), logits(path, 4)
        errors[path.name] = float(np.abs(one - four).max() / one.std())
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
