"""The skeleton of a decoder: embedding, layers, norm, head, and a draft layer for multi-token prediction.

A family builds the parts. Each mixer states what it remembers (`memory`), its kind and its backend; the decoder gives
every memory a place in the cache once, when it is built, so that routing is static: a traced step holds no branch on a
kind. Roles: `target` layers are the model itself, `draft` layers predict further tokens and have a map of their own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels_pallas.op import Cache, Memory, Place, RaggedBatch, assign_places, token_positions
from kernels_pallas.rotary import Rotary, rotary_tables
from models.division import Divisible, Division
from models.layers import Embedding, Head, Linear, RMSNorm

TARGET, DRAFT = "target", "draft"


class Mixer(Protocol):
    """What mixes tokens in a layer. Kind, backend, memory and place are static attributes."""

    kind: str
    backend: str
    place: Place

    @property
    def memory(self) -> Memory:
        """What the layer remembers."""

    def __call__(
        self, x: Float[Array, "T D"], rotary: Rotary | None, cache: Cache, batch: RaggedBatch
    ) -> tuple[Float[Array, "T D"], Cache]:
        """The mixed tokens, and the cache with this layer's memory updated."""


@dataclass(frozen=True)
class Route:
    """One entry of the routing: which layer of which role is of what kind, what it keeps, and who computes it."""

    role: str
    layer: int
    kind: str
    memory: Memory
    place: Place
    backend: str


class ResidualLayer(Protocol):
    """A layer of a decoder, whatever the shape of its residual."""

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """What mixes tokens in this layer: none, one, or several side by side."""

    def __call__(
        self, x: Float[Array, "T D"], rotary: Rotary | None, cache: Cache, batch: RaggedBatch
    ) -> tuple[Float[Array, "T D"], Cache]:
        """The residual stream after the layer, and the cache."""


class Layer(nnx.Module):
    """`x + mixer(norm(x))`, then `x + feed_forward(norm(x))`."""

    def __init__(self, mixer: Mixer, feed_forward: nnx.Module, norm: RMSNorm, feed_forward_norm: RMSNorm):
        self.norm = norm
        self.mixer = mixer
        self.feed_forward_norm = feed_forward_norm
        self.feed_forward = feed_forward

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """The one mixer."""
        return (self.mixer,)

    def __call__(self, x: Array, rotary: Rotary | None, cache: Cache, batch: RaggedBatch) -> tuple[Array, Cache]:
        mixed, cache = self.mixer(self.norm(x), rotary, cache, batch)
        x = x + mixed
        return x + self.feed_forward(self.feed_forward_norm(x)), cache


class Draft(nnx.Module):
    """A multi-token-prediction layer (DeepSeek-V3, arXiv 2412.19437, section 2.2).

    From the hidden state of token t (after the target's final norm) and the embedding of token t + 1 it makes a hidden
    state from which the target's head predicts token t + 2. It works at position t, with keys and values of its own.
    """

    def __init__(
        self, embedding_norm: RMSNorm, hidden_norm: RMSNorm, project: Linear, layer: ResidualLayer, norm: RMSNorm
    ):
        self.embedding_norm = embedding_norm
        self.hidden_norm = hidden_norm
        self.project = project
        self.layer = layer
        self.norm = norm

    def __call__(
        self, embedded: Array, hidden: Array, rotary: Rotary | None, cache: Cache, batch: RaggedBatch
    ) -> tuple[Array, Cache]:
        x = self.project(jnp.concatenate([self.embedding_norm(embedded), self.hidden_norm(hidden)], axis=-1))
        x, cache = self.layer(x, rotary, cache, batch)
        return self.norm(x), cache


class Decoder(Divisible):
    """A hybrid decoder. `frequencies` are the rotary frequencies of all its layers, None for one without positions."""

    def __init__(
        self,
        embedding: Embedding,
        layers: Sequence[ResidualLayer],
        norm: RMSNorm,
        head: Head | None,
        draft: Draft | None,
        frequencies: tuple[float, ...] | None,
        magnitude: float = 1.0,
    ):
        self.embedding = embedding
        self.layers = nnx.List(layers)
        self.norm = norm
        self.head = head
        self.draft = draft
        self.frequencies = frequencies
        self.magnitude = magnitude
        self._assign_places()

    def divide(self, division: Division) -> None:
        """Bind a division to all parts of the model."""
        super().divide(division)
        for _, module in nnx.iter_modules(self):
            match module:
                case Decoder():
                    pass
                case Divisible():
                    module.divide(division)
        self._assign_places()

    def _assign_places(self) -> None:
        mixers = [mixer for _, _, mixer in self._mixers()]
        self.specs, places = assign_places([mixer.memory for mixer in mixers])
        for mixer, place in zip(mixers, places, strict=True):
            mixer.place = place

    def __call__(self, tokens: Int[Array, "T"], cache: Cache, batch: RaggedBatch) -> tuple[Float[Array, "T D"], Cache]:
        """Hidden states after the final norm, and the updated cache."""
        x, cache = list(self.layer_outputs(tokens, cache, batch))[-1]
        return self.norm(x), cache

    def layer_outputs(
        self, tokens: Int[Array, "T"], cache: Cache, batch: RaggedBatch
    ) -> Iterator[tuple[Float[Array, "T D"], Cache]]:
        """The residual stream after each layer, with the cache so far."""
        rotary = self._rotary(tokens.shape[0], batch)
        x = self.embedding(tokens)
        for layer in self.layers:
            x, cache = layer(x, rotary, cache, batch)
            yield x, cache

    def draft_hidden(
        self, following: Int[Array, "T"], hidden: Float[Array, "T D"], cache: Cache, batch: RaggedBatch
    ) -> tuple[Float[Array, "T D"], Cache]:
        """Hidden states of the draft layer, from each token's hidden state (after the final norm) and its successor."""
        if self.draft is None:
            raise ValueError("wanted a model with a draft layer, got one without: its config announces none")
        rotary = self._rotary(following.shape[0], batch)
        return self.draft(self.embedding(following), hidden, rotary, cache, batch)

    def logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "B Y"]:
        """Scores of the next token from hidden states after the final norm, float32."""
        return self.division.gathered(self.embedding.transposed(hidden) if self.head is None else self.head(hidden))

    @property
    def logits_width(self) -> int:
        """Y of `logits`."""
        return self.embedding.table.shape[0] if self.head is None else self.head.kernel.shape[1]

    def routes(self) -> tuple[Route, ...]:
        """The routing, in the order of the layers: target first."""
        return tuple(
            Route(role, index, mixer.kind, mixer.memory, mixer.place, mixer.backend)
            for role, index, mixer in self._mixers()
        )

    def _mixers(self) -> list[tuple[str, int, Mixer]]:
        found = [(TARGET, index, mixer) for index, layer in enumerate(self.layers) for mixer in layer.mixers]
        if self.draft is not None:
            found += [(DRAFT, 0, mixer) for mixer in self.draft.layer.mixers]
        return found

    def _rotary(self, tokens: int, batch: RaggedBatch) -> Rotary | None:
        if self.frequencies is None:
            return None
        inverse = jnp.asarray(self.frequencies, jnp.float32)
        return rotary_tables(token_positions(batch, tokens), inverse, self.magnitude)
