"""The cost of a kernel as read off the compiler's schedule; kernels compiled afresh are no worse than their table."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tpu_topology  # noqa: F401 says that there is no TPU, and that several processes load the library

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "tpu.md"
WORSE = 1.1  # times the bundles of the table
CHECKED = (("gdn", "decode", "v6e:2x2"), ("lightning", "decode", "v6e:2x2"))

USAGE = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    2     2     4     2     1     3     3     2     2     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 2
1 0 4 0 0 3 2 2 1 0
0 0 0 0 0 0 0 0 0 0
1 1 2 0 1 0 0 1 0 0
"""
BUNDLES = """
     0x0   : { nop }
     0x1 LB: > { nop }
     0x2   : >> { nop }
     0x3   : >> { nop }
     0x4 PF: > { nop }
     0x5   : >> { nop }
     0x6   : { nop }
"""


@pytest.fixture(scope="module")
def tpu_cost():
    spec = importlib.util.spec_from_file_location("tpu_cost", ROOT / "scripts" / "tpu_cost.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["tpu_cost"] = module
    spec.loader.exec_module(module)
    return module


def test_a_cost_is_read_off_bundles_and_units(tpu_cost):
    cost = tpu_cost.read_cost("k", USAGE, BUNDLES)
    assert (cost.bundles, cost.empty, cost.spills, cost.fills) == (4, 1, 1, 2)
    assert cost.loops == (2, 1)
    assert cost.used["MXU"] == 2 / 8 and cost.used["VALU"] == 6 / 16 and cost.used["SALU"] == 2 / 8


def test_kernels_are_found_and_plain_fusions_are_not(tpu_cost, tmp_path):
    for name, target in (
        ("17-gdn_decode.1", "tpu_custom_call"),
        ("18-fusion.3", "none"),
        ("19-TLP", "tpu_custom_call"),
    ):
        (tmp_path / f"{name}-70-final_hlo-static-per-bundle-utilization.txt").write_text(USAGE)
        (tmp_path / f"{name}-71-schedule-analysis_final_bundles.txt").write_text(f'custom_call_target="{target}"')
        (tmp_path / f"{name}-72-final_bundles.txt").write_text(BUNDLES)
    assert [cost.kernel for cost in tpu_cost.read_costs(tmp_path)] == ["gdn_decode"]


def test_bytes_of_pools_are_those_that_a_step_moves(tpu_cost):
    """A kernel that reads and writes a quarter of a pool of 4,096 bytes, and takes 32 bytes and gives 64."""
    text = (
        '  %k.1.refs_8_ = (bf16[4,8]{1,0}, f32[8,128]{1,0}) custom-call(%a, %b), custom_call_target="tpu_custom_call", '
        "operand_layout_constraints={bf16[2,8]{1,0}, f32[8,128]{1,0}}, output_to_operand_aliasing={{1}: (1, {})}\n"
    )
    assert tpu_cost.moved_bytes(text, [4096], (0.25, 1.0, 0.25)) == {"k": 32 + 64 + 2048}
    assert tpu_cost.moved_bytes(text, [], (0.25, 1.0, 0.25)) == {"k": 32 + 64 + 8192}


def recorded(kernel, kind_model, sort, chip):
    """Bundles and spills of a line of the table."""
    line = re.compile(
        rf"^\| {kernel} \| {kind_model} \| {sort} \| {chip} \| (\d+) \| \d+ \| [^|]* \| (\d+) \|", re.MULTILINE
    )
    found = line.search(TABLE.read_text())
    assert found, f"docs/tpu.md has no line of {kernel}: make it with scripts/tpu_cost.py"
    return map(int, found.groups())


@pytest.mark.slow
@pytest.mark.parametrize("kind, sort, topology", CHECKED)
def test_a_kernel_is_no_worse_than_its_line(tpu_cost, kind, sort, topology):
    costs = tpu_cost.measure(kind, sort, topology)
    assert costs
    for cost in costs:
        bundles, spills = recorded(cost.kernel, tpu_cost.MODELS[kind], sort, topology.split(":")[0])
        assert cost.bundles <= WORSE * bundles and cost.spills <= max(spills, 1) * WORSE, cost


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gdn", "lightning", "mamba2", "kda"])
def test_decode_compiles_in_a_layer_where_rows_lie_in_tiles_of_16(kind):
    """A TPU7x lays the rows of a layer's activations so; a kernel alone, as a program of its own, is given others."""
    command = [sys.executable, str(ROOT / "scripts" / "tpu_cost.py"), "compile-layer", kind, "decode", "tpu7x:2x2x1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and f"{kind}_decode" in done.stdout, done.stderr[-2000:]
