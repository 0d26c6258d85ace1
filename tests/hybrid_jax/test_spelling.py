"""Matching the names of a checkpoint with its weight table; tensors into parameters and back."""

import math
import re

import numpy as np
import pytest
from fake_family import random_tensors, table
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax.quantisation import widen
from hybrid_jax.spelling import Found, Plan, cut_as_stored, fill, match, pick
from models.weights import Source, Weight

# ------------------------------------------------------------------------------------------------------------- matching


@pytest.mark.parametrize("packed", [False, True])
def test_each_parameter_is_found_in_one_spelling(packed: bool) -> None:
    names = set(random_tensors(packed=packed, prefix="model."))
    plan = match(table(), names)
    assert {name for found in plan.found for name in found.names} == names
    assert [len(found.names) for found in plan.found] == ([1, 1, 1] if packed else [1, 1, 6]) * 2
    assert all(found.source in found.weight.sources for found in plan.found)


def test_what_is_missing_is_named_in_the_likely_spelling() -> None:
    names = set(random_tensors())
    for gone in ("layers.0.dense.weight", "layers.1.experts.2.up.weight"):
        with pytest.raises(ValueError, match=f"1 problem.*\n.*tensor {gone}: missing"):
            match(table(), names - {gone})


def test_an_unexpected_tensor_is_named() -> None:
    for name in ("layers.2.dense.weight", "../../etc", "layers.0.dense.bias_scale.x", "x_scale"):
        with pytest.raises(ValueError, match=re.escape(f"tensor {name}: unexpected")):
            match(table(), [*random_tensors(), name])


def test_two_names_of_one_tensor_are_refused() -> None:
    with pytest.raises(ValueError, match="layers.0.dense.bias and model.layers.0.dense.bias: both are"):
        match(table(), [*random_tensors(), "model.layers.0.dense.bias"])


def test_two_spellings_of_one_parameter_are_refused() -> None:
    with pytest.raises(ValueError, match="two spellings of layers.0.gate_up"):
        match(table(), [*random_tensors(), *random_tensors(packed=True)])


def test_tensors_that_are_not_used_are_left_out() -> None:
    assert match(table(), [*random_tensors(), "vision.a"]).left_out == ("vision.a",)


def test_many_problems_are_counted() -> None:
    with pytest.raises(ValueError, match="16 problem.*(\n.*missing.*){10}\n.*and 6 more"):
        match(table(), [])


# ----------------------------------------------------------------------------------------------- tensors and parameters

PATTERNS = [
    ("a b -> b a", 0),
    ("a -> a", 0),
    ("->", 0),
    ("(c h k) d -> d c h k", 0),
    ("e (c f) d -> e d c f", 0),
    ("e f d -> e d f", 1),
    ("e c f d -> e d c f", 2),
    ("e c (h k) d -> d h e k c", 2),
    ("e c -> c e", 2),
]


@given(st.sampled_from(PATTERNS), st.integers(0, 2**32 - 1))
def test_fill_and_pick_are_the_tables_assemble_and_split(case: tuple[str, int], seed: int) -> None:
    pattern, grid_axes = case
    rng = np.random.default_rng(seed)
    letters = pattern.split("->")[1].split()
    shape = tuple(int(size) for size in rng.integers(1, 4, len(letters)))
    sizes = dict(zip(letters, shape, strict=True))
    grid = tuple(sizes[letter] for letter in pattern.split()[:grid_axes])
    source = Source(tuple(str(n) for n in range(math.prod(grid))), pattern, grid)
    tensors = [rng.standard_normal(source.tensor_shape(shape)) for _ in source.names]
    parameter = np.full(shape, np.nan)
    fill(parameter, source, tensors)
    assert np.array_equal(parameter, source.assemble(tensors, shape))
    for index, tensor in enumerate(source.split(parameter)):
        assert np.array_equal(pick(parameter, source, index), tensor)


@given(st.permutations([1, 2, 5]), st.sampled_from(["c 1 w -> w c", "c w -> c w"]))
def test_joined_tensors_are_filled_and_picked_wherever_a_file_cuts_them(lengths: list[int], pattern: str) -> None:
    usual = Source(("q", "k", "v"), pattern, joined=(3, 3, 2))
    parameter = np.arange(24.0).reshape((3, 8) if pattern.endswith("w c") else (8, 3))
    whole = np.concatenate(usual.split(parameter))
    tensors = np.split(whole, np.cumsum(lengths)[:-1])
    plan = Plan((Found(Weight("w", (usual,)), usual, usual.names),), {}, ())
    shapes = {name: tensor.shape for name, tensor in zip(usual.names, tensors, strict=True)}
    (found,) = cut_as_stored(plan, shapes).found
    filled = np.full_like(parameter, np.nan)
    fill(filled, found.source, tensors)
    assert np.array_equal(filled, parameter)
    for index, tensor in enumerate(tensors):
        assert np.array_equal(pick(parameter, found.source, index), tensor)
    assert cut_as_stored(plan, shapes | {"q": (9,)}) == plan


def test_fill_refuses_another_number_or_shape_of_tensors() -> None:
    source = Source(("a", "b"), "e d -> e d", (2,))
    for tensors in ([np.zeros(3)], [np.zeros(3)] * 3, [np.zeros(4)] * 2):
        with pytest.raises(ValueError):
            fill(np.zeros((2, 3)), source, tensors)


def test_scales_of_packed_experts_are_per_expert_and_row() -> None:
    tensor = np.arange(-12, 12, dtype=np.int8).reshape(2, 3, 4)
    scale = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(widen(tensor, scale), tensor * scale[..., None])
    assert np.array_equal(widen(tensor, scale[..., None]), tensor * scale[..., None])
