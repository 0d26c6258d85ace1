"""What may limit the tokens of a request as they are drawn. Knows nothing of grammars or text. Imports no JAX."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import UInt32


class Constraint(Protocol):
    """A limit that changes with every token of one request.

    Its state depends on the tokens drawn alone, so that it outlives a preemption. A request with a constraint draws one
    token a step, and none before the host has seen the one before. Both methods run between steps, must be quick and
    must not raise.
    """

    def push(self, token_ids: Sequence[int]) -> None:
        """Take in the tokens that were drawn."""

    def mask(self) -> UInt32[np.ndarray, "M"]:
        """A bit for each id that may come next, the lowest first; ids past the end may not.

        Where none is left, the request ends with `error`.
        """
