"""Matching a checkpoint with its weight table, and loading it from either form."""

from pathlib import Path
from typing import Any

import fake_family
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fake_family import (
    HF,
    INT8,
    abstract_state,
    assert_same,
    expected,
    quantize,
    random_tensors,
    table,
    values,
    write_hf,
)
from flax import nnx

from hybrid_jax import checkpoint as loader
from hybrid_jax.checkpoint import check_table, group_paths, load, save
from hybrid_jax.convert import to_orbax
from hybrid_jax.hf_directory import read_config
from hybrid_jax.orbax_tree import Leaf
from hybrid_jax.progress import Silence
from models.weights import WeightTable, weight

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(autouse=True)
def _family(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_family.install(monkeypatch)


# ------------------------------------------------------------------ tables, groups of parameters


def test_a_table_must_be_about_the_parameters_of_the_model() -> None:
    rows = table().weights
    leaves = loader.read_state(abstract_state())
    for weights, message in (
        (rows[1:], "layers.0.kernel: the weight table lacks"),
        ((*rows, weight("x", "x", "d -> d")), "x: the weight table has it, the model does not"),
        ((*rows, rows[0]), "layers.0.kernel: the weight table has it 2 times"),
    ):
        with pytest.raises(ValueError, match=message):
            check_table(WeightTable(weights, str), leaves)


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    path = write_hf(tmp_path, random_tensors())
    with pytest.raises(ValueError, match="layers.2.bias: the weight table lacks this parameter"):
        load(path, abstract_state(HF | {"layers": 3}), table())
    with pytest.raises(ValueError, match="layers.1.bias: the weight table has it, the model does not"):
        load(path, abstract_state(HF | {"layers": 1}), table())


def test_groups_hold_no_more_than_the_largest_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "GROUP_FLOOR_BYTES", 0)
    sizes = [3, 3, 1, 7, 2, 2, 2, 2, 0, 9, 1]
    leaves = {f"p{at}": Leaf((size,), np.dtype(np.int8)) for at, size in enumerate(sizes)}
    groups = group_paths(leaves)
    assert [path for group in groups for path in group] == list(leaves)
    assert [sum(leaves[path].size_bytes for path in group) for group in groups] == [7, 9, 6, 9, 1]
    assert group_paths({}) == []


# -------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("shards, prefix", [(1, ""), (3, "model.")])
def test_a_published_directory_is_loaded(tmp_path: Path, packed: bool, dtype: Any, shards: int, prefix: str) -> None:
    tensors = random_tensors(packed=packed, dtype=dtype, prefix=prefix)
    write_hf(tmp_path, tensors | {"vision.x": np.zeros(3)}, shards=shards)
    state = load(tmp_path, abstract_state(), table())
    assert_same(values(state), expected(tensors))
    assert jax.tree.structure(state) == jax.tree.structure(abstract_state())


def test_an_orbax_directory_is_loaded_like_its_source(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", random_tensors(packed=True, dtype=np.float32), shards=2)
    to_orbax(source, tmp_path / "orbax", Silence())
    assert_same(
        values(load(tmp_path / "orbax", abstract_state(), table())),
        expected(random_tensors(packed=True, dtype=np.float32)),
    )


def test_a_model_trained_here_is_saved_and_loaded(tmp_path: Path) -> None:
    state = load(write_hf(tmp_path / "hf", random_tensors()), abstract_state(), table())
    save(tmp_path / "trained", HF, state)
    assert read_config(tmp_path / "trained") == HF
    assert_same(values(load(tmp_path / "trained", abstract_state(), table())), values(state))
    assert_same(
        values(load(tmp_path / "trained", abstract_state(dtype="float32"), table())) | {},
        {path: value.astype(np.float32) for path, value in values(state).items()},
    )
    with pytest.raises(ValueError, match="wanted a new directory"):
        save(tmp_path / "trained", HF, state)


@pytest.mark.parametrize("orbax", [False, True])
def test_parameters_are_placed_one_after_the_other_by_their_axes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orbax: bool
) -> None:
    path = write_hf(tmp_path / "hf", random_tensors())
    if orbax:
        to_orbax(path, tmp_path / "orbax", Silence())
        path = tmp_path / "orbax"
    placed: list[tuple[Any, ...]] = []

    def put(variable: nnx.Variable, value: np.ndarray) -> jax.Array:
        assert (variable.shape, variable.dtype) == (value.shape, value.dtype)
        placed.append(variable.get_metadata("axes"))
        return jnp.asarray(value)

    state = load(path, abstract_state(), table(), put)
    assert sorted(placed, key=str) == sorted(
        [("model", None), ("model",), ("expert", "model", None, "mlp")] * 2, key=str
    )
    assert_same(values(state), expected(random_tensors()))


