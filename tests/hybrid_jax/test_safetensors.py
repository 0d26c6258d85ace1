"""Safetensors files: equal to the `safetensors` library on valid files, one clear error on hostile ones."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hybrid_jax.safetensors import DTYPES, FileWriter, make_header, open_file, parse_header

NAMES = st.text(st.characters(categories=["L", "N"], include_characters="._-: {}\"'"), min_size=1, max_size=20)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    NAMES.filter(lambda name: ".." not in name and name.isprintable()),
    st.tuples(st.sampled_from(["BF16", "F32", "F16", "I8", "U8", "I64", "BOOL", "F8_E4M3"]), SHAPES),
    max_size=5,
)
FILES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def row(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


def write_rows(path: Path, rows: dict[str, Any], data_bytes: int) -> Path:
    return write_raw(path, json.dumps(rows).encode(), bytes(data_bytes))


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    count = int(np.prod(shape, dtype=int)) * DTYPES[dtype].itemsize
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == "BOOL" else 256, count, np.uint8)
    return raw.view(DTYPES[dtype]).reshape(shape)


def same(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


# --------------------------------------------------------------------------------------------------------- valid files


@FILES
@given(TENSORS, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2), st.randoms())
def test_written_files_are_read_by_us_and_by_the_library(
    tmp_path: Path, tensors: Any, metadata: Any, order: Any
) -> None:
    arrays = {name: random_tensor(dtype, shape, 7) for name, (dtype, shape) in tensors.items()}
    path = tmp_path / "x.safetensors"
    header = make_header([(name, dtype, shape) for name, (dtype, shape) in tensors.items()], metadata)
    names = list(arrays)
    order.shuffle(names)
    with FileWriter(path, header) as writer:
        for name in names:
            writer.write(name, arrays[name])
        writer.finish()
    file = open_file(path)
    assert dict(file.header.metadata) == metadata
    assert all(same(file.read(name), arrays[name]) for name in arrays)
    found = dict(safetensors.deserialize(path.read_bytes()))
    assert {name: (value["dtype"], tuple(value["shape"])) for name, value in found.items()} == tensors
    assert all(bytes(found[name]["data"]) == arrays[name].tobytes() for name in arrays)


@FILES
@given(TENSORS)
def test_files_of_the_library_are_read_and_written_back_byte_for_byte(tmp_path: Path, tensors: Any) -> None:
    arrays = {name: random_tensor(dtype, shape, 7) for name, (dtype, shape) in tensors.items()}
    source, copy = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    safetensors.numpy.save_file(arrays, source, {"format": "pt"} if tensors else None)
    file = open_file(source)
    with FileWriter(copy, file.header) as writer:
        for name in arrays:
            assert same(file.read(name), arrays[name])
            file.release(name)
            assert same(file.read(name), arrays[name])
            writer.write(name, file.read(name))
        writer.finish()
    assert copy.read_bytes() == source.read_bytes()


def test_tensors_at_odd_offsets_are_read(tmp_path: Path) -> None:
    rows = {"a": row("U8", [1], 0, 1), "b": row("BF16", [2], 1, 5), "c": row("F32", [1], 5, 9)}
    data = b"\x07" + np.array([1, 2], ml_dtypes.bfloat16).tobytes() + np.array([3], np.float32).tobytes()
    file = open_file(write_raw(tmp_path / "x", json.dumps(rows).encode() + b" " * 3, data))
    assert file.read("b").astype(np.float32).tolist() == [1, 2]
    assert file.read("c").tolist() == [3]


def test_views_cannot_be_written_to(tmp_path: Path) -> None:
    file = open_file(write_rows(tmp_path / "x", {"a": row("F32", [2], 0, 8)}, 8))
    with pytest.raises(ValueError, match="read-only"):
        file.read("a")[0] = 1


# ------------------------------------------------------------------------------------------------------- hostile files

HUGE = 2**60
HOSTILE: dict[str, tuple[dict[str, Any], int, str]] = {
    "overlap": ({"a": row("U8", [4], 0, 4), "b": row("U8", [4], 2, 6)}, 6, "'b'.*overlaps"),
    "same range twice": ({"a": row("U8", [4], 0, 4), "b": row("U8", [4], 0, 4)}, 4, "'b'.*overlaps"),
    "hole": ({"a": row("U8", [4], 0, 4), "b": row("U8", [4], 6, 10)}, 10, "'b'.*hole"),
    "hole at the start": ({"a": row("U8", [4], 4, 8)}, 8, "'a'.*hole"),
    "rest": ({"a": row("U8", [4], 0, 4)}, 5, "wanted 4 bytes of data"),
    "past the end": ({"a": row("U8", [8], 0, 8)}, 4, "'a'.*within the 4 bytes"),
    "huge": ({"a": row("U8", [2**40], 0, 2**40)}, 48, "'a'.*within the 48 bytes"),
    "shape beyond the range": ({"a": row("F32", [2**40], 0, 48)}, 48, "'a'.*wanted 4398046511104 bytes"),
    "negative offset": ({"a": row("U8", [4], -4, 0)}, 4, "'a'.*>= 0"),
    "negative size": ({"a": row("U8", [-4], 0, 4)}, 4, "'a'.*>= 0"),
    "backwards": ({"a": row("U8", [4], 4, 0)}, 4, "'a'.*wanted 4 bytes"),
    "offset beyond 64 bits": ({"a": row("U8", [4], 0, 10**30)}, 4, "'a'"),
    "zero times huge": ({"a": row("U8", [0, HUGE, HUGE], 0, 0)}, 0, "'a'.*fits into memory"),
    "many axes": ({"a": row("U8", [1] * 33, 0, 1)}, 1, "'a'.*fits into memory"),
    "fraction": ({"a": row("U8", [4.0], 0, 4)}, 4, "'a'.*got `float`"),
    "truth": ({"a": row("U8", [True], 0, 1)}, 1, "'a'.*got `bool`"),
    "one offset": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, 1, "'a'.*length 2"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, 1, "'a'.*shape"),
    "unknown field": ({"a": row("U8", [1], 0, 1) | {"path": "/etc"}}, 1, "'a'.*path"),
    "unknown dtype": ({"a": row("F4", [2], 0, 1)}, 1, "'a'.*wanted a dtype of BOOL"),
    "number": ({"a": 1}, 0, "'a'"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
    "name up": ({"../../x": row("U8", [1], 0, 1)}, 1, "no path"),
    "name absolute": ({"/etc/passwd": row("U8", [1], 0, 1)}, 1, "no path"),
    "name of Windows": ({"c:\\x": row("U8", [1], 0, 1)}, 1, "no path"),
    "empty name": ({"": row("U8", [1], 0, 1)}, 1, "1 to 512 printable"),
    "long name": ({"a" * 513: row("U8", [1], 0, 1)}, 1, "1 to 512 printable"),
    "control character": ({"a\x00b": row("U8", [1], 0, 1)}, 1, "1 to 512 printable"),
}


@pytest.mark.parametrize("rows, data_bytes, message", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_one_clear_error(tmp_path: Path, rows: Any, data_bytes: int, message: str) -> None:
    path = write_rows(tmp_path / "evil.safetensors", rows, data_bytes)
    with pytest.raises(ValueError, match=message) as caught:
        open_file(path)
    assert "evil.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 500


GOOD_ROW = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
RAW: dict[str, tuple[bytes, bytes, int | None, str]] = {
    "empty": (b"", b"", 0, "at its start"),
    "header of 2^60 bytes": (b"{}", b"", HUGE, f"got {HUGE} in its first"),
    "header beyond the file": (b"{}", b"", 3, "at most 2 bytes"),
    "not JSON": (b"{" + b"x" * 50, b"", None, "the header in the safetensors format"),
    "a list": (b"[1]", b"", None, "at its start"),
    "white space first": (b" {}", b"", None, "at its start"),
    "deep": (b'{"a":' + b"[" * 100_000, b"", None, "the header"),
    "bad UTF-8": (b'{"\xff":1}', b"", None, "the header"),
    "half a surrogate": (b'{"\\ud800":' + GOOD_ROW[4:] + b"}", b"x", None, "the header"),
    "two values": (b"{}{}", b"", None, "the header"),
    "a name twice": (b"{" + GOOD_ROW + b"," + GOOD_ROW + b"}", b"x", None, "'a' twice"),
    "a field twice": (b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x", None, "twice"),
    "metadata twice": (b'{"__metadata__":{"a":"b"},"__metadata__":{},' + GOOD_ROW + b"}", b"x", None, "twice"),
    "a number of many digits": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 9000 + b"]}}", b"", None, "'a'"),
}


@pytest.mark.parametrize("header, data, length, message", RAW.values(), ids=RAW)
def test_a_broken_header_is_one_clear_error(
    tmp_path: Path, header: bytes, data: bytes, length: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        open_file(write_raw(tmp_path / "evil.safetensors", header, data, length))
    assert "evil.safetensors" in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_without_a_length_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "x").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=f"got one of {size} bytes"):
        open_file(tmp_path / "x")


def test_a_folder_and_nothing_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="no regular file"):
            open_file(path)


def test_a_flood_of_tiny_rows_builds_nothing() -> None:
    flood = b"{" + b'"a":{},' * 3_000_001 + b'"a":{}}'
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than 500000 tensors"):
        parse_header(flood, 0, "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


VALID = json.dumps(
    {"__metadata__": {"format": "pt"}, "a": row("F32", [2, 2], 0, 16), "b": row("BF16", [3], 16, 22)}
).encode()
MUTATIONS = st.lists(st.tuples(st.integers(0, len(VALID) + 7), st.integers(0, 255)), max_size=4)
NUMBERS = st.sampled_from(
    [b"-1", b"0", b"1", b"16", b"22", b"2.0", b"9" * 19, b"9" * 40, b"1e9", b"true", b"null", b"[]"]
)


def accepts(path: Path) -> bool:
    """Whether our reader takes a file; it raises nothing but ValueError and allocates little."""
    tracemalloc.start()
    try:
        file = open_file(path)
        assert all(file.read(name).nbytes <= 64 for name in file.header.entries)
        return True
    except ValueError as error:
        assert len(str(error)) < 1000
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2_000_000


def library_accepts(path: Path) -> bool:
    try:
        safetensors.deserialize(path.read_bytes())
        return True
    except safetensors.SafetensorError:
        return False


@FILES
@given(MUTATIONS, st.integers(-30, 30))
def test_changed_bytes_never_crash_and_pass_only_where_the_library_lets_them(
    tmp_path: Path, changes: Any, longer: int
) -> None:
    whole = bytearray(len(VALID).to_bytes(8, "little") + VALID + bytes(22))
    for at, byte in changes:
        whole[at] = byte
    path = tmp_path / "x"
    path.write_bytes(bytes(whole[: len(whole) + min(longer, 0)]) + bytes(max(longer, 0)))
    assert not accepts(path) or library_accepts(path)


@FILES
@given(st.integers(0, 30), NUMBERS, st.integers(0, 40))
@example(0, b"2", 22)
def test_changed_numbers_never_crash_and_pass_only_where_the_library_lets_them(
    tmp_path: Path, which: int, number: bytes, data_bytes: int
) -> None:
    digits = [at for at in range(len(VALID)) if VALID[at : at + 1].isdigit() and VALID[at - 1 : at] in b" ["]
    at = digits[which % len(digits)]
    end = at + next(i for i, byte in enumerate(VALID[at:]) if byte in b",]")
    path = write_raw(tmp_path / "x", VALID[:at] + number + VALID[end:], bytes(data_bytes))
    assert not accepts(path) or library_accepts(path)


# -------------------------------------------------------------------------------------------------------------- writing


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = make_header([("a", "F32", (2,)), ("b", "F32", (2,))], {})
    with pytest.raises(ValueError, match=r"\['b'\] were not"), FileWriter(path, header) as writer:
        writer.write("a", np.zeros(2, np.float32))
        assert not path.exists()
        writer.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "tensor",
    [np.zeros(3, np.float32), np.zeros(2, np.float64), np.zeros((2, 1), np.float32), np.zeros(2, np.complex64)],
)
def test_a_tensor_that_the_header_does_not_describe_is_refused(tmp_path: Path, tensor: np.ndarray) -> None:
    header = make_header([("a", "F32", (2,))], {})
    with pytest.raises(ValueError, match="a: wanted F32"), FileWriter(tmp_path / "x", header) as writer:
        writer.write("a", tensor)


def test_a_tensor_is_written_once(tmp_path: Path) -> None:
    header = make_header([("a", "F32", (2,))], {})
    with pytest.raises(ValueError, match="not written again"), FileWriter(tmp_path / "x", header) as writer:
        writer.write("a", np.zeros(2, np.float32))
        writer.write("a", np.zeros(2, np.float32))


def test_tensors_of_a_new_header_are_aligned_and_keep_their_order() -> None:
    header = make_header([("d", "I8", (3,)), ("c", "F32", (1,)), ("b", "BF16", (3,)), ("a", "F32", (2,))], {})
    assert list(header.entries) == ["c", "a", "b", "d"]
    assert header.data_start % 8 == 0
    assert all(entry.begin % DTYPES[entry.dtype].itemsize == 0 for entry in header.entries.values())
