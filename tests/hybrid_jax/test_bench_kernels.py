"""`bench kernels`: our cases, the libraries beside them, and what the command prints."""

import json

import numpy as np
import pytest

from hybrid_jax.bench import kernels, verbs
from hybrid_jax.bench.ceilings import Ceilings
from kernels_pallas.cases import products
from kernels_pallas.cases.case import Case

CEILINGS = Ceilings("a device", read=1e9, copy=0.5e9, products=1e12, dtype="float32")


def test_kernels_need_a_gpu():
    with pytest.raises(ValueError, match="wanted a GPU, got platform 'cpu'"):
        verbs.kernels()


def test_a_kernel_that_fails_does_not_hide_the_others(monkeypatch, capsys):
    cases = [Case(name, "B=1", lambda: None, 1000, 500) for name in ("broken", "whole")]

    def time_case(case):
        if case.name == "broken":
            raise AssertionError("wrong results")
        return 4e-6, 5e-6

    monkeypatch.setattr(kernels, "time_case", time_case)
    monkeypatch.setattr(kernels, "wanted_cases", lambda only: cases)
    monkeypatch.setattr(kernels, "require_kernels", lambda: None)
    monkeypatch.setattr(verbs, "measure_ceilings", lambda: CEILINGS)
    with pytest.raises(SystemExit) as ended:
        verbs.kernels(json=True)
    printed = capsys.readouterr()
    assert ended.value.code == 1 and "broken, B=1: AssertionError: wrong results" in printed.err
    assert [case["name"] for case in json.loads(printed.out)["cases"]] == ["whole"]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_products_of_a_case_are_those_of_its_matrices(dtype):
    case = products.product_case(products.Matrix("small", 8192, 4096), 3, dtype)
    multiply, (xs, weights), _ = case.make()
    assert case.read_bytes >= products.LEAST_BYTES and len(multiply(xs[:1], weights[:1])) == 1
    (got,), (weight, scale) = multiply(xs[:1], weights[:1]), weights[0]
    wanted = np.asarray(xs[0], np.float32) @ np.asarray(weight).astype(np.float32)
    wanted = wanted if scale is None else wanted * np.asarray(scale)
    np.testing.assert_allclose(np.asarray(got, np.float32), wanted, rtol=0.02, atol=0.02 * np.abs(wanted).max())


def test_the_time_of_a_kernel_is_held_against_its_floor(monkeypatch):
    monkeypatch.setattr(kernels, "time_case", lambda case: (4e-6, 5e-6))
    found = kernels.time_kernel(Case("decode", "B=1", lambda: None, 1000, 500), CEILINGS)
    assert found.floor_s == pytest.approx(1000 / 0.5e9 + 500 / 1e9) and found.moved_bytes == 1500
    assert found.ratio == pytest.approx(found.floor_s / 5e-6) and "0.3 GB/s" not in found.line
    assert set(found.to_json()) >= {"name", "shape", "device_s", "span_s", "floor_s", "ratio"}


def test_cases_are_chosen_by_a_part_of_their_name():
    every = kernels.wanted_cases("")
    some = kernels.wanted_cases("decode")
    assert 0 < len(some) <= len(every) and all("decode" in f"{case.name}, {case.shape}" for case in some)
    assert all(case.read_bytes > 0 for case in every)
    with pytest.raises(ValueError, match="wanted a part of the name of a case"):
        kernels.wanted_cases("no such kernel")
