"""Published directories: what is read of an honest one, and one clear error for every hostile one."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from fake_family import HF, random_tensors, write_hf

from hybrid_jax.hf_directory import INDEX, check_file_name, check_quantization, open_hf, read_config

NAMES = sorted(random_tensors())
FIRST = "model-00001-of-00003.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "model", random_tensors(), shards=3)


def edit_index(directory: Path, **places: str | None) -> None:
    """Change the file of some tensors in the index; None removes one."""
    index = json.loads((directory / INDEX).read_text())
    kept = {name: file for name, file in (index["weight_map"] | places).items() if file is not None}
    (directory / INDEX).write_text(json.dumps(index | {"weight_map": kept}))


# ---------------------------------------------------------------------------------------------------------- honest ones


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_found_and_read(tmp_path: Path, shards: int) -> None:
    tensors = random_tensors()
    checkpoint = open_hf(write_hf(tmp_path, tensors, shards=shards))
    assert sorted(checkpoint.names) == NAMES
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tensor.shape
        assert checkpoint.dtype(name) == tensor.dtype
        assert checkpoint.read(name).tobytes() == tensor.tobytes()
        checkpoint.release(name)
    assert (checkpoint.index is None) == (shards == 1)


def test_files_beside_the_named_ones_are_no_part(sharded: Path) -> None:
    safetensors.numpy.save_file({"x": np.zeros(1)}, sharded / "expected.safetensors")
    assert sorted(open_hf(sharded).names) == NAMES
    safetensors.numpy.save_file(random_tensors(), sharded / "model.safetensors")
    (sharded / INDEX).unlink()
    assert set(open_hf(sharded).files) == {"model.safetensors"}


def test_shards_without_an_index_are_read(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert sorted(open_hf(sharded).names) == NAMES


def cache(tmp_path: Path) -> Path:
    """The layout of the hub's cache: a revision of links into blobs."""
    revision = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = write_hf(tmp_path / "models--a--b" / "blobs", random_tensors())
    revision.mkdir(parents=True)
    for file in list(blobs.iterdir()):
        file.rename(blobs / f"blob-{file.stem}")
        (revision / file.name).symlink_to(Path("..", "..", "blobs", f"blob-{file.stem}"))
    return revision


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    revision = cache(tmp_path)
    assert read_config(revision) == HF
    assert sorted(open_hf(revision).names) == NAMES
    (tmp_path / "link").symlink_to(revision)
    assert sorted(open_hf(tmp_path / "link").names) == NAMES


def test_links_into_the_blobs_of_another_repository_are_refused(tmp_path: Path) -> None:
    revision = cache(tmp_path)
    other = tmp_path / "models--c--d" / "blobs"
    other.parent.mkdir()
    (tmp_path / "models--a--b" / "blobs").rename(other)
    (revision / "model.safetensors").unlink()
    (revision / "model.safetensors").symlink_to(other / "blob-model")
    with pytest.raises(ValueError, match="model.safetensors: wanted a file within the checkpoint"):
        open_hf(revision)


# --------------------------------------------------------------------------------------------------------- hostile ones

PATHS = ["../secret", "/etc/passwd", "a/b", "..", ".hidden", "a\\b", "", "a\x00b", "x" * 256]


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_no_file_name(name: str) -> None:
    with pytest.raises(ValueError, match="wanted a plain file name"):
        check_file_name(name)


@pytest.mark.parametrize("name", PATHS)
def test_an_index_that_leads_elsewhere_is_refused(sharded: Path, name: str) -> None:
    edit_index(sharded, **{NAMES[0]: name})
    with pytest.raises(ValueError, match="wanted a plain file name"):
        open_hf(sharded)


