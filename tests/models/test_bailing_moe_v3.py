"""Ling-3.0 beyond the reference outputs: refusals, clamps, compressed queries, gates per channel, the draft layer."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax.checkpoint import check_table, read_state
from kernels_pallas.kda import BoundedDecay, SoftplusDecay
from kernels_pallas.op import Cache
from models.attention import LatentAttention, LatentShape
from models.bailing_moe_v3 import Config, Limits, Model, weight_table
from models.layers import ClampedSwiGLU, swiglu
from models.moe import BiasedRouter, Experts, GroupedSigmoid, MoE, SharedExpert
from tests.models.reference import FOLDER
from tests.ragged import PAGE, PAGES, checked, make_batch, nan_cache


def published(**changed):
    return {**json.loads((FOLDER / "ling3" / "config.json").read_text()), **changed}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("use_bias", True),
        ("use_qkv_bias", True),
        ("use_kda_lora", True),
        ("no_kda_lora", False),
        ("use_nGPT", True),
        ("up_proj_norm", True),
        ("value_norm", True),
        ("scale_router_input", True),
        ("mtp_use_kda", True),
        ("multi_gate", True),
        ("router_type", "MultiRouter"),
        ("rope_interleave", False),
        ("rope_scaling", {"type": "yarn", "factor": 2}),
        ("rotary_dim", 16),
        ("qk_head_dim", 16),
        ("score_function", "softmax"),
        ("moe_router_enable_expert_bias", False),
        ("moe_shared_expert_intermediate_size", 32),
        ("num_nextn_predict_layers", 2),
        ("gated_attention_proj_granularity_type", "layer_wise"),
        ("gated_attention_proj_granularity_type", None),
        ("kda_lower_bound", 5.0),
        ("kda_lower_bound", None),
        ("kda_lower_bound", float("-inf")),
        ("layer_group_size", 3),  # 4 layers
        ("layer_group_size", [1, 1, 0]),
        ("layer_group_size", [1, 1, 2, 0]),
        ("num_experts_per_tok", 5),  # of 4 in one group
        ("expert_swiglu_limit_list", [0, 0, 4]),
        ("expert_swiglu_limit_list", [0, 0, -4, 4]),
        ("share_expert_swiglu_limit_list", [4, 0, 0, 0]),  # the first layer is dense
        ("linear_head_dim", 16),
    ],
)
def test_refused(field, value):
    with pytest.raises(ValueError, match=r"config\.json"):
        Config.from_hf(published(**{field: value}))


def test_decay_is_bounded_only_where_the_config_says_so():
    assert Config.from_hf(published()).decay == BoundedDecay(-5.0)
    assert Config.from_hf(published(kda_safe_gate=False)).decay == SoftplusDecay()


def test_groups_may_be_listed():
    assert Config.from_hf(published(layer_group_size=[1, 0, 0, 1])).full == (False, True, True, False)


def test_clamp_cuts_the_gate_after_its_silu():
    gate_up = np.float32([[[-9, 0.5, 3, 9, 9], [9, -9, 0.25, 9, -9]]])
    gate, up = gate_up[0].astype(np.float64)
    wanted = np.minimum(gate / (1 + np.exp(-gate)), 2) * np.clip(up, -2, 2)
    np.testing.assert_allclose(ClampedSwiGLU(2.0)(jnp.asarray(gate_up))[0], wanted, rtol=1e-6)


def test_limits_belong_to_their_layers_and_not_to_the_draft():
    hf = published(
        expert_swiglu_limit_list=[0, 0, 4, 4], share_expert_swiglu_limit_list=[0, 5, 0, 7], num_nextn_predict_layers=1
    )
    config = Config.from_hf(hf)
    assert config.limits == (Limits(), Limits(None, 5.0), Limits(4.0, None), Limits(4.0, 7.0))
    model = nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0), backend="xla"))
    moes = [*[layer.feed_forward for layer in model.layers][1:], model.draft.layer.feed_forward]
    found = [(moe.experts.activate, moe.shared.mlp.activate) for moe in moes]
    four, five, seven = (ClampedSwiGLU(limit) for limit in (4.0, 5.0, 7.0))
    assert found == [(swiglu, five), (four, swiglu), (four, seven), (swiglu, swiglu)]


@jax.jit
def clamped_experts(x):
    """The output of experts, and what an oracle needs: the choice, the kernels of routed and shared experts."""
    rngs = nnx.Rngs(1)
    experts = Experts(rngs, 6, 8, 4, "float32", ClampedSwiGLU(0.5))
    shared = SharedExpert(rngs, 8, 4, "float32", ClampedSwiGLU(0.25))
    moe = MoE(BiasedRouter(rngs, 8, 6, GroupedSigmoid(2, 1, 1, True, 2.5), "float32"), experts, shared)
    kernels = (experts.gate_up[...], experts.down[...], shared.mlp.gate_up.kernel[...], shared.mlp.down.kernel[...])
    return moe(x), moe.router(x), kernels


def clamped_mlp(x, gate_up, down, limit):
    gate, up = np.einsum("d,dcf->cf", x, gate_up)
    return (np.minimum(gate / (1 + np.exp(-gate)), limit) * np.clip(up, -limit, limit)) @ down


@pytest.mark.parametrize("tokens", [1, 40])  # gathered and grouped experts
def test_clamped_experts_equal_the_formula(tokens):
    x = 3 * np.random.default_rng(0).normal(size=(tokens, 8)).astype(np.float32)
    out, (chosen, weights), kernels = jax.tree.map(np.asarray, clamped_experts(x))
    gate_up, down, shared_gate_up, shared_down = kernels
    for t in range(tokens):
        wanted = clamped_mlp(x[t], shared_gate_up, shared_down, 0.25)
        for e, w in zip(chosen[t], weights[t], strict=True):
            wanted = wanted + w * clamped_mlp(x[t], gate_up[e], down[e], 0.5)
        np.testing.assert_allclose(out[t], wanted, rtol=0, atol=2e-5)


def attend(gate, kernel):
    """The output of a latent attention with this gate, from the same other weights."""
    shape = LatentShape(3, None, 8, 4, 2, 5)
    mixer = LatentAttention(nnx.Rngs(2), 6, shape, 0.4, "float32", "xla", rotated=False, gate=gate)
    mixer.gate.kernel = nnx.Param(kernel)
    cache = Cache((mixer.memory,), ((jnp.full((1, PAGES, PAGE, 10), jnp.nan),),))
    x, graph_state = jax.random.normal(jax.random.key(0), (7, 6)), nnx.split(mixer)
    batch = checked(make_batch([7]), 7)
    return jax.jit(lambda x, cache, batch: nnx.merge(*graph_state)(x, None, cache, batch)[0])(x, cache, batch)


def test_gate_per_channel_repeats_a_gate_per_head():
    kernel = jax.random.normal(jax.random.key(1), (6, 3))
    per_channel = jnp.repeat(kernel[:, :, None], 5, axis=2)
    np.testing.assert_allclose(attend((3, 5), per_channel), attend((3,), kernel), rtol=1e-5, atol=1e-6)
    changed = per_channel.at[:, 2, 4].multiply(-1)
    assert np.abs(attend((3, 5), changed) - attend((3,), kernel)).max() > 1e-3


VARIANT = {
    "q_lora_rank": 24,
    "num_nextn_predict_layers": 1,
    "gated_attention_proj_granularity_type": "element_wise",
    "use_mla_nope": True,
    "kda_safe_gate": False,
}


def test_every_parameter_of_a_variant_has_a_source():
    config = Config.from_hf(published(**VARIANT))
    leaves = read_state(nnx.state(nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0), backend="xla"))))
    table = weight_table(config)
    check_table(table, leaves)
    shapes = {n: s.tensor_shape(leaves[w.path].shape) for w in table.weights for s in w.sources[:1] for n in s.names}
    assert shapes["model.layers.3.attention.q_a_proj.weight"] == (24, 64)
    assert shapes["model.layers.3.attention.q_b_proj.weight"] == (4 * 24, 24)
    assert shapes["model.layers.3.attention.g_proj.weight"] == (4 * 16, 64)
    assert shapes["model.layers.4.attention.g_proj.weight"] == (4 * 16, 64)
    assert shapes["model.layers.4.eh_proj.weight"] == (64, 128)


@pytest.mark.slow
def test_a_variant_decodes_as_it_prefills():
    config = Config.from_hf(published(**VARIANT, num_hidden_layers=2, layer_group_size=2))
    graph, state = nnx.split(nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0), dtype="float32", backend="xla")))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape).astype(np.float32)), state)
    tokens, model = jnp.arange(5, 25, dtype=jnp.int32), nnx.merge(graph, state)

    @jax.jit
    def forward(tokens, cache, batch):
        hidden, cache = model(tokens, cache, batch)
        return model.logits(hidden), cache

    whole, _ = forward(tokens, nan_cache(model), checked(make_batch([20]), 20))
    cache = nan_cache(model)
    for index in range(20):
        batch = checked(make_batch([1], [index], decodes=1, content="decode"), 1)
        step, cache = forward(tokens[index : index + 1], cache, batch)
        np.testing.assert_allclose(step[0], whole[index], rtol=0, atol=5e-4 * whole.std())


def test_draft_layer_is_gated_latent_attention_of_its_own():
    config = Config.from_hf(published(num_nextn_predict_layers=1))
    model = nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0), backend="xla"))
    kinds = [(route.role, route.kind) for route in model.routes()]
    assert kinds == [*[("target", "kda")] * 3, ("target", "mla"), ("draft", "mla")]
    assert model.draft.layer.mixer.gate.kernel.shape == (64, 4)
    assert model.draft.layer.mixer.place != model.layers[3].mixer.place
