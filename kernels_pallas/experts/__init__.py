"""The products of a mixture of experts. On a GPU a kernel computes them; elsewhere they are XLA's, as all products.

On a TPU they are put so that kernels are read where they lie.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax

from kernels_pallas.experts import gpu, tpu, xla
from kernels_pallas.experts.xla import Activation, Compute
from kernels_pallas.op import AUTO_ON_TPU


@dataclass(frozen=True)
class Experts:
    """The functions of a backend. whole: all experts are here. share: numbers out of range give zeros."""

    whole: Compute
    share: Compute


EXPERTS: Mapping[str, Experts] = {
    "xla": Experts(xla.experts, xla.share),
    "tpu": Experts(tpu.experts, tpu.share),
    "gpu": Experts(gpu.experts, gpu.share),
}


def choose_backend(backend: str, dtype: str, widths: tuple[int, int], platform: str | None = None) -> str:
    """The name in `EXPERTS` to use where a model's backend is `backend`.

    Args:
      backend: 'auto', AUTO_ON_TPU or one of `op.BACKENDS`. dtype, widths: of the weights; the model's width and an
        expert's.
      platform: 'cpu', 'gpu' or 'tpu'; None is where JAX runs.
    """
    if backend in ("gpu", "tpu"):
        return backend
    if backend == AUTO_ON_TPU:
        return "tpu"
    own = platform or jax.default_backend()
    fits = own == "tpu" or own == "gpu" and gpu.fits(dtype, widths)
    return own if backend == "auto" and fits else "xla"


__all__ = ["EXPERTS", "Activation", "Experts", "choose_backend"]
