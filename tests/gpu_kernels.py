"""Where tests run the Mosaic GPU kernels: on the GPU with `--device gpu`, interpreted elsewhere."""

from contextlib import AbstractContextManager, nullcontext

import jax

from kernels_pallas.mosaic_gpu import interpreted


def kernels_run() -> AbstractContextManager[None]:
    """Kernels traced inside run on a GPU where the tests were asked to use one, else in the interpreter."""
    return nullcontext() if jax.default_backend() == "gpu" else interpreted()
