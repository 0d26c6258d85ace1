"""The set of tokens that top-k, top-p and min-p leave, against the definition in NumPy float64."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_oracle import define, packed, request, widened

from hybrid_jax import prefixes, sampling
from hybrid_jax.request import SamplingParams

SUPPORT = jax.jit(sampling.support)


def keep(logits: object, **params: object) -> np.ndarray:
    """The support of one row."""
    logits = np.asarray(logits, np.float32)
    return np.asarray(SUPPORT(widened(logits, 1, 300), packed(request(**params))))[0][: logits.size]


def assert_supported(logits: np.ndarray, params: SamplingParams) -> None:
    """The set kept equals the definition's, but for tokens too unlikely for a float32 weight."""
    expected = define(logits, params)
    assert expected.sharp, "choose logits whose limits do not fall on a token"
    np.testing.assert_array_equal(keep(logits, **dataclasses.asdict(params)), expected.probabilities > 1e-40)


PARAMS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.9},
    {"top_p": 1e-7},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.3},
    {"temperature": 1e-3, "top_p": 0.95},
    {"temperature": 2.0, "top_p": 0.5, "min_p": 0.2},
    {"temperature": 1e-5},
]
LOGITS = {
    "random": np.random.default_rng(0).normal(size=300) * 3,
    "ties": np.random.default_rng(1).integers(-2, 3, 300),
    "all equal": np.full(300, -7.5),
    "one token": np.array([4.0]),
    "masked tail": np.where(np.arange(300) < 5, np.arange(300) * 0.4, -np.inf),
    "one left": np.where(np.arange(300) == 100, 0.0, -np.inf),
    "huge": np.where(np.arange(300) % 7 == 0, 3e38, -3e38),
    "huge and near": np.float32(3e38) - np.arange(300) * np.float32(2.1e31),
    "both zeros": np.where(np.arange(300) % 2 == 0, -0.0, 0.0),
    "minute": np.random.default_rng(2).normal(size=300) * 1e-30,
    "peaked": np.where(np.arange(300) == 250, 30.0, np.random.default_rng(3).normal(size=300)),
}


# Where a limit falls on a token, as it may among equal ones, see test_limits_that_fall_on_a_token.
CASES = [(name, p) for name in LOGITS for p in PARAMS if define(LOGITS[name], SamplingParams(**p)).sharp]


@pytest.mark.parametrize(("name", "params"), CASES, ids=str)
def test_support_equals_the_definition(name: str, params: dict) -> None:
    assert_supported(LOGITS[name], SamplingParams(**params))


VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.0 + 2**-23, -1.0, 20.0, -20.0, -np.inf, 1e30, -1e30]),
    st.floats(-30, 30, width=32),
)


@hypothesis.given(
    logits=st.lists(VALUES, min_size=17, max_size=17).filter(lambda values: max(values) > -np.inf),
    temperature=st.sampled_from([1e-5, 1e-3, 0.3, 1.0, 2.0]),
    top_k=st.integers(0, 20),
    top_p=st.floats(1e-6, 1.0),
    min_p=st.sampled_from([0.0, 1e-4, 0.05, 0.7, 1.0]),
)
@hypothesis.settings(max_examples=300)
def test_support_equals_the_definition_on_any_row(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    hypothesis.assume(define(logits, params).sharp)
    assert_supported(np.array(logits, np.float32), params)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_p": 0.5}, 4),  # exactly half: reached, not passed
        ({"top_p": 0.5 + 2**-20}, 5),
        ({"top_p": 0.125}, 1),
        ({"top_p": 1e-13}, 1),  # a share of nothing in fixed point
        ({"top_p": 1 - 2**-24}, 8),
        ({"top_k": 4, "top_p": 0.5}, 2),  # of what top-k left
        ({"top_k": 4, "top_p": 0.25, "min_p": 1.0}, 1),
        ({"top_k": 9}, 8),
        ({"top_k": 2**31 - 1}, 8),
        ({"min_p": 1.0}, 8),
    ],
    ids=str,
)
def test_limits_that_fall_on_a_token(params: dict, kept: int) -> None:
    """Eight equal tokens have weights of 1: sums are exact, and the lowest ids go first."""
    np.testing.assert_array_equal(keep(np.full(8, 2.5), **params), np.arange(8) < kept)


def test_top_k_keeps_exactly_k_of_ties_by_lower_id() -> None:
    logits = [1.0, 5.0, 1.0, 5.0, 1.0, 9.0, 1.0, -3.0]
    for k, kept in ((1, {5}), (2, {5, 1}), (3, {5, 1, 3}), (4, {5, 1, 3, 0}), (6, {5, 1, 3, 0, 2, 4})):
        assert set(np.flatnonzero(keep(logits, top_k=k))) == kept


def test_top_k_before_top_p_before_min_p() -> None:
    """Shares 0.4, 0.3, 0.2, 0.1: each other order keeps another set."""
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert keep(logits, top_k=2, top_p=0.56).tolist() == [True, False, False, False]
    assert keep(logits, top_p=0.56).tolist() == [True, True, False, False]
    # Were min-p first, the rest would be 0.4, 0.3 and half of it reached with one token.
    assert keep(logits, top_p=0.5, min_p=0.7).tolist() == [True, True, False, False]


def test_top_p_of_a_large_vocabulary_is_as_exact_as_its_weights() -> None:
    """A flat distribution over 150 001 tokens, where sums in float32 would be off by many tokens."""
    logits = np.random.default_rng(4).normal(size=150_001).astype(np.float32) * 0.1
    weights = np.sort(np.exp(logits.astype(np.float64) - logits.max()))[::-1]
    for p in (0.1, 0.5, 0.9):
        kept = int(SUPPORT(jnp.asarray(logits)[None], packed(request(top_p=p))).sum())
        assert abs(kept - (np.searchsorted(np.cumsum(weights) / weights.sum(), np.float32(p)) + 1)) <= 1


def test_top_p_of_one_row_leaves_the_others_alone() -> None:
    """The last token is too unlikely to be drawn, and a share of 1 still keeps it."""
    logits = jnp.tile(jnp.array([0.0, -1.0, -60.0]), (2, 1))
    support = SUPPORT(logits, packed(request(top_p=0.5), request()))
    assert support.tolist() == [[True, False, False], [True, True, True]]


@hypothesis.given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=50))
def test_weights_add_up_as_integers(weights: list[float]) -> None:
    weights_BY = jnp.zeros((1, 64)).at[0, : len(weights)].set(jnp.array(weights, jnp.float32))
    high, low = prefixes.mass_of(weights_BY)(jnp.ones((1, 64), bool))
    assert (int(high[0]) << 26) + int(low[0]) == sum(int(weight * 2**39) for weight in weights)


def test_the_largest_vocabulary_of_equal_tokens_does_not_overflow() -> None:
    weights_BY = jnp.ones((1, sampling.MAX_VOCABULARY))
    high, low = prefixes.mass_of(weights_BY)(weights_BY > 0.0)
    assert (int(high[0]), int(low[0])) == (sampling.MAX_VOCABULARY << 13, 0)
    weights_BY = jnp.full((1, sampling.MAX_VOCABULARY), 1 - 2**-24)
    high, low = prefixes.mass_of(weights_BY)(weights_BY > 0.0)
    assert (int(high[0]) << 26) + int(low[0]) == sampling.MAX_VOCABULARY * (2**39 - 2**15)
