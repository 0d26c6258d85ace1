"""How a published checkpoint's tensors and our parameters are the same numbers: one table, read both ways.

A family lists one `Weight` per parameter. A `Source` names the published tensors that make it up and gives the
rearrangement as a pattern, for example `"c (h k) d -> d c h k"`: letters before the arrow are the axes of the published
tensors (stacked in the order of their names where there are several), letters after it the axes of our parameter.
A parameter may have several sources, since one family is published under several spellings (experts one by one, or
packed); a checkpoint must hold exactly one of them. Nothing here reads files.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Source:
    """One spelling: published tensor names, how they are stacked, and the pattern from their axes to ours.

    `names` in row-major order over `grid`; `()` means one name that is the whole tensor. The first `len(grid)` axes of
    the left side of `pattern` are the grid, the others the axes of each tensor.

    Instead of being stacked, tensors may be joined along their first axis: `joined` are their usual lengths there. A
    file may cut the whole elsewhere.

    The first axis, `"(g p)"` in the pattern, may be published part by part, each of all groups g, where ours has group
    by group, each of all parts: `dealt` are the lengths of the parts of one group. So queries, keys and values of one
    head lie together, and some of the heads are one range.
    """

    names: tuple[str, ...]
    pattern: str
    grid: tuple[int, ...] = ()
    joined: tuple[int, ...] = ()
    dealt: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        wanted = len(self.joined) or math.prod(self.grid)
        if len(self.names) != wanted or (self.joined and self.grid):
            raise ValueError(f"wanted {wanted} names, stacked on {self.grid} or joined, got {len(self.names)}")
        if self.dealt and (self.grid or not self.pattern.startswith("(g p) ")):
            raise ValueError(f"wanted a first axis (g p) to deal {self.dealt} out, got {self.pattern!r} on {self.grid}")

    def tensor_shape(self, shape: Sequence[int], index: int = 0) -> tuple[int, ...]:
        """The shape of the published tensor number `index` (without joining all have the same), for our parameter's."""
        whole = self._whole_shape(shape)
        return (self.joined[index], *whole[1:]) if self.joined else whole

    def assemble(self, tensors: Sequence[np.ndarray], shape: Sequence[int]) -> np.ndarray:
        """Our parameter from the published tensors (in the order of `names`). A copy only where axes move or stack."""
        left, sizes = self._axes(shape)
        if self.joined:
            tensors = [np.concatenate(tensors)]
        wanted = self._whole_shape(shape)
        for name, tensor in zip(self.names[: len(tensors)], tensors, strict=True):
            if tuple(tensor.shape) != wanted:
                raise ValueError(f"{name}: wanted shape {wanted}, got {tuple(tensor.shape)}: the config does not fit")
        whole = np.stack(tensors) if self.grid else tensors[0]
        whole = whole[np.argsort(self._published_order(wanted[0]))] if self.dealt else whole
        flat = [axis for group in left for axis in group]
        whole = whole.reshape([sizes[axis] for axis in flat])
        return whole.transpose([flat.index(axis) for axis in self._right()])

    def split(self, parameter: np.ndarray) -> list[np.ndarray]:
        """The published tensors from our parameter, in the order of `names`: the inverse of `assemble`."""
        left, _ = self._axes(parameter.shape)
        right, flat = self._right(), [axis for group in left for axis in group]
        wanted = self._whole_shape(parameter.shape)
        whole = np.ascontiguousarray(parameter.transpose([right.index(axis) for axis in flat]))
        if self.dealt:
            whole = whole.reshape(wanted)[self._published_order(wanted[0])]
        if self.joined:
            return np.split(whole.reshape(wanted), np.cumsum(self.joined)[:-1])
        return list(whole.reshape((len(self.names), *wanted)))

    def _whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of each tensor, or of all tensors together where they are joined."""
        left, sizes = self._axes(shape)
        whole = tuple(math.prod(sizes[axis] for axis in group) for group in left[len(self.grid) :])  # 1 for no letters
        if self.joined and whole[0] != sum(self.joined):
            raise ValueError(f"wanted parts of {whole[0]}, got {self.joined} of {self.names}")
        if self.dealt and sizes["p"] != sum(self.dealt):
            raise ValueError(f"wanted parts of {sizes['p']} a group, got {self.dealt} of {self.names}")
        return whole

    def _published_order(self, length: int) -> np.ndarray:
        """For each index of the published first axis its index in ours."""
        ours = np.arange(length).reshape(-1, sum(self.dealt))
        return np.concatenate([part.reshape(-1) for part in np.split(ours, np.cumsum(self.dealt)[:-1], axis=1)])

    def _right(self) -> list[str]:
        return self.pattern.split("->")[1].split()

    def _axes(self, shape: Sequence[int]) -> tuple[list[list[str]], dict[str, int]]:
        """The left side as groups of letters (a parenthesis is one axis of the file), and the size of each letter."""
        groups = re.findall(r"\(([^)]*)\)|(\w+)", self.pattern.split("->")[0])
        left = [[axis for axis in (inner or single).split() if axis != "1"] for inner, single in groups]
        right = self._right()
        if len(right) != len(shape) or sorted(right) != sorted(axis for group in left for axis in group):
            raise ValueError(f"pattern {self.pattern!r} does not fit a parameter of shape {tuple(shape)}")
        return left, dict(zip(right, shape, strict=True))


@dataclass(frozen=True)
class Weight:
    """One parameter: its path in the model (`"layers.3.mixer.output.kernel"`) and its spellings, the usual first."""

    path: str
    sources: tuple[Source, ...]


def weight(path: str, name: str, pattern: str, *more: Source) -> Weight:
    """A parameter that is one published tensor, rearranged by `pattern`; `more` are its other spellings."""
    return Weight(path, (Source((name,), pattern), *more))


@dataclass(frozen=True)
class WeightTable:
    """All parameters of one model.

    `canonical` maps a tensor name as found in a file to the name used in `weights` (it strips prefixes that some
    releases add), or to None for a tensor that is not part of the model and may be left out (such as a vision tower).
    """

    weights: tuple[Weight, ...]
    canonical: Callable[[str], str | None]


def trunk_rows(embedding: str, norm: str, tied: bool) -> list[Weight]:
    """Rows of what surrounds the layers: embedding, final norm, and the head where it is not tied to the embedding."""
    rows = [weight("embedding.table", embedding, "y d -> y d"), weight("norm.scale", norm, "d -> d")]
    return rows if tied else [*rows, weight("head.kernel", "lm_head.weight", "y d -> d y")]


GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
NUMBERED = ("w1", "w3", "w2")  # the same three matrices where a family numbers them


def mlp_rows(ours: str, theirs: str, parts: tuple[str, str, str] = GATE_UP_DOWN) -> list[Weight]:
    """Rows of a SwiGLU MLP, published as three matrices; `parts` names them in the order gate, up, down."""
    gate, up, down = parts
    names = (f"{theirs}.{gate}.weight", f"{theirs}.{up}.weight")
    return [
        Weight(f"{ours}.gate_up.kernel", (Source(names, "c f d -> d c f", (2,)),)),
        weight(f"{ours}.down.kernel", f"{theirs}.{down}.weight", "d f -> f d"),
    ]


def expert_rows(ours: str, theirs: str, experts: int, parts: tuple[str, str, str] = GATE_UP_DOWN) -> list[Weight]:
    """Rows of E SwiGLU experts, published one by one (`parts` as in `mlp_rows`) or packed."""
    gate_up = tuple(f"{theirs}.{e}.{part}.weight" for e in range(experts) for part in parts[:2])
    down = tuple(f"{theirs}.{e}.{parts[2]}.weight" for e in range(experts))
    packed_gate_up = Source((f"{theirs}.gate_up_proj",), "e (c f) d -> e d c f")
    packed_down = Source((f"{theirs}.down_proj",), "e d f -> e f d")
    return [
        Weight(f"{ours}.gate_up", (Source(gate_up, "e c f d -> e d c f", (experts, 2)), packed_gate_up)),
        Weight(f"{ours}.down", (Source(down, "e d f -> e f d", (experts,)), packed_down)),
    ]


def latent_rows(ours: str, theirs: str, compressed_query: bool, output: str) -> list[Weight]:
    """Rows of a latent attention without a gate; `output` is the published name of its last projection."""
    rows = [
        weight(f"{ours}.latent.kernel", f"{theirs}.kv_a_proj_with_mqa.weight", "z d -> d z"),
        weight(f"{ours}.latent_norm.scale", f"{theirs}.kv_a_layernorm.weight", "z -> z"),
        weight(f"{ours}.expansion.kernel", f"{theirs}.kv_b_proj.weight", "(h n) z -> z h n"),
        weight(f"{ours}.output.kernel", f"{theirs}.{output}.weight", "d v -> v d"),
    ]
    if not compressed_query:
        return [*rows, weight(f"{ours}.query.kernel", f"{theirs}.q_proj.weight", "(h k) d -> d h k")]
    return [
        *rows,
        weight(f"{ours}.query_down.kernel", f"{theirs}.q_a_proj.weight", "r d -> d r"),
        weight(f"{ours}.query_norm.scale", f"{theirs}.q_a_layernorm.weight", "r -> r"),
        weight(f"{ours}.query.kernel", f"{theirs}.q_b_proj.weight", "(h k) r -> r h k"),
    ]
