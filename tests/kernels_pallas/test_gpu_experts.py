"""Experts by their Mosaic GPU kernels, interpreted: equal to the definition, and to each token alone.

Small shapes, but the widths that the kernels want. Lowering for CUDA needs no GPU: it is tried at the sizes of models.
"""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.cases.experts import Sizes, experts_case
from kernels_pallas.experts import EXPERTS, choose_backend, groups, xla
from kernels_pallas.experts.groups import FEW_ROWS, compare_choices, count_choices, group_choices, group_rows, one_token
from kernels_pallas.mosaic_gpu import interpreted
from models.layers import ClampedSwiGLU, swiglu
from models.squared_relu import squared_relu

CONFIGS = Path(__file__).parents[1] / "configs"
BF16 = jnp.bfloat16
TOLERANCE = 4e-3  # relative L2: the inner activations and the outputs are each rounded to bfloat16, 2**-9 of a value
WIDTH = 128


def draw(seed, *shape, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, BF16)


def choose(tokens, each, experts, seed=0):
    """Distinct experts for each token."""
    return jnp.asarray(np.random.default_rng(seed).random((tokens, experts)).argsort(-1)[:, :each], jnp.int32)


def ungated(inner):
    return squared_relu(inner[:, 0])


def make(tokens, each, experts, inner=64, parts=2):
    """Tokens, their choices, and weights that are NaN for the experts that nobody chose."""
    chosen = choose(tokens, each, experts)
    unused = ~jnp.isin(jnp.arange(experts), chosen)
    gate_up = draw(1, experts, WIDTH, parts, inner, scale=0.1)
    down = draw(2, experts, inner, WIDTH, scale=0.1)
    gate_up = jnp.where(unused[:, None, None, None], jnp.nan, gate_up)
    return draw(3, tokens, WIDTH), chosen, gate_up, jnp.where(unused[:, None, None], jnp.nan, down)


def run(part, activate, *arguments):
    """`whole` or `share` of the gpu backend, interpreted."""
    function = getattr(EXPERTS["gpu"], part)
    with interpreted():
        return jax.jit(lambda *a: function(*a, activate))(*arguments)


def exact(x, chosen, gate_up, down, activate):
    """By a loop over choices, in float64 but for the activation."""
    x, gate_up, down = (np.asarray(a, np.float64) for a in (x, gate_up, down))
    out = np.zeros((*chosen.shape, x.shape[1]))
    for token, row in enumerate(np.asarray(chosen)):
        for place, expert in enumerate(row):
            if 0 <= expert < len(down):
                inner = np.einsum("d,dcf->cf", x[token], gate_up[expert])
                inner = np.asarray(activate(jnp.asarray(inner, jnp.float32)[None])[0], np.float64)
                out[token, place] = inner @ down[expert]
    return out


def error(got, want):
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize(
    ("tokens", "each", "experts"), [(1, 3, 5), (3, 2, 4), (8, 2, 4), pytest.param(19, 2, 3, marks=pytest.mark.slow)]
)
def test_outputs_are_the_definition(tokens, each, experts):
    arguments = make(tokens, each, experts)
    assert error(run("whole", swiglu, *arguments), exact(*arguments, swiglu)) < TOLERANCE


@pytest.mark.parametrize("activate", [ClampedSwiGLU(0.3), ungated])
def test_any_activation(activate):
    arguments = make(3, 2, 4, inner=192, parts=1 if activate is ungated else 2)
    assert error(run("whole", activate, *arguments), exact(*arguments, activate)) < TOLERANCE


