"""One answer as it grows: tokens in, text out, and why it ended. Knows nothing of engines. Imports no JAX."""

from hybrid_jax.request import CompletionOutput, FinishReason, Request, RequestOutput, TokenLogprobs
from hybrid_jax.step import Progress
from hybrid_jax.tokenizer import Detokenizer, StopMatcher, Tokenizer


class Answer:
    """The tokens of a request so far, the text that is final, and why it ended. Text only with a tokenizer.

    spelled_ids: special tokens that are part of the text, as they are spelled.
    """

    def __init__(
        self,
        request: Request,
        prompt: str | None,
        tokenizer: Tokenizer | None,
        spelled_ids: frozenset[int] = frozenset(),
    ):
        self.finish_reason: FinishReason | None = None
        self.request = request
        self._prompt = prompt
        self._stop_reason: int | str | None = None
        self._cached_tokens = 0
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._pieces: list[str] = []
        self._given = 0  # pieces that were taken
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, spelled_ids=spelled_ids)
        self._matcher = StopMatcher(request.params.stop, request.params.include_stop_str_in_output)

    def push(self, progress: Progress) -> None:
        """Take in new tokens. A stop string may end the answer before the last of them."""
        self._cached_tokens = progress.cached_tokens or 0
        self._logprobs += progress.logprobs
        last = len(progress.token_ids) - 1
        for index, token in enumerate(progress.token_ids):
            self._tokens.append(token)
            ends = index == last and progress.finish_reason == "stop"  # the text of a stop id is not part of the answer
            if self._detokenizer is not None and not ends and self._stops_at(self._detokenizer.push([token])):
                return
        self.finish_reason = progress.finish_reason
        if self.finish_reason is not None:
            self._finish()

    def take_text(self) -> str:
        """The text that became final since the last call."""
        start, self._given = self._given, len(self._pieces)
        return "".join(self._pieces[start:])

    def output(self) -> RequestOutput:
        """The answer as the user sees it."""
        logprobs = None if self.request.params.logprobs is None else tuple(self._logprobs[: len(self._tokens)])
        text, tokens = "".join(self._pieces), tuple(self._tokens)
        done = CompletionOutput(0, text, tokens, self.finish_reason, self._stop_reason, logprobs)
        ids, over = self.request.prompt_token_ids, self.finish_reason is not None
        return RequestOutput(self.request.id, self._prompt, ids, [done], self._cached_tokens, over)

    def _stops_at(self, text: str) -> bool:
        """Take in text; whether a stop string ends the answer with it."""
        if len(self._tokens) < self.request.params.min_tokens:
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
        if self.finish_reason == "stop" and token in self.request.params.stop_token_ids:
            self._stop_reason = token
