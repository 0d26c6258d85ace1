"""The order in which the lines of a shard run: those that begin alike one after another, the longest such group first.

What a prefix cache holds is then read again before it is evicted, and the end of a job is not one long answer alone.
Looks at the beginnings of prompts as they are spelled in the file; knows nothing of tokens.
"""

import os
from collections.abc import Iterable, Iterator

import msgspec

from hybrid_jax.batch.lines import read_request

KEY_BYTES = 4096  # of a prompt; those alike so far count as equal
COMMON_BYTES = 256  # about 64 tokens, the least that a prefix cache keeps
BYTES_PER_TOKEN = 4
OPEN_END_TOKENS = 1024  # what an answer without a limit counts as


class _Prompt(msgspec.Struct):
    messages: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")
    cache_salt: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None


_decoder = msgspec.json.Decoder(_Prompt)
Key = tuple[bytes, int, int]  # beginning of the prompt, work, line


def order_key(line: int, text: bytes) -> Key:
    """The beginning of a line's prompt, about how many tokens it will cost, and the line."""
    try:
        prompt = _decoder.decode(read_request(text).body)
    except (msgspec.MsgspecError, ValueError):
        return b"", 0, line  # the server will say what is wrong with it
    spelled = (prompt.cache_salt or "").encode("utf-8", "replace") + bytes(prompt.messages) + bytes(prompt.prompt)
    answer = prompt.max_tokens or prompt.max_completion_tokens or OPEN_END_TOKENS
    return spelled[:KEY_BYTES], len(spelled) // BYTES_PER_TOKEN + answer * (prompt.n or 1), line


def order_lines(keys: Iterable[Key]) -> list[int]:
    """The lines in the order to run them."""
    groups = sorted(_groups(sorted(keys)), key=lambda group: -max(work for _, work, _ in group))
    return [line for group in groups for _, _, line in group]


def _groups(keys: list[Key]) -> Iterator[list[Key]]:
    """Runs of sorted keys of which neighbours share a beginning."""
    group: list[Key] = []
    for key in keys:
        if group and not _alike(group[-1][0], key[0]):
            yield group
            group = []
        group.append(key)
    if group:
        yield group


def _alike(first: bytes, second: bytes) -> bool:
    return first == second or len(os.path.commonprefix([first, second])) >= COMMON_BYTES
