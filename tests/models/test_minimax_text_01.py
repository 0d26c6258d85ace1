"""MiniMax-Text-01 beyond the reference outputs: what its config reader refuses, its decay, buffers left out."""

import json

import numpy as np
import pytest
from flax import nnx

from models.minimax_text_01 import Config, Model, canonical
from tests.models.reference import FOLDER


def published():
    return json.loads((FOLDER / "minimax_text" / "config.json").read_text())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("postnorm", False),
        ("hidden_act", "gelu"),
        ("shared_intermediate_size", 32),
        ("sliding_window", 4096),
        ("rope_scaling", {"type": "yarn"}),
        ("attn_type_list", [0, 0, 1]),
        ("attn_type_list", [0, 0, 0, 2]),
        ("layernorm_mlp_alpha", 0),
        ("num_attention_heads", 6),
        ("num_key_value_heads", 3),
        ("rotary_dim", 18),  # of 16
        ("rotary_dim", 7),
        ("num_experts_per_tok", 5),  # of 4
        ("surprise", 1),
    ],
)
def test_refused(field, value):
    with pytest.raises(ValueError, match=r"config\.json"):
        Config.from_hf({**published(), field: value})


@pytest.mark.parametrize("field", ["postnorm", "attn_type_list", "layernorm_linear_attention_beta", "rms_norm_eps"])
def test_required(field):
    with pytest.raises(ValueError, match=f"wanted the field '{field}'"):
        Config.from_hf({name: value for name, value in published().items() if name != field})


def test_the_whole_head_is_rotated_unless_the_config_says_otherwise():
    whole = {name: value for name, value in published().items() if name != "rotary_dim"}
    assert (Config.from_hf(published()).rotary_width, Config.from_hf(whole).rotary_width) == (8, 16)


def test_slopes_fall_with_depth_and_count_layers_from_zero():
    slopes = Config.from_hf(published()).slopes
    heads = [2**-2.0, 2**-4.0, 2**-6.0, 2**-8.0]
    np.testing.assert_allclose(slopes[0], np.multiply(heads, 1 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(slopes[1], np.multiply(heads, 1 - 1 / (3 + 1e-5) + 1e-5), rtol=1e-6)


def test_the_norm_inside_lightning_layers_has_an_epsilon_of_its_own():
    """Too small a difference for the reference outputs to show."""
    config = Config.from_hf(published())
    model = nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0), backend="xla"))
    assert (config.epsilon, model.layers[0].mixer.shape.epsilon) == (1e-5, 1e-6)


@pytest.mark.parametrize("buffer", ["slope_rate", "query_decay", "key_decay", "diagonal_decay"])
def test_stored_decays_are_left_out(buffer):
    assert canonical(f"model.layers.0.self_attn.{buffer}") is None
    assert canonical("model.layers.0.self_attn.norm.weight") == "model.layers.0.self_attn.norm.weight"
