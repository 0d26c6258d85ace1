"""Log-probabilities of the chosen and of the likeliest tokens, against the definition in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_oracle import logprobs, packed, request

from hybrid_jax import sampling

LOGPROBS = jax.jit(sampling.token_logprobs)
EXACT = 2e-6  # of a logprob: float32 rounding of `logit - max`, of the normaliser and of their difference
CUT = 300 * 2.0**-39  # what the fixed-point sum over 300 tokens may leave out


def ask(logits: object, tokens: list[int], asked: list[int | None], padded_rows: int | None = None) -> list[np.ndarray]:
    rows = packed(*[request(logprobs=count) for count in asked], padded_rows=padded_rows)
    logits, short = np.asarray(logits, np.float32), len(rows.logprobs) - len(tokens)
    return [
        np.asarray(one) for one in LOGPROBS(np.pad(logits, ((0, short), (0, 0))), jnp.array(tokens + [0] * short), rows)
    ]


LOGITS = {
    "normal": np.random.default_rng(0).normal(size=300) * 3,
    "ties": np.random.default_rng(1).integers(-2, 3, 300),
    "all equal": np.full(300, -7.5),
    "masked tail": np.where(np.arange(300) < 30, np.arange(300) * 0.4, -np.inf),
    "far apart": np.where(np.arange(300) % 7 == 0, 1e4, -1e4),
    "nearly sure": np.where(np.arange(300) == 250, 25.0, np.random.default_rng(2).normal(size=300)),
}


@pytest.mark.parametrize("name", LOGITS)
def test_values_and_order_equal_the_definition(name: str) -> None:
    expected = logprobs(LOGITS[name])
    order = np.argsort(-LOGITS[name].astype(np.float32), kind="stable")[:20]
    for token in (0, 7, int(order[0])):
        chosen, top, ids = ask(LOGITS[name][None], [token], [5])
        np.testing.assert_array_equal(ids[0], order)
        np.testing.assert_allclose(top[0], expected[order], rtol=EXACT, atol=CUT)
        np.testing.assert_allclose(chosen[0], expected[token], rtol=EXACT, atol=CUT)


def test_a_large_vocabulary() -> None:
    logits = np.random.default_rng(3).normal(size=(1, 150_001)).astype(np.float32) * 0.1
    chosen, top, _ = ask(logits, [17], [1])
    np.testing.assert_allclose(chosen[0], logprobs(logits[0])[17], rtol=EXACT)
    np.testing.assert_allclose(top[0], np.sort(logprobs(logits[0]))[:-21:-1], rtol=EXACT)


def test_the_chosen_token_has_the_bits_it_has_among_the_likeliest() -> None:
    """So that a reader may call a token greedy where its number equals the first one."""
    logits = np.random.default_rng(4).normal(size=(20, 97)).astype(np.float32) * 4
    order = np.argsort(-logits, axis=1)
    chosen, top, _ = ask(logits, [int(order[row, row]) for row in range(20)], [20] * 20)
    np.testing.assert_array_equal(chosen, top[np.arange(20), np.arange(20)])


@pytest.mark.parametrize("vocabulary", [3, 21, 1000])
def test_a_row_has_the_same_bits_in_any_batch(vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    logits = rng.normal(size=(7, vocabulary)).astype(np.float32) * 5
    tokens, asked = [row % vocabulary for row in range(7)], [3, None, 0, 20, None, 1, 5]
    alone = [ask(logits[row : row + 1], tokens[row : row + 1], asked[row : row + 1]) for row in range(7)]
    for padded_rows in (7, 16, 33):
        order = rng.permutation(7)
        batch = ask(logits[order], [tokens[i] for i in order], [asked[i] for i in order], padded_rows)
        for place, row in enumerate(order):
            for one, lone in zip(batch, alone[row], strict=True):
                np.testing.assert_array_equal(one[place], lone[0])


def test_rows_that_do_not_ask_and_rows_without_a_token_get_zeros() -> None:
    logits = [[1.0, 2.0], [np.nan, 1.0], [1.0, np.inf], [1.0, 2.0]]
    tokens = [1, sampling.NO_TOKEN, sampling.NO_TOKEN, 1]
    for one in ask(logits, tokens, [None, 2, 2, 2], padded_rows=6):
        assert (one[[0, 1, 2, 4, 5]] == 0).all() and (one[3] != 0).any()
    for one in ask(logits, tokens, [None, 2, 2, None]):
        assert (one == 0).all()


def test_a_vocabulary_of_fewer_tokens_ends_with_none() -> None:
    _, top, ids = ask([[0.0, 5.0, 1.0]], [0], [20])
    assert ids[0].tolist() == [1, 2, 0] + [sampling.NO_TOKEN] * 17
    assert np.isfinite(top[0, :3]).all() and (top[0, 3:] == -np.inf).all()


def test_half_precision_logits_are_taken_as_float32() -> None:
    logits = jnp.array([[0.5, 2.0, -1.0]], jnp.bfloat16)
    rows = packed(request(logprobs=1))
    one, other = (LOGPROBS(logits.astype(dtype), jnp.array([2]), rows) for dtype in (jnp.bfloat16, jnp.float32))
    np.testing.assert_array_equal(one[0], other[0])


def test_too_large_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="wanted at most 524287 tokens, got 524288"):
        jax.eval_shape(
            sampling.token_logprobs,
            jax.ShapeDtypeStruct((1, 2**19), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            packed(request(logprobs=1)),
        )
