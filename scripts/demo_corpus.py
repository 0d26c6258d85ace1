"""Makes the text that the demo model is trained on, as compressed JSON lines.

    python scripts/demo_corpus.py sample --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out corpus --minutes 8

`sample` asks a small instruction model for many thousands of short pieces of English prose; it needs torch and
transformers, which nothing else here does. A line is one JSON string. Every second piece carries its request:
`<|user|>request<|assistant|>text<|end|>`; the others are the text alone. It does not know the tokenizer or the trainer.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from demo_prompts import Prompt, make_prompt

FILE_BYTES = 15 << 20
FILE_COUNT = 4
# Text compressed at a time. Each chunk is a whole xz stream, so what is written can be read after an abrupt end.
CHUNK_CHARACTERS = 4 << 20

PLAIN_MARKS = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": " - ", "–": "-", "…": "...", "\u00a0": " "})
ALLOWED = frozenset(map(chr, range(32, 127))) | frozenset("\néèêëçàâîïôöûüñä°£½")
SENTENCE_END = re.compile(r"[.!?][\"')]*(?=\s|$)")
LIST_LINE = re.compile(r"^\s*(\d+[.):]|[-+•])\s", re.MULTILINE)
MARK_UP = re.compile(r"[\[\]{}<>|\\_#*=~`^]|https?:|www\.")
WORD = re.compile(r"[a-z']+")
COMMON_WORDS = frozenset(
    "the a an and of to in is was it that he she they we i you his her their my your for on with as at by from but not "
    "be are were had have has this so then there when who which all one said would could can will do did up out".split()
)
BOILERPLATE = re.compile(
    r"\b(as an ai|language model|ai assistant|artificial intelligence|smollm|hugging face|i'm sorry, but|i cannot|"
    r"i can't (assist|help|provide)|here is (a|an|the|your)|here's (a|an|the|your)|in this (story|fable|scene|letter)|"
    r"word count|dear diary entry|certainly!|sure, (here|i)|i'd be happy to|i hope this helps|your name)\b"
)
UNFIT = re.compile(
    r"\b(sex\w*|rap(e|ed|ist)|porn\w*|naked|nude|suicid\w*|murder\w*|nazi\w*|hitler|terroris\w*|genocid\w*|slave\w*|"
    r"cocaine|heroin|drug (abuse|dealer)s?|alcohol\w*|drunk\w*|whore|bitch|fuck\w*|shit\w*|bastard|racis\w*|tortur\w*|"
    r"blood(y|ied)|corpse\w*|gun(s|shot|man)?|bomb\w*|covid|pandemic|cancer|trump|obama|biden)\b"
)


def clean(text: str) -> str:
    """Plain quotation marks and dashes, no bold marks, no trailing blanks, at most one empty line."""
    text = text.translate(PLAIN_MARKS).replace("**", "").replace("  ", " ")
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def cut_to_sentence(text: str) -> str:
    """The text up to its last full sentence; empty if it has none."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def repeated_share(words: list[str], size: int) -> float:
    """The share of the runs of `size` words that have occurred before in the piece."""
    runs = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return 1 - len(set(runs)) / max(len(runs), 1)


def find_fault(text: str) -> str:
    """The name of the first filter that drops this piece, or an empty string."""
    lower = text.lower()
    words = WORD.findall(lower)
    checks = (
        ("short", lambda: len(text) < 160),
        ("characters", lambda: not ALLOWED.issuperset(text)),
        ("mark-up", lambda: MARK_UP.search(text)),
        ("list", lambda: len(LIST_LINE.findall(text)) > 1),
        ("boilerplate", lambda: BOILERPLATE.search(lower)),
        ("unfit", lambda: UNFIT.search(lower)),
        ("not English", lambda: sum(word in COMMON_WORDS for word in words) < 0.25 * len(words)),
        ("long words", lambda: max(map(len, words), default=99) > 18),
        ("repeated runs", lambda: repeated_share(words, 4) > 0.12),
        ("compresses too well", lambda: len(zlib.compress(text.encode())) < 0.36 * len(text)),
    )
    return next((name for name, wrong in checks if wrong()), "")


@dataclass
class Seen:
    """Long sentences met so far: a piece half of whose long sentences are old is a duplicate."""

    hashes: set[int] = field(default_factory=set)

    def is_duplicate(self, text: str) -> bool:
        sentences = [part.strip().lower() for part in SENTENCE_END.split(text)]
        keys = {zlib.crc32(part.encode()) << 32 | len(part) for part in sentences if len(part) > 40}
        old = len(keys & self.hashes)
        self.hashes |= keys
        return old * 2 > len(keys)


