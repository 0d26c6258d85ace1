"""Answers taken apart: every dialect, and the same whatever the cut."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax.server.dialects import Call, find_dialect
from hybrid_jax.server.parsing import BODY_CHARACTERS, AnswerParser, Parsed, Reading

SCHEMAS = {
    "find": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "tags": {"type": "array"},
            "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        },
    }
}
JSON_TAGS = find_dialect("<tool_call>\n{{ tool.name }}")
TAGGED = find_dialect("<tool_call>\n<function={{ name }}>")
SECTIONED = find_dialect("<|tool_calls_section_begin|><|tool_call_begin|>")
LISTED = find_dialect("<TOOLCALL>[")
LINES = find_dialect("<tool_calls>\n{}")
ARGUMENTS = {"city": "Köln </x> \n", "days": 3}
CALL = json.dumps({"name": "find", "arguments": ARGUMENTS}, ensure_ascii=False)
TAG = f"<tool_call>{CALL}</tool_call>"
QUOTED = json.dumps({"name": "f", "arguments": '{"a": 1}'})
FIND = Call("find", json.dumps(ARGUMENTS, ensure_ascii=False))
SECTION = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.find:0<|tool_call_argument_begin|>"
    + json.dumps(ARGUMENTS)
    + "<|tool_call_end|> <|tool_calls_section_end|>"
)
TAGS = (
    "<tool_call>\n<function=find>\n<parameter=city>\nBonn\n\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "<parameter=exact>true</parameter><parameter=tags>[1, 2]</parameter><parameter=limit>null</parameter>\n"
    "</function>\n</tool_call>"
)


def parse(reading, *pieces):
    parser, whole = AnswerParser(reading), Parsed()
    for piece in pieces:
        whole = whole.then(parser.feed(piece))
    return whole.then(parser.finish())


@pytest.mark.parametrize(
    ("dialect", "text", "found"),
    [
        (None, " plain text \n", Parsed(content=" plain text \n")),
        (JSON_TAGS, "  two < three ", Parsed(content="  two < three ")),
        (JSON_TAGS, f"Let me see. \n<tool_call>\n{CALL}\n</tool_call>\n", Parsed("", "Let me see.", (FIND,))),
        (JSON_TAGS, f"{TAG}\n{TAG} Done. ", Parsed("", "Done. ", (FIND, FIND))),
        (LINES, f"<tool_calls>\n{CALL}\n{CALL}\n</tool_calls>", Parsed("", "", (FIND, FIND))),
        (LISTED, f"<TOOLCALL>[{CALL}, {CALL}]</TOOLCALL>", Parsed("", "", (FIND, FIND))),
        (SECTIONED, f"Yes. {SECTION}", Parsed("", "Yes.", (FIND,))),
        (JSON_TAGS, '<tool_call>{"name": "now"}</tool_call>', Parsed("", "", (Call("now", "{}"),))),
        (JSON_TAGS, f"<tool_call>{QUOTED}</tool_call>", Parsed("", "", (Call("f", '{"a": 1}'),))),
    ],
)  # fmt: skip
def test_what_was_written_is_found(dialect, text, found):
    assert parse(Reading(dialect=dialect), text) == found


def test_tagged_values_take_the_types_of_the_schema():
    (call,) = parse(Reading(dialect=TAGGED, schemas=SCHEMAS), TAGS).calls
    expected = {"city": "Bonn\n", "days": 3, "exact": True, "tags": [1, 2], "limit": None}
    assert call.name == "find" and json.loads(call.arguments) == expected
    digits = "<function=find><parameter=city>12</parameter><parameter=days>many</parameter></function>"
    (call,) = parse(Reading(dialect=TAGGED, schemas=SCHEMAS), f"<tool_call>{digits}</tool_call>").calls
    assert json.loads(call.arguments) == {"city": "12", "days": "many"}


@pytest.mark.parametrize(
    "text",
    [
        "a <tool_call>{not json}</tool_call> b",
        'a <tool_call>{"name": 3, "arguments": {}}</tool_call> b',
        'a <tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        f"a <tool_call>{CALL} and more</tool_call>",
        f"a <tool_call>{CALL}",
        "a <tool_call>",
        "a <tool_cal",
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
    ],
)
def test_a_call_that_is_none_comes_back_as_content(text):
    assert parse(Reading(dialect=JSON_TAGS), text) == Parsed(content=text)


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        (TAGGED, "<tool_call><function=f><parameter=a>1</function></tool_call>"),
        (TAGGED, "<tool_call><function=f></tool_call>"),
        (TAGGED, "<tool_call>f()</tool_call>"),
        (SECTIONED, "<|tool_call_begin|>functions.f:0 {}<|tool_call_end|>"),
        (SECTIONED, "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{<|tool_call_end|>"),
    ],
)
def test_so_does_one_of_another_dialect(dialect, body):
    assert parse(Reading(dialect=dialect), body) == Parsed(content=body)


def test_thinking_by_model_and_by_prompt():
    text = "\nHm, <b>.\n\nSo. \n</think>\n\n Yes. "
    expected = Parsed("Hm, <b>.\n\nSo.", "Yes. ")
    assert parse(Reading(thinks=True), " <think>" + text) == expected
    assert parse(Reading(thinks=True, inside=True), text) == expected
    assert parse(Reading(thinks=True), " No <think> here") == Parsed(content=" No <think> here")
    assert parse(Reading(thinks=True, inside=True), "cut </thi") == Parsed("cut </thi", "")
    assert parse(Reading(thinks=True), "<thin") == Parsed(content="<thin")
    calls = parse(Reading(thinks=True, inside=True, dialect=JSON_TAGS), f"a</think>\n<tool_call>{CALL}</tool_call>")
    assert calls == Parsed("a", "", (FIND,))


def test_forced_calls_are_read_from_the_whole_content():
    assert parse(Reading(forced="find"), json.dumps(ARGUMENTS)).calls == (
        Call("find", json.dumps(ARGUMENTS, ensure_ascii=False)),
    )
    listed = json.dumps([{"name": "a", "parameters": {}}, {"name": "b", "parameters": {"x": 1}}])
    assert [call.name for call in parse(Reading(forced=""), listed).calls] == ["a", "b"]
    assert parse(Reading(forced="", most_calls=1), listed).calls == (Call("a", "{}"),)
    for cut in ('{"city": "B', "[]", '[{"name": 1}]', "", "3"):
        assert parse(Reading(forced=""), cut) == Parsed(content=cut)


def test_no_more_calls_than_wanted():
    text = f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
    assert len(parse(Reading(dialect=JSON_TAGS, most_calls=1), text).calls) == 1


def test_a_call_that_is_too_long_is_content_whatever_the_cut():
    for length in (BODY_CHARACTERS, BODY_CHARACTERS + 1):
        body = '{"name": "f", "arguments": {"a": "' + "x" * (length - 37) + '"}}'
        text = f"<tool_call>{body}</tool_call>"
        whole = parse(Reading(dialect=JSON_TAGS), text)
        assert (len(body), bool(whole.calls)) == (length, length == BODY_CHARACTERS)
        place = text.index("</tool_call>") + 5
        assert parse(Reading(dialect=JSON_TAGS), text[:place], text[place:]) == whole


FRAGMENTS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", CALL, TAGS, SECTION, " ", "\n\n", "word", "<", "</t", "é",
    "<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>", "<tool_calls>", "</tool_calls>", "[", "]",
    "<TOOLCALL>", "</TOOLCALL>", "<function=f>", "</function>", "<parameter=a>", "</parameter>", '{"name": "f"}',
)  # fmt: skip
READINGS = st.builds(
    Reading,
    thinks=st.booleans(),
    inside=st.booleans(),
    dialect=st.sampled_from([None, JSON_TAGS, TAGGED, SECTIONED, LISTED, LINES]),
    forced=st.sampled_from([None, None, None, "", "find"]),
    most_calls=st.sampled_from([None, 1]),
)


@settings(max_examples=300, deadline=None)
@given(READINGS, st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join), st.data())
def test_the_cut_changes_nothing(reading, text, data):
    whole = parse(reading, text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(reading, *pieces) == whole
    assert parse(reading, *text) == whole
    for call in whole.calls:
        assert isinstance(json.loads(call.arguments), dict)


@pytest.mark.parametrize("dialect", [JSON_TAGS, TAGGED, SECTIONED])
def test_an_answer_cut_at_every_place(dialect):
    text = f"<think>a\n</think>\n\nSee: {TAGS}\n{SECTION} <tool_call>{CALL}</tool_call>\nEnd. "
    reading = Reading(thinks=True, dialect=dialect, schemas=SCHEMAS)
    whole = parse(reading, text)
    assert whole.calls and whole.reasoning == "a"
    for place in range(len(text)):
        assert parse(reading, text[:place], text[place:]) == whole
