"""What is drawn, what a draw depends on, and when a row is done."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_oracle import define, packed, request, widened
from scipy.stats import chi2

from hybrid_jax import prefixes, sampling
from hybrid_jax.request import ERROR, LENGTH, RUNNING, STOP, Request, SamplingParams

BOTH = jax.jit(lambda logits, rows: (sampling.sample(logits, rows), sampling.support(logits, rows)))
SAMPLE = jax.jit(sampling.sample)
FINISHED = jax.jit(sampling.finished)
DRAWS = 8192


def take(logits: object, *requests: Request, sampled: list[int] | None = None) -> list[int]:
    """One token for each request."""
    rows = packed(*requests, sampled=sampled, padded_rows=8)
    return SAMPLE(widened(logits, 8, 64), rows).tolist()[: len(requests)]


# -------------------------------------------------------------------------------------------------------- what is drawn


def draws(logits: np.ndarray, **params: object) -> np.ndarray:
    """`DRAWS` tokens of one request, as if each came after one more token."""
    rows = packed(*[request(**params)] * DRAWS, sampled=list(range(DRAWS)))
    vocabulary = -(-len(logits) // 64) * 64
    return np.asarray(SAMPLE(jnp.broadcast_to(widened(logits, 1, vocabulary), (DRAWS, vocabulary)), rows))


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.5}, {"top_k": 5, "temperature": 2.0}, {"top_p": 0.8}, {"min_p": 0.3}], ids=str
)
def test_draws_follow_the_definition(params: dict) -> None:
    """Pearson's chi-square; the seed is fixed, so the test is too."""
    params = {"seed": 1, **params}
    logits = np.array([0.3, -1.0, 2.0, 0.3, -np.inf, 1.1, 1.9, -2.5, 0.0, 0.7])
    expected = define(logits, SamplingParams(**params)).probabilities * DRAWS
    seen = np.bincount(draws(logits, **params), minlength=10)
    assert (seen[expected == 0] == 0).all()
    drawn = expected > 0
    statistic = ((seen - expected)[drawn] ** 2 / expected[drawn]).sum()
    assert chi2.sf(statistic, drawn.sum() - 1) > 1e-3


def test_draws_over_many_blocks_follow_the_definition() -> None:
    """A vocabulary of several blocks and a part of one: the share of each of 13 slices."""
    logits = np.random.default_rng(5).normal(size=2 * sampling.BLOCK + 77)
    slices = np.arange(len(logits)) * 13 // len(logits)
    expected = np.bincount(slices, define(logits, SamplingParams()).probabilities) * DRAWS
    seen = np.bincount(slices[draws(logits)], minlength=13)
    assert chi2.sf(((seen - expected) ** 2 / expected).sum(), 12) > 1e-3


def test_a_draw_is_the_first_id_at_which_the_sum_passes_the_random_amount() -> None:
    """Exactly, in Python's integers, over several blocks."""
    rows = packed(*[request(seed=row) for row in range(200)])
    logits = np.random.default_rng(11).normal(size=(200, 2 * sampling.BLOCK + 77)).astype(np.float32) * 3
    tokens, weights = SAMPLE(logits, rows), np.asarray(jax.jit(sampling._weights)(logits, rows)).astype(np.float64)
    digits = np.asarray(sampling._random_digits(rows)).astype(object)  # highest first
    for row in range(200):
        sums = np.cumsum((weights[row] * 2**39).astype(np.int64))
        amount = int(sums[-1]) * int(sum(digits[place, row] << 13 * (3 - place) for place in range(4))) >> 52
        assert tokens[row] == np.searchsorted(sums, amount, side="right")


def test_consecutive_draws_are_independent() -> None:
    pairs = draws(np.zeros(8)).reshape(-1, 2)
    seen = np.bincount(pairs[:, 0] * 8 + pairs[:, 1], minlength=64)
    assert chi2.sf(((seen - DRAWS / 2 / 64) ** 2 / (DRAWS / 2 / 64)).sum(), 63) > 1e-3


