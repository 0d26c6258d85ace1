"""The layers of a model share their Mosaic GPU kernels: a deeper model has more launches, not more kernels."""

import re

import jax
import jax.numpy as jnp
import pytest

from hybrid_jax.bench import subject
from hybrid_jax.buckets import Bucket
from hybrid_jax.runner import Runner, RunnerSizes
from kernels_pallas.gqa.gpu_splits import Items, sum_splits

SIZES = RunnerSizes(9, 5, 64, rows=4, row_pages=2, step_tokens=128, loops=4, grid=64, canary=False)
BUCKETS = {"decode": Bucket(4, 0, 2, likeliest=True), "mixed": Bucket(4, 128, 2)}


def launches_and_kernels(config: str, layers: int, bucket: Bucket) -> tuple[int, int]:
    """Launches of our kernels in a program for CUDA, and how many different kernels they are."""
    model = subject.open_subject(f"tests/configs/{config}.json", "bfloat16", "gpu", layers)
    runner = Runner(model.model, model.routing, SIZES, (), None)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (runner._state, runner._memory))
    program = runner._mixed if bucket.tokens else runner._decode
    text = program.trace(*shapes, *runner._empty_arguments(bucket)).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("@mosaic_gpu"), len(set(re.findall(r'kernel_hash = "((?:[^"\\]|\\.)*)"', text)))


@pytest.mark.slow
@pytest.mark.parametrize("sort", sorted(BUCKETS))
@pytest.mark.parametrize(
    ("config", "period"), [("Qwen3.5-4B", 4), ("Kimi-Linear-48B-A3B", 4), ("Nemotron-3-Nano-30B-A3B-BF16", 7)]
)
def test_a_deeper_model_has_no_more_kernels(config, period, sort, monkeypatch):
    monkeypatch.setattr(subject, "fill", lambda abstract: abstract)
    launches, kernels = launches_and_kernels(config, period + 1, BUCKETS[sort])
    more, same = launches_and_kernels(config, 2 * period + 1, BUCKETS[sort])
    assert more > launches > kernels > 0
    assert same == kernels


@pytest.mark.parametrize("heads", [4, 6, 16])
def test_heads_that_are_padded_to_the_same_shape_have_kernels_of_their_own(heads):
    """Two key heads, whose queries lie in groups of 8 whatever their number."""
    partial, rows = jax.ShapeDtypeStruct((5, 2, 8, 128), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.int32)
    sums, items = jax.ShapeDtypeStruct((5, 2, 64), jnp.float32), Items(*[rows] * 6)
    out = jax.eval_shape(lambda *a: sum_splits(*a, heads), partial, sums, sums, items)
    assert out.shape == (3, heads, 128)
