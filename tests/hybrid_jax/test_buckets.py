"""The shapes that steps are rounded up to: every step has one, the smallest there is."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax.buckets import FEW_PREFILLS, Bucket, ladder, make_ladders, round_up
from hybrid_jax.request import SamplingParams, make_request
from hybrid_jax.step import RowStep, Step

REQUEST = make_request("0", [1], SamplingParams(max_tokens=4, seed=0), 64)


def row(tokens, pages):
    return RowStep(REQUEST, 1, (1,) * tokens, 0, 0, int(not tokens), True, 1, 1, 0, 0, (1,) * pages)


@pytest.mark.parametrize(
    ("sizes", "steps"), [((1, 16, 2), (1, 2, 4, 8, 16)), ((64, 100, 2), (64, 100)), ((8, 3, 8), (3,))]
)
def test_a_ladder_ends_with_the_most_there_can_be(sizes, steps):
    assert ladder(*sizes) == steps


def test_what_no_step_holds_is_refused():
    with pytest.raises(ValueError, match="wanted at most 4, got 5"):
        round_up(5, (1, 4))


@given(
    decodes=st.integers(0, 20),
    prompts=st.lists(st.integers(1, 100), max_size=10),
    pages=st.integers(0, 32),
    one_width=st.booleans(),
)
def test_every_step_has_a_bucket_that_holds_it(decodes, prompts, pages, one_width):
    rows = [row(0, pages)] * decodes + [row(tokens, pages) for tokens in prompts]
    if not rows:
        return
    ladders = make_ladders(30, 1020, 32, one_width)
    step = Step(1, tuple(rows), 4)
    bucket = ladders.choose(step)
    assert bucket in ladders.all()
    assert bucket.rows >= len(rows) and bucket.pages >= pages
    assert bucket.tokens == 0 if not prompts else bucket.tokens >= step.tokens
    assert bucket.prefills is None or len(prompts) <= bucket.prefills


def test_a_loop_whose_rows_all_take_the_likeliest_token_has_a_program_of_its_own():
    ladders = make_ladders(4, 256, 8, one_width=False, likeliest=True)
    plain, drawn = (SamplingParams(temperature=t, max_tokens=4, seed=0) for t in (0.0, 0.8))
    asked = SamplingParams(temperature=0.0, max_tokens=4, logprobs=1)
    late = SamplingParams(temperature=0.0, max_tokens=4, min_tokens=2)
    for params, likeliest in (([plain, plain], True), ([plain, drawn], False), ([asked], False), ([late], False)):
        rows = tuple(replace(row(0, 1), request=make_request("0", [1], each, 64)) for each in params)
        bucket = ladders.choose(Step(1, rows, 4))
        assert bucket.likeliest == likeliest and bucket in ladders.all()
        assert not make_ladders(4, 256, 8, one_width=False).choose(Step(1, rows, 4)).likeliest


@pytest.mark.parametrize(("rows", "sizes"), [(1, (2,)), (2, (2,)), (5, (2, 4, 5))])
def test_decode_loops_may_have_a_least_number_of_rows(rows, sizes):
    ladders = make_ladders(rows, 256, 8, one_width=True, least_rows=2)
    assert ladders.decode_rows == sizes and ladders.step_rows == (rows,)
    assert ladders.choose(Step(1, (row(0, 1),), 4)).rows == 2


def test_few_prompts_beside_many_rows_in_decode_have_a_bucket_of_their_own():
    ladders = make_ladders(16, 256, 8, one_width=False)
    one, many = ([row(0, 1)] * 4 + [row(40, 1)] * count for count in (1, 3))
    assert ladders.choose(Step(1, tuple(one), 1)) == Bucket(8, 64, 8, FEW_PREFILLS)
    assert ladders.choose(Step(1, tuple(many), 1)) == Bucket(8, 128, 8, None)
    assert make_ladders(4, 256, 8, one_width=False).prefills == (None,)
