"""The one value between the host's plan and the device: who runs in a step, with how many tokens, pages and slots.

The scheduler makes a `Step`, the runner carries it out and gives back a `StepResult`. Imports no JAX.
"""

from dataclasses import dataclass

from hybrid_jax.request import FinishReason, Request, TokenLogprobs


@dataclass(frozen=True)
class RowStep:
    """One request's share of a step.

    row: its row in the tables on the device, from 1. tokens: what to feed; none for a row in decode, which feeds the
    newest token that it drew, known to the device alone. seen: tokens fed before. drawn: tokens drawn before.
    ahead: most tokens that it feeds and draws in this step if it is in decode. draws: whether a token is drawn after
    `tokens`; False for a piece of a prompt that has more to come. snapshot_length: new tokens after which the state is
    stored in `snapshot_slot`; a row in decode stores it whenever it passes a multiple of the grid. fresh: the first
    step since the request was admitted. placed: tokens that a fresh row had drawn before, when it was preempted.
    owner, state_owner, page_owners: who writes as this row, and who wrote the state and the pages that it reads, for
    the canary (`canary.py`).
    """

    request: Request
    row: int
    tokens: tuple[int, ...]
    seen: int
    drawn: int
    ahead: int
    draws: bool
    read_slot: int
    write_slot: int
    snapshot_slot: int
    snapshot_length: int
    pages: tuple[int, ...]
    fresh: bool = False
    placed: tuple[int, ...] = ()
    owner: int = 0
    state_owner: int = 0
    page_owners: tuple[int, ...] = ()

    @property
    def in_decode(self) -> bool:
        """Whether the row feeds tokens of its own drawing."""
        return not self.tokens


@dataclass(frozen=True)
class Step:
    """Rows in decode first, then rows that prefill. Without any of those, rows decode up to `loops` tokens each."""

    number: int
    rows: tuple[RowStep, ...]
    loops: int

    @property
    def decodes(self) -> int:
        """Rows in decode."""
        return sum(row.in_decode for row in self.rows)

    @property
    def decode_only(self) -> bool:
        """Whether the step is a loop on the device."""
        return self.decodes == len(self.rows)

    @property
    def tokens(self) -> int:
        """Tokens packed on one axis: those of prompts, and one for each row in decode."""
        return sum(max(len(row.tokens), 1) for row in self.rows)


@dataclass(frozen=True)
class RowResult:
    """What a row drew, why it ended if it did (`request.RUNNING` if not), and log-probabilities where asked for."""

    tokens: tuple[int, ...]
    reason: int
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """One entry per row of the step, in its order."""

    rows: tuple[RowResult, ...]


@dataclass(frozen=True)
class Progress:
    """New tokens of a request, and why it ended if it did. cached_tokens: of its prompt, found in the prefix cache."""

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int | None = None
