"""Orbax checkpoints: written in pieces, and one clear error for every damaged or unfit one."""

import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_family
import ml_dtypes
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from fake_family import HF, abstract_state, random_tensors, table, write_hf

from hybrid_jax import checkpoint as loader
from hybrid_jax import orbax_tree
from hybrid_jax.checkpoint import load, save
from hybrid_jax.orbax_tree import Leaf

# Orbax opens all arrays at once; those that fail after the first find its event loop closed and say so, in threads.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


@pytest.fixture(autouse=True)
def _late_failures() -> Iterator[None]:
    yield
    time.sleep(0.05)
    gc.collect()


@pytest.fixture(autouse=True)
def _family(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_family.install(monkeypatch)


# --------------------------------------------------------------------------------------------------------------- pieces


def test_pieces_become_one_checkpoint(tmp_path: Path) -> None:
    place = tmp_path / "x"
    orbax_tree.save_piece(place, {"a.0.b": np.ones((2, 3), BF16), "c": np.array(7, np.float32)})
    assert orbax_tree.finished_paths(place) == {"a.0.b", "c"}
    orbax_tree.save_piece(place, {"a.0.d": np.zeros(3, np.int8)})
    assert orbax_tree.finished_paths(place) == {"a.0.b", "a.0.d", "c"}
    assert not orbax_tree.is_finished(place)
    orbax_tree.finish(place)
    assert orbax_tree.is_finished(place)
    leaves = {"a.0.b": Leaf((2, 3), BF16), "c": Leaf((), F32), "a.0.d": Leaf((3,), np.dtype(np.int8))}
    assert orbax_tree.read_leaves(place) == leaves
    read = orbax_tree.read(place, {"c": leaves["c"], "a.0.b": leaves["a.0.b"]})
    assert (read["c"].item(), read["a.0.b"].tolist()) == (7, [[1, 1, 1]] * 2)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_large_arrays_are_cut_into_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orbax_tree, "CHUNK_BYTES", 1000)
    array = np.arange(10_000, dtype=np.int16).reshape(4, 50, 50).transpose(2, 0, 1)
    orbax_tree.save_piece(tmp_path / "x", {"a": array})
    orbax_tree.finish(tmp_path / "x")
    chunk = ocp.metadata(tmp_path / "x").metadata["a"].storage_metadata.chunk_shape
    assert np.prod(chunk) * 2 <= 1000
    assert np.array_equal(orbax_tree.read(tmp_path / "x", {"a": Leaf((50, 4, 50), array.dtype)})["a"], array)


def test_a_torn_piece_is_removed_and_finished_ones_stay(tmp_path: Path) -> None:
    place = tmp_path / "x"
    for name in "ab":
        orbax_tree.save_piece(place, {name: np.ones(3, F32)})
    (tmp_path / "x.partial_save.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    pieces = sorted((tmp_path / "x.partial_save").iterdir())
    (pieces[1] / "commit_success.txt").unlink()
    assert orbax_tree.finished_paths(place) == {"a"}
    assert [path.name for path in tmp_path.iterdir()] == ["x.partial_save"]
    assert list((tmp_path / "x.partial_save").iterdir()) == pieces[:1]


def test_pieces_that_were_being_merged_are_started_again(tmp_path: Path) -> None:
    orbax_tree.save_piece(tmp_path / "x", {"a": np.ones(3, F32)})
    (tmp_path / "x.partial_save" / "state").mkdir()
    assert orbax_tree.finished_paths(tmp_path / "x") == set()
    assert list(tmp_path.iterdir()) == []


def test_names_and_existing_places_are_checked(tmp_path: Path) -> None:
    orbax_tree.save(tmp_path / "x", {"a": np.ones(3, F32)})
    with pytest.raises(ValueError, match="wanted a new directory"):
        orbax_tree.save(tmp_path / "x", {"a": np.ones(3, F32)})
    with pytest.raises(ValueError, match="b: wanted Leaf"):
        orbax_tree.read(tmp_path / "x", {"b": Leaf((3,), F32)})
    with pytest.raises(ValueError, match="a: wanted Leaf.*got .3,. float32"):
        orbax_tree.read(tmp_path / "x", {"a": Leaf((4,), F32)})


# -------------------------------------------------------------------------------------------------------------- hostile


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    save(tmp_path / "trained", HF, load(write_hf(tmp_path / "hf", random_tensors()), abstract_state(), table()))
    return tmp_path / "trained"


@pytest.mark.parametrize(
    "leaves, message",
    [
        ({"layers.0.kernel": np.zeros((6, 7), BF16)}, "layers.0.kernel: wanted shape .6, 6., got .6, 7."),
        ({"layers.0.kernel": np.zeros((6, 6), np.int8)}, "layers.0.kernel: wanted a float.*got int8"),
        ({"layers.0.kernel": np.zeros((6, 6), np.int32)}, "layers.0.kernel: wanted a float.*got int32"),
        ({"layers.0.more": np.zeros(1, BF16)}, "layers.0.more: unexpected"),
        ({"layers.0.kernel": None}, "layers.0.kernel: missing"),
    ],
)
def test_orbax_parameters_that_do_not_fit_are_refused(tmp_path: Path, leaves: Any, message: str) -> None:
    good = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in loader.read_state(abstract_state()).items()}
    (tmp_path / "config.json").write_text(json.dumps(HF))
    orbax_tree.save(tmp_path / "parameters", {p: v for p, v in (good | leaves).items() if v is not None})
    with pytest.raises(ValueError, match=message):
        load(tmp_path, abstract_state(), table())


def test_a_damaged_orbax_directory_is_one_clear_error(trained: Path) -> None:
    for name in ("manifest.ocdbt", "_METADATA"):
        file = trained / "parameters" / "state" / name
        content = file.read_bytes()
        for damage in (b"", b"[" * 9999, content[: len(content) // 2]):
            file.write_bytes(damage)
            with pytest.raises(ValueError, match="wanted a readable|wanted layers"):
                load(trained, abstract_state(), table())
        file.write_bytes(content)
    load(trained, abstract_state(), table())


def test_lost_data_of_an_orbax_directory_are_noticed(trained: Path) -> None:
    for file in (trained / "parameters").rglob("d/*"):
        file.unlink()
    with pytest.raises(ValueError, match="wanted"):
        load(trained, abstract_state(), table())


@pytest.mark.parametrize("tree", [{"a": "text"}, {"a": 3}, {"a": [np.zeros(1)]}])
def test_orbax_leaves_that_are_no_arrays_in_dictionaries_are_refused(tmp_path: Path, tree: Any) -> None:
    ocp.save(tmp_path / "x", tree)
    with pytest.raises(ValueError, match="wanted"):
        orbax_tree.read_leaves(tmp_path / "x")


def test_a_directory_that_is_no_orbax_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "parameters").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(HF))
    with pytest.raises(ValueError, match="wanted an Orbax checkpoint, got none that is complete"):
        load(tmp_path, abstract_state(), table())


@pytest.mark.parametrize("name", ["", "state", "state/manifest.ocdbt"])
def test_links_in_an_orbax_directory_are_not_followed(trained: Path, tmp_path: Path, name: str) -> None:
    linked = trained / "parameters" / name
    linked.rename(tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link"):
        load(trained, abstract_state(), table())
