"""Loads a server with many streams for minutes, checks that nothing is lost or grows, and prints the figures.

python scripts/soak.py --streams 200 --minutes 5

Starts `hybrid-jax serve` on a free port of this machine, keeps that many streams open over requests of mixed lengths (a
few of whose clients leave), and ends the server with SIGTERM. Then runs the same requests through the engine without a
server, as many at once, and compares tokens a second. Ends with 1 where anything that is checked does not hold: every
stream is whole, memory and open files stay where they were after a quarter of the time, pages and slots come back,
nothing is compiled, each request has one line in the log, a fixed prompt is answered as before, and the server makes
nearly as many tokens a second as the engine alone.
"""

import argparse
import asyncio
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from urllib.error import URLError

from hybrid_jax.answer import Answer
from hybrid_jax.config import EngineConfig
from hybrid_jax.llm import LLM
from hybrid_jax.request import SamplingParams, make_request

PROMPT_TOKENS = (4, 160)
LEAST_TOKENS = 4  # of an answer
TOP_P = 0.9  # said in every request: what is unset would be the checkpoint's to the server, and off to the engine alone
VOCABULARY = 8000  # ids that every model has
LEAVING = 0.02  # of the clients go in the middle of their answer
CANARY = {"prompt": "Once upon a time there was a fox who", "max_tokens": 40, "temperature": 0, "priority": -1}
CANARY_EACH_S = 10.0
READY_S = 2400.0
WARM_UP = 0.2  # of the time, before tokens a second are counted

Made = tuple[float, float, float]


@dataclass(frozen=True)
class Ask:
    """One request."""

    prompt: tuple[int, ...]
    tokens: int
    temperature: float
    seed: int
    leaves: bool

    def body(self) -> bytes:
        """As JSON."""
        fields = {"prompt": self.prompt, "max_tokens": self.tokens, "temperature": self.temperature, "seed": self.seed}
        fields |= {"top_p": TOP_P, "top_k": 0, "min_p": 0.0}
        stream = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        return json.dumps(fields | stream).encode()

    def params(self) -> SamplingParams:
        """The same for the engine."""
        return SamplingParams(
            temperature=self.temperature, top_p=TOP_P, seed=self.seed, max_tokens=self.tokens, ignore_eos=True
        )


@dataclass
class Seen:
    """What the clients saw. errors: what was wrong, in words.

    sizes_bytes, files: of the server, one a second. made: times, tokens that the engine had made by
    then, and seconds of processors that it had used.
    """

    whole: int = 0
    left: int = 0
    errors: list[str] = field(default_factory=list)
    sizes_bytes: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    canaries: list[str] = field(default_factory=list)
    made: list[Made] = field(default_factory=list)


Draw = Callable[[], Ask]  # the next request of one stream


def draw_ask(chance: random.Random, most_tokens: int) -> Ask:
    """A request of any length."""
    prompt = tuple(chance.randrange(VOCABULARY) for _ in range(chance.randint(*PROMPT_TOKENS)))
    temperature = 0.8 if chance.random() < 0.5 else 0.0
    tokens = chance.randint(LEAST_TOKENS, most_tokens)
    return Ask(prompt, tokens, temperature, chance.getrandbits(32), chance.random() < LEAVING)


def draws_of(streams: int, most_tokens: int) -> list[Draw]:
    """For each stream its own requests, the same whoever answers them."""
    return [partial(draw_ask, random.Random(index), most_tokens) for index in range(streams)]


# ---------------------------------------------------------------------------------------------------------- the server


