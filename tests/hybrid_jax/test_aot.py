"""Steps compiled for TPUs that are not there: bytes, collectives, the verdict and the messages of the command."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hybrid_jax.aot import Program, Report
from hybrid_jax.aot_report import describe, to_table
from hybrid_jax.chips import CHIPS, open_slice
from hybrid_jax.hub import find_model
from hybrid_jax.memory import Limits, plan_memory
from hybrid_jax.plan import build, measure
from tests.tpu_topology import TOPOLOGIES

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = ("--max-num-seqs", 8, "--max-model-len", 256, "--max-num-batched-tokens", 128)


def run(*arguments, **environment):
    own = (f"{name}={value}" for name, value in environment.items())
    command = ["env", "-u", "TPU_LIBRARY_PATH", *own]  # JAX sets it where it has loaded the library
    command += [sys.executable, "-m", "hybrid_jax.cli", "aot", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)


# -------------------------------------------------------------------------------------------------------------- slices


@pytest.mark.parametrize("topology", [*TOPOLOGIES, "v6e:16x16"])
def test_slices_have_the_chips_of_the_table(topology):
    found = open_slice(topology)
    assert found.chip.name.lower() == topology.split(":")[0]
    assert len(found.devices) == {"v6e:16x16": 256, "tpu7x:2x2x1": 8}.get(topology, 4)


@pytest.mark.parametrize("topology", ["v9z:2x2", "v6e:3x1"])
def test_an_unknown_topology_is_one_message(topology):
    with pytest.raises(ValueError, match=f"wanted a topology such as .* got '{topology}'"):
        open_slice(topology)


def test_without_libtpu_the_message_names_the_extra(tmp_path):
    (tmp_path / "libtpu.py").write_text("raise ImportError('none')\n")
    done = run("demo", "--topology", "v6e:2x2", PYTHONPATH=f"{tmp_path}:{Path(__file__).parents[2]}")
    assert done.returncode == 2 and "pip install 'hybrid-jax[tpu]'" in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------------------- verdict


@pytest.fixture(scope="module")
def report():
    sizes = measure(build(find_model("demo"), "bfloat16", "xla"))
    chip = CHIPS["TPU v6 lite"]
    plan = plan_memory(sizes, chip.memory_bytes, Limits(max_num_seqs=4))
    program = Program("decode", "4 rows", 1.0, 10, plan.total_bytes - plan.temporaries_bytes, temporaries_bytes=10**9)
    parts = (plan.weights_bytes, plan.pages_bytes, plan.slots_bytes, plan.rows_bytes)
    return Report("demo", "v6e:2x2", chip, 1, {"mla": "xla"}, plan, *parts, (program,), ())


def test_what_fits_is_said(report):
    assert report.fits and report.deviation == 0 and report.needed_bytes == report.held_bytes + 10**9
    assert describe(report)[-1] == "It fits." and "within 3%" in describe(report)[-2]
    assert to_table(report).row_count == 8 and json.dumps(report.to_json())


def test_what_does_not_fit_is_said(report):
    (program,) = report.programs
    large = replace(report, programs=(replace(program, temporaries_bytes=report.chip.memory_bytes),))
    refused = replace(report, programs=(program, replace(program, sort="prefill", refused="Used 40G of 31G hbm")))
    for found in (large, refused):
        assert not found.fits and describe(found)[-1] == "It does NOT fit."
    assert "Used 40G of 31G hbm" in "\n".join(describe(refused))
    far = replace(report, programs=(replace(program, argument_bytes=int(program.argument_bytes * 1.05)),))
    assert "NOT within 3%" in "\n".join(describe(far))


def test_weights_that_no_plan_holds_end_with_code_1():
    done = run(CONFIGS / "Qwen3.5-122B-A10B.json", "--topology", "v6e:2x2")
    assert done.returncode == 1 and "It does NOT fit: wanted at least" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tensor-parallel", 8], "wanted 8 devices of v6e:2x2, which has 4"),
        (["--max-model-len", 2000], "wanted max_model_len up to 1024"),
    ],
)
def test_bad_usage_ends_with_code_2(arguments, message):
    done = run("demo", "--topology", "v6e:2x2", *arguments)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


# ----------------------------------------------------------------------------------------------------------- compiling


@pytest.mark.slow
def test_the_command_compiles_the_demo_for_two_chips():
    done = run("demo", "--topology", "v6e:2x2", "--tensor-parallel", 2, "--json", *SMALL)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["fits"] and [program["sort"] for program in data["programs"]] == ["decode", "prefill"]
    for program in data["programs"]:
        counts = {one["kind"]: one["count"] for one in program["collectives"]}
        assert counts == {"all-reduce": 2 * 8 + 1, "all-gather": 1}  # layers, embedding; logits
        assert program["aliased_bytes"] >= data["pages_bytes"] + data["slots_bytes"] + data["rows_bytes"]