@pytest.mark.parametrize(("digit", "token"), [(0, 1), (sampling.DIGIT_MASK, 3)])
def test_the_ends_of_the_random_numbers_draw_the_ends(monkeypatch: pytest.MonkeyPatch, digit: int, token: int) -> None:
    """Every amount from nothing to just under everything lands on a token that is kept."""
    logits = jnp.array([[-jnp.inf, 0.0, -jnp.inf, 0.0, -jnp.inf]])
    monkeypatch.setattr(sampling, "_random_digits", lambda rows: [jnp.full((1,), digit, jnp.uint32)] * 4)
    draw = jax.jit(lambda logits, rows: sampling._draw(logits, rows))
    assert draw(logits, packed(request())).tolist() == [token]


def test_a_greedy_row_takes_the_lowest_of_the_most_likely() -> None:
    logits = [[1.0, 3.0, 3.0, 2.0], [-0.0, 0.0, -1.0, 0.0], [-np.inf, -np.inf, -np.inf, -9.0]]
    greedy = request(temperature=9e-6, top_k=1, top_p=0.1, min_p=1.0)
    assert take(logits, greedy, greedy, greedy) == [1, 0, 3]


def test_greedy_rows_among_sampled_rows() -> None:
    logits = np.random.default_rng(6).normal(size=(8, 50)).astype(np.float32)
    requests = [request(temperature=0.0) if row % 2 else request(seed=row) for row in range(8)]
    tokens = np.array(take(logits, *requests))
    np.testing.assert_array_equal(tokens[1::2], logits[1::2].argmax(-1))
    assert (tokens[::2] != logits[::2].argmax(-1)).all()


def test_the_padded_vocabulary_is_never_drawn() -> None:
    logits = np.where(np.arange(64) < 50, 0.0, -np.inf)
    for params in ({}, {"top_k": 60}, {"top_p": 1 - 2**-24}, {"temperature": 2.0}):
        tokens = draws(logits, **params)
        assert tokens.max() < 50 and len(set(tokens)) == 50


def test_a_low_temperature_is_computed_and_not_lifted() -> None:
    """At 1e-3 a token 0.005 below the best has e**-5 of its weight; at 0.01 it would have e**-0.5."""
    seen = np.bincount(draws(np.array([1.0, 0.995]), temperature=1e-3), minlength=2)
    assert abs(seen[1] / DRAWS - 1 / (1 + np.exp(5))) < 3e-3


# ----------------------------------------------------------------------------------------------- what a draw depends on


MIXED = [
    {},
    {"temperature": 0.0},
    {"top_k": 3},
    {"top_p": 0.7, "temperature": 0.4},
    {"min_p": 0.2},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.01, "temperature": 1.5},
]


def test_a_row_draws_alone_what_it_draws_in_any_batch() -> None:
    """Bitwise: the token and the set kept, at every place in a batch of another size."""
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(11, 531)).astype(np.float32) * 2
    requests = [request(seed=row, **MIXED[row % len(MIXED)]) for row in range(11)]
    alone = [BOTH(logits[row : row + 1], packed(requests[row], sampled=[row])) for row in range(11)]
    for _ in range(4):
        order = rng.permutation(11)
        rows = packed(*[requests[i] for i in order], sampled=list(order), padded_rows=16)
        tokens, support = BOTH(np.pad(logits[order], ((0, 5), (0, 0))), rows)
        for place, row in enumerate(order):
            assert tokens[place] == alone[row][0][0]
            np.testing.assert_array_equal(support[place], alone[row][1][0])


