"""Checkpoints of eight bits: kept bit for bit, rounded on load, converted, planned for, and refused where damaged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import LLM, checkpoint, convert, inspection
from hybrid_jax import plan as planning
from hybrid_jax.config import EngineConfig
from hybrid_jax.hf_directory import open_hf, read_config
from hybrid_jax.hub import find_model
from hybrid_jax.progress import Silence
from hybrid_jax.quantisation import check_scale, quantise_model, round_weights, spread, widen
from hybrid_jax.sharding import lay_out, planned_mesh
from models.quantised import SUFFIX, Format, Scale
from models.registry import find_family
from scripts.quantisation_error import publish, write
from tests.models.reference import FOLDER

FORMATS = [Format("int8"), Format("fp8"), Format("fp8", True)]
FIXTURES = ("ling2_5_mtp", "qwen3_5_moe", "nemotron_h", "granitemoehybrid", "kimi_linear")
FP8, INT8 = np.dtype(jnp.float8_e4m3fn), np.dtype(np.int8)


def build(path, quantization=None, widened=False):
    """The abstract model of a checkpoint in float32, its table, and what it keeps in eight bits."""
    hf = read_config(path)
    family = find_family(hf)
    config = family.Config.from_hf(hf)
    model = nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0), dtype="float32", backend="xla"))
    table = family.weight_table(config)
    return model, table, quantise_model(model, path, hf, table, quantization, widened)


def load(path, quantization=None, widened=False):
    """The arrays of a loaded model by dotted path."""
    model, table, _ = build(path, quantization, widened=widened)
    state = checkpoint.load(path, nnx.state(model), table)
    return {".".join(map(str, keys)): np.asarray(leaf[...]) for keys, leaf in nnx.to_flat_state(state)}


def product(values, scale):
    """Weights from values and scales in a model's layout, in float32."""
    for axis, (length, count) in enumerate(zip(values.shape, scale.shape, strict=True)):
        scale = np.repeat(scale, length // count, axis)
    return values.astype(np.float32) * scale


@pytest.fixture(scope="module", params=FIXTURES)
def published(request, tmp_path_factory):
    """A fixture's checkpoint in every format, by name."""
    folder = tmp_path_factory.mktemp(request.param)
    return {str(form): publish(FOLDER / request.param, folder / str(form), form) for form in FORMATS}


# -------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_stored_weights_are_kept_and_times_their_scales_are_those_that_are_widened_on_load(published, form):
    kept, wide = load(published[str(form)]), load(published[str(form)], widened=True)
    scaled = {path for path in kept if f"{path}{SUFFIX}" in kept}
    assert set(kept) - {f"{path}{SUFFIX}" for path in scaled} == set(wide) and scaled
    for path in set(wide) - scaled:
        assert np.array_equal(kept[path], wide[path])
    for path in scaled:
        assert kept[path].dtype == {"fp8": FP8, "int8": INT8}[form.name]
        assert np.array_equal(product(kept[path], kept[f"{path}{SUFFIX}"]), wide[path]), path


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_config_by_itself_tells_the_formats_that_the_headers_tell(published, form):
    path = published[str(form)]
    assert build(path)[2].formats == build(path / "config.json")[2].formats != {}
    assert set(build(path)[2].formats.values()) == {form}


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_the_plan_counts_the_bytes_that_are_loaded(published, form):
    path = published[str(form)]
    planned = planning.measure(planning.build(path, "float32", "xla")).weights_bytes
    assert planned == sum(array.nbytes for array in load(path).values())
    assert planned < sum(array.nbytes for array in load(path, widened=True).values())


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_conversion_there_and_back_keeps_every_byte_and_loads_the_same(published, form, tmp_path):
    source = published[str(form)]
    convert.to_orbax(source, tmp_path / "orbax", Silence())
    convert.to_hf(tmp_path / "orbax", tmp_path / "hf", Silence())
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert not inspection.verify(tmp_path / "orbax").problems and not inspection.verify(source).problems
    wanted, got = load(source), load(tmp_path / "orbax")
    assert wanted.keys() == got.keys()
    assert all(got[path].tobytes() == array.tobytes() for path, array in wanted.items())


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_wide_weights_are_rounded_on_load_to_within_half_a_step(quantization):
    got, wanted = load(FOLDER / "qwen3_5_moe", quantization), load(FOLDER / "qwen3_5_moe")
    scaled = {path for path in got if f"{path}{SUFFIX}" in got}
    assert scaled and all(np.array_equal(got[path], wanted[path]) for path in set(wanted) - scaled)
    for path in scaled:
        scale = np.broadcast_to(got[f"{path}{SUFFIX}"], wanted[path].shape)
        error = np.abs(product(got[path], got[f"{path}{SUFFIX}"]) - wanted[path])
        bound = scale / 2 if quantization == "int8" else np.maximum(np.abs(wanted[path]) / 16, scale * 2.0**-10)
        assert np.all(error <= bound * (1 + 1e-5)), path


def test_numbers_that_cannot_be_rounded_are_refused():
    with pytest.raises(ValueError, match="parameter p: wanted finite weights to round them to int8, got NaN or inf"):
        round_weights("p", np.array([[1, np.nan]], np.float32), INT8, (1, 1))
    values, scale = round_weights("p", np.zeros((2, 2), np.float32), FP8, (2, 1))
    assert not values.astype(np.float32).any() and np.array_equal(scale, np.ones((2, 1)))
    values, scale = round_weights("p", np.array([[1e-45, -1e-45]], np.float32), FP8, (1, 1))
    assert np.isfinite(values.astype(np.float32)).all() and np.all(scale > 0)


def test_scales_of_blocks_are_spread_over_rows_and_groups_of_columns():
    scale = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    got = spread(scale, (130, 320), 5)  # groups of 64
    assert got.shape == (130, 5) and got[0].tolist() == [1, 1, 2, 2, 3] and got[128].tolist() == [4, 4, 5, 5, 6]
    ones = np.ones((130, 320), np.int8)
    assert np.array_equal(widen(ones, scale), np.repeat(np.repeat(scale, 128, 0)[:130], 128, 1)[:, :320])
    assert np.array_equal(widen(ones, np.float32([2])), 2 * ones)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def damaged(tmp_path):
    """A copy of a checkpoint, and a function that changes its first scale."""
    path = publish(FOLDER / "qwen3_5", tmp_path / "checkpoint", Format("fp8"))

    def change(value):
        hf, found = read_config(path), open_hf(path)
        tensors = {name: found.read(name).copy() for name in found.names}
        name = next(name for name in sorted(tensors) if name.endswith("_scale"))
        shutil.rmtree(path)
        write(path, hf, tensors | {name: value(tensors[name])})
        return name

    return path, change


def put(number):
    def change(scale):
        scale.reshape(-1)[3] = number
        return scale

    return change


@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize("number", [0.0, np.nan, np.inf, -1.0])
def test_a_scale_that_is_no_number_above_zero_is_refused(damaged, number, widened):
    path, change = damaged
    name = change(put(number))
    with pytest.raises(ValueError, match=rf"tensor {name}: wanted finite scales above 0, got .* at \(3, 0\)"):
        load(path, widened=widened)


def test_scales_of_another_shape_are_refused(damaged):
    path, change = damaged
    name = change(lambda scale: np.concatenate([scale, scale]))
    with pytest.raises(ValueError, match=f"tensor {name}: wanted one scale per row"):
        load(path)


def test_scales_in_integers_are_refused(damaged):
    path, change = damaged
    name = change(lambda scale: scale.astype(np.int32))
    with pytest.raises(ValueError, match=f"tensor {name}: wanted scales in bfloat16, float16 or float32, got int32"):
        load(path)


def test_scales_that_nobody_checked_for_are_float32():
    assert check_scale("s", np.ones(2, jnp.bfloat16)).dtype == np.float32


def test_another_quantization_than_the_stored_one_is_refused():
    with pytest.raises(ValueError, match="wanted quantization int8, as the checkpoint is stored, got fp8"):
        build(find_model("demo"), "fp8")
    with pytest.raises(ValueError, match="wanted quantization of fp8, int8, or None, got 'int4'"):
        EngineConfig(quantization="int4")  # type: ignore[arg-type]


def test_a_format_that_is_not_known_is_planned_as_if_it_were_wide():
    hf = read_config(FOLDER / "qwen3_5")
    family = find_family(hf)
    config = family.Config.from_hf(hf)
    model = nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0), backend="xla"))
    stated = {**hf, "quantization_config": {"quant_method": "awq"}}
    assert quantise_model(model, None, stated, family.weight_table(config), None).formats == {}


