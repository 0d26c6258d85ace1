"""Prints what tests look at of fixtures on a mesh: `python -m tests.hybrid_jax.sharded_model NAME:TENSOR[:EXPERT] ...`.

A process of its own, since the number of virtual CPU devices is fixed when JAX starts. One program for each fixture is
compiled, and called twice, so that rows prefill in pieces, decode and start beside one another.
"""

import json
import math
import re
import sys
from collections import Counter

import jax
import numpy as np
from flax import nnx

from hybrid_jax import checkpoint
from hybrid_jax.sharding import divide, make_mesh
from kernels_pallas.op import Cache
from models.registry import find_family
from tests.models.reference import Fixture
from tests.ragged import checked, make_batch, nan_cache, page_table

COLLECTIVE = re.compile(r"= (\S+) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
COPY = re.compile(r"= f32\[([\d,]+)\]\S* copy\(")
TOKENS = 96


def abstract(fixture):
    hf = json.loads((fixture.path / "config.json").read_text())
    family = find_family(hf)
    config = family.Config.from_hf(hf)
    model = nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0), dtype="float32", backend="xla"))
    return model, family.weight_table(config)


def step(graph, state, cache, tokens, batch):
    model = nnx.merge(graph, state)
    hidden, cache = model(tokens, cache, batch)
    return cache, model.logits(hidden)


def steps(prompt):
    """Two steps: tokens, batch, and by the place of a first logit the position it belongs to and how many follow.

    The prompt's first half beside its first nine tokens as another request; then one token of that, and the other half.
    """
    half = min(len(prompt) // 2, 60)
    first = np.zeros(TOKENS, np.int32)
    first[: half + 9] = np.concatenate([prompt[:half], prompt[:9]])
    second = np.zeros(TOKENS, np.int32)
    rest = len(prompt[half : half + 40])
    second[: rest + 1] = np.concatenate([prompt[9:10], prompt[half : half + 40]])
    yield first, make_batch([half, 9]), {0: (0, half), half: (0, 9)}
    batch = make_batch([1, rest], [9, half], read=[2, 1], write=[2, 1], pages=page_table(2)[::-1], decodes=1)
    yield second, batch, {0: (9, 1), 1: (half, rest)}


def run(name, parts, groups=1):
    fixture = Fixture(name)
    model, table = abstract(fixture)
    layout = divide(model, make_mesh(jax.devices()[: parts * groups], parts, groups))
    graph, abstract_state = nnx.split(model)
    state = checkpoint.load(fixture.path, abstract_state, table, layout.put)
    places = Cache(model.specs, layout.pools(model.specs))
    cache = jax.device_put(nan_cache(model), places)
    shardings = (layout.weights(state), places, layout.everywhere, layout.everywhere)
    program = jax.jit(
        lambda *arguments: step(graph, *arguments),
        donate_argnums=(1,),
        in_shardings=shardings,
        out_shardings=(places, layout.everywhere),
    )
    index = int(np.argmax([len(prompt) for prompt in fixture.prompts]))
    prompt, wanted = fixture.prompts[index], fixture.expected[f"logits_{index}"]
    compiled, error, wrong = None, 0.0, 0
    for tokens, batch, rows in steps(prompt):
        checked(batch, TOKENS)
        compiled = compiled or program.lower(state, cache, tokens, batch).compile()
        cache, logits = compiled(state, cache, tokens, batch)
        for start, (position, count) in rows.items():
            got, want = np.asarray(logits)[start : start + count], wanted[position : position + count]
            error = max(error, float(np.abs(got - want).max() / wanted.std()))
            wrong += int((got.argmax(-1) != want.argmax(-1)).sum())
    hlo = compiled.as_text()
    pools = [array for pool in cache.pools for array in pool]
    shares = [math.prod(array.sharding.shard_shape(array.shape)) for array in pools]
    copied = (math.prod(map(int, shape.split(","))) for shape in COPY.findall(hlo))
    collectives = COLLECTIVE.findall(hlo)
    return {
        "name": name,
        "parts": parts,
        "error": error,
        "wrong": wrong,
        "collectives": Counter(kind for _, kind in collectives),
        "gathered": [shape.split("{")[0] for shape, kind in collectives if kind == "all-gather"],
        "logits": f"f32[{TOKENS},{model.logits_width}]",
        "whole": layout.whole,
        "shares": sorted({array.size // share for array, share in zip(pools, shares, strict=True)}),
        "aliased_bytes": compiled.memory_analysis().alias_size_in_bytes,
        "pool_bytes": 4 * sum(shares),
        "copies": sum(size in shares for size in copied),
    }


if __name__ == "__main__":
    with jax.default_matmul_precision("highest"):
        for argument in sys.argv[1:]:
            name, *parts = argument.split(":")
            print(json.dumps(run(name, *map(int, parts))), flush=True)
