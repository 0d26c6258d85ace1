"""From a grammar of a body to the constraint of each choice, which begins behind the model's thinking."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from hybrid_jax.constraint import Constraint
from hybrid_jax.server.dialects import THINK_CLOSE, THINK_OPEN
from hybrid_jax.server.errors import bad_request
from hybrid_jax.server.grammars import COMPILE_S, GrammarConstraint
from hybrid_jax.server.service import Service
from hybrid_jax.server.structured import GrammarText

TAIL_TOKENS = 32  # of a prompt, where thinking may have begun


@dataclass(frozen=True)
class Thinking:
    """Whether an answer may hold thinking, and whether its prompt has begun it."""

    expected: bool
    inside: bool


def thinking_after(service: Service, prompt: Sequence[int]) -> Thinking:
    """What the end of a prompt says: it begins thinking, or has ended it, or leaves that to the model."""
    if not service.thinks:
        return Thinking(False, False)
    tail = service.tokenizer.decode(prompt[-TAIL_TOKENS:], skip_special_tokens=False).rstrip()
    if tail.endswith(THINK_OPEN):
        return Thinking(True, True)
    return Thinking(not tail.endswith(THINK_CLOSE), False)


async def constrainer(
    service: Service, grammar: GrammarText | None, may_open: bool
) -> Callable[[list[int]], Constraint | None]:
    """Makes the constraint of a choice from its prompt; `may_open`: whether the model may begin to think by itself.

    Raises ApiError 400 for a grammar that cannot be used.
    """
    if grammar is None:
        return _unconstrained
    compile_it = partial(service.grammars.matcher, grammar)
    try:
        async with asyncio.timeout(COMPILE_S):
            await asyncio.get_running_loop().run_in_executor(service.grammar_pool, compile_it)
    except TimeoutError:
        message = f"the grammar took over {COMPILE_S:g} s to compile: make it smaller"
        raise bad_request(message, grammar.param, "invalid_grammar") from None
    return partial(_constraint, service, grammar, may_open)


def _unconstrained(prompt: list[int]) -> None:
    """No grammar."""


def _constraint(service: Service, grammar: GrammarText, may_open: bool, prompt: list[int]) -> Constraint:
    thinking = thinking_after(service, prompt)
    opens = may_open and thinking.expected and not thinking.inside
    opening = service.tokenizer.backend.token_to_id(THINK_OPEN) if opens else None
    matcher = service.grammars.matcher(grammar)
    return GrammarConstraint(
        matcher, service.grammars.words, service.tokenizer, THINK_CLOSE, opening, inside=thinking.inside
    )
