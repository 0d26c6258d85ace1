"""Full attention by its Mosaic GPU kernels, interpreted: equal to plain jnp, and the contract of a batch.

Small shapes, but the widths that the kernels want. Lowering for CUDA needs no GPU: it is tried at the shapes of models.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.gqa import GQA, GQAWeights, gpu_pages
from kernels_pallas.gqa import gpu_decode as gqa_decode
from kernels_pallas.gqa import gpu_prefill as gqa_prefill
from kernels_pallas.gqa.gpu_prefill import plan_units
from kernels_pallas.mla import MLA, MLAWeights
from kernels_pallas.mla import gpu_decode as mla_decode
from kernels_pallas.mla import gpu_prefill as mla_prefill
from kernels_pallas.op import RaggedBatch, take, token_positions
from kernels_pallas.rotary import frequencies, rotary_tables
from tests.gpu_kernels import kernels_run
from tests.ragged import PAGE, PAGES, checked, make_batch, page_table

LAYERS, LAYER, EPSILON, SCALE = 2, 1, 1e-6, 0.1
TOLERANCE = 1e-2  # relative L2 of bfloat16 outputs
LATENT, ROTATED, PLAIN, VALUE = 256, 64, 64, 64
CONFIGS = Path(__file__).parents[1] / "configs"
_rng = np.random.default_rng(8)


def draw(rng, *shape, scale=1.0):
    return jnp.asarray(rng.normal(size=shape) * scale, jnp.bfloat16)


class Grouped:
    """GQA at `heads` query heads over `key_heads` of `width`."""

    def __init__(self, heads, key_heads, width, page=PAGE):
        self.heads, self.key_heads, self.width, self.page = heads, key_heads, width, page
        self.pool = (key_heads * 2 * width,)
        self.weights = GQAWeights(*(_rng.normal(1, 0.2, width).astype(np.float32) for _ in range(2)))
        self.inverse = frequencies(width // 2, 100.0)

    def inputs(self, rng, tokens):
        heads = (self.heads, self.key_heads, self.key_heads, self.heads)
        return tuple(draw(rng, tokens, n, self.width) for n in heads)

    def run(self, backend, inputs, pages, batch):
        rotary = rotary_tables(token_positions(batch, inputs[0].shape[0]), self.inverse)
        return GQA.on(backend)(*inputs, self.weights, rotary, pages, LAYER, batch, scale=SCALE, epsilon=EPSILON)


class Latent:
    """MLA at `heads` heads."""

    def __init__(self, heads, page=PAGE):
        self.heads, self.page, self.pool = heads, page, (LATENT + ROTATED,)
        expansion = draw(_rng, LATENT, heads, PLAIN + VALUE, scale=LATENT**-0.5)
        self.weights = MLAWeights(_rng.normal(1, 0.2, LATENT).astype(np.float32), expansion)
        self.inverse = frequencies(ROTATED, 100.0)

    def inputs(self, rng, tokens):
        return draw(rng, tokens, self.heads, PLAIN + ROTATED), draw(rng, tokens, LATENT + ROTATED)

    def run(self, backend, inputs, pages, batch):
        rotary = rotary_tables(token_positions(batch, inputs[0].shape[0]), self.inverse)
        weights = MLAWeights(self.weights.latent_norm, self.weights.expansion.astype(inputs[0].dtype))
        return MLA.on(backend)(*inputs, weights, rotary, pages, LAYER, batch, scale=SCALE, epsilon=EPSILON)


# A product of NaN, which pages may hold past a row's last token, warns where it is interpreted.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
KINDS = {"gqa": Grouped(4, 2, 64), "mla": Latent(8)}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Fewer programs, each with more than one unit of work: quicker where they are interpreted one by one."""
    for module in (gqa_decode, gqa_prefill, mla_decode, mla_prefill):
        monkeypatch.setattr(module, "MULTIPROCESSORS", 2)
    monkeypatch.setattr(gpu_pages, "PROGRAMS", 8)


@pytest.fixture(params=["gqa", pytest.param("mla", marks=pytest.mark.slow)])
def kind(request):
    return KINDS[request.param]


_programs = {}


def step(kind, backend, inputs, pages, batch):
    """One call of the op; the gpu backend is interpreted."""
    program = _programs.setdefault((kind, backend), jax.jit(partial(kind.run, backend)))
    with kernels_run():
        return program(inputs, pages, batch)


def exact(kind, inputs, pages, batch):
    """The output by plain jnp in float32, from the same bfloat16 numbers."""
    inputs, pages = jax.tree.map(lambda x: x.astype(jnp.float32), (inputs, pages))
    return np.asarray(step(kind, "xla", inputs, pages, batch)[0])