# -------------------------------------------------------------------------------------------------------- whole models


def test_scales_divide_with_their_channels():
    config = Path(__file__).parents[1] / "configs/Qwen3-Next-80B-A3B-Instruct.json"
    built = planning.build(config, "bfloat16", "xla", "fp8")
    layout = lay_out(built.decoder, planned_mesh(2, 4))
    flat = dict(nnx.to_flat_state(nnx.state(built.decoder)))
    scales = {keys: leaf for keys, leaf in flat.items() if type(leaf) is Scale}
    assert scales
    for keys, scale in scales.items():
        kernel = flat[(*keys[:-1], keys[-1].removesuffix(SUFFIX))]
        local = layout.local_shape(scale.get_metadata("axes"), scale.shape)
        whole = layout.local_shape(kernel.get_metadata("axes"), kernel.shape)
        assert all(s in (1, k) for s, k in zip(local, whole, strict=True)), keys
    assert planning.measure_share(built, layout).weights_bytes < planning.measure(built).weights_bytes / 4


def test_what_is_kept_is_said(capsys):
    assert build(find_model("demo"), "int8")[2].describe() == (
        "weights: 54 of 54 matrices in int8 with a scale for each output channel",
    )
    assert build(find_model("demo"), widened=True)[2].describe()[0].startswith("weights: stored in int8, widened on")
    done = subprocess.run(
        [sys.executable, "-m", "hybrid_jax.cli", "routing", "demo", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "matrices in int8" in json.loads(done.stdout)["weights"][0]


@pytest.mark.slow
def test_logits_of_kept_weights_are_those_of_widened_ones():
    tokens = list(range(5, 60))
    wide = LLM("demo", "float32", max_num_seqs=1, max_model_len=128).logits(tokens)
    kept = LLM("demo", "float32", quantization="int8", max_num_seqs=1, max_model_len=128)
    assert np.abs(kept.logits(tokens) - wide).max() < 2e-4 * wide.std()
    assert len(kept.generate([tokens])[0].outputs[0].token_ids) > 0


@pytest.mark.slow
def test_four_devices_give_the_logits_of_one(tmp_path):
    for name, form in (("qwen3_5_moe", Format("fp8")), ("nemotron_h", Format("int8"))):
        publish(FOLDER / name, tmp_path / name, form)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.hybrid_jax.quantised_on_mesh", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 2 and max(errors.values()) < 5e-4
