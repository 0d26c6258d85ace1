"""Full attention by its TPU kernels, interpreted: equal to plain jnp, and the contract of a batch.

Small shapes, but the widths that the kernels want, and blocks and tiles so small that a row has several. Compiling for
a TPU needs none: it is tried at the shapes of models.
"""

import re
from copy import copy
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.gqa import GQA, GQAWeights, tpu_attend
from kernels_pallas.gqa import tpu as gqa_tpu
from kernels_pallas.gqa.tpu_pages import WINDOW, plan_windows
from kernels_pallas.mla import MLA, MLAWeights
from kernels_pallas.mosaic_tpu import interpreted
from kernels_pallas.op import ArraySpec, KVSpec, RaggedBatch, token_positions
from kernels_pallas.rotary import frequencies, rotary_tables
from tests.ragged import PAGE, PAGES, checked, make_batch, page_table
from tests.tpu_topology import TOPOLOGIES, compile_for

LAYERS, LAYER, EPSILON, SCALE = 2, 1, 1e-6, 0.1
ROWS, TOKENS = 5, 96
LATENT, ROTATED, PLAIN, VALUE = 128, 64, 32, 32
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}  # relative L2: of sums in another order, of products in bfloat16
_rng = np.random.default_rng(8)

# A product of NaN, which pages may hold past a row's last token, warns where it is interpreted.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


