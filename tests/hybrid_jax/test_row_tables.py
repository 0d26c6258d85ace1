"""Tables of the running rows: what a request puts in, what a token adds, and what the logits become."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_oracle import packed, request, shape

from hybrid_jax.request import RUNNING, STOP, SamplingParams
from hybrid_jax.row_tables import (
    IN_PROMPT,
    RowTables,
    count_tokens,
    empty_tables,
    place_row,
    row_contents,
    shape_logits,
)
from hybrid_jax.sampling import NO_TOKEN, SamplingRows, sample

WIDTH = 37  # of the logits
SHAPE = jax.jit(shape_logits)
COUNT = jax.jit(count_tokens)
SAMPLE = jax.jit(sample)
SHAPED = [
    {"presence_penalty": 0.7},
    {"frequency_penalty": -1.3},
    {"repetition_penalty": 1.7},
    {"logit_bias": {0: 3.3, 5: -100, 36: 0.1}},
    {"allowed_token_ids": [1, 5, 9]},
    {"presence_penalty": -0.3, "frequency_penalty": 0.1, "repetition_penalty": 0.6, "logit_bias": {3: -0.7}},
    {"repetition_penalty": 1.1, "logit_bias": {1: 5, 2: 5}, "allowed_token_ids": [2, 3], "frequency_penalty": 2},
    {},
]


@dataclasses.dataclass(frozen=True)
class Row:
    """A request on its way, for the tests."""

    params: SamplingParams
    prompt: list[int]
    output: list[int]
    logits: np.ndarray

    def contents(self) -> tuple[np.ndarray, np.ndarray]:
        return row_contents(self.params, self.prompt, self.output, WIDTH)


def some_rows(count: int) -> list[Row]:
    rng = np.random.default_rng(count)
    return [
        Row(
            SamplingParams(**SHAPED[i % len(SHAPED)]),
            rng.integers(0, WIDTH, 5 + i).tolist(),
            rng.integers(0, WIDTH, 3 * i).tolist(),
            rng.normal(size=WIDTH).astype(np.float32) * 4,
        )
        for i in range(count)
    ]


def in_tables(rows: list[Row], places: list[int], size: int = 12) -> RowTables:
    tables = empty_tables(size, WIDTH)
    for row, place in zip(rows, places, strict=True):
        tables = place_row(tables, place, *row.contents())
    return tables


def shaped(rows: list[Row], places: list[int], padded_rows: int | None = None) -> np.ndarray:
    """The logits that the rows get at these places of the tables."""
    pack = [dataclasses.replace(request(), params=row.params) for row in rows]
    padded_rows = padded_rows or len(rows)
    logits = np.zeros((padded_rows, WIDTH), np.float32)
    logits[: len(rows)] = [row.logits for row in rows]
    return np.asarray(SHAPE(logits, packed(*pack, rows=places, padded_rows=padded_rows), in_tables(rows, places)))


# ------------------------------------------------------------------------------------------- what the logits become


def test_every_way_of_shaping_equals_the_definition() -> None:
    rows = some_rows(8)
    found = shaped(rows, [3, 1, 8, 2, 9, 11, 4, 6], padded_rows=10)
    for row, logits in zip(rows, found, strict=False):
        np.testing.assert_allclose(logits, shape(row.logits, row.params, row.prompt, row.output), rtol=1e-6, atol=1e-5)
    assert (found[8:] == 0).all()


TOKENS = st.lists(st.integers(0, WIDTH - 1), max_size=40)


@hypothesis.given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=WIDTH, max_size=WIDTH),
    prompt=TOKENS.filter(len),
    output=TOKENS,
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    repetition=st.floats(0.1, 2),
    bias=st.dictionaries(st.integers(0, WIDTH - 1), st.floats(-100, 100), max_size=9),
    allowed=st.none() | TOKENS.filter(len),
)
def test_shaping_equals_the_definition_on_any_row(
    logits: list[float], prompt: list[int], output: list[int], presence: float, frequency: float,
    repetition: float, bias: dict[int, float], allowed: list[int] | None,
) -> None:  # fmt: skip
    params = SamplingParams(
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=bias,
        allowed_token_ids=allowed,
    )
    row = Row(params, prompt, output, np.array(logits, np.float32))
    # Rounding of float32 at the largest value on the way, which is 1300 where the penalty divides by 0.1.
    np.testing.assert_allclose(shaped([row], [5])[0], shape(row.logits, params, prompt, output), rtol=1e-6, atol=5e-4)


def test_the_bias_is_added_before_a_token_counts_as_positive() -> None:
    """A logit of -1 with a bias of 3 is divided; were the bias added last, -1 would be multiplied."""
    row = Row(SamplingParams(repetition_penalty=2, logit_bias={4: 3}), [4], [], np.full(WIDTH, -1, np.float32))
    assert shaped([row], [1])[0, [4, 5]].tolist() == [1.0, -1.0]


def test_a_prompt_token_is_repeated_but_neither_present_nor_frequent() -> None:
    params = SamplingParams(presence_penalty=1, frequency_penalty=1, repetition_penalty=2)
    row = Row(params, [4, 4, 5], [5, 6, 6], np.full(WIDTH, 8, np.float32))
    assert shaped([row], [1])[0, 3:7].tolist() == [8, 4, 2, 1]


def test_a_token_that_is_not_allowed_stays_out_whatever_its_bias() -> None:
    params = SamplingParams(
        allowed_token_ids=[2], logit_bias={4: 100}, presence_penalty=-2, frequency_penalty=-2, repetition_penalty=0.1
    )
    logits = shaped([Row(params, [4], [4] * 50, np.zeros(WIDTH, np.float32))], [1])[0]
    assert np.flatnonzero(np.isfinite(logits)).tolist() == [2] and not np.isnan(logits).any()


@pytest.mark.parametrize("params", SHAPED[:-1], ids=str)
def test_bad_logits_still_end_the_row(params: dict) -> None:
    for bad in (np.nan, np.inf):
        for token in (1, 8):
            logits = np.zeros(WIDTH, np.float32)
            logits[token] = bad
            made = shaped([Row(SamplingParams(**params), [1, 8], [1, 8], logits)], [1])
            assert SAMPLE(made, packed(request())).tolist() == [NO_TOKEN]


def test_the_padded_vocabulary_stays_out() -> None:
    logits = np.where(np.arange(WIDTH) < 30, 0, -np.inf).astype(np.float32)
    for params in SHAPED:
        made = shaped([Row(SamplingParams(**params), [1], [2], logits)], [1])[0]
        assert (made[30:] == -np.inf).all()


def test_half_precision_logits_are_shaped_in_float32() -> None:
    (row,) = some_rows(1)
    logits = jnp.asarray(row.logits, jnp.bfloat16)[None]
    made = SHAPE(logits, packed(request(**SHAPED[0]), rows=[1]), in_tables([row], [1]))
    assert made.dtype == jnp.float32


# ------------------------------------------------------------------------------------- what a row does not depend on


def strict(row: Row) -> np.ndarray:
    """The operations in float32 with a rounding after each."""
    bias, tallies = row.contents()
    count, single = (tallies & (IN_PROMPT - 1)).astype(np.float32), np.float32
    repetition = single(row.params.repetition_penalty)
    logits = row.logits + bias
    logits = logits * np.where(tallies > 0, np.where(logits > 0, 1 / repetition, repetition), single(1))
    logits = logits - single(row.params.frequency_penalty) * count
    return logits - np.where(count > 0, single(row.params.presence_penalty), single(0))


def test_a_row_gets_the_same_bits_in_any_batch_and_at_any_place() -> None:
    """Each operation is rounded: a multiplication and a sum made one would round otherwise in some shapes."""
    rows, rng = some_rows(11), np.random.default_rng(1)
    for padded_rows in (11, 16, 33):
        order = rng.permutation(11)
        places = (rng.permutation(11) + 1).tolist()
        found = shaped([rows[i] for i in order], places, padded_rows)
        for place, row in enumerate(order):
            np.testing.assert_array_equal(found[place], strict(rows[row]))
            np.testing.assert_array_equal(found[place], shaped([rows[row]], [7])[0])


def test_a_row_that_is_not_shaped_keeps_its_logits_whatever_its_table_says() -> None:
    """As after a shaped request that held the row before: a row is placed only for a request that is shaped."""
    rows = some_rows(5)[3:]
    tables = in_tables(rows, [1, 2])
    logits = np.stack([row.logits for row in rows])
    made = np.asarray(SHAPE(logits, packed(request(**SHAPED[0]), request(), rows=[1, 2]), tables))
    np.testing.assert_array_equal(made[1], logits[1])


def test_a_batch_without_shaped_rows_reads_no_table() -> None:
    """The tables are read inside a branch of the one conditional."""
    traced = jax.make_jaxpr(shape_logits)(jnp.zeros((2, WIDTH)), packed(request(), request()), empty_tables(3, WIDTH))
    steps = {step.primitive.name: step for step in traced.eqns}
    assert steps.keys() == {"convert_element_type", "reduce_or", "cond"}
    assert sorted(str(branch).count("gather[") for branch in steps["cond"].params["branches"]) == [0, 2]


# ------------------------------------------------------------------------------------------------------- the tables


def step_rows(places: list[int], padded_rows: int) -> SamplingRows:
    return packed(*[request() for _ in places], rows=places, padded_rows=padded_rows)


def test_a_row_counts_what_it_draws_and_others_stay() -> None:
    rows = some_rows(3)
    before = in_tables(rows, [4, 2, 7])
    before = dataclasses.replace(before, newest=before.newest + 5)
    tokens, running = jnp.array([9, 10, NO_TOKEN, 11, NO_TOKEN, 12]), jnp.array([True, False, True, False, True, True])
    after = COUNT(before, step_rows([4, 2, 7], 6), tokens, running)
    expected = np.array(before.tallies)
    expected[4, 9] += 1
    np.testing.assert_array_equal(after.tallies, expected)
    assert np.flatnonzero(after.newest != before.newest).tolist() == [4] and after.newest[4] == 9
    for name in ("reason", "bias"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


def test_the_null_row_is_never_written() -> None:
    """Not by padding rows, even such as claim to run, nor by a row without a token, nor by the last id."""
    for token in (0, WIDTH - 1, NO_TOKEN):
        after = COUNT(empty_tables(4, WIDTH), step_rows([3], 6), jnp.array([5] + [token] * 5), jnp.ones((6,), bool))
        assert (after.newest[0], int(jnp.abs(after.tallies[0]).max())) == (0, 0)
        assert int(after.tallies[1:].sum()) == 1
    with pytest.raises(ValueError, match="wanted a row from 1 to 3, got 0: "):
        place_row(empty_tables(4, WIDTH), 0, *some_rows(1)[0].contents())
    with pytest.raises(ValueError, match="wanted a row from 1 to 3, got 4: "):
        place_row(empty_tables(4, WIDTH), 4, *some_rows(1)[0].contents())


@hypothesis.given(prompt=TOKENS.filter(len), output=TOKENS, cut=st.integers(0, 40))
def test_a_resumed_row_counts_what_a_row_that_went_on_counts(prompt: list[int], output: list[int], cut: int) -> None:
    params = SamplingParams(presence_penalty=1, logit_bias={3: 1})
    tables = place_row(empty_tables(3, WIDTH), 2, *row_contents(params, prompt, output[:cut], WIDTH))
    for token in output[cut:]:
        tables = COUNT(tables, step_rows([2], 2), jnp.array([token, 0]), jnp.array([True, False]))
    resumed = place_row(empty_tables(3, WIDTH), 2, *row_contents(params, prompt, output, WIDTH))
    np.testing.assert_array_equal(tables.tallies, resumed.tallies)
    np.testing.assert_array_equal(tables.bias, resumed.bias)


def test_contents_of_a_row() -> None:
    params = SamplingParams(logit_bias={3: 1.5, 5: -2}, allowed_token_ids=[3, 4])
    bias, tallies = row_contents(params, [2, 2, 6], [6, 6, 1], 8)
    assert bias.tolist() == [-np.inf] * 3 + [1.5, 0] + [-np.inf] * 3
    assert tallies.tolist() == [0, 1, IN_PROMPT, 0, 0, 0, IN_PROMPT + 2, 0]
    assert (bias.dtype, tallies.dtype) == (np.float32, np.int32)


@pytest.mark.parametrize(
    ("params", "prompt", "output"),
    [
        ({"logit_bias": {8: 1}}, [1], []),
        ({"allowed_token_ids": [1, 8]}, [1], []),
        ({}, [1, 8], []),
        ({}, [1], [8]),
    ],
    ids=str,
)
def test_an_id_outside_the_vocabulary_is_refused(params: dict, prompt: list[int], output: list[int]) -> None:
    with pytest.raises(ValueError, match="wanted token ids from 0 to 7, got 8: "):
        row_contents(SamplingParams(**params), prompt, output, 8)


def test_a_placed_row_runs_and_has_nothing_of_the_last_request() -> None:
    one, other = some_rows(2)
    tables = in_tables([one], [2])
    tables = dataclasses.replace(tables, newest=tables.newest.at[2].set(9), reason=tables.reason.at[2].set(STOP))
    tables = place_row(tables, 2, *other.contents())
    fresh = in_tables([other], [2])
    for found, expected in zip(jax.tree.leaves(tables), jax.tree.leaves(fresh), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert tables.reason.tolist() == [RUNNING] * 12


def test_a_row_is_placed_in_the_same_memory() -> None:
    tables = empty_tables(4, WIDTH)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tables)]
    placed = place_row(tables, 1, *some_rows(1)[0].contents())
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(placed)] == pointers
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(tables))


def test_a_loop_shapes_draws_and_counts_without_a_copy_of_the_tables() -> None:
    """As the compiled step does: logits are shaped from the tables that the token is then counted in."""
    logits, rows = (
        jnp.zeros((4, WIDTH)),
        packed(*[request(**params) for params in SHAPED[:3]], rows=[1, 2, 3], padded_rows=4),
    )

    def loop(tables: RowTables, rows: SamplingRows) -> RowTables:
        def one(_: int, tables: RowTables) -> RowTables:
            return count_tokens(tables, rows, sample(shape_logits(logits, rows, tables), rows), rows.token_limit > 0)

        return jax.lax.fori_loop(0, 5, one, tables)

    compiled = jax.jit(loop, donate_argnums=(0,)).lower(empty_tables(9, WIDTH), rows).compile()
    copies = [line for line in compiled.as_text().splitlines() if f"[9,{WIDTH}]" in line and " copy(" in line]
    assert not copies
    after = compiled(empty_tables(9, WIDTH), jax.tree.map(jnp.asarray, rows))
    assert after.tallies.sum(axis=1).tolist() == [0, 5, 5, 5, 0, 0, 0, 0, 0]


# -------------------------------------------------------------------------------------------------- the rows of a step


def test_rows_of_a_step_carry_what_is_asked() -> None:
    shaping = request(presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5, logprobs=0)
    rows = packed(shaping, request(logprobs=4), request(), rows=[5, 2, 9], padded_rows=4)
    assert rows.row.tolist() == [5, 2, 9, 0]
    assert rows.shaped.tolist() == [True, False, False, False]
    assert (rows.presence.tolist(), rows.frequency.tolist()) == ([1, 0, 0, 0], [-1, 0, 0, 0])
    assert (rows.repetition.tolist(), rows.logprobs.tolist()) == ([1.5, 1, 1, 1], [0, 4, -1, -1])


@pytest.mark.parametrize("rows", [[1], [1, 1], [0, 1], [1, 2, 3]], ids=str)
def test_table_rows_are_one_for_each_request(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="wanted 2 different table rows from 1 on"):
        packed(request(), request(), rows=rows)


def test_a_shaped_request_needs_its_table_row() -> None:
    assert packed(request(), padded_rows=2).row.tolist() == [0, 0]
    with pytest.raises(ValueError, match="pass rows"):
        packed(request(), request(presence_penalty=1))
