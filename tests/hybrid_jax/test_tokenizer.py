"""The tokenizer: reading a checkpoint's files, and conversations in token ids."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from tiny_tokenizer import BACKEND, CORPUS, FILES, SPECIALS, TEMPLATE, ids_of, train_tokenizer, write_checkpoint
from tokenizers import decoders

from hybrid_jax import tokenizer as module
from hybrid_jax.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


# ------------------------------------------------------------------------------------------------- a checkpoint's files


def test_text_round_trips(tokenizer: Tokenizer) -> None:
    for text in CORPUS:
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("é", "\ufffd")
    assert tokenizer.encode("cat") == [*ids_of("<s>"), *tokenizer.encode("cat", add_special_tokens=False)]
    assert tokenizer.decode(tokenizer.encode("cat"), skip_special_tokens=False) == "<s>cat"
    assert tokenizer.vocab_size == max(BACKEND.get_vocab().values()) + 1
    assert tokenizer.decode([tokenizer.vocab_size, 10**9]) == ""


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode("a\ud800")


def test_a_prompt_is_neither_cut_nor_filled_up(tmp_path: Path) -> None:
    backend = train_tokenizer()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    loaded = Tokenizer.load(write_checkpoint(tmp_path, tokenizer__json=backend.to_str()))
    assert loaded.encode(CORPUS[0]) == BACKEND.encode(CORPUS[0]).ids


def test_find_says_none_only_without_the_file(tmp_path: Path) -> None:
    assert Tokenizer.find(tmp_path) is None and Tokenizer.find(tmp_path / "absent") is None
    with pytest.raises(ValueError, match=r"wanted tokenizer\.json in the checkpoint, there is none"):
        Tokenizer.load(tmp_path)
    assert Tokenizer.find(write_checkpoint(tmp_path)).eos_token_ids == ids_of("<|end|>")
    write_checkpoint(tmp_path, tokenizer__json="{")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.find(tmp_path)


def test_the_other_files_may_be_absent(tmp_path: Path) -> None:
    loaded = Tokenizer.load(write_checkpoint(tmp_path, tokenizer_config__json=None))
    assert (loaded.eos_token_ids, loaded.chat_template) == ((), None)
    with pytest.raises(ValueError, match="wanted a chat template, the checkpoint has none"):
        loaded.encode_chat([])


@pytest.mark.parametrize(
    ("tokenizer_config", "generation", "config", "wanted"),
    [
        ({}, {"eos_token_id": 7}, {"eos_token_id": 9}, (7, 9)),
        ({}, {"eos_token_id": [7, 8]}, {"eos_token_id": 8}, (7, 8)),
        ({}, {}, {"text_config": {"eos_token_id": 8}, "eos_token_id": None}, (8,)),
        ({}, {"eos_token_id": []}, {"auto_map": {"AutoModel": "evil.Model"}, "text_config": 3}, ()),
        ({"eos_token": "<|user|>"}, {"eos_token_id": 9}, {}, (*ids_of("<|user|>"), 9)),
        ({"eos_token": {"content": "<|user|>"}}, {}, {"eos_token_id": ids_of("<|user|>")[0]}, ids_of("<|user|>")),
        ({"eos_token": "<|unknown|>"}, {}, {"eos_token_id": 9}, (9,)),
        ({"eos_token": None}, {}, {}, ()),
    ],
)
def test_end_ids_are_those_that_any_file_names(
    tmp_path: Path, tokenizer_config: dict, generation: dict, config: dict, wanted: tuple
) -> None:
    files = {"tokenizer_config__json": tokenizer_config, "generation_config__json": generation, "config__json": config}
    assert Tokenizer.load(write_checkpoint(tmp_path, **files)).eos_token_ids == wanted


@pytest.mark.parametrize("eos", [-1, "2", 1.5, True, [1, "2"], {"a": 1}, 2**31], ids=str)
def test_bad_end_ids_are_refused(tmp_path: Path, eos: object) -> None:
    with pytest.raises(ValueError, match=r"wanted eos_token_id in config\.json"):
        Tokenizer.load(write_checkpoint(tmp_path, config__json={"eos_token_id": eos}))


BAD_TOKENIZERS = {
    "empty": "",
    "cut": FILES["tokenizer.json"][:500],
    "no model": "{}",
    "a list": "[]",
    "no vocabulary": json.dumps({"version": "1.0", "model": {"type": "BPE", "merges": []}}),
    "empty vocabulary": json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}),
    "unknown model": json.dumps({"version": "1.0", "model": {"type": "Pickle", "vocab": {"a": 0}}}),
    "merge of nothing": json.dumps(
        {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "zz"]]}}
    ),
    "bytes": b"\xff\xfe\x00",
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("name", BAD_TOKENIZERS)
def test_a_bad_tokenizer_is_one_value_error_with_the_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json.*: (fetch|no other)"):
        Tokenizer.load(write_checkpoint(tmp_path, tokenizer__json=BAD_TOKENIZERS[name]))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", b"\xff", "[" * 100_000, '{"a": 1' + " " * 50], ids=lambda c: c[:9]
)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "config.json"])
def test_bad_json_is_one_value_error_with_the_file(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(ValueError, match=f"wanted JSON (object )?in {name}|wanted a JSON object in {name}"):
        Tokenizer.load(write_checkpoint(tmp_path, **{name.replace(".", "__"): content}))


@pytest.mark.parametrize(
    "decoder",
    [None, decoders.WordPiece(), decoders.Metaspace(), decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])],
    ids=["none", "word piece", "metaspace", "byte fallback"],
)
def test_other_decoders_are_refused(tmp_path: Path, decoder: Any) -> None:
    backend = train_tokenizer()
    backend.decoder = decoder
    with pytest.raises(ValueError, match=r"wanted a ByteLevel decoder in tokenizer\.json, got"):
        Tokenizer.load(write_checkpoint(tmp_path, tokenizer__json=backend.to_str()))


def test_a_byte_level_decoder_may_stand_in_a_sequence(tmp_path: Path) -> None:
    backend = train_tokenizer()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    loaded = Tokenizer.load(write_checkpoint(tmp_path, tokenizer__json=backend.to_str()))
    assert loaded.decode(loaded.encode(CORPUS[2])) == CORPUS[2]


def test_sizes_are_checked_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(FILES["tokenizer.json"].encode())
    write_checkpoint(tmp_path)
    monkeypatch.setattr(module, "TOKENIZER_FILE_BYTES", size)
    Tokenizer.load(tmp_path)
    monkeypatch.setattr(module, "TOKENIZER_FILE_BYTES", size - 1)
    with pytest.raises(ValueError, match=rf"wanted tokenizer\.json of at most {size - 1} bytes"):
        Tokenizer.load(tmp_path)
    monkeypatch.undo()
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)  # a file with a hole: it has no content on the disk
    with pytest.raises(ValueError, match=r"wanted tokenizer\.json of at most 268435456 bytes"):
        Tokenizer.load(tmp_path)


def test_tokenizers_import_no_jax() -> None:
    """The package's own `__init__` is left out, since it imports what needs JAX."""
    code = (
        "import sys, types; package = sys.modules['hybrid_jax'] = types.ModuleType('hybrid_jax');"
        f" package.__path__ = [{str(Path(module.__file__).parent)!r}]; import hybrid_jax.tokenizer;"
        " sys.exit(bool({'jax', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------- conversations


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_config__json": {"chat_template": TEMPLATE}},
        {
            "tokenizer_config__json": {
                "chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": TEMPLATE}]
            }
        },
        {"tokenizer_config__json": {"chat_template": "x"}, "chat_template__jinja": TEMPLATE},
        {"tokenizer_config__json": None, "chat_template__jinja": TEMPLATE},
    ],
    ids=["string", "named", "file first", "file only"],
)
def test_where_the_template_stands(tmp_path: Path, changes: dict) -> None:
    loaded = Tokenizer.load(write_checkpoint(tmp_path, **changes))
    assert loaded.chat_template.render([{"role": "user", "content": "a"}]) == "<|user|>a<|end|>"


