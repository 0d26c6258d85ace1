"""Models on meshes of virtual CPU devices: the numbers of the reference, collectives, pools, refusals, two processes.

The reference stands for one device: `tests/models/test_reference_outputs.py` holds that to the reference.
"""

import json
import os
import socket
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import plan as planning
from hybrid_jax.sharding import ALL, HEADS, TABLE, Layout, best_split, lay_out, make_mesh, place_model, planned_mesh
from kernels_pallas.gdn import GDN
from kernels_pallas.gqa import GQA
from kernels_pallas.kda import KDA
from kernels_pallas.lightning import LIGHTNING
from kernels_pallas.mamba2 import MAMBA2
from kernels_pallas.mla import MLA
from kernels_pallas.op import CONSTANT
from kernels_pallas.short_conv import SHORT_CONV
from models.layers import swiglu
from models.moe import all_experts, some_experts
from tests.models.reference import FOLDER, Fixture

LOGITS = 5e-4  # of the standard deviation of the reference's logits, as for one device
# All-reduces: one behind the embedding, one behind each mixer that divides, one behind each MLP or mixture of experts.
MODELS = {
    "ling2_5:2:2": 13,  # lightning and mla, experts; heads divide over 2 of 4 devices
    "qwen3_5_moe:2": 9,  # gdn and gqa, experts
    "ling3:4": 9,  # kda and mla, experts
    "nemotron_h:2": 8,  # mamba2 and gqa, experts without gate
    "lfm2:4": 9,  # short convolution; keys and values of 2 heads repeated for 4 devices
}
WHOLE = {"falcon_h1:2": 7}  # mamba2 of one group: whole on each device


def environment(devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def results():
    command = [sys.executable, "-m", "tests.hybrid_jax.sharded_model", *MODELS, *WHOLE]
    done = subprocess.run(command, env=environment(4), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip([*MODELS, *WHOLE], map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("model", [*MODELS, *WHOLE])
def test_logits_are_those_of_one_device(results, model):
    assert results[model]["error"] < LOGITS and results[model]["wrong"] == 0


@pytest.mark.parametrize("model", [*MODELS, *WHOLE])
def test_collectives_are_the_expected_ones(results, model):
    found = results[model]
    assert found["collectives"] == {"all-reduce": (MODELS | WHOLE)[model], "all-gather": 1}
    assert found["gathered"] == [found["logits"]]  # not the weights of the head


@pytest.mark.parametrize("model", MODELS)
def test_pools_divide_and_none_is_copied(results, model):
    found = results[model]
    assert found["shares"][-1] == int(model.split(":")[1])  # of heads
    assert found["shares"] in ([found["shares"][-1]], [1, found["shares"][-1]])  # latents are whole on each
    assert found["aliased_bytes"] == found["pool_bytes"] and found["copies"] == 0


def test_what_cannot_divide_is_whole_and_said(results):
    (line,) = results["falcon_h1:2"]["whole"]
    assert line == "state_groups: all 1 are whole on each of 2 devices, they do not divide"
    (line,) = results["lfm2:4"]["whole"]
    assert line.startswith("kv_heads: all 2")


# ---------------------------------------------------------------------------------------------------------- the layout


def built(name):
    return planning.build(FOLDER / name, "float32", "xla")


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        ("ling2_5", (4, 1), "wanted 2 norm_groups to .* got tensor_parallel 4, .* to 1 or 2, .* up to 8 devices"),
        ("qwen3_5", (4, 1), "wanted 2 delta_heads to divide evenly .* to 1 or 2, and with it .* up to 64 devices"),
        ("granitemoehybrid", (4, 1), "wanted 6 expert to divide evenly .* to 1 or 2, and .* up to 2 devices"),
        ("nemotron_h", (1, 3), "wanted 8 expert and 32 mlp to divide .* expert_parallel 3: .* to 1, 2 or 4, and"),
    ],
)
def test_what_must_divide_is_refused_with_the_numbers_that_do(name, parts, message):
    with pytest.raises(ValueError, match=message):
        lay_out(built(name).decoder, planned_mesh(*parts))


def test_experts_divide_further_than_heads():
    decoder = built("qwen3_5_moe").decoder
    assert best_split(decoder, 8) == (2, 4)
    layout = lay_out(decoder, planned_mesh(2, 4))
    experts, heads = ("expert", "model", None, "expert_mlp"), ("model", "heads", None)
    assert layout.spec(experts) == jax.sharding.PartitionSpec(ALL, None, None, None)
    assert layout.local_shape(experts, (8, 64, 2, 16)) == (1, 64, 2, 16)
    assert layout.local_shape(heads, (64, 4, 16)) == (64, 2, 16)
    assert layout.local_shape((), (3, 4)) == (3, 4)


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.iterdir()))
def test_the_table_knows_every_axis_and_divides_each_weight_once(name):
    decoder = built(name).decoder
    axes = [leaf.get_metadata("axes") for _, leaf in nnx.to_flat_state(nnx.state(decoder))]
    axes += [array.axes for spec in decoder.specs for array in spec.arrays]
    assert {axis for names in axes for axis in names if axis is not None} <= TABLE.keys()
    everything = Layout(planned_mesh(2), frozenset(name for name, rule in TABLE.items() if rule.mesh_axes), ())
    assert all(sum(axis is not None for axis in everything.spec(names)) <= 1 for names in axes)


