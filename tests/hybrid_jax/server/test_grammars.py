"""Grammars on the demo's tokens: where they begin, what they allow, and what is refused."""

import json
import time

import numpy as np
import pytest

from hybrid_jax.server.constraining import thinking_after
from hybrid_jax.server.errors import ApiError
from hybrid_jax.server.grammars import GrammarConstraint, Grammars
from hybrid_jax.server.schema import ChatBody, CompletionBody
from hybrid_jax.server.structured import CHOICES_MOST, GRAMMAR_BYTES, SCHEMA_DEPTH, GrammarText, read_grammar
from hybrid_jax.tokenizer import Tokenizer

VOCABULARY = 8200  # a padded tail, as logits may have one


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return Tokenizer.load(checkpoint)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, VOCABULARY, tokenizer.eos_token_ids)


def constraint(grammars, tokenizer, grammar, open_id=None, inside=False):
    return GrammarConstraint(grammars.matcher(grammar), grammars.words, tokenizer, "</think>", open_id, inside)


def allowed(limit):
    return set(np.flatnonzero(np.unpackbits(limit.mask().view(np.uint8), bitorder="little")).tolist())


def read(**fields):
    return read_grammar(CompletionBody(prompt="a", **fields))


YES = GrammarText("lark", 'start: "yes" | "no"', "p")


@pytest.mark.parametrize(
    ("grammar", "text", "accepted"),
    [
        (GrammarText("regex", "[0-9]{2}", "p"), "42", True),
        (GrammarText("regex", "[0-9]{2}", "p"), "4", False),
        (YES, "no", True),
        (GrammarText("schema", '{"type": "object"}', "p"), '{"a": [1, {"ü": null}]}', True),
        (GrammarText("schema", '{"type": "object", "required": ["a"]}', "p"), '{"a": 1', False),
    ],
)
def test_every_token_of_a_text_is_allowed_and_the_end_only_when_it_is_whole(
    grammars, tokenizer, grammar, text, accepted
):
    limit = constraint(grammars, tokenizer, grammar)
    for token in tokenizer.encode(text):
        assert token in allowed(limit) and not allowed(limit) & set(range(8192, VOCABULARY))
        limit.push([token])
    assert bool(allowed(limit) & set(tokenizer.eos_token_ids)) is accepted


def test_behind_the_end_nothing_but_the_end_is_allowed(grammars, tokenizer):
    limit = constraint(grammars, tokenizer, YES)
    limit.push(tokenizer.encode("yes"))
    assert allowed(limit) == set(tokenizer.eos_token_ids)
    limit.push([tokenizer.eos_token_ids[0], 77])
    assert allowed(limit) <= set(tokenizer.eos_token_ids)


def test_copies_of_one_grammar_do_not_meet(grammars, tokenizer):
    first, second = (constraint(grammars, tokenizer, YES) for _ in range(2))
    before = allowed(second)
    first.push(tokenizer.encode("yes"))
    assert allowed(second) == before != allowed(first)


def test_a_token_that_was_not_allowed_leaves_nothing(grammars, tokenizer):
    limit = constraint(grammars, tokenizer, YES)
    limit.push(tokenizer.encode("maybe"))
    assert allowed(limit) == set()


@pytest.mark.parametrize("opened_by", ["prompt", "model", "nobody"])
def test_the_grammar_begins_behind_thinking(grammars, tokenizer, opened_by):
    opening, closing = (tokenizer.backend.token_to_id(marker) for marker in ("<think>", "</think>"))
    limit = constraint(grammars, tokenizer, YES, None if opened_by == "prompt" else opening, opened_by == "prompt")
    if opened_by == "model":
        assert opening in allowed(limit)
        limit.push([opening])
    if opened_by != "nobody":
        for token in tokenizer.encode("Hm, yes or no? "):
            assert len(allowed(limit)) >= VOCABULARY
            limit.push([token])
        limit.push([closing])
    text = tokenizer.encode("yes")
    assert (opening in allowed(limit)) is (opened_by == "nobody") and text[0] in allowed(limit)
    limit.push(text)
    assert allowed(limit) == set(tokenizer.eos_token_ids)


@pytest.mark.parametrize(
    ("tail", "expected", "inside"),
    [
        ("<think>\n", True, True),
        ("<think>\n\n</think>\n\n", False, False),
        ("", True, False),
        ("<think> a", True, False),
    ],
)
def test_the_prompt_says_who_thinks(tokenizer, tail, expected, inside):
    class Service:
        thinks = True

    Service.tokenizer = tokenizer
    found = thinking_after(Service, tokenizer.encode("Why? " + tail))
    assert (found.expected, found.inside) == (expected, inside)
    Service.thinks = False
    assert not thinking_after(Service, tokenizer.encode(tail or "a")).expected


