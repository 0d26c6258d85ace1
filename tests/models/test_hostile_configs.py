"""Configs made to break the reader: every family refuses them with a ValueError, at once, and with nothing else."""

import json
import time

import pytest

from models.hf_fields import Fields
from models.registry import find_family
from tests.models.reference import FOLDER

FIXTURES = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))
LIMIT_S = 1.0
LAYERS, EXPERTS = 2_000_000, 2_147_483_640
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")
HOSTILE_ITEMS = ({}, [], None, True, 1.5, float("nan"), "nothing", 10**400)

# Lists with an entry per layer or of a fixed length; FITTING has one to read where the fixture leaves the list out.
LISTS = {
    "falcon_h1": ("mlp_multipliers", "ssm_multipliers"),
    "granitemoehybrid": ("layer_types",),
    "kimi_linear": ("kda_layers", "full_attn_layers"),
    "lfm2": ("layer_types", "full_attn_idxs"),
    "lfm2_moe": ("layer_types", "full_attn_idxs"),
    "ling2_5": (),
    "ling2_5_mtp": (),
    "ling3": ("layer_group_size", "expert_swiglu_limit_list", "share_expert_swiglu_limit_list"),
    "minimax_text": ("attn_type_list",),
    "nemotron_h": ("layers_block_type", "time_step_limit"),
    "olmo_hybrid": ("layer_types",),
    "qwen3_5": ("layer_types",),
    "qwen3_5_moe": ("layer_types",),
    "qwen3_next": ("layer_types",),
}
FITTING = {
    "full_attn_idxs": lambda hf: [i for i, word in enumerate(hf["layer_types"]) if word == "full_attention"],
    "layer_group_size": lambda hf: [1, 1, 1, 0],
    "expert_swiglu_limit_list": lambda hf: [0, 1.5, 2, 3],
    "share_expert_swiglu_limit_list": lambda hf: [0, 1.5, 2, 3],
    "time_step_limit": lambda hf: [0.0, 1.0],
    "layers_block_type": lambda hf: ["mamba", "moe", "mamba", "attention", "mlp", "mamba", "moe"],
    "layer_types": lambda hf: hf.get("layer_types", ["linear_attention"] * 3 + ["full_attention"]),
}

# Numbers of heads or groups that 5 in their place makes indivisible.
HEADS = {
    "falcon_h1": ("num_key_value_heads", "mamba_n_groups", "mamba_n_heads"),
    "granitemoehybrid": ("num_attention_heads", "num_key_value_heads", "mamba_n_groups", "mamba_n_heads"),
    "lfm2": ("num_attention_heads", "num_key_value_heads"),
    "lfm2_moe": ("num_attention_heads", "num_key_value_heads"),
    "ling2_5": ("group_norm_size", "n_group"),
    "ling2_5_mtp": ("group_norm_size", "n_group"),
    "ling3": ("n_group",),
    "kimi_linear": ("num_expert_group",),
    "minimax_text": ("num_attention_heads", "num_key_value_heads"),
    "nemotron_h": ("num_key_value_heads", "n_groups", "n_group"),
    "olmo_hybrid": ("num_attention_heads", "num_key_value_heads", "linear_num_key_heads"),
    "qwen3_5": ("num_attention_heads", "num_key_value_heads", "linear_num_key_heads"),
    "qwen3_5_moe": ("num_attention_heads", "num_key_value_heads", "linear_num_key_heads"),
    "qwen3_next": ("num_attention_heads", "num_key_value_heads", "linear_num_key_heads"),
}


def published(name):
    return json.loads((FOLDER / name / "config.json").read_text())


def read(hf):
    return find_family(hf).Config.from_hf(hf)


def changed(hf, field, value):
    """The config with a field replaced, at the top or in the section of linear attention."""
    section = hf.get("linear_attn_config", {})
    if field in section:
        return hf | {"linear_attn_config": section | {field: value}}
    kept = {name: old for name, old in hf.items() if (field, name) != ("layers_block_type", "hybrid_override_pattern")}
    return kept | {field: value}


def fitting(hf, field):
    """A list for the field with which the config is read."""
    if field in FITTING:
        return FITTING[field](hf)
    return hf.get("linear_attn_config", hf)[field]