@pytest.mark.parametrize("vocabulary", [1, 3, 17, 1000])
def test_weights_are_the_same_bits_in_any_batch(vocabulary: int) -> None:
    """A vector unit that rounded its last few lanes otherwise would show here."""
    row = np.random.default_rng(10).normal(size=vocabulary).astype(np.float32) * 5
    weights = jax.jit(sampling._weights)
    alone = np.asarray(weights(row[None], packed(request(temperature=0.7))))[0]
    for rows, place in ((2, 1), (5, 3), (33, 17)):
        batch = np.random.default_rng(rows).normal(size=(rows, vocabulary)).astype(np.float32)
        batch[place] = row
        among = np.asarray(weights(batch, packed(*[request(temperature=0.7)] * rows)))[place]
        np.testing.assert_array_equal(among.view(np.uint32), alone.view(np.uint32))


def test_seeds_choices_and_positions_draw_independently() -> None:
    """Two independent rows of draws over 64 tokens agree in one of 64 places."""
    streams = [draws(np.zeros(64), **params) for params in ({}, {"seed": 1}, {"seed": -1}, {"choice": 1})]
    streams += [np.roll(streams[0], 1), np.roll(streams[3], 1)]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert abs((one == other).mean() - 1 / 64) < 6e-3


def test_every_bit_of_a_seed_counts() -> None:
    seeds = [0, 1, -1, 2**32, 2**32 + 1, 2**63 - 1, -(2**63), *(1 << bit for bit in range(1, 63))]
    words = {tuple(row) for row in packed(*[request(seed=seed) for seed in seeds]).seed.tolist()}
    assert len(words) == len(set(seeds))