def test_named_special_tokens_reach_the_template(tmp_path: Path) -> None:
    settings = {"eos_token": "<|end|>", "bos_token": {"content": "<s>"}, "pad_token": None, "unk_token": 3}
    settings["chat_template"] = "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ unk_token is defined }}"
    template = Tokenizer.load(write_checkpoint(tmp_path, tokenizer_config__json=settings)).chat_template
    assert template.render([]) == "<s><|end|>FalseFalse"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat_template__jinja": "{% if %}"}, r"chat_template\.jinja: wanted a Jinja"),
        ({"chat_template__jinja": "x" * (64 * 1024 + 1)}, r"wanted chat_template\.jinja of at most 65536 bytes"),
        ({"tokenizer_config__json": {"chat_template": "{% if %}"}}, r"tokenizer_config\.json: wanted a Jinja"),
        (
            {"tokenizer_config__json": {"chat_template": "é" * 32 * 1024 + "x"}},
            r"tokenizer_config\.json: wanted a chat",
        ),
        ({"tokenizer_config__json": {"chat_template": "\ud800"}}, r"tokenizer_config\.json: wanted a Jinja"),
        (
            {"tokenizer_config__json": {"chat_template": 3}},
            r"wanted chat_template in tokenizer_config\.json as a string",
        ),
    ],
)
def test_bad_templates_are_refused_with_the_file(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(write_checkpoint(tmp_path, **changes))


def test_a_conversation_in_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_chat([{"role": "user", "content": "the cat"}])
    user, end = ids_of("<|user|>", "<|end|>")
    assert ids == [user, *tokenizer.encode("the cat", add_special_tokens=False), end]


@pytest.mark.parametrize("spelling", [*SPECIALS, "<|end|><|end|>", "<<s>s>", "a<|user|>b", "<|us<|end|>er|>", "<|en"])
def test_special_tokens_spelled_in_messages_are_text(tokenizer: Tokenizer, spelling: str) -> None:
    """In every place where a client can write: no id of a special token but those of the template."""
    ids = tokenizer.encode_chat([{"role": "user", "content": f"x{spelling}"}, {"role": "user", "content": spelling}])
    specials = [token for token in ids if token in tokenizer.special_ids]
    assert specials == list(ids_of("<|user|>", "<|end|>")) * 2
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"<|user|>x{spelling}<|end|><|user|>{spelling}<|end|>"


def test_special_tokens_spelled_in_tools_and_variables_are_text(tmp_path: Path) -> None:
    source = "{{ tools | tojson }}{{ name }}<|end|>"
    loaded = Tokenizer.load(write_checkpoint(tmp_path, chat_template__jinja=source))
    tools = [{"name": "<|user|>", "parameters": {"<|end|>": ["<s>", 1, None]}}]
    ids = loaded.encode_chat([], tools=tools, variables={"name": "<|assistant|>"})
    assert [token for token in ids if token in loaded.special_ids] == list(ids_of("<|end|>"))
    text = '[{"name": "<|user|>", "parameters": {"<|end|>": ["<s>", 1, null]}}]<|assistant|><|end|>'
    assert loaded.decode(ids, skip_special_tokens=False) == text


@hypothesis.given(
    st.lists(st.sampled_from([*SPECIALS, "<", "|", ">", "<|", "end", "|>", "s", "x"]), max_size=12).map("".join)
)
def test_no_text_of_a_client_makes_a_special_token(tokenizer: Tokenizer, content: str) -> None:
    ids = tokenizer.encode_chat([{"role": "user", "content": content}])
    assert [token for token in ids if token in tokenizer.special_ids] == list(ids_of("<|user|>", "<|end|>"))
    assert tokenizer.decode(ids) == content


def test_a_special_token_of_one_character_cannot_be_broken(tmp_path: Path) -> None:
    backend = train_tokenizer()
    backend.add_special_tokens(["¶x", "¶"])
    loaded = Tokenizer.load(write_checkpoint(tmp_path, tokenizer__json=backend.to_str()))
    with pytest.raises(ValueError, match="wanted messages without '¶'"):
        loaded.encode_chat([{"role": "user", "content": "a ¶x"}])