def refused(hf, match):
    start_s = time.monotonic()
    with pytest.raises(ValueError, match=match):
        read(hf)
    assert time.monotonic() - start_s < LIMIT_S


def cases(fields_of):
    return [(name, field) for name in FIXTURES for field in fields_of(name)]


def test_every_fixture_has_its_entries():
    assert sorted(LISTS) == sorted(HEADS) == FIXTURES


@pytest.mark.parametrize("name", FIXTURES)
def test_too_many_layers(name):
    refused(published(name) | {"num_hidden_layers": LAYERS}, "wanted num_hidden_layers to be .* at most 4096")


@pytest.mark.parametrize("name", FIXTURES)
def test_too_many_layers_without_a_list(name):
    hf = {field: value for field, value in published(name).items() if field not in ("layer_types", "attn_type_list")}
    refused(hf | {"num_hidden_layers": LAYERS}, "wanted num_hidden_layers to be .* at most 4096")


def test_too_long_a_pattern():
    refused(published("nemotron_h") | {"hybrid_override_pattern": "M" * LAYERS}, "wanted hybrid_override_pattern")


@pytest.mark.parametrize(("name", "field"), cases(lambda name: [f for f in EXPERT_FIELDS if f in published(name)]))
def test_too_many_experts(name, field):
    refused(published(name) | {field: EXPERTS}, f"wanted {field} to be .* at most 65536")


@pytest.mark.parametrize("name", FIXTURES)
def test_too_many_heads(name):
    refused(published(name) | {"num_attention_heads": 65536 * 2}, "wanted num_attention_heads to be .* at most 65536")


@pytest.mark.parametrize(("name", "field"), cases(LISTS.get))
def test_items_of_a_list(name, field):
    hf = published(name)
    good = fitting(hf, field)
    read(changed(hf, field, good))
    for item in HOSTILE_ITEMS:
        allowed = type(good[-1]) is float or field.endswith("limit_list")
        if allowed and item == 1.5:
            continue
        refused(changed(hf, field, [*good[:-1], item]), r"config\.json")
    refused(changed(hf, field, {}), r"config\.json")


@pytest.mark.parametrize(("name", "field"), cases(HEADS.get))
def test_numbers_that_do_not_divide(name, field):
    hf = {field: value for field, value in published(name).items() if field != "num_heads"}  # repeats another
    read(hf)
    refused(changed(hf, field, 5), r"config\.json: wanted .* got")


@pytest.mark.parametrize("value", HOSTILE_ITEMS)
def test_lists_of_words(value):
    fields = Fields({"list": ["a", value], "whole": [1, value]}, "config.json")
    with pytest.raises(ValueError, match="wanted 2 list, the words a, b, got"):
        fields.words("list", ("a", "b"), 2)
    with pytest.raises(ValueError, match="wanted a list of whole, whole numbers from 0 to 1, got"):
        fields.wholes("whole", 0, 1)


def test_a_list_of_the_wrong_length():
    fields = Fields({"list": ["a", "b"], "whole": [1, 0]}, "config.json")
    assert fields.words("list", ("a", "b")) == fields.words("list", ("a", "b"), 2) == ("a", "b")
    assert fields.wholes("whole", 0, 1, 2) == (1, 0)
    with pytest.raises(ValueError, match="wanted 3 list, the words"):
        fields.words("list", ("a", "b"), 3)
    with pytest.raises(ValueError, match="wanted 1 whole, whole numbers"):
        fields.wholes("whole", 0, 1, 1)


@pytest.mark.parametrize("value", [10**400, float("inf"), float("nan"), -1, True, None, {}, []])
def test_numbers(value):
    with pytest.raises(ValueError, match="finite number above 0"):
        Fields({"x": value}, "config.json").number("x")


@pytest.mark.parametrize("value", [{}, [], "", False, 1.0])
def test_a_number_that_may_be_missing(value):
    fields = Fields({"x": value, "none": None, "zero": 0}, "config.json")
    assert fields.whole_or_none("none") is fields.whole_or_none("zero") is fields.whole_or_none("missing") is None
    with pytest.raises(ValueError, match="whole number"):
        fields.whole_or_none("x")
