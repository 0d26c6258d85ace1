"""Trains the demo model's tokenizer: a byte-level BPE of 8192 tokens with the marks of a chat.

python scripts/demo_tokenizer.py --text corpus/*.jsonl.xz --out tokenizer.json
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from train_demo import read_pieces

VOCABULARY = 8192
SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
# Words with their leading space, numbers by at most three digits, runs of other marks, runs of space.
WORDS = Regex(r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def train_tokenizer(pieces: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A tokenizer that reads any text: its smallest tokens are the 256 bytes. Deterministic."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(WORDS, behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(without_marks(pieces), trainer)
    return tokenizer


def without_marks(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces with their chat marks taken out, so that these become no part of a word."""
    for piece in pieces:
        for mark in SPECIAL_TOKENS:
            piece = piece.replace(mark, "\n")
        yield piece


def main() -> None:
    """Read the text, train, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    train_tokenizer(read_pieces(args.text)).save(str(args.out))


if __name__ == "__main__":
    main()
