"""The Python API: `LLM` loads a model once and generates text, streams it, or gives logits.

from hybrid_jax import LLM, SamplingParams
llm = LLM("demo")
print(llm.generate("Once upon a time", SamplingParams(max_tokens=64))[0].outputs[0].text)
"""

import itertools
import operator
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float

from hybrid_jax import checkpoint
from hybrid_jax.answer import Answer
from hybrid_jax.assembly import build_engine, plan_engine, start_line
from hybrid_jax.config import Backend, Dtype, EngineConfig, Quantization
from hybrid_jax.engine import Engine
from hybrid_jax.hub import find_model
from hybrid_jax.published_config import read_published_config
from hybrid_jax.quantisation import keeps_eight_bits, quantise_model
from hybrid_jax.request import RequestOutput, SamplingParams, make_request
from hybrid_jax.routing import Routing, route_model
from hybrid_jax.scheduler import QueueFull
from hybrid_jax.sharding import place_model
from hybrid_jax.stats import Stats
from hybrid_jax.step import Progress
from hybrid_jax.tokenizer import Tokenizer, read_json_object, stated_eos_ids
from models.decoder import Decoder
from models.registry import find_family
from models.weights import WeightTable

Prompt = str | Sequence[int]


class LLM:
    """A model ready to generate.

    Requests of several calls run together: while a stream is read, other answers grow with it. Safe to use from several
    threads; one of them drives the engine at a time.

    Args:
      model: a checkpoint directory (published safetensors, or Orbax), the name of a hub repository, or `"demo"`.
      The others are the fields of `EngineConfig`, where each is explained.
    Raises ValueError for a checkpoint that is damaged or does not fit its config, for a config out of range, and for
    limits that the memory of the device cannot meet; before the weights are read.
    """

    def __init__(
        self,
        model: str | Path,
        dtype: Dtype = EngineConfig.dtype,
        backend: Backend = EngineConfig.backend,
        *,
        quantization: Quantization | None = EngineConfig.quantization,
        tensor_parallel: int = EngineConfig.tensor_parallel,
        expert_parallel: int = EngineConfig.expert_parallel,
        max_model_len: int | None = EngineConfig.max_model_len,
        max_num_seqs: int | None = EngineConfig.max_num_seqs,
        max_num_batched_tokens: int = EngineConfig.max_num_batched_tokens,
        page_size: int = EngineConfig.page_size,
        pages: int | None = EngineConfig.pages,
        slots: int | None = EngineConfig.slots,
        memory_fraction: float = EngineConfig.memory_fraction,
        decode_steps: int = EngineConfig.decode_steps,
        prefix_caching: bool = EngineConfig.prefix_caching,
        snapshot_interval: int = EngineConfig.snapshot_interval,
        max_waiting: int = EngineConfig.max_waiting,
        run_ahead: bool = EngineConfig.run_ahead,
        compilation_cache: str | None = EngineConfig.compilation_cache,
        canary: bool = EngineConfig.canary,
    ):
        self.config = EngineConfig(
            dtype=dtype,
            backend=backend,
            quantization=quantization,
            tensor_parallel=tensor_parallel,
            expert_parallel=expert_parallel,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            page_size=page_size,
            pages=pages,
            slots=slots,
            memory_fraction=memory_fraction,
            decode_steps=decode_steps,
            prefix_caching=prefix_caching,
            snapshot_interval=snapshot_interval,
            max_waiting=max_waiting,
            run_ahead=run_ahead,
            compilation_cache=compilation_cache,
            canary=canary,
        )
        self.path = find_model(str(model))
        hf = read_published_config(self.path)
        family = find_family(hf)
        self.model_config = family.Config.from_hf(hf)
        self.tokenizer = Tokenizer.find(self.path)
        self.eos_token_ids = self.tokenizer.eos_token_ids if self.tokenizer else stated_eos_ids(self.path)
        self.default_params = _default_params(self.path)
        abstract = nnx.eval_shape(
            lambda: family.Model(self.model_config, rngs=nnx.Rngs(0), dtype=dtype, backend=backend)
        )
        table = family.weight_table(self.model_config)
        self.weights = quantise_model(abstract, self.path, hf, table, quantization, widen=not keeps_eight_bits())
        self._start(str(model), abstract, table)
        self._answers, self._ids, self._left = dict[str, Answer](), itertools.count(), deque[Answer]()
        self._driving, self._next, self._driver = threading.RLock(), threading.RLock(), 0

    def _start(self, name: str, abstract: Decoder, table: WeightTable) -> None:
        """Place and plan the model, say so, and load it."""
        placement = place_model(abstract, self.config.tensor_parallel, self.config.expert_parallel)
        self.routing: Routing = route_model(abstract)
        self.memory = plan_engine(abstract, self.routing, self.model_config.max_positions, self.config)
        self.max_model_len = self.memory.max_model_len
        lines = *placement.whole, *self.weights.describe()
        print(start_line(name, self.config, self.routing, self.memory), *lines, sep="\n", file=sys.stderr)
        graph, state = nnx.split(abstract)
        loaded = checkpoint.load(self.path, state, table, placement.put)
        self._engine, self._runner = build_engine(
            nnx.merge(graph, loaded), self.routing, self.memory, self.config, self.eos_token_ids, placement
        )

    def get_ready(self, prompt_scores: bool = False) -> None:
        """Compile the program of every step now. From then on none is compiled, which `stats` counts; `logits` may.

        prompt_scores: also what `Engine.score_prompt` runs.
        """
        with self._turn():
            if prompt_scores:
                self._runner.compile_scorers()
            self._runner.compile_all()

    @property
    def engine(self) -> Engine:
        """The engine itself, for a server that drives it alone, in one thread: nothing of this class may run then."""
        return self._engine

    def stats(self) -> Stats:
        """What runs and waits, the pools, the prefix cache, compilations and times."""
        with self._turn():
            return self._engine.stats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """Generate an answer to each prompt, in the order given.

        Args:
          prompts: one prompt or several, each a text or a list of token ids.
          sampling_params: for all prompts, or one for each; None takes `default_params`, which the checkpoint gives.
          priority: of these requests beside those of other calls; the smallest number runs first.
          cache_salt: keeps what the prefix cache holds for these prompts apart from that of other salts.
        Raises ValueError for a text where the model has no tokenizer, a token id outside the vocabulary, and a prompt
        that leaves no room in the context.
        """
        answers = self._prepare(_listed(prompts), sampling_params, priority, cache_salt)
        self._run(answers)
        return [answer.output() for answer in answers]

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Iterator[str]:
        """Generate an answer to one prompt, piece by piece as the text becomes final; arguments as of `generate`.

        It runs while it is read; closing it aborts it. Raises as `generate` does, at once.
        """
        self._text()
        (answer,) = self._prepare([prompt], sampling_params, priority, cache_salt)
        return self._read(answer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises ValueError where the model has no tokenizer."""
        return self._text().encode(text)

    def encode_chat(self, message: str) -> list[int]:
        """Token ids of one user's message, by the checkpoint's chat template, up to where the answer begins."""
        return self._text().encode_chat([{"role": "user", "content": message}])

    def logits(self, token_ids: Sequence[int]) -> Float[np.ndarray, "T Y"]:
        """The scores of every next token after each of the tokens, float32.

        Raises ValueError for no tokens, more than `max_model_len`, and an id outside the vocabulary.
        """
        token_ids = _token_ids(token_ids)
        if not 0 < len(token_ids) <= self.max_model_len:
            raise ValueError(
                f"wanted 1 to max_model_len={self.max_model_len} token ids, got {len(token_ids)}: cut them"
            )
        self._check_ids(token_ids)
        with self._turn():
            return self._engine.score(token_ids)

    def _prepare(
        self,
        prompts: list[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int,
        cache_salt: str,
    ) -> list[Answer]:
        """An answer yet to be begun for each prompt."""
        params = self.default_params if params is None else params
        if not isinstance(params, SamplingParams | Sequence) or isinstance(params, str):
            raise ValueError(
                f"wanted SamplingParams or a list of them, got {type(params).__name__}: pass SamplingParams(…)"
            )
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"wanted one SamplingParams for all prompts or {len(prompts)}, got {len(each)}")
        answers = []
        for prompt, one in zip(prompts, each, strict=True):
            text = prompt if isinstance(prompt, str) else None
            ids = self._text().encode(prompt) if isinstance(prompt, str) else _token_ids(prompt)
            self._check_ids([*ids, *dict(one.logit_bias), *(one.allowed_token_ids or ())])
            if one.stop:
                self._text()
            request = make_request(
                str(next(self._ids)), ids, one, self.max_model_len, priority=priority, cache_salt=cache_salt
            )
            answers.append(Answer(request, text, self.tokenizer))
        return answers

    # ---------------------------------------------------------------------------------------------------- the engine

    def _run(self, answers: list[Answer]) -> None:
        """Run answers to their ends, as many at once as the engine takes."""
        waiting, running = deque(answers), list[Answer]()
        try:
            while waiting or running:
                while waiting and self._begin(waiting[0]):
                    running.append(waiting.popleft())
                self._advance()
                for answer in running:
                    self._require_alive(answer)
                running = [answer for answer in running if answer.finish_reason is None]
        finally:
            for answer in answers:
                self._end(answer)

    def _read(self, answer: Answer) -> Iterator[str]:
        while not self._begin(answer):
            self._advance()
        try:
            while answer.finish_reason is None:
                self._advance()
                self._require_alive(answer)
                if text := answer.take_text():
                    yield text
            if text := answer.take_text():
                yield text
        finally:
            self._end(answer)

    def _begin(self, answer: Answer) -> bool:
        """Hand a request to the engine; whether there was room in the line."""
        with self._turn():
            try:
                self._engine.add(answer.request)
            except QueueFull:
                return False
            self._answers[answer.request.id] = answer
            return True

    def _advance(self) -> None:
        """One step of the engine, for all answers."""
        with self._turn():
            if not self._engine.unfinished:
                return
            try:
                for progress in self._engine.step():
                    self._hear(progress)
            except BaseException:
                if self._engine.unfinished:  # what others have not heard yet is lost to them
                    self._engine.reset()
                raise

    def _hear(self, progress: Progress) -> None:
        answer = self._answers[progress.request_id]
        answer.push(progress)
        if progress.finish_reason is None and answer.finish_reason is not None:
            self._engine.abort(progress.request_id)  # a stop string, which the engine does not know

    def _require_alive(self, answer: Answer) -> None:
        if answer.finish_reason is None and answer.request.id not in self._answers:
            raise RuntimeError("another request broke the engine, which dropped all that ran: ask again")

    def _end(self, answer: Answer) -> None:
        """Forget an answer; abort it if it is not over."""
        if self._driver == threading.get_ident():  # the garbage collector closes a stream in the middle of a step
            self._left.append(answer)
            return
        with self._turn():
            self._forget(answer)

    def _forget(self, answer: Answer) -> None:
        if self._answers.pop(answer.request.id, None) is not None and answer.finish_reason is None:
            self._engine.abort(answer.request.id)
        while not self._answers and self._engine.unfinished:  # steps that were started before the end was known
            self._engine.step()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The engine, for one thread at a time. If it loses its requests meanwhile, their answers are forgotten.

        Whoever waits for it holds the place of the next, so that the one who had it last stands behind those in line.
        """
        with self._next:
            self._driving.acquire()
        try:
            self._driver = threading.get_ident()  # what `_left` holds is ended after its step
            yield
            while self._left:
                self._forget(self._left.popleft())
        except BaseException:
            if not self._engine.unfinished:
                self._answers.clear()
            raise
        finally:
            self._driver = 0
            self._driving.release()

    def _check_ids(self, ids: Sequence[int]) -> None:
        """JAX clamps an id outside the vocabulary in silence, so it is refused here."""
        vocabulary = self.model_config.vocabulary
        wrong = [token for token in ids if not 0 <= token < vocabulary]
        if wrong:
            raise ValueError(f"wanted token ids from 0 to {vocabulary - 1}, got {wrong[0]}: is it the right tokenizer?")

    def _text(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"wanted token ids, got text: {self.path} has no tokenizer.json; pass lists of token ids")
        return self.tokenizer


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, from one prompt or several."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence | np.ndarray):
        raise ValueError(f"wanted a text, token ids, or a list of these, got {type(prompts).__name__}")
    first = prompts[0] if len(prompts) else None
    listed: Any = [prompts] if isinstance(first, int | np.integer) else prompts
    return list(listed)


def _token_ids(values: Sequence[int]) -> list[int]:
    """Token ids as plain integers. Raises ValueError for anything else, even a number that is nearly one."""
    try:
        if not any(isinstance(value, bool) for value in values):
            return [operator.index(value) for value in values]
    except TypeError:
        pass
    raise ValueError(f"wanted a list of token ids, whole numbers, got {str(values)[:80]}")


def _default_params(directory: Path) -> SamplingParams:
    """How the checkpoint says that it wants to be sampled, in its generation_config.json."""
    stated = read_json_object(directory / "generation_config.json")
    known = {name: stated.get(name) for name in ("temperature", "top_k", "top_p", "min_p")}
    if stated.get("do_sample") is False:
        known["temperature"] = 0.0
    default = SamplingParams()
    try:
        return SamplingParams(
            temperature=default.temperature if known["temperature"] is None else known["temperature"],
            top_k=default.top_k if known["top_k"] is None else known["top_k"],
            top_p=default.top_p if known["top_p"] is None else known["top_p"],
            min_p=default.min_p if known["min_p"] is None else known["min_p"],
        )
    except ValueError as error:
        raise ValueError(f"generation_config.json: {error}") from None