@pytest.mark.parametrize("op", [GDN, GQA, KDA, LIGHTNING, MAMBA2, MLA, SHORT_CONV], ids=lambda op: op.name)
def test_every_op_says_of_each_argument_how_it_divides(op):
    code = op.on("xla").__code__
    names = code.co_varnames[: code.co_argcount]
    assert len(op.shares.arguments) == len(names) and TABLE[op.shares.axis].mesh_axes == HEADS
    assert [name for name, share in zip(names, op.shares.arguments, strict=True) if share == CONSTANT] == ["layer"]
    assert set(op.shares.counts) <= set(code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount])


def test_devices_that_do_not_fall_into_groups_are_refused():
    with pytest.raises(ValueError, match="wanted a multiple of .* = 4 devices, got 6: .* to 1, 2, 3 or 6, exp"):
        make_mesh(range(6), 4)
    with pytest.raises(ValueError, match="wanted 4096 devices .*, got"):
        place_model(built("ling2_5").decoder, 4096)


@pytest.mark.parametrize("tokens", [1, 40])  # few: one by one; many: grouped
def test_shares_of_experts_add_up(tokens):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x, gate_up, down, weights = draw(tokens, 8), draw(12, 8, 2, 6), draw(12, 6, 8), draw(tokens, 2)
    chosen = jnp.asarray(rng.permuted(np.tile(np.arange(12), (tokens, 1)), axis=1)[:, :2], jnp.int32)
    whole = all_experts(x, chosen, weights, gate_up, down, swiglu)
    parts = [
        some_experts(x, chosen, weights, gate_up[4 * p : 4 * p + 4], down[4 * p : 4 * p + 4], swiglu, jnp.int32(p))
        for p in range(3)
    ]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-4, atol=1e-4)
    assert all(jnp.isfinite(part).all() for part in parts)


# ------------------------------------------------------------------------------------------------------- two processes


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def processes():
    started = []

    def start(name, port, index):
        command = [sys.executable, "-m", "tests.hybrid_jax.sharded_engine", name, "4", str(port), "2", str(index)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment(2), **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def first_line(process, timeout_s=240):
    """The first line of results; JAX prints how processes connect, too."""
    watch = threading.Timer(timeout_s, process.kill)
    watch.start()
    for line in process.stdout:
        if line.startswith("{"):
            watch.cancel()
            return json.loads(line)
    raise AssertionError(f"no tokens: {process.stderr.read()[-3000:]}")


@pytest.mark.slow
def test_two_processes_give_the_tokens_of_one_and_end_together(processes):
    port = free_port()
    both = [processes("lfm2", port, index) for index in range(2)]
    expected = Fixture("lfm2").expected
    wanted = [expected[f"greedy_{index}"][:8].tolist() for index in range(2)]
    for process in both:
        found = first_line(process)
        assert found["tokens"] == wanted and found["shares"] == [4]
    both[1].kill()
    both[0].communicate(timeout=60)
    assert both[0].returncode not in (0, None)