@dataclass
class Shelf:
    """Writes lines into numbered xz files of bounded size, a chunk at a time, compressed beside the caller."""

    folder: Path
    stem: str
    file_bytes: int
    file_count: int
    index: int = 0
    lines: list[str] = field(default_factory=list)
    characters: int = 0
    full: bool = False
    pending: list[Future] = field(default_factory=list)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def add(self, text: str) -> None:
        self.lines.append(json.dumps(text, ensure_ascii=False) + "\n")
        self.characters += len(self.lines[-1])
        if self.characters >= CHUNK_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        chunk = "".join(self.lines).encode()
        self.lines, self.characters = [], 0
        self.pending = [task for task in self.pending if not task.done() or task.result()]
        self.pending.append(self.pool.submit(self._store, chunk))

    def _store(self, chunk: bytes) -> None:
        packed = lzma.compress(chunk, preset=9)
        path = self._path()
        if path.exists() and path.stat().st_size + len(packed) > self.file_bytes:
            self.index += 1
            path = self._path()
        self.full = self.index >= self.file_count
        if not self.full:
            with path.open("ab") as file:
                file.write(packed)

    def _path(self) -> Path:
        return self.folder / f"{self.stem}-{self.index:03d}.jsonl.xz"

    def close(self) -> None:
        self.flush()
        self.pool.shutdown()
        for task in self.pending:
            task.result()


