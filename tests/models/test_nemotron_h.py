"""Nemotron-H beyond its reference fixture: what is refused, both spellings of the layers, latent experts, the draft."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.nemotron_h import Config, Model
from models.squared_relu import LatentExperts
from tests.ragged import checked, make_batch, nan_cache

HF = json.loads((Path(__file__).parents[1] / "hf_reference" / "nemotron_h" / "config.json").read_text())
WITH_DRAFT = {**HF, "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E", "moe_latent_size": 24}


@pytest.mark.parametrize(
    "field, value",
    [
        ("use_bias", True),
        ("mlp_bias", True),
        ("mamba_proj_bias", True),
        ("attention_bias", True),
        ("use_conv_bias", False),
        ("residual_in_fp32", True),
        ("mamba_hidden_act", "gelu"),
        ("mlp_hidden_act", "silu"),
        ("mamba_ssm_cache_dtype", "bfloat16"),
        ("sliding_window", 4096),
        ("hybrid_override_pattern", "MEX"),
        ("hybrid_override_pattern", ""),
        ("n_groups", 3),
        ("n_shared_experts", 2),
        ("n_group", 3),
        ("num_experts_per_tok", 9),
        ("norm_eps", 1e-6),
        ("time_step_limit", [1.0]),
        ("time_step_limit", [2.0, 1.0]),
        ("num_nextn_predict_layers", 2),
        ("num_nextn_predict_layers", 1),  # without a pattern
        ("surprise", 1),
    ],
)
def test_refused(field, value):
    with pytest.raises(ValueError):
        Config.from_hf({**HF, field: value})


def test_a_draft_with_a_state_is_refused():
    with pytest.raises(ValueError, match="draft pattern"):
        Config.from_hf({**WITH_DRAFT, "mtp_hybrid_override_pattern": "ME"})


def test_words_and_characters_name_the_same_layers():
    words = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
    renamed = {key: value for key, value in HF.items() if key != "hybrid_override_pattern"}
    renamed["layers_block_type"] = [words[kind] for kind in HF["hybrid_override_pattern"]]
    assert Config.from_hf(renamed) == Config.from_hf(HF)


@pytest.mark.parametrize("limit", [[0.0, float("inf")], [0.0, 1e308], [0, {"__float__": "Infinity"}], None])
def test_an_unlimited_step(limit):
    assert Config.from_hf({**HF, "time_step_limit": limit}).mamba.step_limit == (0.0, float("inf"))


def relu2(x):
    return np.maximum(x, 0) ** 2


def numbers(*variables):
    return [np.asarray(variable[...], np.float64) for variable in variables]


@pytest.mark.parametrize("tokens", [1, 9])  # fewer choices than experts, and more: the two ways to compute them
def test_latent_experts_equal_a_loop(tokens):
    module = LatentExperts(nnx.Rngs(3), 6, 16, 8, 12, "float32")
    rng = np.random.default_rng(1)
    x = rng.normal(size=(tokens, 16)).astype(np.float32)
    chosen = np.stack([rng.permutation(6)[:2] for _ in range(tokens)])
    shares = rng.random((tokens, 2)).astype(np.float32)
    got = module(jnp.asarray(x), jnp.asarray(chosen), jnp.asarray(shares))
    into, up, down, out_of = numbers(module.into.kernel, module.experts.up, module.experts.down, module.out_of.kernel)
    for t in range(tokens):
        narrow = x[t].astype(np.float64) @ into
        mixed = sum(share * relu2(narrow @ up[e]) @ down[e] for e, share in zip(chosen[t], shares[t], strict=True))
        np.testing.assert_allclose(got[t], mixed @ out_of, rtol=2e-5, atol=2e-5)


def rms(x, epsilon=1e-5):
    return x / np.sqrt(np.mean(x * x) + epsilon)


def test_the_draft_of_one_token():
    """One token attends to itself alone, so that its attention is its value."""
    model = Model(Config.from_hf(WITH_DRAFT), rngs=nnx.Rngs(5), dtype="float32", backend="xla")
    assert [(route.kind, route.layer) for route in model.routes() if route.role == "draft"] == [("gqa", 0)]
    hidden = np.random.default_rng(2).normal(size=(1, 64)).astype(np.float32)
    batch = checked(make_batch([1]), 1)
    got, _ = model.draft_hidden(jnp.asarray([7]), jnp.asarray(hidden), nan_cache(model), batch)

    layer = model.draft.layer
    table, project, value, output = numbers(
        model.embedding.table, model.draft.project.kernel, layer.mixer.value.kernel, layer.mixer.output.kernel
    )
    x = np.concatenate([rms(table[7]), rms(hidden[0].astype(np.float64))]) @ project
    values = np.einsum("d,dgk->gk", rms(x), value)
    x = x + np.repeat(values, 2, axis=0).reshape(-1) @ output
    x = x + feed_forward(layer.feed_forward, rms(x))
    np.testing.assert_allclose(got[0], rms(x), rtol=1e-4, atol=1e-4)


def feed_forward(moe, x):
    scores, up, down, into, out_of, shared_up, shared_down = numbers(
        moe.router.scores.kernel,
        moe.experts.experts.up,
        moe.experts.experts.down,
        moe.experts.into.kernel,
        moe.experts.out_of.kernel,
        moe.shared.up.kernel,
        moe.shared.down.kernel,
    )
    scores = 1 / (1 + np.exp(-(x @ scores)))
    chosen = np.argsort(-scores)[: HF["num_experts_per_tok"]]
    shares = scores[chosen] / scores[chosen].sum() * HF["routed_scaling_factor"]
    mixed = sum(share * relu2(x @ into @ up[e]) @ down[e] for e, share in zip(chosen, shares, strict=True))
    return mixed @ out_of + relu2(x @ shared_up) @ shared_down
