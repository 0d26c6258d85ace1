"""Text that streams without ever changing, and stop strings."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from tiny_tokenizer import ADDED, BACKEND, SPECIALS, ids_of, write_checkpoint

from hybrid_jax import tokenizer as module
from hybrid_jax.tokenizer import Detokenizer, StopMatcher, Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


# ------------------------------------------------------------------------------------------------------ streams of text


@st.composite
def streams(draw: st.DrawFn, alphabet: st.SearchStrategy[Any]) -> list[list[Any]]:
    """A list cut into pieces anywhere, empty pieces included."""
    items = draw(st.lists(alphabet, max_size=40))
    cuts = sorted(draw(st.lists(st.integers(0, len(items)), max_size=8)))
    return [items[start:end] for start, end in zip([0, *cuts], [*cuts, len(items)], strict=True)]


def assert_streams_as_decoded(tokenizer: Tokenizer, pieces: list[list[int]], skip_special_tokens: bool) -> None:
    stream = Detokenizer(tokenizer, skip_special_tokens)
    sent, ids = "", []
    for piece in pieces:
        sent += stream.push(piece)
        ids += piece
        whole = tokenizer.decode(ids, skip_special_tokens)
        assert whole.startswith(sent)  # what was sent stands
        assert whole.removeprefix(sent) in (
            "",
            "\ufffd",
            "\ufffd\ufffd",
        )  # and no more than an unfinished character is held back
    assert sent + stream.finish() == tokenizer.decode(ids, skip_special_tokens)


IDS = st.one_of(st.sampled_from(ids_of(*SPECIALS, *ADDED)), st.integers(0, BACKEND.get_vocab_size() + 2))


@hypothesis.given(pieces=streams(IDS), skip=st.booleans())
@hypothesis.settings(max_examples=500)
def test_any_stream_of_ids_is_its_decoded_text(tokenizer: Tokenizer, pieces: list[list[int]], skip: bool) -> None:
    assert_streams_as_decoded(tokenizer, pieces, skip)


BYTE_IDS = [BACKEND.token_to_id(character) for character in sorted(module.BYTE_OF, key=module.BYTE_OF.__getitem__)]


@hypothesis.given(
    streams(st.one_of(st.sampled_from([0xE4, 0xF0, 0x9F, 0x98, 0x80, 0xED, 0xA0, 0xC0]), st.integers(0, 255)))
)
@hypothesis.settings(max_examples=500)
def test_any_stream_of_bytes_is_its_decoded_text(tokenizer: Tokenizer, pieces: list[list[int]]) -> None:
    """Whole, cut, overlong and invalid sequences alike."""
    assert_streams_as_decoded(tokenizer, [[BYTE_IDS[byte] for byte in piece] for piece in pieces], True)


@hypothesis.given(st.text(st.one_of(st.sampled_from("😀👩‍👧你好é ﷺ�"), st.characters(codec="utf-8")), max_size=20))
def test_text_streams_byte_by_byte_without_half_characters(tokenizer: Tokenizer, text: str) -> None:
    stream = Detokenizer(tokenizer)
    parts = [stream.push([BYTE_IDS[byte]]) for byte in text.encode()]
    assert "".join(parts) == text and stream.finish() == ""
    assert sorted(map(len, filter(None, parts))) == [1] * len(text)


def test_a_stream_that_ends_inside_a_character(tokenizer: Tokenizer) -> None:
    stream = Detokenizer(tokenizer)
    assert stream.push([BYTE_IDS[byte] for byte in "a😀".encode()[:-1]]) == "a"
    assert stream.finish() == "\ufffd"


# --------------------------------------------------------------------------------------------------------- stop strings


def search(text: str, stops: list[str]) -> tuple[int, str] | None:
    """The definition: the first end at which a stop string stands, the longest there; where it begins."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return end - len(stop), stop
    return None


@hypothesis.given(
    pieces=streams(st.sampled_from("aab<|")),
    stops=st.lists(st.text("ab<|", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
)
@hypothesis.settings(max_examples=1000)
def test_stop_strings_are_found_as_in_the_whole_text(pieces: list[list[str]], stops: list[str], include: bool) -> None:
    matcher, sent, text = StopMatcher(stops, include), "", ""
    for piece in pieces:
        text += "".join(piece)
        safe, matched = matcher.feed("".join(piece))
        sent += safe
        expected = search(text, stops)
        assert matched == (expected and expected[1])
        if expected:
            start, stop = expected
            assert sent == text[: start + len(stop) * include] and matcher.finish() == ""
            return
        held = text.removeprefix(sent)
        assert text.startswith(sent)
        opens = [n for n in range(1, len(text) + 1) if any(s.startswith(text[-n:]) for s in stops)]
        assert len(held) == max(opens, default=0)  # no more than must be
    assert sent + matcher.finish() == text


def test_a_stop_string_over_three_pieces() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.feed("one\n") == ("one", None)
    assert matcher.feed("two\n\nUs") == ("\ntwo", None)
    assert matcher.feed("er: three") == ("", "\n\nUser:")
    with pytest.raises(ValueError, match="wanted no text after a stop string was found"):
        matcher.feed("more")


def test_what_only_looked_like_a_stop_string_is_given_back() -> None:
    matcher = StopMatcher(["stop"], include=True)
    assert [matcher.feed(piece)[0] for piece in ("a s", "to", "st", "op b")] == ["a ", "", "sto", "stop"]
    matcher = StopMatcher(["stop"])
    assert (matcher.feed("sto"), matcher.finish(), matcher.finish()) == (("", None), "sto", "")