@dataclass
class Editor:
    """Turns sampled tokens into pieces: decodes, cleans, filters, shelves and counts."""

    tokenizer: object
    end_ids: tuple[int, ...]
    seed: int
    shelf: Shelf
    counts: Counter = field(default_factory=Counter)
    seen: Seen = field(default_factory=Seen)
    examples: list[str] = field(default_factory=list)

    def take(self, answers: list[tuple[int, list[int]]]) -> None:
        if not answers:
            return
        bodies = [tokens[:-1] if tokens and tokens[-1] in self.end_ids else tokens for _, tokens in answers]
        texts = self.tokenizer.batch_decode(bodies, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for (number, tokens), body, text in zip(answers, bodies, texts, strict=True):
            self._take_one(number, text, len(tokens), ended=len(body) < len(tokens))

    def _take_one(self, number: int, text: str, tokens: int, ended: bool) -> None:
        prompt = make_prompt(number, self.seed)
        text = clean(prompt.opening + text)
        text = text if ended else cut_to_sentence(text)
        fault = find_fault(text) or ("duplicate" if self.seen.is_duplicate(text) else "")
        self.counts.update({"sampled pieces": 1, "sampled tokens": tokens, "ended by the model": int(ended)})
        if fault:
            self.counts[f"dropped: {fault}"] += 1
            return
        piece = f"<|user|>{prompt.request}<|assistant|>{text}<|end|>" if number % 2 == 0 else text
        self.counts.update({"kept pieces": 1, "kept tokens": tokens, "kept characters": len(text)})
        if len(self.examples) < 24:
            self.examples.append(piece)
        self.shelf.add(piece)


def chat_text(prompt: Prompt) -> str:
    """The request in the chat marks of SmolLM2, and the first words of the answer."""
    return f"<|im_start|>user\n{prompt.request}<|im_end|>\n<|im_start|>assistant\n{prompt.opening}"


def endless_prompts(tokenizer, seed: int, start: int, longest: int):
    """(number, tokens) of prompt after prompt; those over `longest` tokens are left out."""
    while True:
        numbers = range(start, start + 256)
        start += 256
        texts = [chat_text(make_prompt(number, seed)) for number in numbers]
        for number, tokens in zip(numbers, tokenizer(texts, add_special_tokens=False).input_ids, strict=True):
            if len(tokens) <= longest:
                yield number, tokens


def relative_error(value, wanted) -> float:
    """Norm of the difference over the norm of what was wanted."""
    return float((value.float() - wanted.float()).norm() / wanted.float().norm())


def check_attention(sampler, attend, weights, device: str) -> None:
    """Stops if the attention differs from its definition on random data of the model's shapes."""
    import torch

    like = {"dtype": weights.embedding_YD.dtype, "device": device}
    head_width, heads, kv_heads = weights.cos_SK.shape[1], weights.heads, weights.kv_heads
    position_B = torch.tensor([0, 1, 62, 63, 64, 65, 126, 127], device=device)
    q_BHK = torch.randn((8, heads + kv_heads, head_width), **like)[:, :heads]
    cache_BJSK = torch.randn((8, 2 * kv_heads, 128, head_width), **like)
    error = relative_error(attend(q_BHK, cache_BJSK, position_B), sampler.attend_plain(q_BHK, cache_BJSK, position_B))
    print(f"attention differs from its definition by {error:.1e}", flush=True)
    if not error < 1e-2:
        raise SystemExit(f"wanted attention within 1e-2 of its definition, got {error:.1e}; take --attention plain")


def check_logits(sampler, attend, weights, model, prompts: list[list[int]]) -> None:
    """Stops if the logits after some prompts differ from transformers' by more than the rounding of the dtype."""
    import torch

    rows = sampler.make_rows(weights, len(prompts), weights.cos_SK.shape[0])
    device, errors = weights.embedding_YD.device, []
    with torch.inference_mode():
        for step in range(max(map(len, prompts))):
            position = [min(step, len(prompt) - 1) for prompt in prompts]
            token = [prompt[place] for prompt, place in zip(prompts, position, strict=True)]
            position_B, token_B = (torch.tensor(values, device=device) for values in (position, token))
            logits_BY = sampler.forward(weights, rows.cache_LBJSK, token_B, position_B, attend)
        for prompt, logits_Y in zip(prompts, logits_BY, strict=True):
            wanted_Y = model(torch.tensor([prompt], device=device)).logits[0, -1]
            errors.append(relative_error(logits_Y, wanted_Y))
    print(f"logits differ from transformers' by {max(errors):.1e}", flush=True)
    if not max(errors) < (1e-4 if weights.embedding_YD.dtype == torch.float32 else 5e-2):
        raise SystemExit(f"wanted the logits of transformers, got relative errors {errors}; the loop is wrong")


def report(editor: Editor, seconds: float, path: Path) -> None:
    """Write the counts so far, and print them."""
    counts = dict(sorted(dict(editor.counts).items()))
    rates = {"seconds": round(seconds, 1), "sampled tokens/s": round(counts.get("sampled tokens", 0) / seconds)}
    path.write_text(json.dumps(rates | counts, indent=1) + "\n")
    print(json.dumps(rates | counts), flush=True)


def choose_attention(name: str, sampler):
    """The attention of this name; the Triton kernel is imported only where it is asked for."""
    if name == "plain":
        return sampler.attend_plain
    from demo_decode_kernel import attend

    return attend


def sample(args: argparse.Namespace) -> None:
    """Samples until the minutes or the files are used up; the clock starts when the model is loaded and checked."""
    import demo_sampler as sampler
    import torch

    sys.setswitchinterval(5e-4)  # the thread that feeds the device must not wait for the one that edits
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    tokenizer, model = sampler.load_model(args.gguf, dtype, args.device)
    weights = sampler.take_weights(model, args.places)
    attend = choose_attention(args.attention, sampler)
    prompts = endless_prompts(tokenizer, args.seed, args.start, args.places // 3)
    check_attention(sampler, attend, weights, args.device)
    check_logits(sampler, attend, weights, model, [next(prompts)[1] for _ in range(4)])
    end_ids = tuple(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>", "<|im_start|>"]))
    editor = Editor(tokenizer, end_ids, args.seed, Shelf(args.out, "stories", FILE_BYTES, FILE_COUNT))
    settings = sampler.Settings(args.temperature, args.top_p, args.recent_penalty, args.run_penalty, end_ids)
    with torch.inference_mode():
        rows = sampler.make_rows(weights, args.batch, args.places)
        step = sampler.compile_step(weights, rows, settings, attend)
        run(editor, sampler, step, rows, prompts, args)


def run(editor: Editor, sampler, step, rows, prompts, args: argparse.Namespace) -> None:
    """The loop: the device samples while one thread edits what it has finished."""
    begin = time.monotonic()
    seconds = 60 * args.minutes
    shown, tasks = begin, []
    with ThreadPoolExecutor(1) as editing:
        stop = lambda: editor.shelf.full or time.monotonic() - begin > seconds  # noqa: E731
        for answers in sampler.sample_until(stop, step, rows, prompts):
            tasks.append(editing.submit(editor.take, answers))
            tasks = [task for task in tasks if not task.done() or task.result()]
            if time.monotonic() - shown > 20:
                shown = time.monotonic()
                report(editor, shown - begin, args.out / "stats.json")
        for task in tasks:
            task.result()
    elapsed = time.monotonic() - begin
    editor.shelf.close()
    report(editor, elapsed, args.out / "stats.json")
    for example in editor.examples[: args.show]:
        print("-----\n" + example, flush=True)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("sample", help="sample prose from SmolLM2-135M-Instruct")
    verb.add_argument("--gguf", type=Path, required=True, help="the model's GGUF file")
    verb.add_argument("--out", type=Path, required=True, help="folder of the files written")
    verb.add_argument("--minutes", type=float, required=True, help="sampling time, loading not counted")
    verb.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    verb.add_argument("--attention", default="triton", choices=("triton", "plain"), help="plain on a CPU")
    verb.add_argument("--batch", type=int, default=4096, help="rows sampled at once")
    verb.add_argument("--places", type=int, default=448, help="tokens of a row, its prompt included")
    verb.add_argument("--temperature", type=float, default=0.6)
    verb.add_argument("--top-p", type=float, default=0.9, help="among the 64 best tokens")
    verb.add_argument("--recent-penalty", type=float, default=0.5, help="off the logit of a token among the last 48")
    verb.add_argument("--run-penalty", type=float, default=3.0, help="off a token that repeats a run of three")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--start", type=int, default=0, help="number of the first prompt")
    verb.add_argument("--show", type=int, default=6, help="pieces printed at the end")
    verb.set_defaults(run=sample)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_arguments()
    arguments.run(arguments)
