"""LFM2 beyond the reference outputs: what its config reader refuses, its older field names, the width of its MLPs."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from models.lfm2 import CONVOLUTION, FULL, BiasedSigmoid, Config
from tests.models.reference import FOLDER


def published(name="lfm2"):
    return json.loads((FOLDER / name / "config.json").read_text())


def without(hf, *fields):
    return {name: value for name, value in hf.items() if name not in fields}


@pytest.mark.parametrize(
    ("fixture", "field", "value"),
    [
        ("lfm2", "conv_bias", True),
        ("lfm2", "use_pos_enc", False),
        ("lfm2", "block_use_swiglu", False),
        ("lfm2", "block_dim", 32),
        ("lfm2", "conv_dim", 32),
        ("lfm2", "block_norm_eps", 1e-6),
        ("lfm2", "block_ff_dim", 128),  # intermediate_size says 120
        ("lfm2", "num_heads", 8),
        ("lfm2", "num_attention_heads", 6),
        ("lfm2", "conv_L_cache", 1),
        ("lfm2", "layer_types", ["conv"] * 3),
        ("lfm2", "layer_types", ["conv", "conv", "mamba", "conv"]),
        ("lfm2", "full_attn_idxs", [1]),
        ("lfm2", "rope_parameters", {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}),
        ("lfm2", "theta", 10000.0),
        ("lfm2", "tie_word_embeddings", False),  # tie_embedding says true
        ("lfm2", "surprise", 1),
        ("lfm2_moe", "use_expert_bias", False),
        ("lfm2_moe", "norm_topk_prob", False),
        ("lfm2_moe", "num_experts_per_tok", 9),  # of 8
        ("lfm2_moe", "block_ff_dim", 64),
    ],
)
def test_refused(fixture, field, value):
    with pytest.raises(ValueError, match=r"config\.json"):
        Config.from_hf({**published(fixture), field: value})


@pytest.mark.parametrize(
    ("fields", "width"),
    [
        ({"intermediate_size": 6656, "block_ff_dim": 6656, "block_multiple_of": 256}, 4608),
        ({"block_ffn_dim_multiplier": 1.3}, 112),  # 80 * 1.3 = 104, a multiple of 16
        ({"block_auto_adjust_ff_dim": False}, 120),
    ],
)
def test_width_of_the_mlp(fields, width):
    assert Config.from_hf({**published(), **fields}).dense_width == width


def test_older_names():
    hf = without(published(), "layer_types", "rope_parameters", "intermediate_size")
    older = {"full_attn_idxs": [2], "rope_theta": 1000000.0, "theta": 1000000.0}
    assert Config.from_hf({**hf, **older}) == Config.from_hf(published())
    assert Config.from_hf(published()).kinds == (CONVOLUTION, CONVOLUTION, FULL, CONVOLUTION)


def test_the_head_is_the_embedding_under_either_name():
    assert Config.from_hf(without(published(), "tie_embedding")).tied
    assert not Config.from_hf({**published(), "tie_embedding": False}).tied
    assert not Config.from_hf({**published("lfm2_moe"), "tie_word_embeddings": False}).tied


def test_the_bias_chooses_but_does_not_weigh():
    logits, bias = jnp.asarray([[2.0, 1.0, -1.0, 0.0]]), jnp.asarray([0.0, 0.0, 5.0, 0.0])
    experts, weights = BiasedSigmoid(2, 1.5)(logits, bias)
    assert experts.tolist() == [[2, 0]]
    scores = 1 / (1 + np.exp([1.0, -2.0]))
    np.testing.assert_allclose(weights[0], scores / (scores.sum() + 1e-6) * 1.5, rtol=1e-6)
