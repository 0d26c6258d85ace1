"""Requests: what is accepted, what is refused and with which words, and what is settled when one is made."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from hybrid_jax import request as module
from hybrid_jax.request import FINISH_REASONS, LENGTH, STOP, SamplingParams, make_request

NAN, INFINITY = float("nan"), float("inf")


def test_defaults() -> None:
    params = SamplingParams()
    assert dataclasses.asdict(params) == {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "max_tokens": None,
        "min_tokens": 0,
        "ignore_eos": False,
        "include_stop_str_in_output": False,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": (),
        "allowed_token_ids": None,
        "logprobs": None,
    }
    assert not params.greedy and not params.shaped


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 2.0},
        {"top_k": 2**31 - 1},
        {"top_p": 1e-9},
        {"min_p": 1},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"stop": ["a", "b", "c", "d" * 256]},
        {"stop_token_ids": tuple(range(16))},
        {"stop_token_ids": [2**31 - 1]},
        {"max_tokens": 1, "min_tokens": 1},
        {"min_tokens": 7},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"repetition_penalty": 2},
        {"repetition_penalty": 1e-9},
        {"logit_bias": dict.fromkeys(range(300), 100)},
        {"logit_bias": {2**31 - 1: -100.0}},
        {"allowed_token_ids": range(2)},
        {"allowed_token_ids": [2**31 - 1]},
        {"logprobs": 0},
        {"logprobs": 20},
    ],
    ids=str,
)
def test_limits_are_accepted(params: dict) -> None:
    SamplingParams(**params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -1e-9}, "wanted temperature from 0 to 2, got -1e-09"),
        ({"temperature": 2.001}, "wanted temperature from 0 to 2, got 2.001"),
        ({"temperature": NAN}, "wanted temperature from 0 to 2, got nan"),
        ({"temperature": INFINITY}, "wanted temperature from 0 to 2, got inf"),
        ({"temperature": 10**400}, "wanted temperature from 0 to 2, got 1000"),
        ({"temperature": True}, "wanted temperature as a number, got True"),
        ({"temperature": "1"}, "wanted temperature as a number, got '1'"),
        ({"temperature": None}, "wanted temperature as a number, got None"),
        ({"top_p": 0.0}, "wanted top_p above 0"),
        ({"top_p": -0.1}, "wanted top_p from 0 to 1"),
        ({"top_p": 1.1}, "wanted top_p from 0 to 1"),
        ({"top_p": NAN}, "wanted top_p from 0 to 1, got nan"),
        ({"min_p": -0.1}, "wanted min_p from 0 to 1"),
        ({"min_p": 1.1}, "wanted min_p from 0 to 1"),
        ({"top_k": -2}, "wanted top_k from -1"),
        ({"top_k": 2**31}, "wanted top_k from -1 to 2147483647, got 2147483648"),
        ({"top_k": 1.0}, "wanted top_k as an integer, got 1.0"),
        ({"top_k": True}, "wanted top_k as an integer, got True"),
        ({"seed": 2**63}, "wanted seed from"),
        ({"seed": -(2**63) - 1}, "wanted seed from"),
        ({"seed": 1.5}, "wanted seed as an integer"),
        ({"stop": ["a"] * 5}, "wanted at most 4 stop strings, got 5"),
        ({"stop": ""}, "wanted stop strings of 1 to 256 characters, got ''"),
        ({"stop": ["a", ""]}, "wanted stop strings of 1 to 256 characters, got ''"),
        ({"stop": "d" * 257}, "wanted stop strings of 1 to 256 characters, got 'dddd"),
        ({"stop": ["a", 5]}, "wanted stop strings of 1 to 256 characters, got '5'"),
        ({"stop": 5}, "wanted stop as a list or tuple, got 5"),
        ({"stop": None}, "wanted stop as a list or tuple, got None"),
        ({"stop_token_ids": [1] * 17}, "wanted at most 16 stop_token_ids, got 17"),
        ({"stop_token_ids": [-1]}, "wanted each of stop_token_ids from 0"),
        ({"stop_token_ids": [2**31]}, "wanted each of stop_token_ids from 0"),
        ({"stop_token_ids": ["1"]}, "wanted each of stop_token_ids as an integer, got '1'"),
        ({"stop_token_ids": "12"}, "wanted stop_token_ids as a list or tuple, got '12'"),
        ({"stop_token_ids": 12}, "wanted stop_token_ids as a list or tuple, got 12"),
        ({"max_tokens": 0}, "wanted max_tokens from 1"),
        ({"max_tokens": 2.0}, "wanted max_tokens as an integer"),
        ({"min_tokens": -1}, "wanted min_tokens from 0"),
        ({"min_tokens": None}, "wanted min_tokens as an integer"),
        ({"max_tokens": 4, "min_tokens": 5}, "wanted min_tokens up to max_tokens=4, got 5"),
        ({"presence_penalty": -2.1}, "wanted presence_penalty from -2 to 2, got -2.1"),
        ({"frequency_penalty": NAN}, "wanted frequency_penalty from -2 to 2, got nan"),
        ({"frequency_penalty": "1"}, "wanted frequency_penalty as a number, got '1'"),
        ({"repetition_penalty": 0}, "wanted repetition_penalty above 0 and at most 2, got 0"),
        ({"repetition_penalty": -1}, "wanted repetition_penalty from 0 to 2, got -1"),
        ({"repetition_penalty": 2.1}, "wanted repetition_penalty from 0 to 2, got 2.1"),
        ({"logit_bias": {1: 100.1}}, "wanted logit_bias of id 1 from -100 to 100, got 100.1"),
        ({"logit_bias": {1: NAN}}, "wanted logit_bias of id 1 from -100 to 100, got nan"),
        ({"logit_bias": {1: None}}, "wanted logit_bias of id 1 as a number, got None"),
        ({"logit_bias": {"1": 1}}, "wanted each id of logit_bias as an integer, got '1'"),
        ({"logit_bias": {-1: 1}}, "wanted each id of logit_bias from 0"),
        ({"logit_bias": dict.fromkeys(range(301), 0)}, "wanted at most 300 entries of logit_bias, got 301"),
        ({"logit_bias": [(1, 0.5), (1, 0.5)]}, "wanted one logit_bias for each id, got 2 for 1 ids"),
        ({"logit_bias": [1]}, "wanted logit_bias as a mapping of ids to numbers, got the entry 1"),
        ({"logit_bias": None}, "wanted logit_bias as a list or tuple, got None"),
        ({"allowed_token_ids": []}, "wanted at least one of allowed_token_ids, got none"),
        ({"allowed_token_ids": [-1]}, "wanted each of allowed_token_ids from 0"),
        ({"allowed_token_ids": 5}, "wanted allowed_token_ids as a list or tuple, got 5"),
        ({"logprobs": 21}, "wanted logprobs from 0 to 20, got 21"),
        ({"logprobs": -1}, "wanted logprobs from 0 to 20, got -1"),
        ({"logprobs": True}, "wanted logprobs as an integer, got True"),
        ({"ignore_eos": 1}, "wanted ignore_eos as True or False, got 1"),
        ({"include_stop_str_in_output": None}, "wanted include_stop_str_in_output as True or False, got None"),
    ],
    ids=str,
)
def test_refusals_say_wanted_got_and_what_to_do(params: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        SamplingParams(**params)
    assert message in str(error.value)
    assert ": " in str(error.value)  # what to do stands after it


@hypothesis.given(
    name=st.sampled_from([field.name for field in dataclasses.fields(SamplingParams)]),
    value=st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=3),
        st.lists(st.one_of(st.integers(), st.text(max_size=2), st.none()), max_size=20),
        st.dictionaries(st.text(max_size=1), st.integers(), max_size=1),
        st.dictionaries(st.integers(-1, 9), st.floats(-101, 101), max_size=3),
        st.lists(st.tuples(st.integers(0, 9), st.floats(-99, 99)), max_size=3),
        st.binary(max_size=2),
    ),
)
def test_any_value_is_refused_with_value_error_or_kept_in_its_final_form(name: str, value: object) -> None:
    try:
        params = SamplingParams(**{name: value})
    except ValueError:
        return
    assert {params} and params == dataclasses.replace(params)  # hashable, and its own fields make it again


def test_values_are_put_in_one_form() -> None:
    params = SamplingParams(temperature=0, top_k=-1, stop="ab", stop_token_ids=[1, 2])
    assert (params.temperature, params.top_k, params.stop, params.stop_token_ids) == (0.0, 0, ("ab",), (1, 2))
    assert type(params.temperature) is float
    assert SamplingParams(stop=["a", "b"]) == SamplingParams(stop=("a", "b"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3


def test_a_bias_is_kept_as_sorted_pairs_and_allowed_ids_as_they_come() -> None:
    params = SamplingParams(logit_bias={9: 1, 2: -0.5}, allowed_token_ids=[7, 3, 7])
    assert (params.logit_bias, params.allowed_token_ids) == (((2, -0.5), (9, 1.0)), (7, 3, 7))
    assert params == SamplingParams(logit_bias=[(9, 1.0), (2, -0.5)], allowed_token_ids=(7, 3, 7))


@pytest.mark.parametrize(
    ("params", "shaped"),
    [
        ({"presence_penalty": -0.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"repetition_penalty": 0.9}, True),
        ({"logit_bias": {1: 0}}, True),
        ({"allowed_token_ids": [1]}, True),
        ({"logit_bias": {}, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": -0.0}, False),
        ({"logprobs": 3, "min_tokens": 2, "temperature": 0.1, "top_k": 1}, False),
    ],
    ids=str,
)
def test_shaped_is_whatever_changes_the_logits(params: dict, shaped: bool) -> None:
    assert SamplingParams(**params).shaped is shaped


def test_greedy_starts_below_1e_5() -> None:
    assert SamplingParams(temperature=9.9e-6).greedy and not SamplingParams(temperature=1e-5).greedy


@pytest.mark.parametrize(("max_tokens", "limit"), [(None, 7), (7, 7), (3, 3)])
def test_the_limit_is_max_tokens_or_the_rest_of_the_context(max_tokens: int | None, limit: int) -> None:
    made = make_request("r", [5, 0, 9], SamplingParams(max_tokens=max_tokens), max_model_len=10)
    assert (made.prompt_token_ids, made.token_limit) == ((5, 0, 9), limit)


@pytest.mark.parametrize(
    ("prompt", "params", "numbers"),
    [
        (3, {"max_tokens": 8}, ("max_model_len=10", "got 3", "and 8")),
        (3, {"min_tokens": 8}, ("max_model_len=10", "got 3", "and 8")),
        (10, {}, ("max_model_len=10", "got 10", "and 1")),
        (11, {}, ("max_model_len=10", "got 11", "and 1")),
    ],
)
def test_a_full_context_is_refused_with_its_three_numbers(prompt: int, params: dict, numbers: tuple) -> None:
    with pytest.raises(ValueError) as error:
        make_request("r", [1] * prompt, SamplingParams(**params), max_model_len=10)
    assert all(number in str(error.value) for number in numbers)


@pytest.mark.parametrize("prompt", [[], [-1], [2**31], [1.0], ["a"], [True]], ids=str)
def test_bad_prompts(prompt: list) -> None:
    with pytest.raises(ValueError, match="wanted"):
        make_request("r", prompt, SamplingParams(), max_model_len=10)


def test_a_seed_is_kept_or_drawn() -> None:
    assert make_request("r", [1], SamplingParams(seed=-5), 10).seed == -5
    seeds = {make_request("r", [1], SamplingParams(), 10).seed for _ in range(50)}
    assert len(seeds) == 50 and all(SamplingParams(seed=seed).seed == seed for seed in seeds)


def test_choices_share_all_but_their_number() -> None:
    params = SamplingParams(seed=3)
    first, second = (make_request("r", [1], params, 10, choice=choice) for choice in (0, 1))
    assert dataclasses.replace(second, choice=0) == first
    with pytest.raises(ValueError, match="wanted choice from 0"):
        make_request("r", [1], params, 10, choice=-1)


def test_priority_and_salt_are_kept_and_checked() -> None:
    first = make_request("r", [1], SamplingParams(seed=3), 10)
    assert (first.priority, first.cache_salt) == (0, "")
    other = make_request("r", [1], SamplingParams(seed=3), 10, priority=-5, cache_salt="a")
    assert dataclasses.replace(other, priority=0, cache_salt="") == first and other.priority == -5
    with pytest.raises(ValueError, match="wanted priority from"):
        make_request("r", [1], SamplingParams(), 10, priority=2**63)
    with pytest.raises(ValueError, match="wanted cache_salt as a string, got 5: "):
        make_request("r", [1], SamplingParams(), 10, cache_salt=5)


def test_reasons_are_indexed_by_what_the_device_says() -> None:
    assert (FINISH_REASONS[STOP], FINISH_REASONS[LENGTH], FINISH_REASONS[0]) == ("stop", "length", None)


def test_requests_import_no_jax() -> None:
    """The package's own `__init__` is left out, since it imports what needs JAX."""
    code = (
        "import sys, types; package = sys.modules['hybrid_jax'] = types.ModuleType('hybrid_jax');"
        f" package.__path__ = [{str(Path(module.__file__).parent)!r}]; import hybrid_jax.request;"
        " sys.exit(bool({'jax', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
