"""OLMo hybrid beyond the reference outputs: what its config reader refuses, its defaults, spellings of its tensors."""

import json

import numpy as np
import pytest
from flax import nnx

from hybrid_jax.checkpoint import check_table, read_state
from models.olmo_hybrid import Config, Model, weight_table
from tests.models.reference import FOLDER

DELTA_FIELDS = (
    "linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim"
).split()


def published():
    return json.loads((FOLDER / "olmo_hybrid" / "config.json").read_text())


def abstract(config):
    return nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0), backend="xla"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("layer_types", ["linear_attention"] * 2),
        ("layer_types", ["linear_attention", "conv", "full_attention"]),
        ("layer_types", None),
        ("num_key_value_heads", 3),
        ("head_dim", 32),
        ("linear_num_value_heads", 4),  # 3 key heads
        ("rope_parameters", {"rope_theta": 5e5, "rope_type": "yarn", "factor": 8.0}),
        ("linear_allow_neg_eigval", "yes"),
        ("rms_norm_eps", 0),
        ("surprise", 1),
    ],
)
def test_refused(field, value):
    with pytest.raises(ValueError, match=r"config\.json"):
        Config.from_hf({**published(), field: value})


def test_widths_of_the_delta_rule_follow_from_the_model():
    shorter = {name: value for name, value in published().items() if name not in DELTA_FIELDS}
    shape = Config.from_hf(shorter).delta
    assert (shape.key_heads, shape.heads, shape.key_width, shape.value_width, shape.convolution) == (4, 4, 12, 24, 4)


@pytest.mark.parametrize("rope", [None, {"rope_theta": None, "rope_type": "default"}])
def test_without_positions(rope):
    config = Config.from_hf({**published(), "rope_parameters": rope})
    assert config.rope_theta is None
    assert abstract(config).frequencies is None


def test_beta_reaches_two_only_where_eigenvalues_may_be_negative():
    assert Config.from_hf(published()).beta_scale == 2
    assert Config.from_hf({**published(), "linear_allow_neg_eigval": False}).beta_scale == 1


def test_routes():
    assert [route.kind for route in abstract(Config.from_hf(published())).routes()] == ["gdn", "gdn", "gqa"]


def test_norms_have_two_spellings():
    rows = {
        row.path: {source.names[0] for source in row.sources}
        for row in weight_table(Config.from_hf(published())).weights
    }
    delta, full = "model.layers.0.", "model.layers.2."
    assert rows["layers.0.norm.scale"] == {f"{delta}input_layernorm.weight", f"{delta}attention_layer_norm.weight"}
    both = {"post_attention_layernorm.weight", "feedforward_layer_norm.weight"}
    assert rows["layers.0.feed_forward_norm.scale"] == {delta + name for name in both}
    assert rows["layers.2.norm.scale"] == {full + name for name in both}


def test_three_convolutions_are_one_parameter():
    """Published as those of queries, keys and values; some files cut the same channels into equal thirds."""
    config = Config.from_hf(published())
    leaves = read_state(nnx.state(abstract(config)))
    check_table(weight_table(config), leaves)
    (row,) = (row for row in weight_table(config).weights if row.path == "layers.0.mixer.convolution")
    (source,) = row.sources
    assert [source.tensor_shape(leaves[row.path].shape, index) for index in range(3)] == [
        (48, 1, 4),
        (48, 1, 4),
        (96, 1, 4),
    ]
    parameter = np.random.default_rng(0).normal(size=(4, 3, 64))  # of each key head: 16 + 16 + 32 channels
    tensors = source.split(parameter)
    assert np.array_equal(tensors[1][16 + 5, 0], parameter[:, 1, 16 + 5])
    assert np.array_equal(tensors[2][32 + 5, 0], parameter[:, 1, 32 + 5])
    thirds = np.split(np.concatenate(tensors), 3)
    for cut in (tensors, thirds):
        assert np.array_equal(source.assemble(cut, parameter.shape), parameter)
    with pytest.raises(ValueError, match="wanted shape"):
        source.assemble(tensors[:2], parameter.shape)
