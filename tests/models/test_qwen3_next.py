"""Qwen3-Next beyond the reference outputs: what its config reader refuses, and the draft layer no config announces."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from hybrid_jax.checkpoint import check_table, load, read_state
from hybrid_jax.convert import to_hf, to_orbax
from hybrid_jax.hf_directory import read_config
from hybrid_jax.progress import Silence
from hybrid_jax.published_config import read_published_config
from hybrid_jax.routing import route_model
from models.qwen3_5 import FULL, LINEAR
from models.qwen3_next import Config, Model, weight_table
from tests.models.reference import FOLDER, Fixture

REAL = FOLDER.parent / "configs" / "Qwen3-Next-80B-A3B-Instruct.json"


def published():
    return json.loads((FOLDER / "qwen3_next" / "config.json").read_text())


def abstract(config):
    return nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0), backend="xla"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_only_layers", [1]),
        ("decoder_sparse_step", 2),
        ("norm_topk_prob", False),
        ("rope_scaling", {"type": "yarn"}),
        ("use_sliding_window", True),
        ("num_nextn_predict_layers", 2),
        ("partial_rotary_factor", 0.2),
        ("linear_num_value_heads", 3),
        ("num_attention_heads", 3),
        ("num_experts_per_tok", 9),  # of 8
        ("layer_types", [LINEAR] * 3),
        ("layer_types", ["sliding_attention"] * 4),
        ("full_attention_interval", 0),
        ("surprise", 1),
    ],
)
def test_refused(field, value):
    with pytest.raises(ValueError, match=r"config\.json"):
        Config.from_hf({**published(), field: value})


def test_a_list_of_layers_wins_over_the_interval():
    kinds = [FULL, LINEAR, LINEAR, FULL]
    assert Config.from_hf(published()).kinds == (LINEAR, LINEAR, LINEAR, FULL)
    assert Config.from_hf({**published(), "layer_types": kinds}).kinds == tuple(kinds)


def test_the_draft_layer_of_the_published_checkpoint():
    config = Config.from_hf(json.loads(REAL.read_text()) | {"num_nextn_predict_layers": 1})
    model = abstract(config)
    counts = route_model(model).parameters
    assert (counts["target"], counts["draft"]) == (79_674_391_296, 1_650_471_424)
    check_table(weight_table(config), read_state(nnx.state(model)))


def test_the_draft_layer_attends_and_has_a_place_of_its_own():
    config = Config.from_hf(published() | {"num_nextn_predict_layers": 1})
    *target, draft = abstract(config).routes()
    assert [route.kind for route in target] == ["gdn", "gdn", "gdn", "gqa"]
    assert (draft.role, draft.layer, draft.kind) == ("draft", 0, "gqa")
    assert draft.place not in [route.place for route in target]


def test_without_the_draft_layer_its_tensors_are_left_out():
    plain, drafting = (weight_table(Config.from_hf(published() | {"num_nextn_predict_layers": n})) for n in (0, 1))
    assert plain.canonical("mtp.fc.weight") is None
    assert drafting.canonical("mtp.fc.weight") == "mtp.fc.weight"
    assert plain.canonical("model.norm.weight") == drafting.canonical("model.norm.weight") == "model.norm.weight"


def publish_with_draft(directory):
    """The reference checkpoint with a draft layer among its tensors, of which its config says nothing."""
    shutil.copytree(Fixture("qwen3_next").path, directory)
    file = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    width = tensors["model.norm.weight"].shape[0]
    full = "model.layers.3."
    draft = {name.replace(full, "mtp.layers.0."): value for name, value in tensors.items() if name.startswith(full)}
    norms = ("mtp.norm.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight")
    draft |= {name: np.full(width, 0.5, np.float32) for name in norms}
    draft["mtp.fc.weight"] = np.random.default_rng(0).normal(size=(width, 2 * width)).astype(np.float32)
    safetensors.numpy.save_file(tensors | draft, file, {"format": "pt"})
    return draft


def test_a_draft_that_the_config_does_not_announce_is_loaded_and_converted_back(tmp_path):
    published, orbax, back = tmp_path / "published", tmp_path / "orbax", tmp_path / "back"
    draft = publish_with_draft(published)
    config = read_published_config(published)
    assert config["num_nextn_predict_layers"] == 1 and "num_nextn_predict_layers" not in read_config(published)
    model = abstract(Config.from_hf(config))
    state = load(published, nnx.state(model), weight_table(Config.from_hf(config)))
    loaded = {".".join(map(str, keys)): leaf[...] for keys, leaf in nnx.to_flat_state(state)}
    np.testing.assert_allclose(loaded["draft.project.kernel"], draft["mtp.fc.weight"].T, atol=0.01, rtol=0.01)
    to_orbax(published, orbax, Silence())
    assert read_published_config(orbax) == config
    to_hf(orbax, back, Silence())
    for name in ("model.safetensors", "config.json"):
        assert (back / name).read_bytes() == (published / name).read_bytes()


def test_without_draft_tensors_the_config_stays_as_it_is():
    path = Fixture("qwen3_next").path
    assert read_published_config(path) == read_config(path)
