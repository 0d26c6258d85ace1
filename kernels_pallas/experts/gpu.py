"""The experts of a step's tokens on Hopper: each chosen expert's weights are read once, and nothing is copied before.

Choices are grouped by expert (`groups`): 8 rows a group where they are few, more where they are many. Two kernels run
over the groups: the first products with the activation behind them, and the second product. The weights take the 64-row
side of the matrix unit and the rows of a group its narrow side, out^T = W^T x^T, so that 8 rows cost no more than one;
every row is a column of its own, whose sums never meet another row's: neighbours change no bit of a result.

A block works on one item after another: some outputs of one group, of each matrix that the activation needs, over all
inputs. A ring of stages in shared memory, each a slab of the weights and of the rows, is filled by bulk copies ahead of
use, across items. What keeps the memory busy is the bytes that are on their way, however few the blocks are.

Knows no router and no model.

Letters: T tokens, D model width, E experts, k experts a token, c matrices of the activation, F expert width.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.experts.groups import FEW_ROWS, Groups, group_choices, one_token
from kernels_pallas.experts.xla import Activation
from kernels_pallas.mosaic_gpu import interpreter

TILE = 64  # rows of one matrix instruction: outputs
MULTIPROCESSORS = 132  # of an H100 and of an H200
RESIDENT = 2  # blocks that a multiprocessor holds at once: one starts or ends an item while the other reads
BLOCK_BYTES = 108 * 1024  # of shared memory that a block takes
STAGE_BYTES = 16 * 1024  # weights of a stage, or as near as the inputs allow

# JAX gives these classes' protocol methods without a body, which mypy takes for abstract.
_TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]

Scalar = Any  # a traced int32
Ref = Any


def experts(
    x: Float[Array, "T D"],
    chosen: Int[Array, "T k"],
    gate_up: Float[Array, "E D c F"],
    down: Float[Array, "E F D"],
    activate: Activation,
) -> Float[Array, "T k D"]:
    """The outputs of each token's experts, as `xla.experts`.

    Raises NotImplementedError for other dtypes than bfloat16, and widths that are no multiples of 64.
    """
    groups = one_token(chosen) if len(chosen) == 1 else group_choices(chosen, gate_up.shape[0])
    return _compute(x, groups, gate_up, down, activate)[groups.place].reshape(*chosen.shape, -1)


def share(
    x: Float[Array, "T D"],
    chosen: Int[Array, "T k"],
    gate_up: Float[Array, "E D c F"],
    down: Float[Array, "E F D"],
    activate: Activation,
) -> Float[Array, "T k D"]:
    """The outputs of each token's experts, zeros for a number out of range, as `xla.share`.

    Raises NotImplementedError as `experts` does.
    """
    groups = group_choices(chosen, gate_up.shape[0])
    out = _compute(x, groups, gate_up, down, activate)[jnp.where(groups.real, groups.place, 0)]
    return jnp.where(groups.real[:, None], out, 0).reshape(*chosen.shape, -1)


def fits(dtype: str, widths: tuple[int, int]) -> bool:
    """Whether the kernels have a dtype and the widths of a model and of an expert."""
    return dtype == "bfloat16" and not any(width % TILE for width in widths)


def _compute(x: Array, groups: Groups, gate_up: Array, down: Array, activate: Activation) -> Float[Array, "r D"]:
    """The outputs at all rows of all groups; arbitrary numbers where there is no choice."""
    _require_fit(x, gate_up, down)
    common = x.shape[0] <= FEW_ROWS == groups.rows  # every group has the tokens at their own rows: no gathering
    rows = x if common else x[groups.token.reshape(-1)]
    inner = _multiply(rows, groups, gate_up, activate, common)
    return _multiply(inner, groups, down[:, :, None, :], _same, False)


def _require_fit(x: Array, gate_up: Array, down: Array) -> None:
    dtypes = sorted({str(array.dtype) for array in (x, gate_up, down)})
    widths = (down.shape[2], down.shape[1])
    if len(dtypes) > 1 or not fits(dtypes[0], widths):
        raise NotImplementedError(
            f"experts on a GPU want bfloat16 and widths that are multiples of {TILE}, got {', '.join(dtypes)} and "
            f"widths {widths[0]} and {widths[1]}; use backend 'xla'"
        )


@dataclass(frozen=True)
class Products:
    """The products of an item as an activation reads them, `[:, i]` for those of matrix i: they cannot be stacked."""

    parts: tuple[Array, ...]

    @property
    def dtype(self) -> Any:
        """Of all."""
        return self.parts[0].dtype

    def __getitem__(self, index: tuple[slice, int]) -> Array:
        return self.parts[index[1]]


def _same(products: Any) -> Array:
    return products[:, 0]


# ---------------------------------------------------------------------------------------------------------- one product


@dataclass(frozen=True)
class Plan:
    """Static shapes of one kernel. rows: of a group. common: all groups have the same rows.

    parts: matrices of an item, side by side. wide: tiles of 64 outputs of an item, of each matrix. tiles: items of a
    group. depth: inputs of a stage. steps: stages of an item. stages: of the ring. blocks: of the launch, all resident
    at once.
    """

    rows: int
    common: bool
    parts: int
    wide: int
    tiles: int
    depth: int
    steps: int
    stages: int
    blocks: int

    @property
    def columns(self) -> int:
        """Outputs of an item."""
        return self.wide * TILE


def make_plan(weight: Float[Array, "E D c F"], groups: Groups, common: bool) -> Plan:
    """Stages of 16 KiB of weights where the inputs allow, as many as fit.

    Few rows want many items, for an even load; many rows want 128 outputs an item, for which they are read once.
    """
    _, inputs, parts, outputs = weight.shape
    wide = 2 if parts == 1 and groups.rows > FEW_ROWS and outputs % (2 * TILE) == 0 else 1
    depths = [d for d in (256, 128, 64) if inputs % d == 0 and d * parts * wide * TILE * 2 <= STAGE_BYTES]
    depth = depths[0] if groups.rows == FEW_ROWS else TILE
    stage_bytes = 2 * depth * (TILE * parts * wide + groups.rows)
    stages = (BLOCK_BYTES - 2 * groups.rows * TILE * wide) // stage_bytes
    tiles = outputs // (wide * TILE)
    blocks = min(RESIDENT * MULTIPROCESSORS, groups.expert.shape[0] * tiles)
    return Plan(groups.rows, common, parts, wide, tiles, depth, inputs // depth, stages, blocks)


def _multiply(
    x: Float[Array, "r D"], groups: Groups, weight: Float[Array, "E D c F"], activate: Activation, common: bool
) -> Float[Array, "r F"]:
    """The activation of the products of each group's rows with the matrices of its expert.

    Args:
      common: whether all groups have the rows of `x`, or each its own.
    """
    plan = make_plan(weight, groups, common)
    out_type = jax.ShapeDtypeStruct((groups.expert.shape[0] * plan.rows, weight.shape[3]), x.dtype)
    name = "experts_out" if activate is _same else "experts_in"
    return _built(plan, activate, out_type, name, interpreter())(x, groups.count, groups.expert, weight)


@functools.cache
def _built(
    plan: Plan,
    activate: Activation,
    out_type: jax.ShapeDtypeStruct,
    name: str,
    interpret: plgpu.InterpretGPUParams | None,
) -> Callable[..., Array]:
    """The kernel; one object for equal arguments, so that the layers of a model share what is compiled."""
    return plgpu.kernel(
        _body(plan, activate),
        out_type=out_type,
        scratch_types=[
            plgpu.SMEM((plan.stages, plan.rows, plan.depth), jnp.bfloat16, transforms=_TRANSFORMS),
            plgpu.SMEM((plan.stages, plan.parts, plan.depth, plan.columns), jnp.bfloat16, transforms=_TRANSFORMS),
            plgpu.SMEM((plan.rows, plan.columns), jnp.bfloat16, transforms=_TRANSFORMS),
            plgpu.Barrier(num_arrivals=plan.parts + 1, num_barriers=plan.stages),
        ],
        grid=(plan.blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
        kernel_name=name,
    )


def _body(plan: Plan, activate: Activation) -> Callable[..., None]:
    accumulators = [plgpu.ACC((TILE, plan.rows), jnp.float32)] * (plan.parts * plan.wide)

    def body(
        x: Ref, count: Ref, expert: Ref, weight: Ref, out: Ref, rows_s: Ref, weight_s: Ref, out_s: Ref, arrived: Ref
    ) -> None:
        block, blocks = lax.axis_index("block"), plan.blocks
        turns = lax.div(count[0] * plan.tiles - block + blocks - 1, blocks)
        stages = turns * plan.steps

        def fetch(n: Scalar) -> None:
            item, slot = block + lax.div(n, plan.steps) * blocks, lax.rem(n, plan.stages)
            group, tile = lax.div(item, plan.tiles), lax.rem(item, plan.tiles)
            inputs, outputs = lax.rem(n, plan.steps) * plan.depth, tile * plan.columns
            for part in range(plan.parts):
                source = weight.at[expert[group], pl.ds(inputs, plan.depth), part, pl.ds(outputs, plan.columns)]
                plgpu.copy_gmem_to_smem(source, weight_s.at[slot, part], arrived.at[slot])
            first = group * 0 if plan.common else group * plan.rows
            lines = x.at[pl.ds(first, plan.rows), pl.ds(inputs, plan.depth)]
            plgpu.copy_gmem_to_smem(lines, rows_s.at[slot], arrived.at[slot])

        def multiply(turn: Scalar, *sums: Any) -> tuple[Array, ...]:
            def step(j: Scalar, _: None) -> None:
                n = turn * plan.steps + j
                slot = lax.rem(n, plan.stages)
                plgpu.barrier_wait(arrived.at[slot])
                lines = rows_s.at[slot].transpose((1, 0))
                for index, total in enumerate(sums):
                    tile, part = divmod(index, plan.parts)
                    weights = weight_s.at[slot, part, :, pl.ds(tile * TILE, TILE)]
                    plgpu.wgmma(total, weights.transpose((1, 0)), lines)
                plgpu.wgmma_wait(0)
                pl.when(n + plan.stages < stages)(lambda: fetch(n + plan.stages))

            lax.fori_loop(0, plan.steps, step, None)
            return tuple(total[...] for total in sums)

        pl.loop(0, jnp.minimum(plan.stages, stages))(fetch)

        @pl.loop(0, turns)
        def _(turn: Scalar) -> None:
            sums = pl.run_scoped(lambda *totals: multiply(turn, *totals), *accumulators)
            item = block + turn * blocks
            group, tile = lax.div(item, plan.tiles), lax.rem(item, plan.tiles)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for index in range(plan.wide):
                products: Any = Products(sums[index * plan.parts : (index + 1) * plan.parts])
                result = plgpu.layout_cast(activate(products).astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
                out_s.at[:, pl.ds(index * TILE, TILE)].transpose((1, 0))[...] = result
            plgpu.commit_smem()
            target = out.at[pl.ds(group * plan.rows, plan.rows), pl.ds(tile * plan.columns, plan.columns)]
            plgpu.copy_smem_to_gmem(out_s, target)

        plgpu.wait_smem_to_gmem(0)

    return body