def check(kind, inputs, pages, batch):
    """The op on a batch is right in every token and leaves the pages that plain jnp leaves; returns the output."""
    got, got_pages = step(kind, "gpu", inputs, pages, batch)
    _, want_pages = step(kind, "xla", inputs, pages, batch)
    got, want = np.asarray(got, np.float32), exact(kind, inputs, pages, batch)
    start = np.asarray(batch.query_start)
    for first, end in zip(start[:-1], start[1:], strict=True):
        assert np.linalg.norm(got[first:end] - want[first:end]) <= TOLERANCE * np.linalg.norm(want[first:end]), first
    assert (got[start[-1] :] == 0).all()
    np.testing.assert_array_equal(np.asarray(got_pages, np.float32), np.asarray(want_pages, np.float32))
    return got


def nan_pages(kind, pages=PAGES):
    return jnp.full((LAYERS, pages, kind.page, *kind.pool), jnp.nan, jnp.bfloat16)


def pack(rows, tokens):
    """Rows of inputs one after another on an axis of `tokens`, NaN behind them."""
    return tuple(
        jnp.concatenate([*parts, jnp.full((tokens - sum(map(len, parts)), *parts[0].shape[1:]), jnp.nan, jnp.bfloat16)])
        for parts in zip(*rows, strict=True)
    )


def cut(inputs, start, end):
    return tuple(x[start:end] for x in inputs)


def context(kind, rows, seen, table, tokens, pages=PAGES):
    """Pages that hold the first `seen[r]` tokens of each of four rows."""
    filled = pack([cut(r, 0, n) for r, n in zip(rows, seen, strict=True)], tokens)
    batch = make_batch(seen, pages=np.where(np.asarray(seen)[:, None] > 0, table, 0))
    return step(kind, "xla", filled, nan_pages(kind, pages), batch)[1]


SEEN, NEW, TOKENS = [130, 3, 32, 0], [1, 1, 60, 70], 136


def mixed(kind, order=(0, 1, 2, 3), shift=0):
    """Two rows in decode and two that prefill, in `order`: inputs, pages, batch."""
    rng = np.random.default_rng(2)
    rows = [kind.inputs(rng, 140) for _ in range(4)]
    table = np.roll(page_table(4), shift, axis=0)
    pages = context(kind, rows, SEEN, table, 168)
    batch = make_batch([NEW[r] for r in order], [SEEN[r] for r in order], pages=table[list(order)], decodes=2)
    inputs = pack([cut(rows[r], SEEN[r], SEEN[r] + NEW[r]) for r in order], TOKENS)
    return inputs, pages, checked(batch, TOKENS)


def test_mixed_batch(kind):
    check(kind, *mixed(kind))


def test_place_and_pages_change_no_bit(kind):
    def by_row(order, shift):
        inputs, pages, batch = mixed(kind, order, shift)
        out = np.asarray(step(kind, "gpu", inputs, pages, batch)[0], np.float32)
        starts = dict(zip(order, batch.query_start, strict=False))
        return [out[starts[r] : starts[r] + NEW[r]] for r in range(4)]

    jax.tree.map(np.testing.assert_array_equal, by_row((1, 0, 3, 2), 1), by_row((0, 1, 2, 3), 0))


@pytest.mark.parametrize("kind", [pytest.param(KINDS["gqa"], marks=pytest.mark.slow), KINDS["mla"]], ids=KINDS)
def test_batch_of_decodes(kind):
    rng = np.random.default_rng(4)
    rows, seen, table = [kind.inputs(rng, 131) for _ in range(4)], [130, 0, 0, 64], page_table(4)
    pages = context(kind, rows, seen, table, 200)
    inputs = pack([cut(rows[r], seen[r], seen[r] + 1) for r in (0, 3)], 4)
    batch = make_batch([1, 0, 0, 1], seen, read=[1, 0, 0, 4], pages=table, decodes=4, content="decode")
    check(kind, inputs, pages, checked(batch, 4))


