"""Text to token ids and back: the tokenizer of a checkpoint, streams of text, stop strings.

Everything is read as data from the checkpoint's JSON files; nothing in them can name code to run, and fields that try
(`auto_map`) are not read. Knows nothing of models and devices, and imports no JAX; what a chat template may do is in
`chat_template.py`.
"""

import codecs
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers

from hybrid_jax.chat_template import (
    SPECIAL_TOKEN_NAMES,
    TEMPLATE_BYTES,
    ChatTemplate,
    Scalar,
    Template,
    compile_template,
)

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILE_BYTES = 256 * 2**20
JSON_FILE_BYTES = 16 * 2**20
TEMPLATE_FILE = "chat_template.jinja"


# -------------------------------------------------------------------------------------------------------- the tokenizer


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A checkpoint's tokenizer. Made by `Tokenizer.load`.

    eos_token_ids: every id that any file of the checkpoint names as the end.
    special_ids: ids that `decode` and `Detokenizer` leave out unless told otherwise.
    """

    backend: tokenizers.Tokenizer = field(repr=False)  # a vocabulary is no message
    eos_token_ids: tuple[int, ...]
    special_ids: frozenset[int]
    chat_template: Template | None

    @staticmethod
    def find(directory: Path) -> "Tokenizer | None":
        """The tokenizer of a checkpoint directory, or None if it has no tokenizer.json. Raises as `load` does."""
        return Tokenizer.load(directory) if (directory / TOKENIZER_FILE).is_file() else None

    @staticmethod
    def load(directory: Path) -> "Tokenizer":
        """Read tokenizer.json and, where there, the other JSON files of the checkpoint and its chat template.

        Raises ValueError naming the file that is missing, too large, no JSON or no tokenizer with a byte-level decoder.
        """
        backend = _read_backend(directory / TOKENIZER_FILE)
        settings = read_json_object(directory / "tokenizer_config.json")
        added = backend.get_added_tokens_decoder()
        return Tokenizer(
            backend=backend,
            eos_token_ids=_eos_token_ids(directory, backend, settings),
            special_ids=frozenset(token_id for token_id, token in added.items() if token.special),
            chat_template=_read_chat_template(directory, settings),
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; the spelling of a special token gives that token.

        add_special_tokens: also the tokens that the checkpoint puts around every text.
        Raises ValueError for a lone surrogate, which is no text.
        """
        text.encode()  # the error of a lone surrogate says where it stands
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Scalar] | None = None,
        now: datetime | None = None,
    ) -> list[int]:
        """Token ids of a conversation by the chat template: `ChatTemplate.render` says what the arguments are.

        The spelling of a special token inside `messages` or `tools` is text: only the template makes special tokens.
        Raises ValueError for a checkpoint without a chat template, and as `render` and `encode` do.
        """
        if self.chat_template is None:
            raise ValueError("wanted a chat template, the checkpoint has none: send a prompt instead of messages")
        cut = f"\ue000{secrets.token_hex(8)}\ue001"  # private-use characters, and nobody can guess the rest
        added = self.backend.get_added_tokens_decoder()
        broken = _breaker([token.content for token in added.values() if token.special], cut)
        messages, tools, variables = (_map_strings(broken, value) for value in (messages, tools, variables))
        text = self.chat_template.render(messages, tools, add_generation_prompt, variables, now)
        return [token for piece in text.split(cut) for token in self.encode(piece, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids, U+FFFD for bytes that are no UTF-8; ids outside the vocabulary have no text."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)


def _breaker(specials: Sequence[str], cut: str) -> Callable[[str], str]:
    """Puts `cut` after the first character of every spelling of a special token, so that no piece holds a whole one."""
    if not specials:
        return lambda text: text
    alternatives = "|".join(map(re.escape, sorted(specials, key=len)))  # the shortest that stands there is found
    pattern = re.compile(f"(?=(?P<spelling>{alternatives}))(?P<first>.)", re.DOTALL)

    def broken(match: re.Match[str]) -> str:
        if len(match["spelling"]) == 1:
            raise ValueError(
                f"wanted messages without {match['spelling']!r}, the spelling of a special token: leave it out"
            )
        return match["first"] + cut

    return lambda text: pattern.sub(broken, text)


def _map_strings(change: Callable[[str], str], value: Any) -> Any:
    """The same JSON value with every string changed, keys too."""
    match value:
        case str():
            return change(value)
        case Mapping():
            return {_map_strings(change, key): _map_strings(change, item) for key, item in value.items()}
        case list() | tuple():
            return [_map_strings(change, item) for item in value]
    return value


# ------------------------------------------------------------------------------------------------- a checkpoint's files


def _read_bytes(path: Path, limit_bytes: int) -> bytes | None:
    """The file's content, None if there is no such file. Never reads more than the limit."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise ValueError(f"wanted {path.name} of at most {limit_bytes} bytes, got more: is it the right file?")
    return content


def read_json_object(path: Path) -> dict[str, Any]:
    """A small JSON file of a checkpoint, empty where there is none. Raises ValueError naming the file."""
    content = _read_bytes(path, JSON_FILE_BYTES)
    if content is None:
        return {}
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"wanted JSON in {path.name}, got {str(error)[:200]}: fetch the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"wanted a JSON object in {path.name}, got {type(value).__name__}: fetch the file again")
    return value


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    content = _read_bytes(path, TOKENIZER_FILE_BYTES)
    if content is None:
        raise ValueError(f"wanted {path.name} in the checkpoint, there is none: convert its tokenizer to that format")
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"wanted a tokenizer in {path.name}, got {str(error)[:200]}: fetch the file again") from None
    if not backend.get_vocab_size():
        raise ValueError(f"wanted a vocabulary in {path.name}, it is empty: fetch the file again")
    _check_decoder(backend, path.name)
    backend.no_truncation()  # a file may ask for either; a prompt is never cut or filled up in silence
    backend.no_padding()
    return backend


def _check_decoder(backend: tokenizers.Tokenizer, file_name: str) -> None:
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": None}
    kinds = [part["type"] for part in decoder.get("decoders", [decoder]) if part["type"] != "Fuse"]
    if kinds != ["ByteLevel"]:
        raise ValueError(
            f"wanted a ByteLevel decoder in {file_name}, got {kinds}: no other is supported, since what they decode can"
            " change after it was sent"
        )


def _eos_token_ids(directory: Path, backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> tuple[int, ...]:
    eos_token = _special_tokens(settings).get("eos_token")
    own = None if eos_token is None else backend.token_to_id(eos_token)
    return tuple(dict.fromkeys([*([] if own is None else [own]), *stated_eos_ids(directory)]))


def stated_eos_ids(directory: Path) -> tuple[int, ...]:
    """The ids that generation_config.json and config.json of a checkpoint name as the end. Raises ValueError."""
    ids: dict[int, None] = {}  # a set that keeps the order
    for name in ("generation_config.json", "config.json"):
        config = read_json_object(directory / name)
        text_config = config.get("text_config")
        for part in (config, text_config if isinstance(text_config, dict) else {}):
            ids |= dict.fromkeys(_id_list(part.get("eos_token_id"), name))
    return tuple(ids)


def _id_list(value: Any, file_name: str) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token_id) is int and 0 <= token_id < 2**31 for token_id in ids):
        raise ValueError(f"wanted eos_token_id in {file_name} as a token id or a list of them, got {str(value)[:80]}")
    return ids


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The spelling of each named special token, given as a string or as an object with `content`."""
    found = {name: settings.get(name) for name in SPECIAL_TOKEN_NAMES}
    spelled = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: token for name, token in spelled.items() if isinstance(token, str)}


def _read_chat_template(directory: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    file_name, source = TEMPLATE_FILE, _read_bytes(directory / TEMPLATE_FILE, TEMPLATE_BYTES)
    if source is None:
        file_name, stated = "tokenizer_config.json", settings.get("chat_template")
        if isinstance(stated, list):
            named = {entry.get("name"): entry.get("template") for entry in stated if isinstance(entry, dict)}
            stated = named.get("default")
        if stated is None:
            return None
        if not isinstance(stated, str):
            raise ValueError(f"wanted chat_template in {file_name} as a string or a list of named ones: fetch it again")
        source = stated.encode("utf-8", "surrogatepass")
    try:
        return compile_template(source, _special_tokens(settings))
    except ValueError as error:
        raise ValueError(f"{file_name}: {error}") from None


# ------------------------------------------------------------------------------------------------------ streams of text


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary: itself if it prints, else from U+0100 up."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


class Detokenizer:
    """Turns a stream of token ids into text that never changes again.

    Works on bytes, so that each token costs the same however long the stream: a character is given out with the token
    that completes it. All that `push` and `finish` return together is `Tokenizer.decode` of all ids.

    spelled_ids: special tokens that are not skipped.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, spelled_ids: frozenset[int] = frozenset()
    ):
        self._token_of = tokenizer.backend.id_to_token
        self._skipped = tokenizer.special_ids - spelled_ids if skip_special_tokens else frozenset()
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete; may be empty."""
        return self._characters.decode(b"".join(map(self._bytes_of, ids)))

    def finish(self) -> str:
        """What is left of an unfinished character, as U+FFFD; mostly nothing."""
        return self._characters.decode(b"", final=True)

    def _bytes_of(self, token_id: int) -> bytes:
        token = None if token_id in self._skipped else self._token_of(token_id)
        if token is None:
            return b""
        if all(character in BYTE_OF for character in token):
            return bytes(BYTE_OF[character] for character in token)
        return token.encode()  # an added token is spelled as text


class StopMatcher:
    """Looks for stop strings in a stream of text and holds back what could begin one.

    The match is the one that ends first, and of those that end together the longest: what is found does not depend on
    how the text was cut into pieces. Text of tokens that may not stop yet (`min_tokens`) is not to be fed.
    """

    def __init__(self, stop: Sequence[str], include: bool = False):
        self._stop, self._include = tuple(stop), include
        self._held, self._matched = "", False

    def feed(self, text: str) -> tuple[str, str | None]:
        """Text that is safe to give out, and the stop string once one is complete: the text then ends before it, or
        with it if `include`. Raises ValueError if a match was returned before.
        """
        if self._matched:
            raise ValueError("wanted no text after a stop string was found, got more: end the request at the match")
        text = self._held + text
        ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if ends:
            end, _, stop = min(ends)
            self._held, self._matched = "", True
            return text[: end if self._include else end - len(stop)], stop
        safe = len(text) - self._open_length(text)
        self._held = text[safe:]
        return text[:safe], None

    def finish(self) -> str:
        """What is held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _open_length(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)
