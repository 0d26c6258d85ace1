"""Which rows go through which expert: the choices of an expert in groups of a few rows.

A choice is one of the k experts of a token; a choice whose expert is out of range has no group. Few choices are
compared all with all, many are counted block by block: both are a few small kernels, where a sort is dozens. Knows no
weights.

Letters: T tokens, k experts a token, n = T k choices, g groups at most, R rows of a group.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

FEW_ROWS = 8  # of a group of few choices: the least that a matrix unit takes
BLOCK = 256  # choices that are compared with one another where they are counted


@dataclass(frozen=True)
class Groups:
    """Groups of up to R choices of one expert. The first `count` are used.

    expert: of each group. group, row: where each choice lies. real: whether its expert is in range; else it lies
    nowhere. token: at each row of each group; any token where there is none.
    """

    count: Int[Array, "1"]
    expert: Int[Array, "g"]
    group: Int[Array, "n"]
    row: Int[Array, "n"]
    real: Bool[Array, "n"]
    token: Int[Array, "g R"]

    @property
    def rows(self) -> int:
        """Rows of a group."""
        return self.token.shape[1]

    @property
    def place(self) -> Int[Array, "n"]:
        """Where each choice lies among the rows of all groups."""
        return self.group * self.rows + self.row


def group_choices(chosen: Int[Array, "T k"], experts: int) -> Groups:
    """The groups of all choices. Up to 8 tokens lie in every group at the row of their own number.

    Args:
      chosen: the experts of each token, distinct but for those out of range. experts: how many there are.
    """
    tokens, each = chosen.shape
    rows = group_rows(tokens, each, experts)
    return compare_choices(chosen, experts) if rows == FEW_ROWS else count_choices(chosen, experts, rows)


def group_rows(tokens: int, each: int, experts: int) -> int:
    """Rows of a group: enough that most experts have one group, whose weights are then read once."""
    mean = tokens * each / experts
    if tokens <= FEW_ROWS or mean <= FEW_ROWS / 2:
        return FEW_ROWS
    return 32 if mean <= 24 else 128


def one_token(chosen: Int[Array, "1 k"]) -> Groups:
    """The groups of one token, whose experts are distinct and all in range: one for each."""
    index = jnp.arange(chosen.shape[1], dtype=jnp.int32)
    count, zeros = jnp.full((1,), len(index), jnp.int32), jnp.zeros_like(index)
    token = jnp.zeros((len(index), FEW_ROWS), jnp.int32)
    return Groups(count, chosen[0].astype(jnp.int32), index, zeros, index >= 0, token)


def compare_choices(chosen: Int[Array, "T k"], experts: int) -> Groups:
    """Groups of 8, in the order in which their experts are first chosen."""
    tokens, each = chosen.shape
    flat = chosen.reshape(-1).astype(jnp.int32)
    index = jnp.arange(len(flat), dtype=jnp.int32)
    real = _in_range(flat, experts)
    same = (flat[:, None] == flat[None, :]) & real[:, None]
    rank = _count(same & (index[None, :] < index[:, None]))  # earlier choices of the same expert
    leads = real & (rank % FEW_ROWS == 0)
    leader = _first(same & (rank[None, :] == (rank - rank % FEW_ROWS)[:, None]))
    group = _count(leads[None, :] & (index[None, :] < leader[:, None]))
    numbers = jnp.arange(_most(len(flat), experts, FEW_ROWS), dtype=jnp.int32)
    inside = (group[None, :] == numbers[:, None]) & real[None, :]
    row = index // each if tokens <= FEW_ROWS else rank % FEW_ROWS
    here = inside[:, None, :] & (row[None, None, :] == jnp.arange(FEW_ROWS, dtype=jnp.int32)[None, :, None])
    count = jnp.sum(leads, dtype=jnp.int32).reshape(1)
    return Groups(count, flat[_first(inside)], group, row, real, _first(here) // each)


def count_choices(chosen: Int[Array, "T k"], experts: int, rows: int) -> Groups:
    """Groups of `rows`, in the order of the experts, each expert's choices in the order of the tokens.

    The barriers keep what gathers rows by these indices from computing them anew for every element of a row.
    """
    flat = chosen.reshape(-1).astype(jnp.int32)
    real = _in_range(flat, experts)
    rank, sizes = _ranks(jnp.where(real, flat, experts), experts)
    used = (sizes + rows - 1) // rows
    numbers = jnp.arange(experts, dtype=jnp.int32)
    ends = jnp.sum(jnp.where(numbers[None, :] <= numbers[:, None], used[None, :], 0), axis=1, dtype=jnp.int32)
    most = _most(len(flat), experts, rows)
    of = _count(ends[None, :] <= jnp.arange(most, dtype=jnp.int32)[:, None])
    group, row = (ends - used)[jnp.where(real, flat, 0)] + rank // rows, rank % rows
    group, row = lax.optimization_barrier((group, row))
    index = jnp.arange(len(flat), dtype=jnp.int32)
    place = jnp.where(real, group * rows + row, most * rows + index)
    tokens = index // chosen.shape[1]
    token = jnp.zeros((most * rows,), jnp.int32).at[place].set(tokens, mode="drop", unique_indices=True)
    return Groups(ends[-1:], jnp.minimum(of, experts - 1), group, row, real, token.reshape(most, rows))


def _ranks(expert: Int[Array, "n"], experts: int) -> tuple[Int[Array, "n"], Int[Array, "E"]]:
    """How many earlier choices there are of each choice's expert, and how many choices of each expert."""
    n = len(expert)
    blocks = -(-n // BLOCK)
    padded = jnp.concatenate([expert, jnp.full((blocks * BLOCK - n,), experts, jnp.int32)]).reshape(blocks, BLOCK)
    inside, numbers = jnp.arange(BLOCK, dtype=jnp.int32), jnp.arange(blocks, dtype=jnp.int32)
    earlier = (inside[None, :] < inside[:, None])[None]
    rank = _count((padded[:, :, None] == padded[:, None, :]) & earlier)
    sizes = _count(jnp.arange(experts + 1, dtype=jnp.int32)[None, :, None] == padded[:, None, :])
    before = (numbers[None, :] < numbers[:, None]).astype(jnp.bfloat16)  # blocks have few choices: all sums are exact
    starts = jnp.dot(before, sizes.astype(jnp.bfloat16), preferred_element_type=jnp.float32).astype(jnp.int32)
    rank = rank + jnp.take_along_axis(starts, padded, axis=1)
    return rank.reshape(-1)[:n], sizes.sum(0, dtype=jnp.int32)[:experts]


def _in_range(flat: Int[Array, "n"], experts: int) -> Bool[Array, "n"]:
    return (flat >= 0) & (flat < experts)


def _most(choices: int, experts: int, rows: int) -> int:
    """Groups there may be: each expert has at most one that is not full."""
    return min(choices, experts + choices // rows)


def _count(chosen: Bool[Array, "*a n"]) -> Int[Array, "*a"]:
    return jnp.sum(chosen, axis=-1, dtype=jnp.int32)


def _first(chosen: Bool[Array, "*a n"]) -> Int[Array, "*a"]:
    """The index of the first true value; 0 where there is none."""
    return jnp.argmax(chosen, axis=-1).astype(jnp.int32)
