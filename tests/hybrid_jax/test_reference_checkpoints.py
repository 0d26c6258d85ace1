"""The reference checkpoints of real families: loaded, verified, converted to Orbax and back."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from fake_family import values
from flax import nnx

from hybrid_jax.checkpoint import Outline, load, make_outline
from hybrid_jax.convert import to_hf, to_orbax
from hybrid_jax.hf_directory import read_config
from hybrid_jax.inspection import inspect, verify
from hybrid_jax.progress import Silence
from hybrid_jax.spelling import match

REFERENCE = Path(__file__).parent.parent / "hf_reference"
NAMES = sorted(path.name for path in REFERENCE.iterdir())


@pytest.fixture(params=NAMES)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a reference checkpoint without its expected outputs."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "hf").mkdir(exist_ok=True)
        shutil.copyfile(REFERENCE / request.param / name, tmp_path / "hf" / name)
    return tmp_path / "hf"


def state_of(outline: Outline, path: Path) -> nnx.State:
    config = outline.family.Config.from_hf(read_config(path))
    return nnx.state(
        nnx.eval_shape(lambda: outline.family.Model(config, rngs=nnx.Rngs(0), dtype="float32", backend="xla"))
    )


def test_it_is_whole_and_returns_byte_for_byte(published: Path, tmp_path: Path) -> None:
    assert verify(published).problems == ()
    to_orbax(published, tmp_path / "orbax", Silence())
    assert verify(tmp_path / "orbax").problems == ()
    to_hf(tmp_path / "orbax", tmp_path / "back", Silence())
    assert {path.name for path in (tmp_path / "back").iterdir()} == {"config.json", "model.safetensors"}
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (published / name).read_bytes()
    assert inspect(published).total == inspect(tmp_path / "orbax").total


def test_both_forms_give_the_parameters_of_the_weight_table(published: Path, tmp_path: Path) -> None:
    outline = make_outline(read_config(published))
    stored = safetensors.numpy.load_file(published / "model.safetensors")
    to_orbax(published, tmp_path / "orbax", Silence())
    for path in (published, tmp_path / "orbax"):
        got = values(load(path, state_of(outline, path), outline.table))
        assert len(got) == len(outline.leaves)
        for found in match(outline.table, stored).found:
            tensors = [stored[name] for name in found.names]
            wanted = found.source.assemble(tensors, got[found.weight.path].shape)
            assert np.array_equal(got[found.weight.path], wanted.astype(np.float32))


def test_a_tensor_less_or_more_is_named(published: Path) -> None:
    stored = safetensors.numpy.load_file(published / "model.safetensors")
    for name in list(stored)[:: max(1, len(stored) // 7)]:
        less = {other: tensor for other, tensor in stored.items() if other != name}
        safetensors.numpy.save_file(less, published / "model.safetensors")
        (problem,) = verify(published).problems
        assert problem.startswith(f"tensor {name}: missing")
    safetensors.numpy.save_file(stored | {"model.more.weight": np.zeros(1)}, published / "model.safetensors")
    (problem,) = verify(published).problems
    assert problem.startswith("tensor model.more.weight: unexpected")


def test_a_tensor_of_another_shape_is_named(published: Path) -> None:
    stored = safetensors.numpy.load_file(published / "model.safetensors")
    found = match(make_outline(read_config(published)).table, stored).found
    (name,) = next(one.names for one in found if one.weight.path == "norm.scale")
    stored[name] = np.zeros(63, np.float32)
    safetensors.numpy.save_file(stored, published / "model.safetensors")
    assert verify(published).problems == (f"tensor {name}: wanted shape (64,), got (63,)",)


def test_a_family_is_not_found_by_its_model_type(published: Path) -> None:
    hf = read_config(published)
    (published / "config.json").write_text(json.dumps(hf | {"architectures": ["OtherForCausalLM"]}))
    (problem,) = verify(published).problems
    assert "wanted an architecture of" in problem and "got 'OtherForCausalLM'" in problem
    with pytest.raises(ValueError, match="got 'OtherForCausalLM'"):
        inspect(published)
