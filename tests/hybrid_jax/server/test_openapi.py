"""The OpenAPI document: it names every route, its schemas are schemas, and bodies that decode are those it allows."""

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax.server.app import ROUTES
from hybrid_jax.server.errors import ApiError
from hybrid_jax.server.gate import OPEN_PATHS
from hybrid_jax.server.openapi import document
from hybrid_jax.server.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, decode, json_levels
from hybrid_jax.server.settings import JSON_LEVELS

BODIES = (ChatBody, CompletionBody, DetokenizeBody, TokenizeBody)
DOCUMENT = document()
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def test_it_names_every_route_with_its_method_and_key():
    served = {(route.path.replace(":path", ""), "post" if "POST" in route.methods else "get") for route in ROUTES}
    assert served == {(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods}
    unlocked = {
        path for path, methods in DOCUMENT["paths"].items() for one in methods.values() if "security" not in one
    }
    assert unlocked == set(OPEN_PATHS)


def test_every_schema_is_one_and_every_reference_leads_somewhere():
    schemas = DOCUMENT["components"]["schemas"]
    for name, schema in schemas.items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["title"] == name
    text = msgspec.json.encode(DOCUMENT).decode()
    referred = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert {body.__name__ for body in BODIES} < referred <= set(schemas)


@pytest.mark.parametrize("kind", BODIES)
def test_what_decodes_is_what_the_schema_allows(kind):
    schema = {"$ref": f"#/components/schemas/{kind.__name__}", "components": DOCUMENT["components"]}
    validator = jsonschema.Draft202012Validator(schema)
    names = st.sampled_from(kind.__struct_fields__)
    whole = {"prompt": "a", "messages": [{}], "tokens": [1]}
    required = {name: whole[name] for name in kind.__struct_fields__ if name in whole and kind is not TokenizeBody}

    @settings(max_examples=50, deadline=None)
    @given(st.dictionaries(names, JSON_VALUES, max_size=4))
    def check(fields):
        sent = msgspec.json.encode(required | fields)
        try:
            decode(sent, kind, strict=False)
        except ApiError as error:
            assert error.status == 400 and error.code in ("invalid_type", "invalid_json", "unsupported_field")
            return
        validator.validate(msgspec.json.decode(sent))

    check()


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | JSON_VALUES.map(msgspec.json.encode))
def test_any_bytes_decode_or_are_a_400(body):
    for kind in BODIES:
        try:
            decode(body, kind, strict=True)
        except ApiError as error:
            assert error.status == 400


def depth(value):
    match value:
        case list():
            return 1 + max(map(depth, value), default=0)
        case dict():
            return 1 + max(map(depth, value.values()), default=0)
    return 0


NESTED = st.recursive(
    st.text('a"\\[]{}', max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('"\\[{', max_size=2), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(NESTED)
def test_levels_are_counted_outside_of_texts(value):
    wide = [value, [[]] * JSON_LEVELS]  # so that the count of brackets alone does not settle it
    assert json_levels(msgspec.json.encode(wide)) == depth(wide)


@pytest.mark.parametrize("kind", BODIES)
def test_one_level_too_many_is_refused_before_it_is_read(kind):
    for levels in (JSON_LEVELS + 1, 2**20):
        with pytest.raises(ApiError, match=f"at most {JSON_LEVELS} levels, got {levels}") as caught:
            decode(b'{"user":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}", kind, strict=False)
        assert caught.value.status == 400


def test_every_route_states_its_answer_and_its_refusals():
    for path, methods in DOCUMENT["paths"].items():
        for operation in methods.values():
            for status, stated in operation["responses"].items():
                for media, content in stated["content"].items():
                    assert media in ("text/plain", "text/html") or content["schema"] or path == "/openapi.json", status
            assert {"200", "400", "405", "500", "503"} <= set(operation["responses"])
