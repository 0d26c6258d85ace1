"""Grammars on tokens: compiled once, copied for each answer, and the masks that follow from what was drawn.

llguidance does the work (https://github.com/guidance-ai/llguidance). It bounds its own work by the limits below, in
units of its own; what it does not implement is refused, never passed over.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence

import llguidance
import numpy as np
from jaxtyping import UInt32

from hybrid_jax.server.errors import ApiError, bad_request
from hybrid_jax.server.structured import GrammarText
from hybrid_jax.tokenizer import Detokenizer, Tokenizer

KEPT = 32  # compiled grammars
COMPILE_S = 5.0  # how long a request waits for its grammar; the limits end what takes longer
LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_items_in_row=2_000,
    max_lexer_states=50_000,  # 1 to 2 kB each
    max_grammar_size=200_000,
    verbose_errors=False,
)


class Grammars:
    """Compiles grammars for one tokenizer. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, eos_token_ids: Sequence[int]):
        self._tokenizer, self._vocabulary, self._eos = tokenizer, vocabulary, list(eos_token_ids)
        self._tokens: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[GrammarText, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: GrammarText) -> llguidance.LLMatcher:
        """A matcher at its start, for one answer. Raises ApiError 400 with what is wrong in the grammar."""
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
        if found is None:
            found = self._compile(grammar)
            with self._lock:
                self._compiled[grammar] = found
                while len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
        return found.deep_copy()

    @property
    def words(self) -> int:
        """32-bit words of a mask."""
        return -(-self._vocabulary // 32)

    def _compile(self, grammar: GrammarText) -> llguidance.LLMatcher:
        try:
            matcher = llguidance.LLMatcher(self._vocabulary_of_tokens(), _source(grammar), log_level=0, limits=LIMITS)
        except ValueError as error:
            raise _refused(grammar, str(error)) from None
        warnings = matcher.get_grammar_warnings()
        if matcher.is_error() or warnings:
            raise _refused(grammar, matcher.get_error() or "; ".join(map(str, warnings)))
        return matcher

    def _vocabulary_of_tokens(self) -> llguidance.LLTokenizer:
        if not self._eos:
            raise bad_request("structured output needs a model with an end-of-text token: the checkpoint names none")
        with self._lock:
            if self._tokens is None:
                text = self._tokenizer.backend.to_str()
                self._tokens = llguidance.LLTokenizer(text, n_vocab=self._vocabulary, eos_token=self._eos)
            return self._tokens


def _source(grammar: GrammarText) -> str:
    match grammar.form:
        case "schema":
            # "lenient" goes over what the schema itself may ask for.
            return llguidance.LLMatcher.grammar_from_json_schema(grammar.text, overrides={"lenient": False})
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(grammar.text)
    return llguidance.LLMatcher.grammar_from_lark(grammar.text)


def _refused(grammar: GrammarText, why: str) -> ApiError:
    return bad_request(f"the grammar cannot be used: {why[:500]}", grammar.param, "invalid_grammar")


class GrammarConstraint:
    """Holds an answer to a grammar, from its start or from behind its thinking. A `Constraint`.

    open_id: a token that begins thinking where it comes first; None where nothing does. close: the text that ends
    thinking. inside: whether the prompt has begun it already.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        words: int,
        tokenizer: Tokenizer,
        close: str,
        open_id: int | None,
        inside: bool,
    ):
        self._matcher, self._words, self._close = matcher, words, close
        self._open_id, self._inside = open_id, inside
        self._text, self._spelled = Detokenizer(tokenizer, skip_special_tokens=False), ""

    def push(self, token_ids: Sequence[int]) -> None:
        """Take in the tokens that were drawn."""
        for token in token_ids:
            self._take(token)

    def _take(self, token: int) -> None:
        first, self._open_id = self._open_id, None
        if self._inside:
            self._spelled = (self._spelled + self._text.push([token]))[-4 * len(self._close) - 256 :]
            self._inside = self._close not in self._spelled
        elif token == first:
            self._inside = True
        elif not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    def mask(self) -> UInt32[np.ndarray, "M"]:
        """A bit for each id that may come next; everything may while the model thinks."""
        words = np.full(self._words, 0xFFFFFFFF, np.uint32)
        if self._inside:
            return words
        if self._matcher.is_error():
            return np.zeros_like(words)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            return np.zeros_like(words)
        if self._open_id is not None:
            words[self._open_id // 32] |= np.uint32(1 << self._open_id % 32)
        return words