@pytest.mark.parametrize("orbax", [False, True])
@pytest.mark.parametrize("flat_scales", [False, True])
def test_int8_weights_are_multiplied_by_their_scales(tmp_path: Path, orbax: bool, flat_scales: bool) -> None:
    stored = quantize(random_tensors(prefix="model."))
    if flat_scales:
        stored = {name: tensor[:, 0] if name.endswith("_scale") else tensor for name, tensor in stored.items()}
    path = write_hf(tmp_path / "hf", stored, HF | INT8)
    if orbax:
        to_orbax(path, tmp_path / "orbax", Silence())
        path = tmp_path / "orbax"
    wanted = {
        name: tensor.astype(np.float32) * stored[f"{name}_scale"].astype(np.float32).reshape(-1, 1)
        if f"{name}_scale" in stored
        else tensor
        for name, tensor in stored.items()
        if not name.endswith("_scale")
    }
    assert_same(values(load(path, abstract_state(), table())), expected(wanted))


def change(name: str, tensor: np.ndarray | None) -> Any:
    def edit(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        edited = tensors | {name: tensor}
        return {name: value for name, value in edited.items() if value is not None}

    return edit


WEIGHT, EXPERT = "layers.0.dense.weight", "layers.1.experts.2.up.weight"
WRONG = {
    "another shape": (change(WEIGHT, np.zeros((6, 5), np.float32)), f"{WEIGHT}: wanted shape .6, 6., got .6, 5."),
    "another rank": (change(EXPERT, np.zeros(24, np.float32)), f"{EXPERT}: wanted shape .4, 6., got .24,."),
    "whole numbers": (change(WEIGHT, np.zeros((6, 6), np.int32)), f"{WEIGHT}: wanted bfloat16.*got int32"),
    "float8": (change(WEIGHT, np.zeros((6, 6), ml_dtypes.float8_e4m3fn)), f"{WEIGHT}: wanted.*got float8_e4m3fn"),
    "int8 without scales": (change(WEIGHT, np.zeros((6, 6), np.int8)), f"{WEIGHT}: wanted.*int8 with scales, got int8"),
    "scales of a float": (
        change(f"{WEIGHT}_scale", np.zeros(6, np.float32)),
        f"{WEIGHT}: wanted int8 or float8_e4m3fn",
    ),
    "missing": (change(WEIGHT, None), f"{WEIGHT}: missing"),
    "unexpected": (change("layers.7.dense.weight", np.zeros(6, np.float32)), "layers.7.dense.weight: unexpected"),
}


@pytest.mark.parametrize("edit, message", WRONG.values(), ids=WRONG)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, edit: Any, message: str) -> None:
    write_hf(tmp_path, edit(random_tensors(dtype=np.float32)))
    with pytest.raises(ValueError, match=message):
        load(tmp_path, abstract_state(), table())


def test_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    stored = quantize(random_tensors())
    write_hf(tmp_path, stored | {f"{WEIGHT}_scale": np.zeros((6, 2), np.float32)}, HF | INT8)
    with pytest.raises(ValueError, match=f"{WEIGHT}_scale: wanted one scale per row of .6, 6., got .6, 2."):
        load(tmp_path, abstract_state(), table())


def test_other_quantization_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    write_hf(tmp_path, {"x": np.zeros(1)}, HF | {"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(ValueError, match="'fp8'"):
        load(tmp_path, abstract_state(), table())
