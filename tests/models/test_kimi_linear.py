"""Kimi-Linear beyond the reference outputs: what its config reader refuses, and both spellings of a dense layer."""

import json

import pytest

from models.kimi_linear import Config, weight_table
from tests.models.reference import FOLDER

LISTS = {"num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4}


def published():
    return json.loads((FOLDER / "kimi_linear" / "config.json").read_text())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("mla_use_nope", False),
        ("q_lora_rank", 16),
        ("rope_scaling", {"type": "yarn"}),
        ("moe_layer_freq", 2),
        ("moe_router_activation_func", "softmax"),
        ("use_grouped_topk", False),
        ("num_nextn_predict_layers", 1),
        ("num_experts_per_token", 7),  # of 6
        ("num_expert_group", 4),  # 6 experts do not fall into 4 groups
        ("moe_renormalize", "yes"),
        ("rms_norm_eps", 0),
        ("linear_attn_config", {**LISTS, "kda_layers": [0, 1, 3], "full_attn_layers": [2, 4]}),  # counted from 0
        ("linear_attn_config", {**LISTS, "kda_layers": [1, 2, 4], "full_attn_layers": [3]}),
        ("linear_attn_config", {**LISTS, "kda_layers": [1, 2, 3, 4], "full_attn_layers": [3, 5]}),
        ("linear_attn_config", {**LISTS, "kda_layers": None, "full_attn_layers": None}),
        ("linear_attn_config", {**LISTS, "kda_layers": [1, 2, 4], "full_attn_layers": [3, 5], "safe_gate": True}),
        ("layer_types", ["linear_attention"] * 5),
    ],
)
def test_refused(field, value):
    with pytest.raises(ValueError, match=r"config\.json"):
        Config.from_hf({**published(), field: value})


@pytest.mark.parametrize("field", ["mla_use_nope", "linear_attn_config", "model_max_length", "rms_norm_eps"])
def test_required(field):
    with pytest.raises(ValueError, match=f"wanted the field '{field}'"):
        Config.from_hf({name: value for name, value in published().items() if name != field})


def test_lists_count_layers_from_one():
    assert Config.from_hf(published()).full == (False, False, True, False, True)


def test_a_dense_layer_has_two_spellings():
    rows = {row.path: row for row in weight_table(Config.from_hf(published())).weights}
    down = [source.names for source in rows["layers.0.feed_forward.down.kernel"].sources]
    assert down == [("model.layers.0.mlp.down_proj.weight",), ("model.layers.0.block_sparse_moe.down_proj.weight",)]