def test_absent_rows_do_nothing(kind):
    rows = [kind.inputs(np.random.default_rng(3), 20)]
    check(kind, pack(rows, TOKENS), nan_pages(kind), checked(make_batch([0, 0, 20, 0], decodes=1), TOKENS))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [Grouped(2, 2, 128), Grouped(6, 2, 64, 128), Grouped(16, 1, 64, 64), Latent(16, 64), Grouped(2, 1, 256, 32)],
    ids=("group 1", "group 3, page 128", "group 16, page 64", "mla, page 64", "width 256, page 32"),
)
def test_groups_widths_and_pages(kind):
    rng = np.random.default_rng(5)
    lengths, seen = [1, 1, 9, 0], [3, 64, 66, 0]
    rows = [kind.inputs(rng, 80) for _ in range(4)]
    table = np.arange(1, 4 * 5 + 1, dtype=np.int32).reshape(4, 5)
    table = np.where(np.arange(5)[None, :] < -(-(np.add(lengths, seen)) // kind.page)[:, None], table, 0)
    pages = context(kind, rows, seen, table, 136, 21)
    inputs = pack([cut(r, n, n + m) for r, n, m in zip(rows, seen, lengths, strict=True)], 12)
    check(kind, inputs, pages, make_batch(lengths, seen, pages=table, decodes=2))


# --------------------------------------------------------------------------------------------- kernels of prefill alone


def prefill_gqa(q, pages, batch):
    units = plan_units(batch, q.shape[0])
    layer = jnp.full((1,), LAYER, jnp.int32)
    out = gqa_prefill.attend_chunks(take(q, units.token), batch.pages, units, pages, layer, SCALE)
    return take(out.reshape(-1, *q.shape[1:]), units.place)


def prefill_mla(q, pages, batch, latent=LATENT):
    return mla_prefill.prefill(q, pages, jnp.full((1,), LAYER, jnp.int32), batch, SCALE, latent)


def dense(q, k, v):
    """The last tokens' queries `[n, H, D]` over `[s, H, ...]`, float64."""
    scores = np.einsum("nhd,shd->nhs", q, k) * SCALE
    visible = np.arange(len(k))[None, :] < np.arange(len(k) - len(q) + 1, len(k) + 1)[:, None]
    scores = np.where(visible[:, None], scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nhs,shd->nhd", shares / shares.sum(-1, keepdims=True), v)


def check_prefill(run, heads, width, pool, keys_and_values):
    """A kernel on rows in decode (to be left alone), rows that prefill and an absent row, against dense attention."""
    rng = np.random.default_rng(6)
    lengths, seen = [1, 70, 0, 130], [9, 33, 0, 0]
    table = page_table(4)
    pages = np.full((LAYERS, PAGES, PAGE, *pool), np.nan, np.float32)
    for row in (1, 3):
        held = rng.normal(size=(table.shape[1] * PAGE, *pool))
        held[lengths[row] + seen[row] :] = np.nan
        pages[LAYER, table[row]] = held.reshape(-1, PAGE, *pool)
    pages, q = jnp.asarray(pages, jnp.bfloat16), draw(rng, 210, heads, width)
    batch = checked(make_batch(lengths, seen, pages=table, decodes=1), 210)
    with kernels_run():
        out = np.asarray(jax.jit(run)(q, pages, batch), np.float32)
    for row in (1, 3):
        tokens = slice(batch.query_start[row], batch.query_start[row + 1])
        held = np.asarray(pages[LAYER, table[row]], np.float64).reshape(-1, *pool)[: lengths[row] + seen[row]]
        want = dense(np.asarray(q[tokens], np.float64), *keys_and_values(held))
        assert np.linalg.norm(out[tokens] - want) < TOLERANCE * np.linalg.norm(want)
    assert (out[0] == 0).all() and (out[201:] == 0).all()


@pytest.mark.parametrize(("heads", "key_heads", "width"), [(3, 1, 64), pytest.param(4, 2, 256, marks=pytest.mark.slow)])
def test_prefill_of_gqa(heads, key_heads, width):
    own = np.arange(heads) // (heads // key_heads)
    check_prefill(prefill_gqa, heads, width, (key_heads, 2, width), lambda held: (held[:, own, 0], held[:, own, 1]))


@pytest.mark.slow
def test_prefill_of_mla():
    def keys_and_values(held):
        repeated = np.repeat(held[:, None], 16, axis=1)
        return repeated, repeated[..., :LATENT]

    check_prefill(prefill_mla, 16, LATENT + ROTATED, (LATENT + ROTATED,), keys_and_values)


# ---------------------------------------------------------------------------------------- what the kernels do not cover


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Grouped(4, 2, 80), "head width"), (Grouped(4, 2, 64, 8), "page"), (Grouped(65, 1, 64), "query heads")],
)
def test_refusals_of_gqa(kind, words):
    inputs = kind.inputs(np.random.default_rng(0), 4)
    with pytest.raises(NotImplementedError, match=words):
        kind.run("gpu", inputs, nan_pages(kind, 5), make_batch([1, 1, 0, 0], decodes=2))