@pytest.mark.parametrize("rows", [8, 32])
def test_share_gives_zeros_for_experts_elsewhere(monkeypatch, rows):
    monkeypatch.setattr(groups, "group_rows", lambda *sizes: rows)
    x, chosen, gate_up, down = make(11, 3, 9)
    chosen = chosen - 3  # numbers from -3 to 5
    gate_up, down = (jnp.nan_to_num(a[:4]) for a in (gate_up, down))
    want = exact(x, chosen, gate_up, down, swiglu)
    elsewhere = np.asarray((chosen < 0) | (chosen >= 4))
    got = run("share", swiglu, x, chosen, gate_up, down)
    assert error(got, want) < TOLERANCE and elsewhere.any()
    assert (np.asarray(got, np.float32)[elsewhere] == 0).all()
    assert error(xla.share(x, chosen, gate_up, down, swiglu), want) < 2 * TOLERANCE


@pytest.mark.slow
def test_many_tokens():
    arguments = make(150, 2, 3, inner=128)
    assert group_rows(150, 2, 3) == 128
    assert error(run("whole", swiglu, *arguments), exact(*arguments, swiglu)) < TOLERANCE


@pytest.mark.parametrize("tokens", [7, pytest.param(11, marks=pytest.mark.slow)])
def test_tokens_do_not_depend_on_one_another(tokens):
    x, chosen, gate_up, down = make(tokens, 2, 3)
    together = run("whole", swiglu, x, chosen, gate_up, down)
    spoilt = jnp.where(jnp.arange(tokens)[:, None] == 5, x, 1e8).astype(BF16)
    others = chosen.at[:5].set(choose(5, 2, 3, seed=9))
    apart = run("whole", swiglu, spoilt, others, jnp.nan_to_num(gate_up), jnp.nan_to_num(down))
    np.testing.assert_array_equal(np.asarray(together[5], np.float32), np.asarray(apart[5], np.float32))
    alone = run("whole", swiglu, x[5:6], chosen[5:6], gate_up, down)
    np.testing.assert_array_equal(np.asarray(together[5], np.float32), np.asarray(alone[0], np.float32))


def test_benchmark_checks_what_it_times(monkeypatch):
    case = experts_case(Sizes(16, 4, 2, 8), 3, "xla")
    function, arguments, donated = case.make()
    assert donated == () and [out.shape for out in function(*arguments)] == [(3, 2, 16)] * 3
    assert case.read_bytes <= 2 * 3 * (4 * 3 * 16 * 8 + 3 * 16) and case.operations == 2 * 3 * 6 * 3 * 16 * 8
    monkeypatch.setattr("kernels_pallas.cases.experts._one_expert", lambda x, *weights: jnp.ones(x.shape))
    with pytest.raises(RuntimeError, match="the kernel is wrong here"):
        case.make()


# ------------------------------------------------------------------------------------------------------------- groups


def count_16(chosen, experts):
    return count_choices(chosen, experts, 16)


