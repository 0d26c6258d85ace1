"""The compiled step: model, sampling, stop conditions and bookkeeping in one traced function for each sort of step.

`mixed_step` feeds pieces of prompts and one token of every row in decode; `decode_loop` feeds and draws up to N tokens
a row; `score` gives the logits of every token, `score_following` the log-probabilities of the tokens that follow. What
is known on the device alone stays there: the newest token of each row, and whether the row has ended. A row that has
ended is absent from a step, whatever the host had planned for it: it writes neither pages nor states, so what it leaves
can be kept.

Letters: B rows of the step, T packed tokens, N loops, Y vocabulary.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.canary import Beliefs, Stamps, mismatched, stamped
from hybrid_jax.request import ERROR, MAX_LOGPROBS, RUNNING
from hybrid_jax.row_tables import RowTables, count_tokens, shape_logits
from hybrid_jax.sampling import NO_TOKEN, AnyArray, Logprobs, SamplingRows, draw, finished, given_logprobs
from kernels_pallas.op import Cache, RaggedBatch
from models.decoder import Decoder


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceMemory:
    """All that stays on the device from step to step; donated to each."""

    cache: Cache
    tables: RowTables
    stamps: Stamps | None  # with the canary only


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepPlan:
    """What the host plans for the rows of a step, beside the batch."""

    sampling: SamplingRows
    draws: Bool[AnyArray, "B"]  # whether a token is drawn
    ahead: Int[AnyArray, "B"]  # most tokens to draw in a decode loop
    beliefs: Beliefs | None  # with the canary only
    likeliest: bool = field(default=False, metadata={"static": True})  # all rows take the likeliest token, unshaped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn:
    """What a step drew. tokens and the log-probabilities have a row per loop; `count` says how many are real."""

    tokens: Int[Array, "N B"]
    logprob: Float[Array, "N B"]
    top: Float[Array, "N B 20"]
    top_ids: Int[Array, "N B 20"]
    count: Int[Array, "B"]
    reason: Int[Array, "B"]
    strange: Bool[Array, "B"]  # the canary: rows that met a page or a state of somebody else


def mixed_step(
    graph: nnx.GraphDef[Decoder],
    state: nnx.State,
    memory: DeviceMemory,
    tokens: Int[Array, "T"],
    batch: RaggedBatch,
    plan: StepPlan,
    *,
    page_size: int,
) -> tuple[DeviceMemory, Drawn]:
    """Feed pieces of prompts, and the newest token of each row in decode; draw one token for each row that `draws`."""
    model = nnx.merge(graph, state)
    tables, rows = memory.tables, plan.sampling
    decoding = jnp.arange(batch.rows) < batch.decodes
    present = (batch.lengths > 0) & (~decoding | (tables.reason[rows.row] == RUNNING))
    packed, compact = _present_only(tokens, tables.newest[rows.row], batch, present)
    hidden, cache = model(packed, memory.cache, compact)
    logits = model.logits(hidden[jnp.maximum(compact.query_start[1:] - 1, 0)])
    token, (chosen, top, top_ids) = draw(logits, rows, lambda logits: shape_logits(logits, rows, tables))
    failed = token == NO_TOKEN
    reason = jnp.where(plan.draws, finished(token, rows)[1], jnp.where(failed, ERROR, RUNNING))
    drew = present & plan.draws
    tables = _end_rows(count_tokens(tables, rows, token, drew), rows, reason, present)
    one = (token[None], chosen[None], top[None], top_ids[None])
    count = (drew & ~failed).astype(jnp.int32)
    strange, stamps = _check_and_stamp(memory.stamps, compact, plan.beliefs, page_size)
    return DeviceMemory(cache, tables, stamps), Drawn(*one, count, jnp.where(present, reason, RUNNING), strange)


def _check_and_stamp(
    stamps: Stamps | None, batch: RaggedBatch, beliefs: Beliefs | None, page_size: int
) -> tuple[Bool[Array, "B"], Stamps | None]:
    """Which rows met something strange in this step, and the stamps after it; nothing without the canary."""
    if stamps is None or beliefs is None:
        return jnp.zeros((batch.rows,), bool), None
    return mismatched(stamps, batch, beliefs, page_size), stamped(stamps, batch, beliefs, page_size)


def _end_rows(tables: RowTables, rows: SamplingRows, reason: Int[Array, "B"], present: Bool[Array, "B"]) -> RowTables:
    """The tables with the reason of each row that was `present`."""
    row = jnp.where(present & (rows.row > 0), rows.row, len(tables.reason))
    return replace(tables, reason=tables.reason.at[row].set(reason, mode="drop"))


def _present_only(
    tokens: Int[Array, "T"], newest: Int[Array, "B"], batch: RaggedBatch, present: Bool[Array, "B"]
) -> tuple[Int[Array, "T"], RaggedBatch]:
    """The packed tokens and the batch of the rows that are `present`; a row in decode feeds its newest token."""
    end = jnp.cumsum(jnp.where(present, batch.lengths, 0), dtype=jnp.int32)
    start = jnp.concatenate([jnp.zeros((1,), jnp.int32), end])
    index = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(end, index, side="right", method="compare_all"), batch.rows - 1)
    source = jnp.minimum(batch.query_start[row] + index - start[row], tokens.shape[0] - 1)
    packed = jnp.where(row < batch.decodes, newest[row], tokens[source])
    packed = jnp.where(index < end[-1], packed, 0)
    slots = (jnp.where(present, slot, 0) for slot in (batch.read_slot, batch.write_slot, batch.snapshot_slot))
    read, write, snapshot = slots
    return packed, replace(batch, query_start=start, read_slot=read, write_slot=write, snapshot_slot=snapshot)


def decode_loop(
    graph: nnx.GraphDef[Decoder],
    state: nnx.State,
    memory: DeviceMemory,
    batch: RaggedBatch,
    plan: StepPlan,
    *,
    loops: int,
    grid: int,
    page_size: int,
) -> tuple[DeviceMemory, Drawn]:
    """Draw up to `loops` tokens a row, each row until it ends or has drawn as many as planned for it.

    A row with a snapshot slot stores its state there whenever it has seen a multiple of `grid` tokens.
    """
    model = nnx.merge(graph, state)
    planned = plan.sampling
    drawn = _nothing_drawn(loops, batch.rows)
    reason = jnp.where(batch.lengths > 0, memory.tables.reason[planned.row], ERROR)

    def running(drawn: Drawn) -> Bool[Array, "B"]:
        return (drawn.reason == RUNNING) & (drawn.count < plan.ahead)

    def unfinished(carry: tuple[Array, DeviceMemory, Drawn]) -> Array:
        return jnp.any(running(carry[2]))

    def one(carry: tuple[Array, DeviceMemory, Drawn]) -> tuple[Array, DeviceMemory, Drawn]:
        index, memory, drawn = carry
        runs = running(drawn)
        packed, step = _loop_batch(memory.tables.newest[planned.row], batch, runs, drawn.count, grid)
        hidden, cache = model(packed, memory.cache, step)
        logits = model.logits(hidden[jnp.minimum(step.query_start[:-1], batch.rows - 1)])
        rows = planned.advanced(drawn.count)
        token, logprobs = draw(logits, rows, lambda logits: shape_logits(logits, rows, memory.tables), plan.likeliest)
        reason = jnp.where(runs, finished(token, rows)[1], drawn.reason)
        tables = _end_rows(count_tokens(memory.tables, rows, token, runs), rows, reason, runs)
        strange, stamps = _check_and_stamp(memory.stamps, step, _later(plan.beliefs, drawn.count), page_size)
        drawn = _record(drawn, index, runs, token, logprobs, reason)
        return index + 1, DeviceMemory(cache, tables, stamps), replace(drawn, strange=drawn.strange | strange)

    start = (jnp.int32(0), memory, replace(drawn, reason=reason))
    _, memory, drawn = jax.lax.while_loop(unfinished, one, start)
    told = jnp.where(reason == RUNNING, drawn.reason, RUNNING)  # a row that had ended before has nothing to tell
    return memory, replace(drawn, reason=told)


def _later(beliefs: Beliefs | None, count: Int[Array, "B"]) -> Beliefs | None:
    """After its first token a row reads the state that it wrote itself."""
    if beliefs is None:
        return None
    return replace(beliefs, state_owner=jnp.where(count > 0, beliefs.owner, beliefs.state_owner))


def _loop_batch(
    newest: Int[Array, "B"], batch: RaggedBatch, runs: Bool[Array, "B"], count: Int[Array, "B"], grid: int
) -> tuple[Int[Array, "B"], RaggedBatch]:
    """The batch of the rows that run, each with its newest token, after `count` tokens in this loop."""
    packed, step = _present_only(jnp.zeros_like(newest), newest, replace(batch, decodes=jnp.int32(batch.rows)), runs)
    seen = batch.seen + count
    passes = (seen + 1) % grid == 0
    return packed, replace(
        step,
        seen=seen,
        read_slot=jnp.where(count > 0, step.write_slot, step.read_slot),
        snapshot_slot=jnp.where(passes, step.snapshot_slot, 0),
        snapshot_length=jnp.ones_like(seen),
    )


def _nothing_drawn(loops: int, rows: int) -> Drawn:
    top = (loops, rows, MAX_LOGPROBS)
    return Drawn(
        jnp.zeros(top[:2], jnp.int32),
        jnp.zeros(top[:2], jnp.float32),
        jnp.zeros(top, jnp.float32),
        jnp.zeros(top, jnp.int32),
        jnp.zeros((rows,), jnp.int32),
        jnp.zeros((rows,), jnp.int32),
        jnp.zeros((rows,), bool),
    )


def _record(
    drawn: Drawn,
    index: Array,
    runs: Bool[Array, "B"],
    token: Int[Array, "B"],
    logprobs: Logprobs,
    reason: Int[Array, "B"],
) -> Drawn:
    chosen, top, top_ids = logprobs
    return Drawn(
        drawn.tokens.at[index].set(jnp.where(runs, token, 0)),
        drawn.logprob.at[index].set(chosen),
        drawn.top.at[index].set(top),
        drawn.top_ids.at[index].set(top_ids),
        drawn.count + (runs & (token != NO_TOKEN)).astype(jnp.int32),
        reason,
        drawn.strange,
    )


def score(
    graph: nnx.GraphDef[Decoder], state: nnx.State, memory: DeviceMemory, tokens: Int[Array, "T"], batch: RaggedBatch
) -> tuple[DeviceMemory, Float[Array, "T Y"]]:
    """The logits of every token, float32."""
    model = nnx.merge(graph, state)
    hidden, cache = model(tokens, memory.cache, batch)
    return replace(memory, cache=cache), model.logits(hidden)


def score_following(
    graph: nnx.GraphDef[Decoder],
    state: nnx.State,
    memory: DeviceMemory,
    tokens: Int[Array, "T"],
    following: Int[Array, "T"],
    batch: RaggedBatch,
    *,
    block: int,
) -> tuple[DeviceMemory, Logprobs]:
    """What `given_logprobs` says of the token that follows each one.

    No more than `block` rows of logits exist at once; T is a multiple of it.
    """
    model = nnx.merge(graph, state)
    hidden_TD, cache = model(tokens, memory.cache, batch)

    def score_block(args: tuple[Array, Array]) -> Logprobs:
        hidden_BD, following_B = args
        return given_logprobs(model.logits(hidden_BD), following_B)

    parts = jax.lax.map(score_block, (hidden_TD.reshape(-1, block, hidden_TD.shape[1]), following.reshape(-1, block)))
    logprob, top, ids = (part.reshape(-1, *part.shape[2:]) for part in parts)
    return replace(memory, cache=cache), (logprob, top, ids)
