"""Granite 4 beyond its reference fixture: what is refused, the releases without experts and with positions."""

import json
from pathlib import Path

import pytest
from flax import nnx

from hybrid_jax.checkpoint import check_table, read_state
from models.granitemoehybrid import Config, Model, weight_table

HF = json.loads((Path(__file__).parents[1] / "hf_reference" / "granitemoehybrid" / "config.json").read_text())


def abstract(config):
    return nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0), backend="xla"))


@pytest.mark.parametrize(
    "field, value",
    [
        ("attention_bias", True),
        ("mamba_proj_bias", True),
        ("mamba_conv_bias", False),
        ("hidden_act", "gelu"),
        ("normalization_function", "layernorm"),
        ("position_embedding_type", "alibi"),
        ("rope_scaling", {"rope_type": "yarn"}),
        ("layer_types", ["mamba", "attention"]),
        ("layer_types", ["mamba", "conv", "attention"]),
        ("num_experts_per_tok", 7),
        ("mamba_d_head", 8),
        ("mamba_n_groups", 3),
        ("head_dim", 8),
        ("logits_scaling", 0),
        ("surprise", 1),
    ],
)
def test_refused(field, value):
    with pytest.raises(ValueError):
        Config.from_hf({**HF, field: value})


def test_newer_words_name_the_same_layers():
    newer = {**HF, "layer_types": ["linear_attention", "linear_attention", "full_attention"]}
    assert Config.from_hf(newer) == Config.from_hf(HF)


def test_without_experts_the_shared_mlp_is_alone():
    config = Config.from_hf({**HF, "num_local_experts": 0, "num_experts_per_tok": 0})
    leaves = read_state(nnx.state(abstract(config)))
    check_table(weight_table(config), leaves)
    assert leaves["layers.0.feed_forward.gate_up.kernel"].shape == (64, 2, 32)
    assert not any("experts" in path or "router" in path for path in leaves)


@pytest.mark.parametrize("kind, rotated", [("nope", False), ("rope", True)])
def test_positions(kind, rotated):
    model = abstract(Config.from_hf({**HF, "position_embedding_type": kind}))
    assert model.layers[2].mixer.rotated is rotated
    assert (model.frequencies is not None) is rotated
