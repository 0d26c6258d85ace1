"""Conversions in a process of their own: killed at any point and gone on with, measured, audited for pickle."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fake_family
import numpy as np
import pytest
from fake_family import HF, random_tensors, write_hf

from hybrid_jax.convert import to_hf, to_orbax
from hybrid_jax.hf_directory import open_hf
from hybrid_jax.progress import Silence

ROOT = Path(__file__).parent.parent.parent
SIZES = HF | {"layers": 5}

# One conversion; `stop` ends the process by force once so many groups are written, -1 never.
JOB = """
import os, signal, sys
from pathlib import Path
import pytest
import fake_family
from hybrid_jax import checkpoint, convert
from hybrid_jax.progress import Silence

def refuse(event, arguments):
    if event.startswith("pickle."):
        os._exit(77)

class Reports(Silence):
    left = int(sys.argv[4])
    def advance(self, size_bytes):
        self.left -= size_bytes > 0
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def peak_mb(reset):
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

sys.addaudithook(refuse)
fake_family.install(pytest.MonkeyPatch())
checkpoint.GROUP_FLOOR_BYTES = int(sys.argv[5])
source, destination = Path(sys.argv[2]), Path(sys.argv[3])
if sys.argv[1] == "load":
    hf = checkpoint.read_config(source)
    state, table = fake_family.abstract_state(hf), fake_family.table(hf)
    before = peak_mb(True)
    checkpoint.load(source, state, table, lambda variable, value: None)
else:
    before = peak_mb(True)
    getattr(convert, sys.argv[1])(source, destination, Reports())
print(peak_mb(False) - before)
"""


def start(job: str, source: Path, destination: Path, stop: int = -1, floor: int = 0) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", JOB, job, str(source), str(destination), str(stop), str(floor)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(job: str, source: Path, destination: Path, stop: int = -1, floor: int = 0) -> float:
    """Run a job to its end; gives the growth of its memory in MiB."""
    with start(job, source, destination, stop, floor) as process:
        out, errors = process.communicate(timeout=300)
    assert process.returncode == (0 if stop < 0 else -signal.SIGKILL), errors
    return float(out or "nan")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fake_family.install(monkeypatch)
    return write_hf(tmp_path / "hf", random_tensors(SIZES) | {"vision.x": np.ones(5)}, SIZES, shards=4)


# ---------------------------------------------------------------------------------------------------------- interrupted


class Counter(Silence):
    """Remembers how much was done before anything was done."""

    def __init__(self) -> None:
        self.done: list[int] = []

    def advance(self, size_bytes: int) -> None:
        self.done.append(size_bytes)


def test_a_killed_conversion_to_orbax_goes_on_where_it_was(source: Path, tmp_path: Path) -> None:
    run("to_orbax", source, tmp_path / "orbax", stop=3)
    pieces = {path: path.stat().st_mtime_ns for path in (tmp_path / "orbax" / "parameters.partial_save").iterdir()}
    assert len(pieces) == 3
    for refuse in (
        lambda: to_hf(tmp_path / "orbax", tmp_path / "back", Silence()),
        lambda: open_hf(tmp_path / "orbax"),
    ):
        with pytest.raises(ValueError, match="wanted"):
            refuse()
    counter = Counter()
    to_orbax(source, tmp_path / "orbax", counter)
    assert counter.done[0] > 0  # found finished
    assert len(counter.done) == 2  # the floor puts all the rest into one group
    to_hf(tmp_path / "orbax", tmp_path / "back", Silence())
    assert contents(tmp_path / "back") == contents(source)
    names = {"config.json", "hybrid_jax.json", "other.safetensors", "parameters"}
    assert {path.name for path in (tmp_path / "orbax").iterdir()} == names


def test_a_killed_conversion_to_files_keeps_the_finished_ones(source: Path, tmp_path: Path) -> None:
    to_orbax(source, tmp_path / "orbax", Silence())
    run("to_hf", tmp_path / "orbax", tmp_path / "back", stop=20)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "back").glob("*.safetensors")}
    assert 0 < len(finished) < 4
    with pytest.raises(ValueError, match="its conversion was interrupted: run it again"):
        open_hf(tmp_path / "back")
    to_hf(tmp_path / "orbax", tmp_path / "back", Silence())
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in finished.items())
    assert contents(tmp_path / "back") == contents(source)


def test_the_rest_of_another_conversion_is_refused(source: Path, tmp_path: Path) -> None:
    run("to_orbax", source, tmp_path / "orbax", stop=2)
    os.utime(source / "model-00001-of-00004.safetensors")
    with pytest.raises(ValueError, match="got one of another source: delete it"):
        to_orbax(source, tmp_path / "orbax", Silence())
    (tmp_path / "orbax" / "conversion.json").write_text("?")
    with pytest.raises(ValueError, match="got one of another source: delete it"):
        to_orbax(source, tmp_path / "orbax", Silence())


@pytest.mark.parametrize("tear", ["before the mark is taken away", "while pieces are merged", "after merging"])
def test_late_interruptions_are_gone_on_with(source: Path, tmp_path: Path, tear: str) -> None:
    orbax = tmp_path / "orbax"
    run("to_orbax", source, orbax, stop=4)
    mark = (orbax / "conversion.json").read_bytes()
    if tear == "while pieces are merged":
        (orbax / "parameters.partial_save" / "state").mkdir()
    else:
        to_orbax(source, orbax, Silence())
        (orbax / "conversion.json").write_bytes(mark)
    if tear == "after merging":
        for name in ("hybrid_jax.json", "other.safetensors", "config.json"):
            (orbax / name).unlink()
    to_orbax(source, orbax, Silence())
    to_hf(orbax, tmp_path / "back", Silence())
    assert contents(tmp_path / "back") == contents(source)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_conversions_survive_kills_at_any_time(source: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    for job, start_at, end_at in (
        ("to_orbax", source, tmp_path / "orbax"),
        ("to_hf", tmp_path / "orbax", tmp_path / "back"),
    ):
        for kills in range(12):
            with start(job, start_at, end_at) as process:
                try:
                    process.communicate(timeout=chance.uniform(1.0, 3.5) + 0.2 * kills)
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
        if (end_at / "conversion.json").exists() or not end_at.exists():
            run(job, start_at, end_at)
    assert contents(tmp_path / "back") == contents(source)


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 20 layers of 16 MiB, 320 MiB in all, largest parameter 8 MiB; as files, as Orbax, and back."""
    root = tmp_path_factory.mktemp("large")
    sizes = HF | {"layers": 20, "width": 2048, "inner": 128, "experts": 8}
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.integers(0, 2**16, tensor.shape, np.uint16).view(tensor.dtype) if tensor.itemsize == 2 else tensor
        for name, tensor in random_tensors(sizes).items()
    }
    write_hf(root / "hf", tensors, sizes, shards=2)
    return root


LARGEST_MB, WHOLE_MB = 8, 320


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_parameter(large: Path) -> None:
    size_mb = sum(path.stat().st_size for path in (large / "hf").iterdir()) / 2**20
    assert WHOLE_MB <= size_mb < WHOLE_MB + 1
    growth = {
        "to Orbax": run("to_orbax", large / "hf", large / "orbax"),
        "to files": run("to_hf", large / "orbax", large / "back"),
        "load files": run("load", large / "hf", large),
        "load Orbax": run("load", large / "orbax", large),
    }
    assert contents(large / "back") == contents(large / "hf")
    shutil.rmtree(large / "back")
    # The constant is TensorStore's: Orbax gives it 100 MB to cache what it reads.
    assert all(grown < 4 * LARGEST_MB + 110 for grown in growth.values()), growth
