"""The products of a mixture of experts. On a GPU a kernel computes them; elsewhere they are XLA's, as all products."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
from jaxtyping import Array

from kernels_pallas.experts import gpu, xla
from kernels_pallas.experts.xla import Activation

Compute = Callable[[Array, Array, Array, Array, Activation], Array]


@dataclass(frozen=True)
class Experts:
    """The functions of a backend. whole: all experts are here. share: numbers out of range give zeros."""

    whole: Compute
    share: Compute


EXPERTS: Mapping[str, Experts] = {"xla": Experts(xla.experts, xla.share), "gpu": Experts(gpu.experts, gpu.share)}


def choose_backend(backend: str, dtype: str, widths: tuple[int, int], platform: str | None = None) -> str:
    """The name in `EXPERTS` to use where a model's backend is `backend`.

    Args:
      backend: 'auto' or one of `op.BACKENDS`. dtype, widths: of the weights; the model's width and an expert's.
      platform: 'cpu', 'gpu' or 'tpu'; None is where JAX runs.
    """
    if backend == "gpu":
        return "gpu"
    own = platform or jax.default_backend()
    return "gpu" if backend == "auto" and own == "gpu" and gpu.fits(dtype, widths) else "xla"


__all__ = ["EXPERTS", "Activation", "Experts", "choose_backend"]
