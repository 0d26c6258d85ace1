"""Ring-linear-2.0, which has no reference outputs: its config, its shapes, and that prefill and decode agree."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax.checkpoint import check_table, read_state
from kernels_pallas.op import Cache, Place, token_positions
from kernels_pallas.rotary import frequencies, rotary_tables
from models.attention import GroupedAttention, NormShape
from models.bailing_moe_linear_v2 import Config, Model, weight_table
from models.lightning import alibi_slopes
from tests.models.reference import FOLDER
from tests.ragged import checked, make_batch, nan_cache

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "layer_group_size": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "group_norm_size": 2,
    "vocab_size": 64,
}


def published():
    return json.loads((FOLDER.parent / "configs" / "Ring-mini-linear-2.0.json").read_text())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("use_bias", True),
        ("use_qkv_bias", True),
        ("use_rmsnorm", False),
        ("linear_silu", True),
        ("rope_scaling", {"type": "yarn"}),
        ("score_function", "softmax"),
        ("router_dtype", "bf16"),
        ("moe_router_enable_expert_bias", False),
        ("num_nextn_predict_layers", 1),
        ("moe_shared_expert_intermediate_size", 1024),
        ("num_key_value_heads", 3),
        ("group_norm_size", 3),
        ("n_group", 7),
        ("topk_group", 9),
        ("partial_rotary_factor", 0.33),
        ("surprise", 1),
    ],
)
def test_refused(field, value):
    with pytest.raises(ValueError, match=r"config\.json"):
        Config.from_hf({**published(), field: value})


def test_key_heads_are_required():
    with pytest.raises(ValueError, match="wanted the field 'num_key_value_heads'"):
        Config.from_hf({name: value for name, value in published().items() if name != "num_key_value_heads"})


def test_layers_of_an_incomplete_last_group_are_full():
    config = Config.from_hf(published() | TINY)
    assert [config.is_full(layer) for layer in range(5)] == [False, True, False, True, True]


def test_slopes_follow_the_layer_offset():
    config = Config.from_hf(published())
    factors = 1 - (np.arange(20) - 1) / 19 + 1e-5
    np.testing.assert_allclose(config.slopes, factors[:, None] * alibi_slopes(16)[None, :], rtol=1e-6)


def test_every_parameter_has_a_source():
    for qk_norm in (True, False):
        config = Config.from_hf(published() | TINY | {"use_qk_norm": qk_norm})
        model = nnx.eval_shape(lambda config=config: Model(config, rngs=nnx.Rngs(0), backend="xla"))
        check_table(weight_table(config), read_state(nnx.state(model)))


@functools.cache
def tiny_model():
    """The config and a model with random weights, norms included."""
    config = Config.from_hf(published() | TINY)
    graph, state = nnx.split(nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0), dtype="float32", backend="xla")))
    rng = np.random.default_rng(1)
    fill = lambda leaf: jnp.asarray(rng.normal(leaf.ndim == 1, 0.2, leaf.shape), jnp.float32)  # noqa: E731
    return config, nnx.merge(graph, jax.tree.map(fill, state))


def mixed(mixer, memory, tokens=9):
    """The output of a mixer alone for one fresh request."""
    batch = jax.tree.map(jnp.asarray, checked(make_batch([tokens]), tokens))
    lead = (1, 65, 16) if mixer.kind == "gqa" else (1, 9)
    pools = tuple(jnp.full(lead + memory.pool_shape(array), jnp.nan, array.dtype) for array in memory.arrays)
    rotary = rotary_tables(token_positions(batch, tokens), jnp.asarray(frequencies(4, 1e6)))
    x = jax.random.normal(jax.random.key(2), (tokens, 32))
    graph, state = nnx.split(mixer)

    @jax.jit
    def run(state, *inputs):
        mixer = nnx.merge(graph, state)
        mixer.place = Place(0, 0)  # the only layer of its pool here
        return mixer(*inputs)[0]

    return run(state, x, rotary, Cache((memory,), (pools,)), batch)


def test_the_fused_projection_is_queries_then_keys_then_values():
    config, model = tiny_model()
    fused = model.layers[1].mixer
    split = GroupedAttention(
        nnx.Rngs(0), 32, config.attention, NormShape(config.epsilon), True, 8**-0.5, "float32", "xla"
    )
    for name, part in (("query", slice(0, 4)), ("key", slice(4, 6)), ("value", slice(6, 8))):
        nnx.update(getattr(split, name), {"kernel": fused.query_key_value.kernel[...][:, part]})
    nnx.update(split.output, {"kernel": fused.output.kernel[...].reshape(-1, 32)})
    for name in ("query_norm", "key_norm"):
        nnx.update(getattr(split, name), nnx.state(getattr(fused, name)))
    np.testing.assert_allclose(mixed(fused, fused.memory), mixed(split, split.memory), rtol=0, atol=1e-6)


def test_prefill_equals_token_by_token():
    graph, state = nnx.split(tiny_model()[1])
    model = nnx.merge(graph, state)
    forward = jax.jit(lambda state, *step: nnx.merge(graph, state)(*step))
    tokens = np.random.default_rng(0).integers(0, 64, 20).astype(np.int32)
    whole, _ = forward(state, jnp.asarray(tokens), nan_cache(model), checked(make_batch([20]), 20))
    cache, single = nan_cache(model), []
    for t in range(20):
        batch = checked(make_batch([1], [t], decodes=1, content="decode"), 1)
        out, cache = forward(state, jnp.asarray(tokens[t : t + 1]), cache, batch)
        single.append(out[0])
    np.testing.assert_allclose(np.stack(single), whole, rtol=0, atol=2e-5)
    assert np.asarray(whole).std() > 0.1