class Grouped:
    """GQA at `heads` query heads over `key_heads` of `width`."""

    def __init__(self, heads, key_heads, width):
        self.heads, self.key_heads, self.width = heads, key_heads, width
        self.pool, self.lanes = (2 * key_heads * width,), 2 * key_heads * width
        self.weights = GQAWeights(*(_rng.normal(1, 0.2, width).astype(np.float32) for _ in range(2)))
        self.inverse = frequencies(width // 2, 100.0)

    def inputs(self, rng, tokens):
        heads = (self.heads, self.key_heads, self.key_heads, self.heads)
        return tuple(rng.normal(size=(tokens, n, self.width)) for n in heads)

    def run(self, backend, inputs, pages, batch):
        rotary = rotary_tables(token_positions(batch, inputs[0].shape[0]), self.inverse)
        return GQA.on(backend)(*inputs, self.weights, rotary, pages, LAYER, batch, scale=SCALE, epsilon=EPSILON)

    def flat(self, pages):
        """Pages as the kernels want them."""
        return pages


class Latent:
    """MLA at `heads` heads."""

    def __init__(self, heads):
        self.heads, self.pool, self.lanes = heads, (LATENT + ROTATED,), LATENT + 128
        self.expansion = _rng.normal(size=(LATENT, heads, PLAIN + VALUE)) * LATENT**-0.5
        self.norm = _rng.normal(1, 0.2, LATENT).astype(np.float32)
        self.inverse = frequencies(ROTATED, 100.0)

    def inputs(self, rng, tokens):
        return rng.normal(size=(tokens, self.heads, PLAIN + ROTATED)), rng.normal(size=(tokens, LATENT + ROTATED))

    def run(self, backend, inputs, pages, batch):
        rotary = rotary_tables(token_positions(batch, inputs[0].shape[0]), self.inverse)
        weights = MLAWeights(self.norm, jnp.asarray(self.expansion, inputs[0].dtype))
        return MLA.on(backend)(*inputs, weights, rotary, pages, LAYER, batch, scale=SCALE, epsilon=EPSILON)

    def flat(self, pages):
        """Pages as the kernels want them: zeros fill up the row of every token that is there."""
        return jnp.concatenate([pages, jnp.repeat(pages[..., :1] * 0, self.lanes - pages.shape[-1], axis=-1)], axis=-1)


KINDS = {"gqa": Grouped(4, 2, 128), "gqa of 64": Grouped(3, 1, 64), "mla": Latent(8)}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Two blocks of four chunks a row of pages, and tiles of 16 queries or less."""
    monkeypatch.setattr(tpu_attend, "MOST_TOKENS", 128)
    monkeypatch.setattr(tpu_attend, "CHUNK_TOKENS", 32)
    monkeypatch.setattr(tpu_attend, "STRAND_ROWS", 16)
    monkeypatch.setattr(gqa_tpu, "PREFILL_ROWS", 64)


@cache
def program(name, backend):
    """The op of a kind, traced once for each shape."""
    return jax.jit(partial(KINDS[name].run, backend))


def run(name, inputs, pages, batch, backend="tpu", params=None):
    """Outputs and pages of one step, NumPy; interpreted, `params` by a program of its own."""
    call = program(name, backend) if params is None else jax.jit(partial(KINDS[name].run, backend))
    with interpreted(params):
        return jax.tree.map(np.asarray, call(inputs, pages, batch))


class Story:
    """Rows of every sort: two in decode (one has seen nothing), an absent one, a prefill with history, a fresh one."""

    lengths, seen, decodes = (1, 1, 0, 45, 17), (150, 0, 0, 37, 0), 3

    def __init__(self, name, dtype, seed=0):
        rng, kind = np.random.default_rng(seed), KINDS[name]
        self.name, self.dtype, self.table = name, jnp.dtype(dtype), page_table(ROWS)
        pages = np.full((LAYERS, PAGES, PAGE, *kind.pool), np.nan)
        for row in range(ROWS):
            held = rng.normal(size=(self.table.shape[1] * PAGE, *kind.pool))
            held[self.seen[row] :] = np.nan
            pages[LAYER, self.table[row]] = held.reshape(-1, PAGE, *kind.pool)
        self.pages = jnp.asarray(pages, dtype)
        own = [kind.inputs(rng, length) for length in self.lengths]
        self.own = [tuple(np.asarray(jnp.asarray(x, dtype), np.float64) for x in each) for each in own]

    def exact(self):
        """The same numbers, computed in float32."""
        other = copy(self)
        other.dtype, other.pages = jnp.dtype("float32"), self.pages.astype(jnp.float32)
        return other

    def step(self, order=range(ROWS), moved=None, backend="tpu", content="mixed", tokens=TOKENS, params=None):
        """The outputs of each row of the story, and the pages, of one step with the rows in this order."""
        order, pages = list(order), self.pages
        table = self.table[order]
        if moved is not None:  # every page elsewhere
            pages, table = pages[:, np.argsort(moved)], moved[table]
        batch = make_batch(
            [self.lengths[r] for r in order], [self.seen[r] for r in order], pages=table,
            decodes=sum(r < self.decodes for r in order), content=content,
        )  # fmt: skip
        parts = [np.concatenate(part) for part in zip(*(self.own[r] for r in order), strict=True)]
        padding = tokens - len(parts[0])
        inputs = [np.concatenate([x, np.full((padding, *x.shape[1:]), np.nan)]) for x in parts]
        inputs = tuple(jnp.asarray(x, self.dtype) for x in inputs)
        pages = KINDS[self.name].flat(pages) if backend == "tpu" else pages
        out, pages = run(self.name, inputs, pages, checked(batch, tokens), backend, params)
        starts = dict(zip(order, batch.query_start, strict=False))
        assert (out[batch.query_start[-1] :] == 0).all()
        return {r: out[starts[r] : starts[r] + self.lengths[r]] for r in order}, pages


def assert_close(rows, wanted, dtype):
    for row, want in wanted.items():
        got, want = np.asarray(rows[row], np.float64), np.asarray(want, np.float64)
        assert np.linalg.norm(got - want) <= TOLERANCES[dtype] * np.linalg.norm(want), row


SOME = [("gqa", "float32"), ("mla", "float32")]
OTHERS = [("gqa of 64", "float32"), ("gqa", "bfloat16"), ("mla", "bfloat16")]


@pytest.mark.parametrize(("name", "dtype"), SOME + [pytest.param(*each, marks=pytest.mark.slow) for each in OTHERS])
def test_a_mixed_batch_equals_plain_jnp_and_stores_only_its_own_tokens(name, dtype):
    story = Story(name, dtype)
    rows, pages = story.step()
    wanted, stored = story.exact().step(backend="xla")
    assert_close(rows, wanted, dtype)
    old, new = (np.asarray(KINDS[name].flat(x), np.float32) for x in (story.pages, stored))
    np.testing.assert_array_equal(np.isnan(pages), np.isnan(new))
    kept = ~np.isnan(old)
    np.testing.assert_array_equal(pages[kept].astype(np.float32), old[kept])
    fresh = ~kept & ~np.isnan(new)
    limits = {"float32": (1e-5, 1e-6), "bfloat16": (1e-2, 1e-2)}[dtype]
    np.testing.assert_allclose(pages[fresh].astype(np.float32), new[fresh], *limits)


@pytest.mark.parametrize("name", ["gqa", "mla", pytest.param("gqa of 64", marks=pytest.mark.slow)])
def test_place_in_the_batch_and_in_the_pool_changes_no_bit(name):
    story = Story(name, "float32")
    moved = np.concatenate([[0], np.random.default_rng(3).permutation(np.arange(1, PAGES))])
    rows, _ = story.step()
    jax.tree.map(np.testing.assert_array_equal, story.step((2, 1, 0, 4, 3), moved)[0], rows)


def test_a_row_in_decode_has_the_same_bits_without_prefills():
    story = Story("gqa", "float32")
    rows, _ = story.step()
    alone, _ = story.step(range(story.decodes), content="decode")
    jax.tree.map(np.testing.assert_array_equal, alone, {row: rows[row] for row in alone})


def test_pieces_then_decode_equal_one_prefill():
    kind, inputs = KINDS["gqa"], KINDS["gqa"].inputs(np.random.default_rng(4), 64)
    inputs = [jnp.asarray(x, jnp.float32) for x in inputs]
    pages = jnp.full((LAYERS, PAGES, PAGE, kind.lanes), jnp.nan, jnp.float32)

    def step(pages, start, end, decodes=0):
        padded = tuple(jnp.pad(x[start:end], ((0, TOKENS - end + start), (0, 0), (0, 0))) for x in inputs)
        batch = make_batch([end - start, *[0] * (ROWS - 1)], [start] * ROWS, decodes=decodes)
        out, pages = run("gqa", padded, pages, checked(batch, TOKENS))
        return out[: end - start], pages

    whole, _ = step(pages, 0, 64)
    pieces = []
    for start, end in ((0, 15), (15, 16), (16, 63), (63, 64)):
        out, pages = step(pages, start, end, decodes=int(end - start == 1))
        pieces.append(out)
    np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "on_wait"])
@pytest.mark.parametrize("name", ["gqa", "mla"])
def test_copies_do_not_race_and_stay_in_bounds(name, mode):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    story = Story(name, "float32")
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", dma_execution_mode=mode
    )
    rows, _ = story.step(params=params)
    assert not interpret_pallas_call.races.races_found
    jax.tree.map(np.testing.assert_array_equal, rows, story.step()[0])


# ------------------------------------------------------------------------------------------------- windows of the pages


@pytest.mark.parametrize("page", [16, 64])
def test_windows_cover_the_new_tokens_of_prefills_once(page):
    rng, planned = np.random.default_rng(page), jax.jit(partial(plan_windows, tokens=240, page=page))
    for _ in range(20):
        lengths = rng.integers(0, 60, 4) * rng.integers(0, 2, 4)
        seen, decodes = rng.integers(0, 70, 4), int(lengths[0] <= 1)
        tables = rng.permutation(np.arange(1, 41)).reshape(4, 10)
        batch = make_batch(lengths, seen, pages=tables, decodes=decodes)
        plan = jax.tree.map(np.asarray, planned(batch))
        stored = {}
        for window in range(len(plan.page)):
            for inside in range(plan.first[window], plan.end[window]):
                place = (int(plan.page[window]), int(plan.place[window]) + inside)
                assert place not in stored and plan.place[window] % WINDOW == 0
                stored[place] = int(plan.token[window]) + inside
        wanted = {}
        for row in range(decodes, 4):
            for token in range(lengths[row]):
                position = seen[row] + token
                wanted[int(tables[row, position // page]), int(position % page)] = int(batch.query_start[row]) + token
        assert stored == wanted


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_fits():
    def fits(op, shape, dtype):
        return op.fits["tpu"](KVSpec((ArraySpec("kv", shape, dtype),)), dtype)

    assert fits(GQA, (4, 512), "bfloat16") and fits(GQA, (1, 128), "float32") and fits(MLA, (576,), "bfloat16")
    assert not fits(GQA, (2, 160), "bfloat16")
    assert not fits(MLA, (48,), "bfloat16")
    assert not fits(MLA, (576,), "float16")


def test_rows_of_latents_fill_whole_registers_on_a_tpu_alone():
    memory = KVSpec((ArraySpec("latent", (576,), "bfloat16"),))
    assert MLA.keep("tpu", memory).arrays[0].shape == (640,) and MLA.keep("tpu", memory).token_bytes == 1280
    assert MLA.keep("xla", memory) == MLA.keep("gpu", memory) == memory


def trace(kind, page, dtype, entries=1):
    inputs = tuple(jnp.asarray(x, dtype) for x in kind.inputs(np.random.default_rng(0), 4))
    pages = jax.ShapeDtypeStruct((LAYERS, 5, page, kind.lanes), dtype)
    table = np.zeros((2, entries), np.int32)
    jax.eval_shape(partial(kind.run, "tpu"), inputs, pages, make_batch([1, 0], pages=table, decodes=1))


@pytest.mark.parametrize(
    ("kind", "page", "dtype", "words"),
    [
        (Grouped(2, 1, 80), 16, "float32", "head width"),
        (KINDS["gqa"], 8, "float32", "page"),
        (KINDS["mla"], 24, "float32", "page"),
        (KINDS["gqa"], 16, "float16", "same dtype"),
        (KINDS["mla"], 16, "float16", "same dtype"),
    ],
)
def test_refusals(kind, page, dtype, words):
    with pytest.raises(NotImplementedError, match=words):
        trace(kind, page, dtype)


def test_a_page_table_larger_than_scalar_memory_is_refused():
    with pytest.raises(NotImplementedError, match="page table"):
        trace(KINDS["gqa"], PAGE, "float32", entries=100_000)


# --------------------------------------------------------------------------------------------------- compiling for TPUs


def shaped_batch(rows, page_count, content):
    int32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    row = int32((rows,))
    return RaggedBatch(int32((rows + 1,)), row, int32(()), row, row, row, row, int32((rows, page_count)), content)


# Qwen3.5-27B, Qwen3.5-397B, Nemotron-3-Nano, MiniMax-Text-01, Olmo-Hybrid-7B, Ling-2.6-flash, Ling-2.6-1T
MODELS = [("gqa", 24, 4, 256), ("gqa", 32, 2, 256), ("gqa", 32, 2, 128), ("gqa", 64, 8, 128), ("gqa", 30, 30, 128)]
MODELS += [("mla", 32, 512, 64), ("mla", 64, 512, 64)]
PAGES_OF_A_CHIP = 2049  # the compiler would move a pool that fits VMEM there and back


def compiled(topology, shape, tokens, rows, content, dtype="bfloat16"):
    """The program of a full layer of a model, and the shape of its pool: heads, key heads, width; or heads of MLA."""
    name, heads, *rest = shape
    shaped = partial(jax.ShapeDtypeStruct, dtype=dtype)
    batch, layer = shaped_batch(rows, 128, content), jax.ShapeDtypeStruct((), jnp.int32)
    if name == "gqa":
        key_heads, width = rest
        pool = shaped((4, PAGES_OF_A_CHIP, 64, 2 * key_heads * width))
        inputs = (shaped((tokens, heads, width)), *[shaped((tokens, key_heads, width))] * 2)

        def step(pages, layer, batch, q, k, v):
            return GQA.on("tpu")(q, k, v, q, GQAWeights(), None, pages, layer, batch, scale=0.1, epsilon=EPSILON)
    else:
        latent, rotated = rest
        pool = shaped((4, PAGES_OF_A_CHIP, 64, -(-(latent + rotated) // 128) * 128))
        inputs = (shaped((tokens, heads, 128 + rotated)), shaped((tokens, latent + rotated)))
        inputs += (shaped((latent, heads, 256)),)

        def step(pages, layer, batch, q, c, expansion):
            weights = MLAWeights(jnp.ones((latent,), jnp.float32), expansion)
            return MLA.on("tpu")(q, c, weights, None, pages, layer, batch, scale=0.1, epsilon=EPSILON)

    return compile_for(topology, step, pool, layer, batch, *inputs, donate_argnums=0), pool


def check_pool(program, pool):
    """The pool is changed in place: all its bytes are aliased, and nothing but the kernels makes an array like it."""
    size_bytes = int(np.prod(pool.shape)) * pool.dtype.itemsize
    assert program.memory_analysis().alias_size_in_bytes >= size_bytes
    assert program.memory_analysis().temp_size_in_bytes < size_bytes
    made = re.findall(r"^ *(?:ROOT )?%\S+ = (\([^=]*?\)|\S+) ([\w-]+)\(", program.as_text(), re.MULTILINE)
    words = f"[{','.join(map(str, pool.shape))}]"
    operations = {operation for result, operation in made if words in result}
    assert {"parameter", "custom-call"} <= operations
    assert operations <= {"parameter", "custom-call", "get-tuple-element", "bitcast", "tuple"}, operations


@pytest.fixture
def full_tiles(monkeypatch, small_tiles):
    """The tiles that models get."""
    monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("shape", MODELS, ids=str)
def test_compiles_with_the_pages_in_place(shape, full_tiles):
    check_pool(*compiled("v6e:2x2", shape, 1024, 8, "mixed"))


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_batch_of_decodes_compiles_for_every_tpu(topology, full_tiles):
    check_pool(*compiled(topology, ("gqa", 16, 4, 256), 64, 64, "decode"))


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_prefill_compiles_for_every_tpu(topology, full_tiles):
    check_pool(*compiled(topology, ("gqa", 16, 4, 256), 1024, 8, "prefill"))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [("gqa", 8, 2, 64), ("gqa", 4, 1, 128), ("mla", 8, 512, 64)], ids=str)
def test_other_shapes_and_float32_compile(shape, full_tiles):
    check_pool(*compiled("v5e:2x2", shape, 256, 4, "mixed", "float32"))