def test_the_key_is_the_one_stated() -> None:
    """fold_in(fold_in(key(seed), choice), index), so that others can replay a draw."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7, impl="threefry2x32"), 2), 5)
    word = int(jax.random.bits(key, (2,), jnp.uint32)[0])
    digits = sampling._random_digits(jax.tree.map(jnp.asarray, packed(request(seed=7, choice=2), sampled=[5])))
    assert int(digits[0][0]) << 13 | int(digits[1][0]) == word >> 6


def test_a_loop_on_the_device_draws_what_single_steps_draw() -> None:
    logits = widened(np.random.default_rng(8).normal(size=(8, 40)), 8, 64)
    requests = [request(seed=row, **MIXED[row % len(MIXED)]) for row in range(8)]
    rows = jax.tree.map(jnp.asarray, packed(*requests, sampled=[3] * 8))

    @jax.jit
    def loop(rows: sampling.SamplingRows) -> jax.Array:
        return jax.lax.scan(
            lambda r, _: (r.advanced(jnp.ones_like(r.sampled)), sampling.sample(logits, r)), rows, length=10
        )[1]

    tokens = np.asarray(loop(rows))
    for step in range(10):
        np.testing.assert_array_equal(tokens[step], SAMPLE(logits, rows))
        rows = rows.advanced(jnp.ones_like(rows.sampled))


def test_one_program_serves_every_mix_of_requests() -> None:
    sample = jax.jit(lambda logits, rows: sampling.sample(logits, rows))  # its own cache of programs
    for params in MIXED:
        stop_token_ids = list(range(16))[: len(params) * 5]
        sample(jnp.zeros((2, 64)), packed(request(stop_token_ids=stop_token_ids, **params), padded_rows=2))
    assert sample._cache_size() == 1


# ------------------------------------------------------------------------------------------------------- masks and ends


def test_min_tokens_masks_every_stop_id() -> None:
    logits = [0, 50, 0, 50, 0, 0]
    short = request(temperature=0.0, min_tokens=2, stop_token_ids=[1, 5_000_000])
    assert take([logits] * 4, short, short, short, short, sampled=[0, 1, 2, 3]) == [0, 0, 1, 1]
    ignoring = request(temperature=0.0, min_tokens=2, stop_token_ids=[1], ignore_eos=True)
    assert take(logits, ignoring) == [3]  # the end id of the model is no stop id here


def test_min_tokens_of_one_row_leaves_the_others_alone() -> None:
    short, free = request(temperature=0.0, min_tokens=1), request(temperature=0.0)
    assert take([[0, 0, 0, 50]] * 2, short, free) == [0, 3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_nothing_to_draw_from_gives_no_token(temperature: float) -> None:
    bad = [[np.nan, 1, 2, 0], [-np.inf] * 4, [1, np.inf, 2, 0], [-np.inf] * 3 + [9], [0, 9, 0, -np.inf]]
    plain, short = request(temperature=temperature), request(temperature=temperature, min_tokens=1)
    requests = [plain, plain, plain, short, plain]  # the fourth has only the end id left, and it is masked
    tokens = take(bad, *requests)
    assert tokens[:4] == [sampling.NO_TOKEN] * 4 and tokens[4] in (0, 1, 2)
    assert FINISHED(jnp.array(tokens), packed(*requests))[1].tolist() == [ERROR] * 4 + [RUNNING]


@pytest.mark.parametrize(
    ("params", "sampled", "token", "reason"),
    [
        ({}, 0, 5, RUNNING),
        ({}, 0, 3, STOP),
        ({"ignore_eos": True}, 0, 3, RUNNING),
        ({"ignore_eos": True, "stop_token_ids": [3]}, 0, 3, STOP),
        ({"stop_token_ids": [5, 9]}, 0, 9, STOP),
        ({"max_tokens": 1}, 0, 5, LENGTH),
        ({"max_tokens": 4}, 2, 5, RUNNING),
        ({"max_tokens": 4}, 3, 5, LENGTH),
        ({"max_tokens": 4}, 3, 3, STOP),  # a stop id on the last token allowed
        ({"max_tokens": 4, "min_tokens": 4}, 2, 3, RUNNING),
        ({"max_tokens": 4, "min_tokens": 4}, 3, 3, STOP),
        ({}, 998, 5, LENGTH),  # the context of 1000 holds a prompt of 1
        ({}, 997, 5, RUNNING),
    ],
)
def test_finished(params: dict, sampled: int, token: int, reason: int) -> None:
    done, reasons = FINISHED(jnp.array([token]), packed(request(**params), sampled=[sampled]))
    assert (reasons.tolist(), done.tolist()) == ([reason], [reason != RUNNING])


def test_padding_rows_are_done() -> None:
    rows = packed(request(), padded_rows=3)
    assert FINISHED(jnp.array([0, 0, 0]), rows)[0].tolist() == [False, True, True]


def test_half_precision_logits_are_sampled_in_float32() -> None:
    logits = widened(np.random.default_rng(9).normal(size=(8, 64)), 8, 64).astype(jnp.bfloat16)
    rows = packed(*[request(seed=row, top_p=0.9) for row in range(8)])
    np.testing.assert_array_equal(SAMPLE(logits, rows), SAMPLE(logits.astype(jnp.float32), rows))


def test_a_vocabulary_of_one_token() -> None:
    tokens, support = BOTH(jnp.array([[4.0]]), packed(request(top_k=1, top_p=0.5, min_p=1.0)))
    assert (tokens.tolist(), support.tolist()) == ([0], [[True]])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="got 2 requests and 2 counts"):
        packed(request(), request(), padded_rows=1)
    with pytest.raises(ValueError, match="got 1 requests and 2 counts"):
        packed(request(), sampled=[0, 1])
    with pytest.raises(ValueError, match="wanted at most 524287 tokens, got 524288"):
        jax.eval_shape(sampling.sample, jax.ShapeDtypeStruct((1, 2**19), jnp.float32), packed(request()))


@hypothesis.given(
    st.integers(0, 2**32 - 1), st.integers(0, 2**26 - 1), st.lists(st.integers(0, 2**13 - 1), min_size=4, max_size=4)
)
def test_amounts_are_scaled_as_integers(high: int, low: int, digits: list[int]) -> None:
    word = lambda value: jnp.array([value], jnp.uint32)  # noqa: E731
    scaled = prefixes.scaled((word(high), word(low)), [word(digit) for digit in digits])
    fraction = sum(digit << 13 * place for place, digit in enumerate(reversed(digits)))
    assert (int(scaled[0][0]) << 26) + int(scaled[1][0]) == ((high << 26) + low) * fraction >> 52
