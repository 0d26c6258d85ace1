"""The Python API: `LLM` loads a model once and generates text, streams it, or gives logits.

from hybrid_jax import LLM, SamplingParams
llm = LLM("demo")
print(llm.generate("Once upon a time", SamplingParams(max_tokens=64))[0].outputs[0].text)
"""

import itertools
import operator
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from hybrid_jax import checkpoint
from hybrid_jax.config import Backend, Dtype, EngineConfig
from hybrid_jax.engine import Engine, Progress, score
from hybrid_jax.hf_directory import read_config
from hybrid_jax.hub import find_model
from hybrid_jax.request import CompletionOutput, FinishReason, Request, RequestOutput, SamplingParams, make_request
from hybrid_jax.routing import Routing, route_model, summary
from hybrid_jax.runner import Runner
from hybrid_jax.tokenizer import Detokenizer, StopMatcher, Tokenizer, read_json_object, stated_eos_ids
from models.registry import find_family

DEFAULT_MODEL_LEN = 8192
Prompt = str | Sequence[int]


class LLM:
    """A model ready to generate.

    Args:
      model: a checkpoint directory (published safetensors, or Orbax), the name of a hub repository, or `"demo"`.
      The others are the fields of `EngineConfig`, where each is explained.
    Raises ValueError for a checkpoint that is damaged or does not fit its config, and for a config out of range.
    """

    def __init__(
        self,
        model: str | Path,
        dtype: Dtype = EngineConfig.dtype,
        backend: Backend = EngineConfig.backend,
        *,
        max_model_len: int | None = EngineConfig.max_model_len,
        max_num_seqs: int = EngineConfig.max_num_seqs,
        max_num_batched_tokens: int = EngineConfig.max_num_batched_tokens,
        page_size: int = EngineConfig.page_size,
        decode_steps: int = EngineConfig.decode_steps,
    ):
        self.config = EngineConfig(
            dtype, backend, max_model_len, max_num_seqs, max_num_batched_tokens, page_size, decode_steps
        )
        self.path = find_model(str(model))
        hf = read_config(self.path)
        family = find_family(hf)
        self.model_config = family.Config.from_hf(hf)
        self.max_model_len = _fit_length(max_model_len, self.model_config.max_positions)
        self.tokenizer = Tokenizer.find(self.path)
        self.eos_token_ids = self.tokenizer.eos_token_ids if self.tokenizer else stated_eos_ids(self.path)
        self.default_params = _default_params(self.path)
        abstract = nnx.eval_shape(
            lambda: family.Model(self.model_config, rngs=nnx.Rngs(0), dtype=dtype, backend=backend)
        )
        self.routing: Routing = route_model(abstract)
        print(
            f"{model}: {dtype} on {jax.default_backend()}, {_backends(self.routing)}; {summary(self.routing)}",
            file=sys.stderr,
        )
        graph, state = nnx.split(abstract)
        loaded = checkpoint.load(self.path, state, family.weight_table(self.model_config))
        pages = max_num_seqs * -(-self.max_model_len // page_size) + 1
        precision = "highest" if dtype == "float32" else None
        merged = nnx.merge(graph, loaded)
        self._runner = Runner(merged, self.routing, pages, max_num_seqs + 1, page_size, precision)
        self._ids = itertools.count()
        self._in_use = threading.Lock()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Generate an answer to each prompt, in the order given.

        Args:
          prompts: one prompt or several, each a text or a list of token ids.
          sampling_params: for all prompts, or one for each; None takes `default_params`, which the checkpoint gives.
        Raises ValueError for a text where the model has no tokenizer, a token id outside the vocabulary, and a prompt
        that leaves no room in the context.
        """
        listed = _listed(prompts)
        requests = self._requests(listed, sampling_params)
        outputs: list[RequestOutput] = []
        for start in range(0, len(requests), self.config.max_num_seqs):
            group = requests[start : start + self.config.max_num_seqs]
            answers = [_Answer(request, self.tokenizer) for request in group]
            for _ in self._run(group, answers):
                pass
            texts = [prompt if isinstance(prompt, str) else None for prompt in listed[start : start + len(group)]]
            outputs += [answer.output(text) for answer, text in zip(answers, texts, strict=True)]
        return outputs

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """Generate an answer to one prompt, piece by piece as the text becomes final.

        Until the stream is at its end or closed, this LLM does nothing else. Raises as `generate` does, at once.
        """
        requests = self._requests([prompt], sampling_params)
        answers = [_Answer(requests[0], self._text())]
        return (text for _, text in self._run(requests, answers) if text)

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
        with self._alone():
            return score(self._runner, self.config, token_ids)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The cache has one user at a time: two would hand out the same slots and pages."""
        if not self._in_use.acquire(blocking=False):
            raise ValueError(
                "wanted an idle LLM, got one whose stream is still running: read it to its end or close it"
            )
        try:
            yield
        finally:
            self._in_use.release()

    def _run(self, requests: list[Request], answers: list["_Answer"]) -> Iterator[tuple[int, str]]:
        """Run requests together; each row's new text as it becomes final."""
        with self._alone():
            engine = Engine(self._runner, self.config, requests, self.eos_token_ids)
            while engine.unfinished:
                for progress in engine.step():
                    text = answers[progress.row].push(progress)
                    if answers[progress.row].finish_reason is not None:
                        engine.stop(progress.row)
                    yield progress.row, text

    def _requests(
        self, prompts: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        params = self.default_params if params is None else params
        if not isinstance(params, SamplingParams | Sequence) or isinstance(params, str):
            raise ValueError(
                f"wanted SamplingParams or a list of them, got {type(params).__name__}: pass SamplingParams(…)"
            )
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"wanted one SamplingParams for all prompts or {len(prompts)}, got {len(each)}")
        made = []
        for prompt, one in zip(prompts, each, strict=True):
            ids = self._text().encode(prompt) if isinstance(prompt, str) else _token_ids(prompt)
            self._check_ids(ids)
            made.append(make_request(str(next(self._ids)), ids, one, self.max_model_len))
            if one.stop:
                self._text()
        return made

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


class _Answer:
    """One answer as it grows: its tokens, its text, and why it ended."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None):
        self.finish_reason: FinishReason | None = None
        self._request = request
        self._stop_reason: int | str | None = None
        self._tokens: list[int] = []
        self._pieces: list[str] = []
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._matcher = StopMatcher(request.params.stop, request.params.include_stop_str_in_output)

    def push(self, progress: Progress) -> str:
        """Take in new tokens; the text that they make final."""
        before = len(self._pieces)
        last = len(progress.token_ids) - 1
        for index, token in enumerate(progress.token_ids):
            self._tokens.append(token)
            ends = index == last and progress.finish_reason == "stop"  # the text of a stop id is not part of the answer
            if self._detokenizer is not None and not ends and self._stops_at(self._detokenizer.push([token])):
                return "".join(self._pieces[before:])
        self.finish_reason = progress.finish_reason
        if self.finish_reason is not None:
            self._finish()
        return "".join(self._pieces[before:])

    def output(self, prompt: str | None) -> RequestOutput:
        """The answer as the user sees it."""
        done = CompletionOutput(0, "".join(self._pieces), tuple(self._tokens), self.finish_reason, self._stop_reason)
        ids = self._request.prompt_token_ids
        return RequestOutput(self._request.id, prompt, ids, [done], 0, self.finish_reason is not None)

    def _stops_at(self, text: str) -> bool:
        """Take in text; whether a stop string ends the answer with it."""
        if len(self._tokens) < self._request.params.min_tokens:
            self._pieces.append(text)
            return False
        safe, found = self._matcher.feed(text)
        self._pieces.append(safe)
        if found is not None:
            self.finish_reason, self._stop_reason = "stop", found
        return found is not None

    def _finish(self) -> None:
        if self._detokenizer is not None:
            self._pieces.append(self._matcher.finish() + self._detokenizer.finish())
        token = self._tokens[-1] if self._tokens else None
        if self.finish_reason == "stop" and token in self._request.params.stop_token_ids:
            self._stop_reason = token


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


def _fit_length(asked: int | None, positions: int) -> int:
    if asked is not None and asked > positions:
        raise ValueError(f"wanted max_model_len up to the model's {positions} positions, got {asked}: lower it")
    return min(positions, DEFAULT_MODEL_LEN) if asked is None else asked


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


def _backends(routing: Routing) -> str:
    pairs = dict.fromkeys((route.kind, route.backend) for route in routing.routes)
    return ", ".join(f"{kind} by {backend}" for kind, backend in pairs)
