"""The rules of the house hold in this checkout, and each of them fails on a tree that breaks it."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import house_rules as house
import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parent.parent
Rule = Callable[[Path], Iterator[str]]

PYPROJECT = '[project]\ndependencies = ["jax>=0.11.2,<0.12", "flax", "orbax-checkpoint"]\n'
DOC = '"""Says what it is for."""\n'


def lines_of_code(lines: int, name: str = "f") -> str:
    """A function of so many lines."""
    return f'def {name}():\n    """Counts."""\n' + "    x = 1\n" * (lines - 2)


# A tree that keeps every rule, with what comes close to breaking each.
GOOD = {
    "pyproject.toml": PYPROJECT,
    "constraints.txt": "# what is tested\njax==0.11.2\nml-dtypes==0.6.0\n\nnvidia-cuda-cccl==13.3.5.0.6\n",
    "README.md": "During training a string is ringed. See the documentation.\n",
    "kernels_pallas/__init__.py": DOC,
    "kernels_pallas/gdn/__init__.py": DOC,
    "kernels_pallas/gdn/gpu.py": DOC + "import jax\nimport kernels_pallas.op\n" + lines_of_code(150),
    "kernels_pallas/op.py": DOC + "import functools\n" + "x = 1\n" * 698,
    "models/decoder.py": DOC + "from flax import nnx\nimport jax.numpy as jnp\nfrom kernels_pallas import op\n",
    "models/qwen3.py": DOC + "from . import decoder\n",
    "models/bailing_moe_v2_5.py": DOC,
    "tests/models/test_bailing_moe_v2_5.py": DOC,
    "hybrid_jax/config.py": DOC + "import dataclasses\nfrom hybrid_jax.request import Request\n",
    "hybrid_jax/request.py": DOC + "# A string; during; Sterling; bring.\n",
    "hybrid_jax/pool.py": DOC + "from . import request\n",
    "hybrid_jax/cache.py": DOC
    + "import jax\nimport orbax.checkpoint\nfrom models import decoder\n"
    + lines_of_code(60),
    "hybrid_jax/llm.py": DOC + "class LLM:\n" + '    """The door."""\n    def _f(self, *args): ...\n',
    "hybrid_jax/short.py": DOC + "def _f(): ...\ndef _g(): ...\ndef _h(): ...\n",
    "scripts/train.py": DOC + "import optax\nimport torch\nfrom hybrid_jax import llm\n",
    "scripts/launch.py": DOC
    + 'import os\nos.environ["JAX_PLATFORMS"] = "cpu"\nos.environ.setdefault("XLA_FLAGS", "")\n',
    "scripts/load.py": DOC + "import numpy\nnumpy.load('x', allow_pickle=False)\n",
    "hybrid_jax/demo/tokenizer.json": '{"TO' + 'DO": 7}\n',
    "tests/test_x.py": "import hybrid_jax\ndef test_x(**kwargs): ...\n",
}

UNFINISHED = "# TO" + "DO: later\n"
BELOW_HOME = "/ro" + "ot/models"
INDEX = "https://py" + "pi.org/simple"
BESIDE = "." * 2 + "/shared/specs"

# rule, file, text that replaces it, the place that must be named
BREACHES: list[tuple[Rule, str, str, str]] = [
    (house.imports_go_down, "models/decoder.py", DOC + "from hybrid_jax import pool\n", "models/decoder.py:2"),
    (
        house.imports_go_down,
        "kernels_pallas/op.py",
        DOC + "def f():\n    import models.moe\n",
        "kernels_pallas/op.py:3",
    ),
    (house.imports_go_down, "hybrid_jax/llm.py", DOC + "from scripts import train\n", "hybrid_jax/llm.py:2"),
    (house.imports_go_down, "scripts/train.py", DOC + "import tests.cases\n", "scripts/train.py:2"),
    (house.libraries_fit_the_layer, "kernels_pallas/op.py", DOC + "import flax.nnx\n", "kernels_pallas/op.py:2"),
    (house.libraries_fit_the_layer, "models/decoder.py", DOC + "import safetensors\n", "models/decoder.py:2"),
    (house.libraries_are_declared, "hybrid_jax/llm.py", DOC + "def f():\n    import torch\n", "hybrid_jax/llm.py:3"),
    (house.libraries_are_declared, "hybrid_jax/llm.py", DOC + "from transformers import x\n", "hybrid_jax/llm.py:2"),
    (
        house.host_wing_is_free_of_devices,
        "hybrid_jax/pool.py",
        DOC + "import jax.numpy as jnp\n",
        "hybrid_jax/pool.py:2",
    ),
    (
        house.host_wing_is_free_of_devices,
        "hybrid_jax/config.py",
        DOC + "from models import x\n",
        "hybrid_jax/config.py:2",
    ),
    (
        house.host_wing_is_free_of_devices,
        "hybrid_jax/request.py",
        DOC + "from . import cache\n",
        "hybrid_jax/request.py:2",
    ),
    (house.host_wing_is_free_of_devices, "hybrid_jax/scheduler.py", "import hybrid_jax.cache\n", "scheduler.py:1"),
    (house.files_are_short, "hybrid_jax/llm.py", DOC + "x = 1\n" * 400, "hybrid_jax/llm.py:401"),
    (house.files_are_short, "kernels_pallas/op.py", "x = 1\n" * 701, "kernels_pallas/op.py:701"),
    (house.functions_are_short, "hybrid_jax/llm.py", DOC + lines_of_code(61), "hybrid_jax/llm.py:2"),
    (house.functions_are_short, "kernels_pallas/gdn/xla.py", DOC + lines_of_code(61), "kernels_pallas/gdn/xla.py:2"),
    (house.functions_are_short, "kernels_pallas/gdn/gpu.py", DOC + lines_of_code(151), "kernels_pallas/gdn/gpu.py:2"),
    (house.functions_are_short_in_the_median, "hybrid_jax/short.py", lines_of_code(15) * 9, "median function of 12"),
    (house.engine_names_no_kind, "hybrid_jax/llm.py", DOC + "if kind == 'gdn': ...\n", "hybrid_jax/llm.py:2"),
    (house.engine_names_no_kind, "hybrid_jax/cli.py", DOC + "# as in Ling 2.5\n", "hybrid_jax/cli.py:2"),
    (house.engine_names_no_kind, "hybrid_jax/llm.py", DOC + "KimiLinear = Qwen3 = 1\n", "hybrid_jax/llm.py:2"),
    (house.engine_names_no_kind, "hybrid_jax/mamba2.py", DOC, "hybrid_jax/mamba2.py:0"),
    (house.files_have_nouns, "hybrid_jax/cache_manager.py", DOC, "hybrid_jax/cache_manager.py"),
    (house.files_have_nouns, "models/utils/norm.py", DOC, "models/utils/norm.py"),
    (house.files_have_nouns, "tests/engine_v2.py", DOC, "tests/engine_v2.py"),
    (house.files_have_nouns, "models/common.py", DOC, "models/common.py"),
    (house.classes_have_nouns, "hybrid_jax/llm.py", DOC + "class CacheManager: ...\n", "hybrid_jax/llm.py:2"),
    (house.classes_have_nouns, "models/decoder.py", DOC + "class BaseModel: ...\n", "models/decoder.py:2"),
    (house.nobody_asks_for_attributes, "models/decoder.py", DOC + "x = hasattr(1, 'y')\n", "models/decoder.py:2"),
    (house.nothing_is_run_from_data, "hybrid_jax/llm.py", DOC + "import pickle\n", "hybrid_jax/llm.py:2"),
    (house.nothing_is_run_from_data, "hybrid_jax/llm.py", DOC + "eval('1')\n", "hybrid_jax/llm.py:2"),
    (house.nothing_is_run_from_data, "scripts/train.py", DOC + "exec('1')\n", "scripts/train.py:2"),
    (house.nothing_is_run_from_data, "scripts/load.py", DOC + "f(\n    allow_pickle=True)\n", "scripts/load.py:3"),
    (house.parameters_are_named, "models/decoder.py", DOC + "def f(**kwargs): ...\n", "models/decoder.py:2"),
    (house.parameters_are_named, "models/decoder.py", DOC + "f = lambda **more: 1\n", "models/decoder.py:2"),
    (house.no_environment_variables_of_our_own, "scripts/launch.py", "import os\nos.getenv('OURS')\n", "launch.py:2"),
    (house.no_environment_variables_of_our_own, "scripts/launch.py", "import os\nos.environ['OURS']\n", "launch.py:2"),
    (house.no_environment_variables_of_our_own, "scripts/launch.py", "from os import environ\n", "launch.py:1"),
    (
        house.no_environment_variables_of_our_own,
        "scripts/launch.py",
        "import os\nx = os.environ['JAX_X']\ny = os.environ[x]\n",
        "scripts/launch.py:3",
    ),
    (house.everything_public_is_described, "models/decoder.py", "import jax\n", "models/decoder.py:1"),
    (house.everything_public_is_described, "models/__init__.py", "", "models/__init__.py:1"),
    (house.everything_public_is_described, "models/decoder.py", DOC + "def f(): ...\n", "models/decoder.py:2"),
    (house.everything_public_is_described, "models/decoder.py", DOC + "class A: ...\n", "models/decoder.py:2"),
    (house.nothing_is_left_to_do, "models/decoder.py", DOC + UNFINISHED, "models/decoder.py:2"),
    (house.nothing_is_left_to_do, "docs/performance.md", "measured\n" + UNFINISHED, "docs/performance.md:2"),
    (house.nothing_tells_of_a_machine, "README.md", f"ls {BELOW_HOME}\n", "README.md:1"),
    (house.nothing_tells_of_a_machine, "constraints.txt", f"--index-url {INDEX}\n", "constraints.txt:1"),
    (house.nothing_tells_of_a_machine, "hybrid_jax/demo/config.json", f'"{BELOW_HOME}"\n', "config.json:1"),
    (house.nothing_tells_of_a_machine, ".ci/run", f"cat {BESIDE}\n", ".ci/run:1"),
    (house.versions_are_pinned_in_one_file, "constraints.txt", "jax>=0.11\n", "constraints.txt:1"),
    (house.versions_are_pinned_in_one_file, "constraints.txt", "jax==0.11.2 --hash=sha256:0\n", "constraints.txt:1"),
    (house.versions_are_pinned_in_one_file, "constraints.txt", "jax @ file:///x.whl\n", "constraints.txt:1"),
    (house.versions_are_pinned_in_one_file, "uv.lock", "", "uv.lock:1"),
]


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_this_checkout_keeps(rule: Rule) -> None:
    breaches = list(rule(ROOT))
    if breaches:
        pytest.fail("\n".join([f"{rule.__doc__}", *breaches]), pytrace=False)


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_near_misses_are_no_breach(rule: Rule, tmp_path: Path) -> None:
    assert list(rule(write_tree(tmp_path, GOOD))) == []


@pytest.mark.parametrize("rule, name, text, place", BREACHES, ids=lambda value: getattr(value, "__name__", None))
def test_a_breach_is_named(rule: Rule, name: str, text: str, place: str, tmp_path: Path) -> None:
    breaches = list(rule(write_tree(tmp_path, GOOD | {name: text})))
    assert len(breaches) == 1, breaches
    assert place in breaches[0]


def test_every_rule_is_seen_to_fail() -> None:
    assert {rule for rule, *_ in BREACHES} == set(house.RULES)


def test_git_decides_what_belongs_to_the_tree(tmp_path: Path) -> None:
    write_tree(tmp_path, {".gitignore": "/out/\n", "out/utils.py": "", "new.py": "", "deleted.py": "", ".ci/run": ""})
    for command in (["init", "-q"], ["add", "deleted.py"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "deleted.py").unlink()
    names = [path.relative_to(tmp_path).as_posix() for path in house.tracked_files(tmp_path)]
    assert names == [".ci/run", ".gitignore", "new.py"]


def test_caches_and_hidden_folders_do_not_belong_to_a_tree_without_git(tmp_path: Path) -> None:
    write_tree(tmp_path, {".venv/x.py": "", "a/__pycache__/x.py": "", ".ci/run": "", ".gitignore": "", "a/x.py": ""})
    names = [path.relative_to(tmp_path).as_posix() for path in house.tracked_files(tmp_path)]
    assert names == [".ci/run", ".gitignore", "a/x.py"]


def test_unreadable_bytes_are_not_searched(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe" + BELOW_HOME.encode())
    assert list(house.nothing_tells_of_a_machine(tmp_path)) == []


def test_types_are_not_promoted_in_tests() -> None:
    with pytest.raises(ValueError, match="no available implicit dtype promotion"):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.bfloat16)


def test_ranks_are_not_promoted_in_tests() -> None:
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 2)) + jnp.ones(2)


def test_products_are_exact_and_run_on_the_platform_asked_for(pytestconfig: pytest.Config) -> None:
    assert jax.config.jax_default_matmul_precision == "highest"
    assert jax.default_backend() == pytestconfig.getoption("--device")
