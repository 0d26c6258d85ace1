"""Static routing: one map per role, lookups that refuse the wrong kind, configs that are read whole or refused."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import routing
from hybrid_jax.routing import route_model
from kernels_pallas.op import ArraySpec, KVSpec, Place, StateSpec
from models import bailing_moe_v2_5, qwen3_5
from models.decoder import Decoder, Layer
from models.layers import MLP, Embedding, RMSNorm
from models.registry import find_family
from tests.models.reference import FOLDER
from tests.ragged import make_batch, nan_cache


def abstract_model(name):
    hf = json.loads((FOLDER / name / "config.json").read_text())
    family = find_family(hf)
    config = family.Config.from_hf(hf)
    return nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0), dtype="float32", backend="xla"))


def test_a_draft_layer_is_full_though_its_index_is_a_linear_one_of_the_target():
    for name, kinds in (("qwen3_5", ("gdn", "gqa")), ("ling2_5_mtp", ("lightning", "mla"))):
        found = route_model(abstract_model(name))
        assert (found.layer("target", 0)[0].kind, found.layer("draft", 0)[0].kind) == kinds
        assert found.page_place("draft", 0) not in [found.page_place("target", 3)]


def test_a_draft_keeps_pages_of_its_own_beside_the_targets():
    found = route_model(abstract_model("ling2_5_mtp"))
    assert found.page_place("target", 3) == Place(1, 0)
    assert found.page_place("draft", 0) == Place(1, 1)


@pytest.mark.parametrize("role, layer", [("target", 0), ("target", 2)])
def test_a_page_lookup_by_a_linear_layers_index_is_an_error(role, layer):
    found = route_model(abstract_model("qwen3_5"))
    with pytest.raises(ValueError, match=f"{role} layer {layer} .gdn., which keeps a slot"):
        found.page_place(role, layer)
    with pytest.raises(ValueError, match=r"layer 3 .gqa., which keeps pages"):
        found.slot_place("target", 3)


@pytest.mark.parametrize("role, layer", [("target", 4), ("draft", 1), ("target", -1), ("other", 0)])
def test_a_layer_that_is_not_there_is_an_error(role, layer):
    with pytest.raises(ValueError, match="wanted a layer of role"):
        route_model(abstract_model("qwen3_5")).layer(role, layer)


def test_the_wrong_lookup_fails_when_the_step_is_traced():
    model = abstract_model("qwen3_5")
    model.layers[0].mixer.place = model.layers[3].mixer.place  # a linear layer that is sent to pages
    graph, state = nnx.split(model)
    cache = jax.eval_shape(lambda: nan_cache(model))

    def step(state, tokens, cache, batch):
        return nnx.merge(graph, state)(tokens, cache, batch)

    with pytest.raises(ValueError, match="wanted slots at Place"):
        jax.eval_shape(step, state, jnp.zeros(8, jnp.int32), cache, make_batch([8]))


class EitherKind(nnx.Module):
    """One class for both kinds: what it remembers is what it was built with, never what class it is."""

    def __init__(self, full: bool):
        array = ArraySpec("memory", (4,), "float32")
        self.memory = KVSpec((array,)) if full else StateSpec((array,))
        self.kind, self.backend, self.place = "gqa" if full else "gdn", "xla", Place(0, 0)
        self.full = full

    def __call__(self, x, rotary, cache, batch):
        (pool,) = cache.pages(self.place) if self.full else cache.slots(self.place)
        return x + pool.shape[0], cache


def test_a_linear_layer_built_from_the_same_class_as_a_full_one():
    rngs = nnx.Rngs(0)
    norms = [RMSNorm(4, 1e-6) for _ in range(6)]
    layers = [Layer(EitherKind(full), MLP(rngs, 4, 8, "float32"), norms.pop(), norms.pop()) for full in (0, 1, 0)]
    model = Decoder(Embedding(rngs, 9, 4, "float32"), layers, RMSNorm(4, 1e-6), None, None, None)
    found = route_model(model)
    assert [route.kind for route in found.routes] == ["gdn", "gqa", "gdn"]
    assert [found.slot_place("target", 0), found.slot_place("target", 2)] == [Place(0, 0), Place(0, 1)]
    assert found.page_place("target", 1) == Place(1, 0)
    model(jnp.zeros(8, jnp.int32), nan_cache(model), make_batch([8]))


def test_a_layer_of_two_kinds_has_a_place_for_each():
    found = route_model(abstract_model("falcon_h1"))
    assert [route.kind for route in found.layer("target", 1)] == ["mamba2", "gqa"]
    assert (found.slot_place("target", 1).layer, found.page_place("target", 1).layer) == (1, 1)


def test_incomplete_last_groups_are_full_attention():
    hf = json.loads((FOLDER / "ling2_5" / "config.json").read_text()) | {"num_hidden_layers": 8}
    config = bailing_moe_v2_5.Config.from_hf(hf)
    assert [config.is_full(layer) for layer in range(8)] == [False, False, True, False, False, True, True, True]


def test_slopes_count_layers_from_minus_one():
    config = bailing_moe_v2_5.Config.from_hf(json.loads((FOLDER / "ling2_5" / "config.json").read_text()))
    listed = json.loads((FOLDER / "ling2_5" / "fixture.json").read_text())["decay_rates_by_layer"]
    for layer, rates in listed.items():
        np.testing.assert_allclose(config.slopes[int(layer)], rates, rtol=1e-6)


def test_json_and_table_say_the_same():
    found = route_model(abstract_model("qwen3_5"))
    data = routing.to_json(found)
    assert [(e["role"], e["layer"], e["kind"], e["keeps"]) for e in data["layers"]] == [
        ("target", 0, "gdn", "slot"),
        ("target", 1, "gdn", "slot"),
        ("target", 2, "gdn", "slot"),
        ("target", 3, "gqa", "pages"),
        ("draft", 0, "gqa", "pages"),
    ]
    state, tail, kv = 4 * 16 * 16 * 4, 3 * 128 * 4, 2 * 2 * 32 * 4
    assert [e["bytes"] for e in data["layers"]] == [state + tail] * 3 + [kv] * 2
    assert data["parameters"] == sum(data["parameters_by_role"].values())
    assert (found.token_bytes, found.request_bytes) == (2 * kv, 3 * (state + tail))
    assert routing.to_table(found, "x").row_count == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architectures": ["BailingMoeV9ForCausalLM"]}, "not implemented"),
        ({"architectures": []}, "wanted 'architectures'"),
        ({"architectures": None}, "wanted 'architectures'"),
        ({"kda_lower_bound": -5.0}, "another architecture"),
        ({"new_trick": 1}, "unknown fields"),
        ({"use_bias": True}, "not implemented"),
        ({"linear_silu": True}, "not implemented"),
        ({"rope_interleave": False}, "not implemented"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "not implemented"),
        ({"num_nextn_predict_layers": 2}, "not implemented"),
        ({"rotary_dim": 10}, "other fields imply it"),
        ({"partial_rotary_factor": 0.25}, "share one rotary table"),
        ({"n_group": 3}, "equal groups"),
        ({"num_experts_per_tok": 99}, "99 experts in"),
        ({"hidden_size": "64"}, "whole number"),
        ({"hidden_size": True}, "whole number"),
        ({"rms_norm_eps": float("nan")}, "finite number"),
    ],
)
def test_a_config_that_is_not_implemented_is_refused(change, message):
    hf = json.loads((FOLDER / "ling2_5" / "config.json").read_text()) | change
    with pytest.raises(ValueError, match=message):
        find_family(hf).Config.from_hf(hf)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attn_output_gate": False}, "not implemented"),
        ({"layer_types": ["linear_attention"]}, "wanted 4 layer_types"),
        ({"layer_types": ["linear_attention"] * 3 + ["sliding_attention"]}, "wanted 4 layer_types"),
        ({"linear_num_value_heads": 3}, "multiple of 2"),
        ({"mtp_use_dedicated_embeddings": True}, "not implemented"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "not implemented"),
        ({"sliding_window": 4096}, "not implemented"),
        ({"mamba_ssm_dtype": "bfloat16"}, "not implemented"),
        ({"expert_dropout": 0.1}, "unknown fields"),
    ],
)
def test_a_qwen_config_that_is_not_implemented_is_refused(change, message):
    hf = json.loads((FOLDER / "qwen3_5" / "config.json").read_text()) | change
    with pytest.raises(ValueError, match=message):
        qwen3_5.Config.from_hf(hf)


def test_the_same_model_type_with_another_architecture_is_another_family_or_an_error():
    hf = json.loads((FOLDER / "ling2_5" / "config.json").read_text()) | {"architectures": ["BailingMoeV3ForCausalLM"]}
    assert hf["model_type"] == "bailing_hybrid"
    with pytest.raises(ValueError):
        find_family(hf).Config.from_hf(hf)


def test_every_fixture_is_of_a_known_family():
    for folder in Path(FOLDER).iterdir():
        find_family(json.loads((folder / "config.json").read_text()))
