"""The definition of an operation on experts: what each token's experts make of it, before they are weighed and summed.

Expert e computes `activate(x G_e) W_e`, where G_e holds the matrices that the activation needs side by side: gate and
up of a SwiGLU, or one. `experts` is for tokens whose experts are all here; `share` for those that may have experts
elsewhere, which are numbers out of range and give zeros.

Letters: T tokens, D model width, E experts, k experts a token, c matrices of the activation, F expert width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Activation = Callable[[Array], Array]  # [n, c, F] to [n, F]
Compute = Callable[[Array, Array, Array, Array, Activation], Array]


def experts(
    x: Float[Array, "T D"],
    chosen: Int[Array, "T k"],
    gate_up: Float[Array, "E D c F"],
    down: Float[Array, "E F D"],
    activate: Activation,
    grouped: Compute | None = None,
) -> Float[Array, "T k D"]:
    """The outputs of each token's experts. Gathering reads a kernel per choice, grouping reads every kernel.

    `grouped`: how, None for `grouped_experts`.
    """
    compute = gathered_experts if chosen.size < gate_up.shape[0] else grouped or grouped_experts
    return compute(x, chosen, gate_up, down, activate)


def share(
    x: Float[Array, "T D"],
    chosen: Int[Array, "T k"],
    gate_up: Float[Array, "E D c F"],
    down: Float[Array, "E F D"],
    activate: Activation,
    grouped: Compute | None = None,
) -> Float[Array, "T k D"]:
    """The outputs of each token's experts, zeros for a number out of range.

    Looping reads a kernel per choice in range, and waits for each; grouping reads every kernel, as for `experts`.
    """
    count = gate_up.shape[0]
    here = (chosen >= 0) & (chosen < count)
    own = jnp.where(here, chosen, count)
    compute = looped_experts if chosen.size < count else grouped or grouped_experts
    return jnp.where(here[:, :, None], compute(x, own, gate_up, down, activate), 0)


def looped_experts(
    x: Array, chosen: Int[Array, "T k"], gate_up: Array, down: Array, activate: Activation
) -> Float[Array, "T k D"]:
    """The outputs of each token's experts, zeros for an expert out of range: for few tokens, of which few are here."""
    flat = chosen.reshape(-1)
    here = flat < gate_up.shape[0]
    order = jnp.argsort(~here, stable=True)

    def one(index: Array, out: Array) -> Array:
        choice = order[index]
        expert = flat[choice]
        inner = activate(jnp.einsum("d,dcf->cf", x[choice // chosen.shape[1]], gate_up[expert])[None])
        return out.at[choice].set(inner[0] @ down[expert])

    out = jax.lax.fori_loop(0, jnp.sum(here), one, jnp.zeros((len(flat), x.shape[1]), x.dtype))
    return out.reshape(*chosen.shape, -1)


def gathered_experts(
    x: Array, chosen: Int[Array, "T k"], gate_up: Array, down: Array, activate: Activation
) -> Float[Array, "T k D"]:
    """The outputs of each token's experts, reading one kernel per choice: for few tokens."""
    inner = jnp.einsum("td,tkdcf->tkcf", x, gate_up[chosen])
    shape = inner.shape
    inner = activate(inner.reshape(-1, *shape[2:])).reshape(*shape[:2], shape[3])
    return jnp.einsum("tkf,tkfd->tkd", inner, down[chosen])


def grouped_experts(
    x: Array, chosen: Int[Array, "T k"], gate_up: Array, down: Array, activate: Activation
) -> Float[Array, "T k D"]:
    """The outputs of each token's experts, with the tokens sorted by expert: for many tokens."""
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=gate_up.shape[0]).astype(jnp.int32)
    rows = x[order // chosen.shape[1]]
    inner = jax.lax.ragged_dot(rows, gate_up.reshape(*gate_up.shape[:2], -1), sizes)
    inner = activate(inner.reshape(-1, *gate_up.shape[2:]))
    out = jax.lax.ragged_dot(inner, down, sizes)
    return jnp.zeros_like(out).at[order].set(out).reshape(*chosen.shape, -1)