@dataclass(frozen=True)
class Server:
    """A server process of this machine."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def get(self, path: str) -> str:
        """A page."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            text: str = answer.read().decode()
        return text

    def metric(self, name: str) -> float:
        """The first value whose line begins so."""
        found = re.search(rf"^{re.escape(name)}\S* (\S+)$", self.get("/metrics"), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def size_bytes(self) -> int:
        """Memory that it holds."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    def files(self) -> int:
        """How many it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def cpu_s(self) -> float:
        """Seconds of processors that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait_until_ready(self) -> None:
        """Raises RuntimeError for one that does not get there."""
        end_s = time.monotonic() + READY_S
        while time.monotonic() < end_s and self.process.poll() is None:
            try:
                self.get("/ready")
                return
            except URLError:
                time.sleep(0.5)
        raise RuntimeError(f"the server did not get ready:\n{self.log.read_text()}")


@contextmanager
def serving(model: str, flags: list[str]) -> Iterator[Server]:
    """A server, ended by force where nobody ended it."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        command = [sys.executable, "-m", "hybrid_jax.cli", "serve", model, "--port", str(port), *flags]
        with path.open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            server = Server(process, port, path)
            server.wait_until_ready()
            yield server
        finally:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Rate:
    """Tokens a second of the clock, and a second of a processor, which other work on the machine does not lower."""

    a_second: float
    a_cpu_second: float


def rate(made: list[Made]) -> Rate:
    """Of all but the first part of the time."""
    warm = made[int(len(made) * WARM_UP) :]
    (begin_s, before, cpu_begin_s), (end_s, after, cpu_end_s) = warm[0], warm[-1]
    return Rate((after - before) / (end_s - begin_s), (after - before) / (cpu_end_s - cpu_begin_s))


# --------------------------------------------------------------------------------------------------------- the clients


async def post(port: int, body: bytes, reads: int | None = None) -> bytes:
    """The whole answer to a completion; with `reads`, what came in so many reads before the client left."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = b""
        while (part := await reader.read(2**16)) and (reads is None or reads > 0):
            answer += part
            reads = None if reads is None else reads - 1
        return answer
    finally:
        writer.close()


async def ask_once(port: int, ask: Ask, seen: Seen) -> None:
    """One request, and whether its answer is whole."""
    answer = await post(port, ask.body(), 2 if ask.leaves else None)
    if ask.leaves:
        seen.left += 1
        return
    counted = re.search(rb'"completion_tokens":(\d+)', answer)
    if b"data: [DONE]" in answer and counted is not None and int(counted[1]) == ask.tokens:
        seen.whole += 1
    else:
        seen.errors.append(f"a stream of {ask.tokens} tokens ended with {answer[-300:]!r}")


async def keep_asking(port: int, draw: Draw, end_s: float, seen: Seen) -> None:
    """One stream after another."""
    while time.monotonic() < end_s:
        try:
            await ask_once(port, draw(), seen)
        except OSError as error:
            seen.errors.append(f"a connection broke: {error!r}")


async def ask_canary(port: int) -> str:
    """The answer to the fixed prompt."""
    answer = await post(port, json.dumps(CANARY).encode())
    return str(json.loads(answer[answer.index(b"\r\n\r\n") :])["choices"][0]["text"])


async def look(server: Server, end_s: float, seen: Seen) -> None:
    """Look at the server each second."""
    while time.monotonic() < end_s:
        seen.sizes_bytes.append(server.size_bytes())
        seen.files.append(server.files())
        made = await asyncio.to_thread(server.metric, "vllm:generation_tokens")
        seen.made.append((time.monotonic(), made, server.cpu_s()))
        await asyncio.sleep(1)


async def keep_asking_canary(port: int, end_s: float, seen: Seen) -> None:
    """Ask the fixed prompt now and then."""
    while time.monotonic() < end_s:
        seen.canaries.append(await ask_canary(port))
        await asyncio.sleep(CANARY_EACH_S)


async def load(server: Server, draws: Sequence[Draw], seconds: float) -> Seen:
    """All clients until the time is over and their last answers are whole."""
    seen = Seen(canaries=[await ask_canary(server.port)])
    end_s = time.monotonic() + seconds
    clients = [keep_asking(server.port, draw, end_s, seen) for draw in draws]
    await asyncio.gather(*clients, look(server, end_s, seen), keep_asking_canary(server.port, end_s, seen))
    seen.canaries.append(await ask_canary(server.port))
    return seen


# ---------------------------------------------------------------------------------------------------- the engine alone


def run_alone(llm: LLM, draws: Sequence[Draw], seconds: float) -> Rate:
    """The rate of the same requests, as many at once, through the engine and the detokenizer alone."""
    answers: dict[str, tuple[Answer, Draw]] = {}
    for draw in draws:
        _add(llm, draw, answers)
    made, tokens, end_s = list[Made](), 0, time.monotonic() + seconds
    while time.monotonic() < end_s:
        for progress in llm.engine.step():
            tokens += len(progress.token_ids)
            answer, draw = answers[progress.request_id]
            answer.push(progress)
            answer.take_text()
            if answer.finish_reason is not None:
                del answers[progress.request_id]
                _add(llm, draw, answers)
        made.append((time.monotonic(), tokens, time.process_time()))
    return rate(made)


def _add(llm: LLM, draw: Draw, answers: dict[str, tuple[Answer, Draw]]) -> None:
    ask = draw()
    llm.engine.add(request := make_request(f"r{ask.seed}", ask.prompt, ask.params(), llm.max_model_len))
    answers[request.id] = Answer(request, None, llm.tokenizer), draw


# ------------------------------------------------------------------------------------------------------------- the run


def check(server: Server, seen: Seen, growth: float) -> list[str]:
    """What does not hold, in words. Ends the server. growth: most of memory, from the second quarter to the last."""
    found = [f"{len(seen.errors)} errors, the first: {seen.errors[0]}"] if seen.errors else []
    quarter = max(len(seen.sizes_bytes) // 4, 1)
    before, after = mean(seen.sizes_bytes[quarter : 2 * quarter]), mean(seen.sizes_bytes[-quarter:])
    if after > before * (1 + growth):
        found.append(f"memory grew from {before / 2**20:.1f} to {after / 2**20:.1f} MiB")
    if max(seen.files[-quarter:]) > max(seen.files[quarter : 2 * quarter]) + 2:
        found.append(f"open files grew: {seen.files[quarter]} to {seen.files[-1]}")
    if len(set(seen.canaries)) != 1:
        found.append(f"the fixed prompt got {len(set(seen.canaries))} different answers of {len(seen.canaries)}")
    for unit in ("pages", "state_slots"):
        if held := server.metric(f'hybrid_jax_{unit}{{state="used"}}'):
            found.append(f"{held:.0f} {unit} did not come back")
    if late := server.metric("hybrid_jax_compilations_after_ready"):
        found.append(f"{late:.0f} programs were compiled after ready")
    server.process.send_signal(signal.SIGTERM)
    if code := server.process.wait(60):
        found.append(f"the server ended with {code}")
    return found + check_log(server.log.read_text(), seen)


def check_log(log: str, seen: Seen) -> list[str]:
    """Whether each request has one line, with a reason that fits."""
    reasons = re.findall(r"route='POST /v1/completions' status=\d+ reason=(\S+)", log)
    wanted = {"length": seen.whole + len(seen.canaries), "disconnect": seen.left}
    got = {name: reasons.count(name) for name in sorted({*wanted, *reasons})}
    kept = got.get("disconnect", 0) <= seen.left  # an answer may be over before its client has left
    even = sum(got.values()) == sum(wanted.values()) and set(got) == set(wanted)
    return [] if seen.errors or (kept and even) else [f"the log has {got}, the clients saw {wanted}"]


def compare(served: Rate, ratio: float) -> list[str]:
    """Print the rates of the server and of the engine alone; whether the server's is too low, in words."""
    command = [sys.executable, __file__, "--alone", *sys.argv[1:]]
    engine = Rate(*map(float, subprocess.check_output(command).split()[-2:]))
    share, cpu_share = served.a_second / engine.a_second, served.a_cpu_second / engine.a_cpu_second
    print(f"tokens/s: served {served.a_second:.1f}, engine alone {engine.a_second:.1f}, ratio {share:.3f}")
    print(f"of a processor: {served.a_cpu_second:.1f}, {engine.a_cpu_second:.1f}, ratio {cpu_share:.3f}")
    return [] if share >= ratio else [f"the server makes {share:.1%} of the tokens a second of the engine alone"]


def soak(given: argparse.Namespace, flags: list[str]) -> int:
    """Run everything; the exit code."""
    with serving(given.model, flags) as server:
        clients_s, server_s, begin_s = time.process_time(), server.cpu_s(), time.monotonic()
        seen = asyncio.run(load(server, draws_of(given.streams, given.most_tokens), given.minutes * 60))
        seconds = time.monotonic() - begin_s
        shares = [(time.process_time() - clients_s) / seconds, (server.cpu_s() - server_s) / seconds]
        asyncio.run(asyncio.sleep(2))
        problems = check(server, seen, given.growth)
    sizes_bytes = seen.sizes_bytes[len(seen.sizes_bytes) // 4], max(seen.sizes_bytes), seen.sizes_bytes[-1]
    ended = f"{seen.whole} whole, {seen.left} left, {len(seen.errors)} errors"
    print(f"{given.streams} streams for {seconds:.0f} s: {ended}")
    print(f"processors: clients {shares[0]:.2f}, server {shares[1]:.2f} of {os.cpu_count()}")
    print("memory in MiB after a quarter, most, at the end: " + ", ".join(f"{b / 2**20:.1f}" for b in sizes_bytes))
    print(f"fixed prompt asked {len(seen.canaries)} times, {len(set(seen.canaries))} answer; files {seen.files[-1]}")
    if given.alone_minutes:
        problems += compare(rate(seen.made), given.ratio)
    print("all holds" if not problems else "DOES NOT HOLD:\n" + "\n".join(problems))
    return int(bool(problems))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--most-tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--alone-minutes", type=float, default=0.5, help="of the engine alone; 0 leaves it out")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="requests that run at once")
    parser.add_argument("--max-model-len", type=int, default=320)
    parser.add_argument("--max-num-batched-tokens", type=int, default=256)
    parser.add_argument("--decode-steps", type=int, default=EngineConfig.decode_steps)
    parser.add_argument("--ratio", type=float, default=0.9, help="least tokens a second, of those of the engine alone")
    parser.add_argument("--growth", type=float, default=0.02, help="most of memory since the second quarter")
    parser.add_argument("--compilation-cache", help="folder of compiled programs")
    parser.add_argument("--alone", action="store_true", help="only the engine without a server")
    given = parser.parse_args()
    if given.alone:
        llm = LLM(
            given.model,
            "float32",
            max_model_len=given.max_model_len,
            max_num_seqs=given.max_num_seqs,
            max_num_batched_tokens=given.max_num_batched_tokens,
            decode_steps=given.decode_steps,
            compilation_cache=given.compilation_cache,
        )
        llm.get_ready()
        alone = run_alone(llm, draws_of(given.streams, given.most_tokens), given.alone_minutes * 60)
        print(alone.a_second, alone.a_cpu_second)
        return
    flags = ["--dtype", "float32"]
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "decode_steps"):
        flags += ["--" + name.replace("_", "-"), str(getattr(given, name))]
    flags += ["--compilation-cache", given.compilation_cache] if given.compilation_cache else []
    raise SystemExit(soak(given, flags))


if __name__ == "__main__":
    main()