def test_refusals_of_other_dtypes(kind):
    inputs = tuple(x.astype(jnp.float32) for x in kind.inputs(np.random.default_rng(0), 4))
    with pytest.raises(NotImplementedError, match="bfloat16"):
        kind.run("gpu", inputs, nan_pages(kind, 5), make_batch([1, 1, 0, 0], decodes=2))


@pytest.mark.parametrize("heads", [12, 136])
def test_refusals_of_mla(heads):
    kind = Latent(heads)
    inputs = kind.inputs(np.random.default_rng(0), 4)
    with pytest.raises(NotImplementedError, match="equal tiles"):
        kind.run("gpu", inputs, nan_pages(kind, 5), make_batch([1, 1, 0, 0], decodes=2))


# -------------------------------------------------------------------------------------------------- lowering for a GPU


def bf16(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def full_layers():
    """Shapes of the full layers of the published configs, each once: heads, key heads, width; or heads of MLA."""
    found = {}
    for path in sorted(CONFIGS.glob("*.json")):
        hf = json.loads(path.read_text())
        hf = hf.get("text_config", hf)
        heads = hf["num_attention_heads"]
        if "kv_lora_rank" in hf:
            found.setdefault(("mla", heads, hf["kv_lora_rank"], hf["qk_rope_head_dim"]), path.stem)
        else:
            width = hf.get("head_dim") or hf.get("attention_head_dim") or hf["hidden_size"] // heads
            found.setdefault(("gqa", heads, hf["num_key_value_heads"], width), path.stem)
    return [pytest.param(shape, id=f"{name} {shape}") for shape, name in found.items()]


def shaped_batch(rows, page_count, content):
    int32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    row = int32((rows,))
    return RaggedBatch(int32((rows + 1,)), row, int32(()), row, row, row, row, int32((rows, page_count)), content)


def lowered(shape, tokens, content):
    name, heads, *rest = shape
    batch = shaped_batch(min(tokens, 64), 128, content)
    if name == "gqa":
        key_heads, width = rest
        inputs = (bf16(tokens, heads, width), *[bf16(tokens, key_heads, width)] * 2)
        pool = bf16(4, 257, 64, key_heads * 2 * width)

        def run(pages, batch, q, k, v):
            return GQA.on("gpu")(q, k, v, q, GQAWeights(), None, pages, 2, batch, scale=0.1, epsilon=EPSILON)
    else:
        latent, rotated = rest
        inputs = (bf16(tokens, heads, 128 + rotated), bf16(tokens, latent + rotated), bf16(latent, heads, 256))
        pool = bf16(4, 257, 64, latent + rotated)

        def run(pages, batch, q, c, expansion):
            weights = MLAWeights(jnp.ones((latent,), jnp.float32), expansion)
            return MLA.on("gpu")(q, c, weights, None, pages, 2, batch, scale=0.1, epsilon=EPSILON)

    return jax.jit(run, donate_argnums=0).trace(pool, batch, *inputs).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("shape", full_layers())
def test_lowers_for_cuda_with_the_pages_in_place(shape):
    text = lowered(shape, 2048, "mixed")
    (main,) = (line for line in text.splitlines() if "func.func public @main" in line)
    pages = main.split("%arg0:")[1].split("%arg1:")[0]
    assert "tf.aliasing_output" in pages
    assert all(name in text for name in ("store_tokens", "sum_splits", f"{shape[0]}_decode"))


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("shape", [("gqa", 16, 4, 256), ("mla", 64, 512, 64)], ids=("gqa", "mla"))
def test_a_batch_of_decodes_lowers(shape, rows):
    assert f"{shape[0]}_decode" in lowered(shape, rows, "decode")


@pytest.mark.parametrize(("heads", "key_heads", "width"), [(32, 4, 128), (16, 4, 256)])
def test_prefill_of_gqa_lowers(heads, key_heads, width):
    shapes = bf16(2048, heads, width), bf16(4, 257, 64, key_heads, 2, width), shaped_batch(8, 128, "mixed")
    text = jax.jit(prefill_gqa).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "gqa_prefill" in text


@pytest.mark.parametrize("heads", [32, 64])
def test_prefill_of_mla_lowers(heads):
    shapes = bf16(2048, heads, 576), bf16(4, 257, 64, 576), shaped_batch(8, 128, "mixed")
    text = jax.jit(partial(prefill_mla, latent=512)).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "mla_prefill" in text