def test_the_fields_that_ask_for_a_grammar():
    schema = {"type": "object"}
    for fields in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json": schema}},
        {"structured_outputs": {"json": json.dumps(schema)}},
        {"guided_json": schema},
    ):
        assert json.loads(read(**fields).text) == schema
    assert read(guided_regex="a").form == read(structured_outputs={"regex": "a"}).form == "regex"
    assert read(guided_grammar="start: X").form == read(structured_outputs={"grammar": "start: X"}).form == "lark"
    assert read() is read(response_format={"type": "text"}) is None


def test_a_choice_is_any_of_its_texts(grammars, tokenizer):
    texts = ['say "no"', "tab\tand\\slash", "é\n", "a|b"]
    for text in texts:
        limit = constraint(grammars, tokenizer, read(guided_choice=texts))
        for token in tokenizer.encode(text):
            assert token in allowed(limit)
            limit.push([token])
        assert set(tokenizer.eos_token_ids) <= allowed(limit)


def nested(levels):
    schema = {"type": "integer"}
    for _ in range((levels - 1) // 2):
        schema = {"items": schema, "type": "array"}
    return schema


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "structural_tag"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}},
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": True}},
        {"structured_outputs": {"json": 3}},
        {"structured_outputs": {"regex": ["a"]}},
        {"guided_json": "{"},
        {"guided_choice": []},
        {"guided_choice": ["a"] * (CHOICES_MOST + 1)},
        {"guided_regex": "a", "response_format": {"type": "json_object"}},
        {"guided_regex": "a", "guided_choice": ["a"]},
        {"guided_regex": "a", "min_tokens": 1},
        {"guided_regex": "a", "ignore_eos": True},
        {"guided_regex": "a", "allowed_token_ids": [1]},
        {"guided_regex": "a" * (GRAMMAR_BYTES + 1)},
        {"guided_json": {"enum": list(range(CHOICES_MOST + 1))}},
        {"guided_json": nested(4 * SCHEMA_DEPTH)},
    ],
)
def test_what_is_no_grammar_is_refused(fields):
    with pytest.raises(ApiError) as caught:
        read(**fields)
    assert caught.value.status == 400 and caught.value.param


def test_the_limits_themselves_are_met():
    assert read(guided_regex="a" * GRAMMAR_BYTES) and read(guided_choice=["a"] * CHOICES_MOST)
    assert read(guided_json={"enum": list(range(CHOICES_MOST))})
    assert read(guided_json=nested(SCHEMA_DEPTH - 2))
    assert read_grammar(ChatBody(messages=[], guided_regex="a"))


HOSTILE = {
    "open regex": ("regex", "(a"),
    "powers": ("regex", "(((a{1,99}){1,99}){1,99}){1,99}b"),
    "backtracking": ("regex", "(a+)+(b|c|d)*(a|aa)+$"),
    "look-behind": ("regex", "(?<=a)b"),
    "unicode": ("regex", r"[\p{L}]{1,5000}"),
    "no lark": ("lark", "root ::= 'a'"),
    "no start": ("lark", 'rule: "a"'),
    "endless": ("lark", "start: start"),
    "ambiguous": ("lark", 'start: start start start | "a" | ""'),
    "unknown keyword": ("schema", '{"if": {"type": "string"}}'),
    "asks to be lenient": ("schema", '{"uniqueItems": true, "type": "array", "x-guidance": {"lenient": true}}'),
    "remote": ("schema", '{"$ref": "https://example.com/schema.json"}'),
    "itself": ("schema", '{"$ref": "#"}'),
    "wide": ("schema", json.dumps({"properties": {f"k{i}": {"type": "string"} for i in range(2000)}})),
    "false": ("schema", '{"not": {}}'),
    "many": ("schema", '{"type": "array", "items": {"type": "string", "pattern": "^(a|b)*$"}, "minItems": 5000}'),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_or_bounded(grammars, tokenizer, name):
    begin = time.process_time()
    try:
        limit = constraint(grammars, tokenizer, GrammarText(*HOSTILE[name], "p"))
        for token in tokenizer.encode("aaaa"):
            allowed(limit)
            limit.push([token])
    except ApiError as error:
        assert error.status == 400 and error.code == "invalid_grammar" and len(error.message) < 700
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    "name", ["open regex", "look-behind", "no lark", "unknown keyword", "asks to be lenient", "remote"]
)
def test_what_is_not_implemented_is_never_a_looser_mask(grammars, name):
    with pytest.raises(ApiError):
        grammars.matcher(GrammarText(*HOSTILE[name], "p"))


def test_only_so_many_grammars_are_kept(grammars):
    for index in range(100):
        grammars.matcher(GrammarText("regex", f"a{{{index + 1}}}", "p"))
    assert len(grammars._compiled) <= 32


def test_a_model_without_an_end_cannot_end_a_grammar(tokenizer):
    with pytest.raises(ApiError, match="end-of-text"):
        Grammars(tokenizer, VOCABULARY, ()).matcher(YES)
