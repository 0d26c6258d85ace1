"""Log-probabilities of tokens in OpenAI's two forms. Knows nothing of requests."""

from collections.abc import Sequence
from typing import Any

from hybrid_jax.request import TokenLogprobs
from hybrid_jax.tokenizer import BYTE_OF, Tokenizer


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes that a token stands for, special tokens as they are spelled; none for an id without a token."""
    token = tokenizer.backend.id_to_token(token_id) or ""
    if all(character in BYTE_OF for character in token):
        return bytes(BYTE_OF[character] for character in token)
    return token.encode()


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The same as text, U+FFFD for what is no UTF-8."""
    return token_bytes(tokenizer, token_id).decode("utf-8", "replace")


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The form of chat completions."""
    content = [
        _token(tokenizer, entry.token_id, entry.logprob)
        | {"top_logprobs": [_token(tokenizer, token, logprob) for token, logprob in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    spelled = token_bytes(tokenizer, token_id)
    return {"token": spelled.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(spelled)}


def completion_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
    """The form of completions; `offset` is the length of the text of the tokens before these."""
    tokens = [token_text(tokenizer, entry.token_id) for entry in entries]
    offsets = [offset + sum(map(len, tokens[:index])) for index in range(len(tokens))]
    return {
        "tokens": tokens,
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [_top(tokenizer, entry) for entry in entries],
        "text_offset": offsets,
    }


def prompt_logprobs(tokenizer: Tokenizer, prompt: Sequence[int], entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The same of a prompt, with `entries` for all but its first token, of which nothing can be said."""
    first = token_text(tokenizer, prompt[0])
    rest = completion_logprobs(tokenizer, entries, len(first))
    before = {"tokens": [first], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}
    return {name: before[name] + rest[name] for name in before}


def _top(tokenizer: Tokenizer, entry: TokenLogprobs) -> dict[str, float]:
    """By text; of two ids with the same text the likelier one. The chosen token is always among them."""
    found: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token_id, entry.logprob)):
        text = token_text(tokenizer, token)
        found[text] = max(logprob, found.get(text, logprob))
    return found
