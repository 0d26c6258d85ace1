"""Full attention in plain jnp: a dense float64 oracle, pages in any order, mixed batches, padding, NaN elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import attention
from kernels_pallas.gqa import GQA, GQAWeights
from kernels_pallas.mla import MLA, MLAWeights
from kernels_pallas.op import token_positions
from kernels_pallas.rotary import frequencies, rotary_tables
from tests.kernels_pallas.linear_cases import packed, part, rms, sigmoid
from tests.ragged import PAGE, PAGES, checked, make_batch, page_table

HEADS, KEY_HEADS, WIDTH, LATENT, ROTATED, LAYERS, LAYER, EPSILON = 4, 2, 16, 24, 8, 2, 1, 1e-6
BUCKET = 192
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}  # float32 against float64
INVERSE = frequencies(ROTATED, 100.0)
_rng = np.random.default_rng(21)
GQA_WEIGHTS = GQAWeights(*(_rng.normal(1, 0.2, WIDTH).astype(np.float32) for _ in range(2)))
# Numbers that bfloat16 holds exactly, so that one oracle serves both dtypes.
EXPANSION = np.asarray(_rng.normal(size=(LATENT, HEADS, WIDTH + 12)) * LATENT**-0.5, jnp.bfloat16).astype(np.float32)
MLA_WEIGHTS = MLAWeights(_rng.normal(1, 0.2, LATENT).astype(np.float32), EXPANSION)


def gqa_inputs(rng, tokens):
    shapes = {"q": HEADS, "k": KEY_HEADS, "v": KEY_HEADS, "gate": HEADS}
    return {name: rng.normal(size=(tokens, heads, WIDTH)).astype(np.float32) for name, heads in shapes.items()}


@jax.jit
def run_gqa(inputs, pages, batch):
    rotary = rotary_tables(token_positions(batch, inputs["q"].shape[0]), INVERSE)
    return GQA.on("xla")(
        inputs["q"], inputs["k"], inputs["v"], inputs["gate"], GQA_WEIGHTS, rotary, pages, LAYER, batch,
        scale=0.3, epsilon=EPSILON,
    )  # fmt: skip


def rotate(x, positions, interleaved):
    """Rotate the first channels of `x` `[T, H, d]`; the rotated channels keep their own places."""
    angle = positions[:, None, None] * INVERSE.astype(np.float64)
    r = len(INVERSE)
    first, second = (slice(0, 2 * r, 2), slice(1, 2 * r, 2)) if interleaved else (slice(0, r), slice(r, 2 * r))
    out = x.copy()
    out[..., first] = x[..., first] * np.cos(angle) - x[..., second] * np.sin(angle)
    out[..., second] = x[..., second] * np.cos(angle) + x[..., first] * np.sin(angle)
    return out


def softmax_causal(scores):
    tokens = scores.shape[-1]
    scores = np.where(np.tril(np.ones((tokens, tokens), bool)), scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def gqa_oracle(inputs):
    x = {name: value.astype(np.float64) for name, value in inputs.items()}
    positions = np.arange(len(x["q"]))
    q = rotate(rms(x["q"], GQA_WEIGHTS.query_norm), positions, False)
    k = rotate(rms(x["k"], GQA_WEIGHTS.key_norm), positions, False)
    k, v = (np.repeat(y, HEADS // KEY_HEADS, 1) for y in (k, x["v"]))
    shares = softmax_causal(0.3 * np.einsum("thd,shd->hts", q, k))
    return (np.einsum("hts,shd->thd", shares, v) * sigmoid(x["gate"])).reshape(len(q), -1)


def mla_inputs(rng, tokens):
    return {
        "q": rng.normal(size=(tokens, HEADS, WIDTH + ROTATED)).astype(np.float32),
        "latent": rng.normal(size=(tokens, LATENT + ROTATED)).astype(np.float32),
    }


@jax.jit
def run_mla(inputs, pages, batch):
    rotary = rotary_tables(token_positions(batch, inputs["q"].shape[0]), INVERSE)
    weights = MLAWeights(MLA_WEIGHTS.latent_norm, jnp.asarray(MLA_WEIGHTS.expansion, inputs["q"].dtype))
    return MLA.on("xla")(
        inputs["q"], inputs["latent"], weights, rotary, pages, LAYER, batch, scale=0.3, epsilon=EPSILON
    )


def mla_oracle(inputs):
    q, latent = inputs["q"].astype(np.float64), inputs["latent"].astype(np.float64)
    positions = np.arange(len(q))
    compressed = rms(latent[:, :LATENT], MLA_WEIGHTS.latent_norm)
    shared = rotate(latent[:, None, LATENT:], positions, True)[:, 0]
    k, v = np.split(np.einsum("sz,zhn->shn", compressed, MLA_WEIGHTS.expansion), [WIDTH], axis=2)
    rotated = rotate(q[..., WIDTH:], positions, True)
    scores = np.einsum("thn,shn->hts", q[..., :WIDTH], k) + np.einsum("thr,sr->hts", rotated, shared)
    return np.einsum("hts,shv->thv", softmax_causal(0.3 * scores), v).reshape(len(q), -1)


CASES = {
    "gqa": (gqa_inputs, run_gqa, gqa_oracle, (KEY_HEADS * 2 * WIDTH,)),
    "mla": (mla_inputs, run_mla, mla_oracle, (LATENT + ROTATED,)),
}


@pytest.fixture(params=CASES, ids=str)
def case(request):
    inputs, run, oracle, shape = CASES[request.param]

    def step(parts, batch, pages, tokens=BUCKET):
        out, pages = run(packed(parts, tokens), pages, checked(batch, tokens))
        return np.asarray(out), pages

    return inputs, step, oracle, lambda: jnp.full((LAYERS, PAGES, PAGE, *shape), jnp.nan, jnp.float32)


@pytest.mark.parametrize("length", (1, 16, 17, 65, 130))
def test_prefill_equals_the_oracle(case, length):
    make, step, oracle, pages = case
    inputs = make(np.random.default_rng(length), length)
    out, _ = step([inputs], make_batch([length, 0, 0, 0]), pages())
    np.testing.assert_allclose(out[:length], oracle(inputs), **TOLERANCE)
    assert (out[length:] == 0).all()


def test_bfloat16(case):
    make, step, oracle, pages = case
    rounded = {name: value.astype(jnp.bfloat16) for name, value in make(np.random.default_rng(4), 65).items()}
    out, _ = step([rounded], make_batch([65, 0, 0, 0]), pages().astype(jnp.bfloat16))
    wanted = oracle(rounded)
    assert out.dtype == jnp.bfloat16
    assert np.linalg.norm(out[:65].astype(np.float64) - wanted) < 1e-2 * np.linalg.norm(wanted)


@pytest.mark.parametrize("cuts", [(1,), (16, 40), (63, 64, 65)])
def test_pieces_then_decode_equal_the_oracle(case, cuts):
    make, step, oracle, pages = case
    inputs, pages, outs, seen = make(np.random.default_rng(0), 72), pages(), [], 0
    for cut in cuts:
        out, pages = step([part(inputs, seen, cut)], make_batch([cut - seen, 0, 0, 0], [seen, 0, 0, 0]), pages)
        outs.append(out[: cut - seen])
        seen = cut
    for t in range(seen, 72):
        batch = make_batch([1, 0, 0, 0], [t, 0, 0, 0], decodes=1, content="decode")
        out, pages = step([part(inputs, t, t + 1)], batch, pages, tokens=4)
        outs.append(out[:1])
    np.testing.assert_allclose(np.concatenate(outs), oracle(inputs), **TOLERANCE)


def mixed(case, order):
    make, step, _, pages = case
    rng = np.random.default_rng(2)
    inputs, pages, table = [make(rng, 100) for _ in range(4)], pages(), page_table(4)
    seen, lengths = [50, 3, 32, 0], [1, 1, 60, 17]
    for row in range(3):
        own = np.concatenate([table[row : row + 1], np.zeros((3, table.shape[1]), np.int32)])
        _, pages = step([part(inputs[row], 0, seen[row])], make_batch([seen[row], 0, 0, 0], pages=own), pages)
    batch = make_batch([lengths[r] for r in order], [seen[r] for r in order], pages=table[list(order)], decodes=2)
    out, pages = step([part(inputs[r], seen[r], seen[r] + lengths[r]) for r in order], batch, pages)
    starts = dict(zip(order, batch.query_start, strict=False))
    results = [out[starts[row] : starts[row] + lengths[row]] for row in range(4)]
    return inputs, seen, lengths, results


def test_mixed_batch_equals_the_oracle(case):
    inputs, seen, lengths, results = mixed(case, (0, 1, 2, 3))
    for row in range(4):
        end = seen[row] + lengths[row]
        np.testing.assert_allclose(results[row], case[2](part(inputs[row], 0, end))[seen[row] :], **TOLERANCE)


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (0, 1, 3, 2)])
def test_place_in_the_batch_changes_no_bit(case, order):
    jax.tree.map(np.testing.assert_array_equal, mixed(case, order)[3], mixed(case, (0, 1, 2, 3))[3])


def test_a_step_writes_only_its_own_tokens(case):
    make, step, _, pages = case
    before = pages()
    table = page_table(4)
    _, after = step([make(np.random.default_rng(1), 21)], make_batch([1, 0, 20, 0], pages=table, decodes=1), before)
    written = {(table[0, 0], 0)} | {(table[2, t // PAGE], t % PAGE) for t in range(20)}
    for layer in range(LAYERS):
        finite = np.isfinite(np.asarray(after)[layer].reshape(PAGES, PAGE, -1)).all(-1)
        assert {tuple(map(int, place)) for place in np.argwhere(finite)} == (written if layer == LAYER else set())


@pytest.mark.parametrize("block", [1, 7, 64])
def test_size_of_a_block_changes_no_result(case, block, monkeypatch):
    make, step, oracle, pages = case
    monkeypatch.setattr(attention, "BLOCK", block)
    run_gqa.clear_cache()
    run_mla.clear_cache()
    inputs = make(np.random.default_rng(9), 50)
    out, _ = step([inputs], make_batch([50, 0, 0]), pages(), tokens=56)
    np.testing.assert_allclose(out[:50], oracle(inputs), **TOLERANCE)
    run_gqa.clear_cache()
    run_mla.clear_cache()
