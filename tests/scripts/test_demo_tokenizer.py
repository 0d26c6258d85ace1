"""The demo's tokenizer reads any text and gives it back, and its chat marks are single tokens."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("optax")
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from demo_tokenizer import SPECIAL_TOKENS, train_tokenizer

PIECES = [
    "<|user|>Tell me of the sea.<|assistant|>The sea is wide, the sea is deep.<|end|>",
    "A fox ran to the sea. " * 9,
]
TOKENIZER = train_tokenizer(PIECES, vocabulary=300)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text):
    ids = TOKENIZER.encode(text).ids
    assert any(mark in text for mark in SPECIAL_TOKENS) or TOKENIZER.decode(ids) == text


def test_chat_marks_are_the_first_tokens():
    assert [TOKENIZER.token_to_id(mark) for mark in SPECIAL_TOKENS] == [0, 1, 2, 3]
    ids = TOKENIZER.encode(PIECES[0]).ids
    assert [token for token in ids if token < 4] == [1, 2, 3]


def test_training_is_deterministic():
    assert train_tokenizer(PIECES, vocabulary=300).to_str() == TOKENIZER.to_str()