def test_a_link_out_of_the_directory_is_refused(sharded: Path, tmp_path: Path) -> None:
    (sharded / FIRST).rename(tmp_path / FIRST)
    (sharded / FIRST).symlink_to(tmp_path / FIRST)
    with pytest.raises(ValueError, match=f"{FIRST}: wanted a file within the checkpoint, got a link out of it"):
        open_hf(sharded)


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_linked_config_or_index_is_refused(sharded: Path, tmp_path: Path, name: str) -> None:
    (sharded / name).rename(tmp_path / "elsewhere")
    (sharded / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="got a link out of it"):
        read_config(sharded)
        open_hf(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / FIRST).unlink()
    with pytest.raises(ValueError, match=f"{FIRST}: wanted a file of the checkpoint, it is missing"):
        open_hf(sharded)
    (sharded / INDEX).unlink()
    with pytest.raises(ValueError, match="wanted 3 shards, got 2, shard 1 is missing"):
        open_hf(sharded)


def test_announcing_many_shards_costs_nothing(tmp_path: Path) -> None:
    write_hf(tmp_path, random_tensors())
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00002-of-99999.safetensors")
    with pytest.raises(ValueError, match="wanted 99999 shards, got 1, shard 1 is missing"):
        open_hf(tmp_path)


def test_index_and_files_must_agree(sharded: Path) -> None:
    edit_index(sharded, **{NAMES[0]: None, "more": FIRST})
    with pytest.raises(ValueError) as caught:
        open_hf(sharded)
    assert f"tensor more: the index has it in {FIRST}, which lacks it" in str(caught.value)
    assert f"tensor {NAMES[0]}: model-0000" in str(caught.value)
    assert "2 problem(s)" in str(caught.value)


def test_a_tensor_in_two_files_is_refused(sharded: Path) -> None:
    tensors = safetensors.numpy.load_file(sharded / FIRST)
    name = "model-00002-of-00003.safetensors"
    again = safetensors.numpy.load_file(sharded / name) | dict(list(tensors.items())[:1])
    safetensors.numpy.save_file(again, sharded / name)
    with pytest.raises(ValueError, match=f"wanted it in one file, it is in {FIRST} and {name}"):
        open_hf(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "[" * 99_999])
def test_a_broken_index_is_one_clear_error(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"{INDEX}: wanted an object with a 'weight_map'"):
        open_hf(sharded)


def test_many_problems_are_counted_and_the_first_shown(sharded: Path) -> None:
    edit_index(sharded, **{f"more.{number}": FIRST for number in range(5000)})
    with pytest.raises(ValueError, match="5000 problem") as caught:
        open_hf(sharded)
    assert "and 4990 more" in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_a_pipe_is_not_opened(sharded: Path) -> None:
    (sharded / FIRST).unlink()
    os.mkfifo(sharded / FIRST)
    with pytest.raises(ValueError, match="no regular file"):
        open_hf(sharded)


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted [*].safetensors or model.safetensors.index.json, got neither"):
        open_hf(tmp_path)


def test_a_hostile_shard_is_named(sharded: Path) -> None:
    (sharded / FIRST).write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=f"{FIRST}: wanted a header of at most 2 bytes"):
        open_hf(sharded)


# -------------------------------------------------------------------------------------------------------------- configs


def test_a_config_is_read_from_a_directory_and_by_itself(sharded: Path) -> None:
    assert read_config(sharded) == read_config(sharded / "config.json") == HF


def test_infinity_is_read_as_python_writes_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"limit": [0.0, float("inf")]}))
    assert read_config(tmp_path) == {"limit": [0.0, float("inf")]}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "got no JSON"),
        ("[]", "that is an object, got a list"),
        ("[" * 99_999, "got no JSON"),
        ('{"a": ' + "9" * 5000 + "}", "got no JSON"),
        (" " * 10_000_001, "wanted at most 10000000 bytes"),
    ],
)
def test_a_broken_config_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config.json: wanted a file of the checkpoint, it is missing"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        read_config(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "stated",
    [
        None,
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ],
)
def test_known_quantization_is_accepted(stated: Any) -> None:
    check_quantization({"quantization_config": stated})
    check_quantization({})


@pytest.mark.parametrize(
    "stated, named",
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "'fp8'"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "'pack-quantized'"),
        ({"quant_method": "compressed-tensors"}, "format None"),
        ("int8", "quant_method None"),
        ({}, "quant_method None"),
    ],
)
def test_other_quantization_is_refused_by_name(stated: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_quantization({"quantization_config": stated})
