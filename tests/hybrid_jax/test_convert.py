"""Conversion to Orbax and back: every byte returns, memory is bounded, an interruption costs little."""

import json
from pathlib import Path
from typing import Any

import fake_family
import ml_dtypes
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
import safetensors.numpy
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

from hybrid_jax import checkpoint as loader
from hybrid_jax import convert, orbax_directory
from hybrid_jax.checkpoint import load, save
from hybrid_jax.convert import to_hf, to_orbax, usual_files
from hybrid_jax.hf_directory import INDEX, open_hf
from hybrid_jax.orbax_tree import Leaf
from hybrid_jax.progress import Silence
from hybrid_jax.spelling import Found, Plan

SPECIAL = {
    "vision.patch": np.array([1, -1, 2**62], np.int64),
    "vision.flags": np.array([True, False]),
    "vision.half": np.arange(65536, dtype=np.uint16).view(np.float16),
    "vision.scale": np.array(2.5, np.float64),
    "vision.none": np.zeros((0, 3), np.float32),
    "vision.small": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),
}


@pytest.fixture(autouse=True)
def _family(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_family.install(monkeypatch)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class Counter(Silence):
    """Adds up what is reported."""

    def __init__(self) -> None:
        self.totals: list[int] = []
        self.done: list[int] = []

    def start(self, what: str, total_bytes: int) -> None:
        self.totals.append(total_bytes)

    def advance(self, size_bytes: int) -> None:
        self.done.append(size_bytes)


# ----------------------------------------------------------------------------------------------------------- round trip


def every_bit_pattern() -> dict[str, np.ndarray]:
    """Weights that go through all bfloat16 patterns, infinities, both zeros and all NaNs among them."""
    tensors = random_tensors()
    patterns = np.random.default_rng(1).permutation(65536).astype(np.uint16)
    weights = [name for name in tensors if name.endswith(".weight")]
    for at, name in enumerate(weights):
        size = tensors[name].size
        tensors[name] = np.resize(np.roll(patterns, -at * size), tensors[name].shape).view(ml_dtypes.bfloat16)
    tensors["layers.0.dense.weight"][...] = -0.0
    tensors["layers.1.dense.weight"][...] = 0.0
    tensors["layers.0.dense.bias"][:2] = np.array([0x7F800001, 0xFFC12345], np.uint32).view(np.float32)
    return tensors


CASES = {
    "one file": (random_tensors(), HF, 1),
    "shards": (random_tensors(), HF, 4),
    "packed": (random_tensors(packed=True), HF, 2),
    "prefix": (random_tensors(prefix="model."), HF, 3),
    "float32": (random_tensors(dtype=np.float32), HF, 1),
    "float16": (random_tensors(dtype=np.float16), HF, 1),
    "int8": (quantize(random_tensors()), HF | INT8, 3),
    "left out": (random_tensors() | SPECIAL, HF, 3),
    "every bit pattern": (every_bit_pattern(), HF, 2),
}


@pytest.mark.parametrize("tensors, hf, shards", CASES.values(), ids=CASES)
def test_every_byte_returns(tmp_path: Path, tensors: Any, hf: Any, shards: int) -> None:
    source = write_hf(tmp_path / "hf", tensors, hf, shards)
    (source / "tokenizer.json").write_bytes(b'{"a":\r\n 1}')
    (source / "chat_template.jinja").write_text("{{ x }}")
    to_orbax(source, tmp_path / "orbax", Silence())
    to_hf(tmp_path / "orbax", tmp_path / "back", Silence())
    assert contents(tmp_path / "back") == contents(source)


def test_odd_headers_return(tmp_path: Path) -> None:
    """White space, escapes, the order of names and an odd length are kept."""
    source = write_hf(tmp_path / "hf", random_tensors())
    raw = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    rows = json.loads(raw[8 : 8 + length])
    rows["__metadata__"] = {"ä": "\u2028", "format": "pt"}
    header = json.dumps(dict(reversed(rows.items())), indent=1).replace("bias", "b\\u0069as").encode() + b"  \n"
    header += b" " * (1 - len(header) % 2)
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    to_orbax(source, tmp_path / "orbax", Silence())
    to_hf(tmp_path / "orbax", tmp_path / "back", Silence())
    assert contents(tmp_path / "back") == contents(source)


def test_any_user_of_orbax_restores_the_parameters(tmp_path: Path) -> None:
    to_orbax(write_hf(tmp_path / "hf", random_tensors(dtype=np.float32)), tmp_path / "orbax", Silence())
    tree = ocp.load(tmp_path / "orbax" / "parameters")
    wanted = expected(random_tensors(dtype=np.float32))
    assert set(tree) == {"layers"} and set(tree["layers"]) == {"0", "1"}
    assert tree["layers"]["1"]["gate_up"].dtype == np.float32
    assert np.array_equal(tree["layers"]["1"]["gate_up"].astype(ml_dtypes.bfloat16), wanted["layers.1.gate_up"])


def test_only_named_small_files_are_copied(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", random_tensors())
    (source / "modeling_fake.py").write_text("print()")
    (source / "pytorch_model.bin").write_text("")
    (source / "LICENSE").write_text("free")
    to_orbax(source, tmp_path / "orbax", Silence())
    names = {"config.json", "LICENSE", "parameters", "hybrid_jax.json"}
    assert {path.name for path in (tmp_path / "orbax").iterdir()} == names


def test_progress_adds_up(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", random_tensors(), shards=2)
    for job, arguments in ((to_orbax, ("hf", "orbax")), (to_hf, ("orbax", "back"))):
        counter = Counter()
        job(*(tmp_path / name for name in arguments), counter)
        assert counter.totals == [sum(file.header.data_bytes for file in open_hf(source).files.values())]
        assert sum(counter.done) == counter.totals[0]


# ----------------------------------------------------------------------------------------------- a model trained here


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    save(tmp_path / "trained", HF, load(write_hf(tmp_path / "hf", random_tensors()), abstract_state(), table()))
    return tmp_path / "trained"


def test_a_model_trained_here_is_published_in_the_usual_spelling(trained: Path, tmp_path: Path) -> None:
    to_hf(trained, tmp_path / "published", Silence())
    found = safetensors.numpy.load_file(tmp_path / "published" / "model.safetensors")
    assert_same(found, random_tensors())
    assert_same(values(load(tmp_path / "published", abstract_state(), table())), expected(random_tensors()))


def test_large_models_are_published_in_shards(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "usual_files", lambda plan, stored: usual_files(plan, stored, 200))
    to_hf(trained, tmp_path / "published", Silence())
    checkpoint = open_hf(tmp_path / "published")
    sizes = [file.header.data_bytes for file in checkpoint.files.values()]
    assert len(sizes) == 4 and max(sizes) <= 200
    assert list(checkpoint.files) == [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
    index = json.loads((tmp_path / "published" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert_same({name: checkpoint.read(name) for name in checkpoint.names}, random_tensors())


def test_a_tensor_larger_than_a_file_has_one_of_its_own() -> None:
    rows = table().weights
    plan = Plan(tuple(Found(row, row.sources[0], row.sources[0].names) for row in rows), {}, ())
    stored = {path: Leaf(leaf.shape, leaf.dtype) for path, leaf in loader.read_state(abstract_state()).items()}
    headers = usual_files(plan, stored, 1).headers
    assert [len(header.entries) for header in headers.values()] == [1] * 16


# -------------------------------------------------------------------------------------------------- refused at once


def test_a_source_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    tensors = random_tensors()
    mixed = tensors | {"layers.0.experts.1.up.weight": np.zeros((4, 6), np.float32)}
    for change, message in (
        ({**tensors, "x": np.zeros(1)}, "tensor x: unexpected"),
        ({**tensors, "layers.0.dense.bias": np.zeros(5, np.float32)}, "wanted shape .6,., got .5,."),
        (mixed, "layers.0.gate_up: wanted one dtype, got .'bfloat16', 'float32'."),
    ):
        write_hf(tmp_path / "hf", change)
        with pytest.raises(ValueError, match=message):
            to_orbax(tmp_path / "hf", tmp_path / "orbax", Silence())
        assert not (tmp_path / "orbax").exists()


def test_a_destination_that_holds_something_is_refused(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", random_tensors())
    (tmp_path / "file").write_text("")
    to_orbax(source, tmp_path / "orbax", Silence())
    for destination in ("hf", "orbax", "file"):
        with pytest.raises(ValueError, match="wanted a new or empty directory"):
            to_orbax(source, tmp_path / destination, Silence())
    with pytest.raises(ValueError, match="wanted a new or empty directory"):
        to_hf(tmp_path / "orbax", source, Silence())


def test_a_linked_tokenizer_is_not_copied_from_elsewhere(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", random_tensors())
    (tmp_path / "secret").write_text("x")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="tokenizer.json: wanted a file within the checkpoint"):
        to_orbax(source, tmp_path / "orbax", Silence())


def test_a_published_directory_is_not_taken_for_orbax(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted an Orbax directory with parameters, got none"):
        to_hf(write_hf(tmp_path / "hf", random_tensors()), tmp_path / "back", Silence())


def edit_record(directory: Path, **fields: Any) -> None:
    record = json.loads((directory / orbax_directory.RECORD).read_text())
    file = record["files"][0]
    file |= {name: value(file[name]) for name, value in fields.items()}
    (directory / orbax_directory.RECORD).write_text(json.dumps(record))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": lambda _: "../../x.safetensors"}, "wanted a plain file name"),
        ({"name": lambda _: "/tmp/x.safetensors"}, "wanted a plain file name"),
        ({"name": lambda _: "config.json"}, "wanted distinct names of safetensors files"),
        ({"data_bytes": lambda _: 2**60}, "bytes of data, which the tensors fill"),
        ({"header": lambda text: text.replace("BF16", "F16")}, "the record has F16 .*, stored is BF16"),
        ({"header": lambda text: text.replace("dense.bias", "dense.boas")}, "layers.0.dense.bias: missing"),
        ({"header": lambda text: text.replace("layers.0.dense.bias", "../../layers.0")}, "no path"),
        ({"header": lambda text: 7}, "wanted a record of published files"),
    ],
)
def test_a_hostile_record_is_refused(tmp_path: Path, fields: Any, message: str) -> None:
    to_orbax(write_hf(tmp_path / "hf", random_tensors()), tmp_path / "orbax", Silence())
    edit_record(tmp_path / "orbax", **fields)
    with pytest.raises(ValueError, match=message):
        to_hf(tmp_path / "orbax", tmp_path / "back", Silence())
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("model-00001-of-00002.safetensors", "../x.safetensors", "wanted a plain file name"),
        ("layers.0.dense.bias", "layers.0.dense.boas", "wanted an index that agrees with the headers"),
        ("weight_map", "map", "wanted an object with a 'weight_map'"),
    ],
)
def test_a_hostile_index_in_the_record_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    to_orbax(write_hf(tmp_path / "hf", random_tensors(), shards=2), tmp_path / "orbax", Silence())
    path = tmp_path / "orbax" / orbax_directory.RECORD
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"index": record["index"].replace(old, new)}))
    with pytest.raises(ValueError, match=message):
        to_hf(tmp_path / "orbax", tmp_path / "back", Silence())


def test_kept_tensors_that_are_lost_are_missed(tmp_path: Path) -> None:
    to_orbax(write_hf(tmp_path / "hf", random_tensors() | SPECIAL), tmp_path / "orbax", Silence())
    (tmp_path / "orbax" / "other.safetensors").unlink()
    with pytest.raises(ValueError, match="tensor vision.flags: missing beside the Orbax checkpoint"):
        to_hf(tmp_path / "orbax", tmp_path / "back", Silence())