@pytest.mark.parametrize("form", [compare_choices, count_16])
@pytest.mark.parametrize(("tokens", "each", "experts"), [(2, 3, 4), (8, 10, 512), (64, 8, 16), (64, 10, 512)])
def test_groups_hold_every_choice_once(form, tokens, each, experts):
    chosen = choose(tokens, each, experts)
    made = form(chosen, experts)
    places, count, flat = np.asarray(made.place), int(made.count[0]), np.asarray(chosen).reshape(-1)
    assert len(set(places)) == len(places) and np.asarray(made.real).all()
    assert set(np.asarray(made.group)) == set(range(count)) and count <= len(made.expert)
    np.testing.assert_array_equal(np.asarray(made.expert)[made.group], flat)
    np.testing.assert_array_equal(np.asarray(made.token).reshape(-1)[places], np.arange(tokens * each) // each)
    assert count == sum(-(-size // made.rows) for size in np.bincount(flat))
    if tokens <= FEW_ROWS == made.rows:
        np.testing.assert_array_equal(made.row, np.arange(tokens * each) // each)


@pytest.mark.parametrize("form", [compare_choices, count_16])
def test_groups_leave_out_experts_elsewhere(form):
    chosen = choose(20, 3, 12) - 4
    made = form(chosen, 5)
    flat, real = np.asarray(chosen).reshape(-1), np.asarray(made.real)
    np.testing.assert_array_equal(real, (flat >= 0) & (flat < 5))
    np.testing.assert_array_equal(np.asarray(made.expert)[made.group][real], flat[real])
    assert set(np.asarray(made.group)[real]) == set(range(int(made.count[0])))
    none = form(jnp.full((3, 2), -1, jnp.int32), 5)
    assert int(none.count[0]) == 0 and not np.asarray(none.real).any()


@pytest.mark.parametrize(
    ("sizes", "rows"), [((8, 10, 4), 8), ((64, 10, 512), 8), ((256, 8, 256), 32), ((8192, 10, 512), 128)]
)
def test_rows_of_a_group(sizes, rows):
    assert group_rows(*sizes) == rows


def test_one_token_is_a_case_of_the_rest():
    chosen = choose(1, 5, 9)
    short, general = one_token(chosen), group_choices(chosen, 9)
    for name in ("count", "expert", "group", "row", "real"):
        np.testing.assert_array_equal(getattr(short, name), getattr(general, name))


# ------------------------------------------------------------------------------------------- refusals, choice, lowering


def test_refuses_what_it_cannot_do():
    x, chosen, gate_up, down = make(2, 1, 2)
    for arguments, words in (
        ((x.astype(jnp.float32), chosen, gate_up, down), "bfloat16, float32"),
        ((x, chosen, gate_up[..., :40], down[:, :40]), "multiples of 64"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            EXPERTS["gpu"].whole(*arguments, swiglu)


@pytest.mark.parametrize(
    ("backend", "dtype", "widths", "platform", "wanted"),
    [
        ("auto", "bfloat16", (2048, 512), "gpu", "gpu"),
        ("auto", "bfloat16", (2048, 500), "gpu", "xla"),
        ("auto", "float32", (2048, 512), "gpu", "xla"),
        ("auto", "bfloat16", (2048, 512), "tpu", "tpu"),
        ("xla", "bfloat16", (2048, 512), "gpu", "xla"),
        ("tpu", "bfloat16", (2048, 512), "tpu", "tpu"),
        ("gpu", "float32", (2048, 500), "gpu", "gpu"),
    ],
)
def test_backend(backend, dtype, widths, platform, wanted):
    assert choose_backend(backend, dtype, widths, platform) == wanted


def config(name):
    """Model width, experts, experts a token, expert width, matrices of a published model."""
    found = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    found = found.get("text_config", found)
    names = ("num_experts_per_tok", "num_experts_per_token"), ("num_experts", "n_routed_experts")
    each, experts = (next(found[n] for n in options if n in found) for options in names)
    width = found.get("moe_latent_size") or found["hidden_size"]
    return width, experts, each, found["moe_intermediate_size"], 1 if name.startswith("Nemotron") else 2


MODELS = (
    *("Qwen3-Next-80B-A3B-Instruct", "Ling-2.6-flash", "Kimi-Linear-48B-A3B", "Nemotron-3-Nano-30B-A3B-BF16"),
    *("Qwen3.5-397B-A17B", "Ling-3.0-flash", "Ling-2.6-1T", "Nemotron-3-Super-120B-A12B-FP8"),
)


@pytest.mark.parametrize("tokens", [1, 64, pytest.param(2048, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_lowers_for_models(name, tokens):
    width, experts, each, inner, parts = config(name)
    shapes = ((tokens, width), (experts, width, parts, inner), (experts, inner, width))
    x, gate_up, down = (jax.ShapeDtypeStruct(shape, BF16) for shape in shapes)
    chosen = jax.ShapeDtypeStruct((tokens, each), jnp.int32)
    activate = swiglu if parts == 2 else ungated
    program = jax.jit(lambda *a: EXPERTS["gpu"].whole(*a, activate)).trace(x, chosen, gate_up, down)
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 2
    results = [line.rsplit("->", 1)[-1] for line in text.splitlines() if " = " in line]
    assert not [result for result in results if f"tensor<{experts}x{width}x{parts}x{inner}xbf16>" in result]  # no copy
