"""Falcon-H1 beyond its reference fixture: what is refused, both kinds in every layer, the norm's variants."""

import json
from pathlib import Path

import pytest
from flax import nnx

from hybrid_jax.checkpoint import check_table, read_state
from models.falcon_h1 import Config, Model, weight_table

HF = json.loads((Path(__file__).parents[1] / "hf_reference" / "falcon_h1" / "config.json").read_text())


def abstract(config):
    return nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0), backend="xla"))


@pytest.mark.parametrize(
    "field, value",
    [
        ("attention_bias", True),
        ("mlp_bias", True),
        ("mamba_proj_bias", True),
        ("projectors_bias", True),
        ("mamba_conv_bias", False),
        ("mamba_use_mlp", False),
        ("hidden_act", "gelu"),
        ("attn_layer_indices", [0, 2]),
        ("rope_scaling", {"rope_type": "yarn"}),
        ("sliding_window", 4096),
        ("ssm_multipliers", [1.0] * 4),
        ("mlp_multipliers", [1.0, "x"]),
        ("key_multiplier", 0),
        ("mamba_d_head", 8),
        ("mamba_n_heads", 5),
        ("mamba_n_groups", 4),
        ("surprise", 1),
    ],
)
def test_refused(field, value):
    with pytest.raises(ValueError):
        Config.from_hf({**HF, field: value})


def test_every_layer_keeps_a_slot_and_pages():
    routes = abstract(Config.from_hf(HF)).routes()
    assert [(route.layer, route.kind) for route in routes] == [
        (layer, kind) for layer in range(3) for kind in ("mamba2", "gqa")
    ]


def test_channels_default_to_a_multiple_of_the_width():
    shorter = {key: value for key, value in HF.items() if key not in ("mamba_d_ssm", "mamba_d_head")}
    shape = Config.from_hf({**shorter, "mamba_n_heads": 8}).mamba
    assert (shape.inner, shape.width) == (128, 16)


@pytest.mark.parametrize("first", [False, True])
def test_with_a_norm(first):
    config = Config.from_hf({**HF, "mamba_rms_norm": True, "mamba_norm_before_gate": first})
    assert (config.mamba.normed, config.mamba.norm_first) == (True, first)
    leaves = read_state(nnx.state(abstract(config)))
    check_table(weight_table(config), leaves)
    assert leaves["layers.0.mamba.output_norm.scale"].shape == (96,)
