"""What `inspect` and `verify` say of whole and of damaged checkpoints."""

import io
import json
from pathlib import Path

import fake_family
import numpy as np
import pytest
from fake_family import HF, INT8, abstract_state, quantize, random_tensors, table, write_hf
from rich.console import Console

from hybrid_jax.checkpoint import load, save
from hybrid_jax.convert import to_orbax
from hybrid_jax.hf_directory import INDEX
from hybrid_jax.inspection import Verification, inspect, render_inspection, render_verification, verify
from hybrid_jax.progress import Silence, show_progress


@pytest.fixture(autouse=True)
def _family(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_family.install(monkeypatch)


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def text(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_a_published_directory_is_described(tmp_path: Path) -> None:
    write_hf(tmp_path, quantize(random_tensors()) | {"vision.x": np.zeros(3, np.float32)}, HF | INT8, shards=2)
    (tmp_path / "more[red].safetensors").write_bytes(b"")
    found = inspect(tmp_path)
    assert (found.architecture, found.family, found.form) == ("FakeForCausalLM", "fake_family", "safetensors")
    assert (found.total, found.parameters) == (2 * (36 + 6 + 3 * 6 * 2 * 4), 6)
    assert found.dtypes == {"int8": (14, 360), "bfloat16": (14, 120), "float32": (3, 60)}
    assert (found.other_spellings, found.left_out, found.problems) == (0, 1, 0)
    assert found.beside == ("more[red].safetensors",)
    assert found.size_bytes == sum(path.stat().st_size for path in tmp_path.glob("model-*.safetensors"))
    render_inspection(found, out := console())
    for word in ("FakeForCausalLM", "372 numbers in 6 arrays", "14 tensors, 360 bytes", "more[red]", "usual"):
        assert word in text(out)


def test_the_spelling_is_named(tmp_path: Path) -> None:
    found = inspect(write_hf(tmp_path, random_tensors(packed=True)))
    assert found.other_spellings == 2
    render_inspection(found, out := console())
    assert "other for 2 arrays" in text(out)


def test_an_orbax_directory_is_described(tmp_path: Path) -> None:
    to_orbax(write_hf(tmp_path / "hf", random_tensors() | {"vision.x": np.zeros(3)}), tmp_path / "orbax", Silence())
    found = inspect(tmp_path / "orbax")
    assert (found.form, set(found.files)) == ("Orbax", {"parameters", "other.safetensors"})
    assert found.dtypes == {"bfloat16": (4, 720), "float32": (2, 48)}
    assert verify(tmp_path / "orbax") == Verification(tmp_path / "orbax", "Orbax", 6, ())


def test_a_config_by_itself_is_described_but_is_no_checkpoint(tmp_path: Path) -> None:
    write_hf(tmp_path, random_tensors())
    found = inspect(tmp_path / "config.json")
    assert (found.form, found.total, found.size_bytes) == ("config", 372, 0)
    assert verify(tmp_path / "config.json").problems == (
        f"{tmp_path / 'config.json'}: wanted a checkpoint directory, got a config by itself",
    )


def test_a_whole_checkpoint_has_no_problems(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", random_tensors(), shards=3)
    save(tmp_path / "trained", HF, load(source, abstract_state(), table()))
    assert verify(source) == Verification(source, "safetensors", 16, ())
    assert verify(tmp_path / "trained").problems == ()
    render_verification(verify(source), out := console())
    assert text(out) == f"{source}: whole, 16 tensors (safetensors)\n"


def test_every_problem_is_gathered(tmp_path: Path) -> None:
    tensors = random_tensors()
    del tensors["layers.0.dense.bias"]
    tensors |= {"layers.9.x": np.zeros(1), "layers.1.dense.weight": np.zeros((5, 6), np.float32)}
    write_hf(tmp_path, tensors, shards=3)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"] |= {"more": "model-00001-of-00003.safetensors", "[bold]": "model-00004-of-00003.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / "conversion.json").write_text("{}")
    problems = verify(tmp_path).problems
    wanted = [
        "model-00004-of-00003.safetensors: wanted a file of the checkpoint",
        "tensor more: the index has it in model-00001-of-00003.safetensors, which lacks it",
        f"{tmp_path}: wanted a complete checkpoint, its conversion was interrupted",
        "tensor layers.0.dense.bias: missing",
        "tensor layers.9.x: unexpected",
        "tensor layers.1.dense.weight: wanted shape (6, 6), got (5, 6)",
    ]
    assert len(problems) == len(wanted)
    assert all(problem.startswith(start) for problem, start in zip(problems, wanted, strict=True))
    render_verification(verify(tmp_path), out := console())
    assert f"{tmp_path}: 6 problem(s)\n  model-00004" in text(out)
    assert inspect(tmp_path).problems == 6


def test_an_unknown_config_is_the_one_problem(tmp_path: Path) -> None:
    write_hf(tmp_path, random_tensors(), HF | {"quantization_config": {"quant_method": "awq"}})
    (problem,) = verify(tmp_path).problems
    assert "'awq'" in problem
    (tmp_path / "config.json").unlink()
    (problem,) = verify(tmp_path).problems
    assert "config.json: wanted a file of the checkpoint, it is missing" in problem


@pytest.mark.parametrize("damage", ["hybrid_jax.json", "parameters/_CHECKPOINT_METADATA"])
def test_a_damaged_orbax_directory_is_a_problem(tmp_path: Path, damage: str) -> None:
    to_orbax(write_hf(tmp_path / "hf", random_tensors()), tmp_path / "orbax", Silence())
    (tmp_path / "orbax" / damage).rename(tmp_path / "orbax" / "elsewhere")
    if damage == "hybrid_jax.json":
        (tmp_path / "orbax" / damage).write_text("{}")
    (problem,) = verify(tmp_path / "orbax").problems
    assert "wanted a record" in problem or "got none that is complete" in problem


def test_a_record_that_does_not_fit_is_a_problem(tmp_path: Path) -> None:
    to_orbax(write_hf(tmp_path / "hf", random_tensors()), tmp_path / "orbax", Silence())
    record = tmp_path / "orbax" / "hybrid_jax.json"
    record.write_text(record.read_text().replace("BF16", "F16"))
    problems = verify(tmp_path / "orbax").problems
    assert len(problems) == 14 and "the record has F16 (6, 6), stored is BF16 (6, 6)" in problems[0]


def test_many_problems_are_printed_shortly(tmp_path: Path) -> None:
    found = Verification(tmp_path, "safetensors", 0, tuple(f"problem {number}" for number in range(2000)))
    render_verification(found, out := console())
    assert "  problem 49\n  and 1950 more\n" in text(out) and "problem 50" not in text(out)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown(terminal: bool) -> None:
    out = Console(file=io.StringIO(), width=200, force_terminal=terminal)
    with show_progress(out) as progress:
        for what in ("parameters", "files"):
            progress.start(what, 2_000_000_000)
            for _ in range(40):
                progress.advance(50_000_000)
    printed = text(out)
    if terminal:
        assert "parameters" in printed and "files" in printed and "2.0/2.0 GB" in printed
    else:
        tenths = [f"{what}: {tenth}0 %" for what in ("parameters", "files") for tenth in range(1, 11)]
        tenths.insert(10, "files: 2.00 GB")
        assert printed.splitlines() == ["parameters: 2.00 GB", *tenths]
