"""A byte-level tokenizer trained on five lines, and checkpoint directories around it."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

SPECIALS = ["<|end|>", "<|user|>", "<|assistant|>", "<s>"]
ADDED = ["<tool> x", "Ġq", "é", "你"]  # not special; some spelled with characters that stand for bytes
CORPUS = [
    "the cat sat on the mat, the cat sat",
    "你好，世界。你好吗",
    "👩‍👩‍👧‍👦 😀😃 the 😀",
    "naïve Grüße ﷺ �",
    "a b c d\n\n  e",
]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"


def train_tokenizer() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(ADDED)
    start = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    return backend


BACKEND = train_tokenizer()
FILES: dict[str, Any] = {
    "tokenizer.json": BACKEND.to_str(),
    "tokenizer_config.json": {"eos_token": "<|end|>", "bos_token": {"content": "<s>"}, "chat_template": TEMPLATE},
}


def write_checkpoint(directory: Path, **changes: Any) -> Path:
    """A checkpoint with `FILES`, of which some are changed; a value of None leaves the file out."""
    for name, content in (FILES | {name.replace("__", "."): content for name, content in changes.items()}).items():
        if content is not None:
            raw = content if isinstance(content, str | bytes) else json.dumps(content)
            (directory / name).write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return directory


def ids_of(*tokens: str) -> tuple[int, ...]:
    return tuple(BACKEND.token_to_id(token) for token in tokens)
