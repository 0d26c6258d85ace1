"""The canary: every page and slot carries a stamp of who wrote it, and for which position, which is checked on reading.

A stamp is (owner, position): a page's position is its place in the request's page table, a slot's the number of tokens
that its state has seen. The owner is a number that the schedule gives to each start of a request. Before a step reads
pages and slots, what is stamped on them is compared with what the schedule believes of them, which it knows from the
request's own history and from whoever handed them to the prefix cache, not from the stamps. So a page or slot that was
given out twice, freed too early, or published at a wrong position is noticed at the first read, before it is an answer.

Letters: B rows, M pages of a row, P pages, N slots.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from hybrid_jax.sampling import AnyArray
from kernels_pallas.op import RaggedBatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stamps:
    """What is stamped on each page and slot: owner and position."""

    pages: Int[Array, "P 2"]
    slots: Int[Array, "N 2"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Beliefs:
    """Who writes as each row, and who wrote what it reads, as the schedule believes."""

    owner: Int[AnyArray, "B"]
    state_owner: Int[AnyArray, "B"]  # of the state that the step starts from
    page_owners: Int[AnyArray, "B M"]


def empty_stamps(pages: int, slots: int) -> Stamps:
    """Stamps that belong to nobody."""
    return Stamps(jnp.zeros((pages, 2), jnp.int32), jnp.zeros((slots, 2), jnp.int32))


def mismatched(stamps: Stamps, batch: RaggedBatch, beliefs: Beliefs, page_size: int) -> Bool[Array, "B"]:
    """Rows that would read a page or a state that is not what the schedule believes it to be."""
    old = (batch.lengths > 0) & (batch.seen > 0)
    believed = jnp.stack([jnp.asarray(beliefs.state_owner), batch.seen], axis=1)
    wrong = jnp.any(stamps.slots[batch.read_slot] != believed, axis=1)
    if len(stamps.pages):
        place = jnp.arange(batch.pages.shape[1], dtype=jnp.int32)[None, :]
        read = place * page_size < batch.seen[:, None]
        found = stamps.pages[batch.pages]
        differs = (found[:, :, 0] != beliefs.page_owners) | (found[:, :, 1] != place)
        wrong |= jnp.any(read & differs, axis=1)
    return old & wrong


def stamped(stamps: Stamps, batch: RaggedBatch, beliefs: Beliefs, page_size: int) -> Stamps:
    """The stamps after a step has written: pages of new tokens, write slots, and snapshots."""
    present = batch.lengths > 0
    owner = jnp.asarray(beliefs.owner)
    slots = _put(stamps.slots, batch.write_slot, present, owner, batch.seen + batch.lengths)
    slots = _put(slots, batch.snapshot_slot, present, owner, batch.seen + batch.snapshot_length)
    pages = stamps.pages
    if len(pages):
        place = jnp.broadcast_to(jnp.arange(batch.pages.shape[1], dtype=jnp.int32), batch.pages.shape)
        first, end = (batch.seen // page_size)[:, None], (batch.seen + batch.lengths)[:, None]
        written = present[:, None] & (place >= first) & (place * page_size < end)
        pages = _put(pages, batch.pages, written, jnp.broadcast_to(owner[:, None], place.shape), place)
    return Stamps(pages, slots)


def _put(stamps: Array, unit: Array, written: Array, owner: Array, position: Array) -> Array:
    index = jnp.where(written & (unit > 0), unit, len(stamps))  # past the end: dropped
    return stamps.at[index].set(jnp.stack([owner, position], axis=-1), mode="drop")
