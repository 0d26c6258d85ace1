"""What a user installs: the wheel, its dependencies, its command; and the files that make it so."""

import email
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("hybrid_jax", "kernels_pallas", "models")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOT_AT_RUN_TIME = ("torch", "transformers", "hypothesis", "huggingface_hub")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built without a network from a copy of what belongs to it and a little that does not."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in (*PACKAGES, "scripts", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tree)
    (tree / "hybrid_jax" / "demo").mkdir(exist_ok=True)
    (tree / "hybrid_jax" / "demo" / "a_weight.safetensors").write_bytes(b"\0")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, tree)
    return zipfile.ZipFile(next(out.glob("hybrid_jax-*.whl")))


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """The standard output of a command that must succeed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def read_metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


@pytest.mark.slow
def test_wheel_holds_the_three_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {*PACKAGES, f"hybrid_jax-{PROJECT['version']}.dist-info"}


@pytest.mark.slow
def test_wheel_holds_every_module_and_all_data(wheel: zipfile.ZipFile) -> None:
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    wanted = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    held = {name for name in wheel.namelist() if name.split("/")[0] in PACKAGES}
    assert held == wanted | {"hybrid_jax/demo/a_weight.safetensors"}


@pytest.mark.slow
def test_wheel_states_command_licence_and_pythons(wheel: zipfile.ZipFile) -> None:
    metadata = read_metadata(wheel)
    (points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert wheel.read(points).decode().split() == ["[console_scripts]", "hybrid-jax", "=", "hybrid_jax.cli:main"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == "<3.14,>=3.12"
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


@pytest.mark.slow
def test_wheel_needs_no_torch(wheel: zipfile.ZipFile) -> None:
    needs = read_metadata(wheel).get_all("Requires-Dist")
    always = {re.split(r"[^\w-]", need)[0] for need in needs if "extra ==" not in need}
    assert {"jax", "flax", "orbax-checkpoint", "tokenizers", "safetensors"} <= always
    assert not always & {"torch", "transformers", "optax"}
    assert "jax<0.12,>=0.11.2" in needs


@pytest.mark.slow
def test_every_module_imports_without_the_extras(tmp_path: Path) -> None:
    """In a fresh process, where the packages that are not for run time cannot be found."""
    names = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    )
    program = tmp_path / "imports.py"
    program.write_text(
        f"import importlib, sys\nfor name in {NOT_AT_RUN_TIME}: sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nfor name in {names}: importlib.import_module(name)\n"
    )
    run(sys.executable, program, cwd=tmp_path)


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    loaded = run(sys.executable, "-c", "import hybrid_jax, sys; print(*sys.modules)").split()
    assert "hybrid_jax" in loaded
    assert not {name.split(".")[0] for name in loaded} & {"torch", "transformers"}


def test_constraints_pin_every_direct_dependency() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["test"], *extras["train"], *extras["hub"], *extras["tpu"]]
    names = {re.split(r"[^\w-]", need)[0].replace("_", "-") for need in wanted} - {"hybrid-jax"}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert names <= {line.split("==")[0] for line in lines}
    assert "jax==0.11.2" in lines


def find_python(home: Path, path: str, python: str = "") -> subprocess.CompletedProcess[str]:
    environment = {"HOME": str(home), "PATH": path, "PYTHON": python}
    command = ["/bin/sh", str(ROOT / "scripts" / "find_python.sh")]
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)


def put_python(path: Path, answer: str, code: int) -> None:
    """A program in the place of a Python that gives this answer to the script's question."""
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho '{answer}'\nexit {code}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    "place", [".pyenv/versions/3.13.0/bin", ".local/share/uv/python/cpython-3.12.4-linux-x86_64-gnu/bin"]
)
def test_a_python_of_pyenv_or_uv_is_found_beside_an_old_one(tmp_path: Path, place: str) -> None:
    put_python(tmp_path / place / "python3", "/the/new/one", 0)
    put_python(tmp_path / "bin" / "python3", "is Python 3.11", 1)
    found = find_python(tmp_path, f"{tmp_path}/bin")
    assert (found.returncode, found.stdout) == (0, "/the/new/one\n"), found.stderr


def test_without_a_fitting_python_the_reasons_are_given(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    os.symlink(shutil.which("cat") or "/bin/cat", tmp_path / "bin" / "cat")
    put_python(tmp_path / ".pyenv" / "versions" / "3.12.9" / "bin" / "python3", "lacks the modules venv", 1)
    found = find_python(tmp_path, f"{tmp_path}/bin")
    assert (found.returncode, found.stdout) == (2, "")
    for words in (
        "No Python 3.12 or 3.13 found",
        "3.12.9/bin/python3 lacks the modules venv",
        "uv python install 3.12",
    ):
        assert words in found.stderr


def test_the_running_python_is_judged_by_its_own_words(tmp_path: Path) -> None:
    found = find_python(tmp_path, "/bin:/usr/bin", sys.executable)
    assert (found.returncode, found.stdout) == (0, f"{sys.executable}\n"), found.stderr


def test_a_named_python_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    put_python(tmp_path / "bin" / "python3.11", "is Python 3.11", 1)
    found = find_python(tmp_path, os.environ["PATH"], f"{tmp_path}/bin/python3.11")
    assert (found.returncode, found.stdout) == (2, "")
    assert "is no usable Python 3.12 or 3.13" in found.stderr
    assert "is Python 3.11" in found.stderr
