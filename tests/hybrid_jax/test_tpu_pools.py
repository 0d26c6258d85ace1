"""Law 6 for TPUs that are not there: a step updates its pools where they lie, and copies none, nor weights of experts.

The programs are those of an engine, as `hybrid_jax.aot` compiles them, of models cut to two small layers: one that
keeps slots, one that keeps pages.
"""

import json
import re
from pathlib import Path

import pytest

from hybrid_jax.aot import compile_program, lower_program, prepare
from hybrid_jax.chips import open_slice
from hybrid_jax.config import EngineConfig
from tests import tpu_topology  # noqa: F401 says that there is no TPU, before the library is loaded

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = {"hidden_size": 256, "vocab_size": 512, "num_hidden_layers": 2, "intermediate_size": 128}
EXPERTS = {"moe_intermediate_size": 128, "num_experts_per_tok": 2}
KIMI_EXPERTS = {"moe_intermediate_size": 128, "num_experts_per_token": 2, "num_experts": 4}
DELTA = {"full_attn_layers": [2], "kda_layers": [1], "head_dim": 128, "num_heads": 4, "short_conv_kernel_size": 4}
MODELS = {
    "gqa gdn": (
        "Qwen3-Next-80B-A3B-Instruct",
        EXPERTS | {"full_attention_interval": 2, "num_experts": 4, "shared_expert_intermediate_size": 128,
                   "linear_num_key_heads": 4, "linear_num_value_heads": 8, "num_attention_heads": 8},
    ),
    "mla kda": (
        "Kimi-Linear-48B-A3B",
        KIMI_EXPERTS | {"linear_attn_config": DELTA, "num_attention_heads": 4, "num_key_value_heads": 4},
    ),
    "gqa lightning": (
        "MiniMax-Text-01",
        {"attn_type_list": [0, 1], "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4},
    ),
    "gqa mamba2": (
        "Nemotron-3-Nano-30B-A3B-BF16",
        EXPERTS | {"hybrid_override_pattern": "M*", "n_routed_experts": 4, "moe_shared_expert_intermediate_size": 128,
                   "mamba_num_heads": 16, "num_attention_heads": 8},
    ),
}  # fmt: skip
ENGINE = {"max_num_seqs": 8, "max_model_len": 4096, "max_num_batched_tokens": 256, "pages": 4097, "slots": 16385}


def subject(name, topology, devices=1, **changed):
    """The abstract model on one chip of a topology, or divided over several."""
    config, cut = MODELS[name]
    hf = json.loads((CONFIGS / f"{config}.json").read_text()) | SMALL | cut | changed
    return prepare(hf, name, open_slice(topology), EngineConfig(**ENGINE, tensor_parallel=devices))


def check(found, sort):
    program = compile_program(found, sort)
    assert program.refused is None
    assert program.pool_copies == 0
    one = found.plan
    assert program.aliased_bytes >= one.pages_bytes + one.slots_bytes
    return program


@pytest.mark.slow
@pytest.mark.parametrize("sort", ["decode", "prefill"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_copies_no_pool(name, sort):
    check(subject(name, "v6e:2x2"), sort)


@pytest.mark.slow
def test_nor_does_a_step_that_two_chips_share():
    """One head of keys and values is left to each: a row of a page stays one row of lanes."""
    found = subject("gqa gdn", "v5e:2x2", devices=2)
    program = check(found, "decode")
    assert program.argument_bytes < 1.02 * (found.plan.total_bytes - found.plan.temporaries_bytes)


@pytest.mark.parametrize("name", MODELS)
def test_no_decode_kernel_lets_a_pool_be_taken_into_vmem(name):
    """Each pool that it updates is told to lie in HBM: those of few slots would be taken there and back in between."""
    text = lower_program(subject(name, "v6e:2x2"), "decode")[0].as_text()
    kernels = [line for line in text.splitlines() if re.search(r'kernel_name = "\w+_decode"', line)]
    assert kernels
    for line in kernels:
        assert line.count("output_tuple_indices") == line.count(r"{\22color\22:0,\22shape_index\22:[")


WIDE = {"hidden_size": 1024, "num_attention_heads": 8}
MOST_BYTES = 32 * 2**20  # of temporaries; a layer's first kernels of experts are 64 MiB or 116 MiB


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, experts",
    [
        ("gqa gdn", {"num_experts": 32, "moe_intermediate_size": 512, "num_experts_per_tok": 4}),
        (
            "gqa mamba2",
            {"n_routed_experts": 32, "moe_intermediate_size": 1856, "num_experts_per_tok": 4,
             "hybrid_override_pattern": "M*E", "num_hidden_layers": 3},
        ),
    ],
)  # fmt: skip
def test_a_decode_step_copies_no_kernels_of_experts(name, experts):
    """Two matrices side by side, and matrices whose width is no multiple of 128 lanes."""
    program = check(subject(name, "v6e:2x2", **WIDE, **experts), "decode")
    assert program.temporaries_bytes < MOST_BYTES


def test_full_attention_takes_the_kernels_of_a_tpu():
    """Rows of latents fill whole registers there, and the plan counts them."""
    found = subject("mla kda", "v6e:2x2")
    assert {route.kind: route.backend for route in found.model.routing.routes} == {"kda": "tpu", "mla": "tpu"}
    assert found.sizes.token_bytes == 640 * 2
    routes = subject("gqa mamba2", "v6e:2x2").model.routing.routes
    assert {route.backend for route in routes} == {"tpu"}
