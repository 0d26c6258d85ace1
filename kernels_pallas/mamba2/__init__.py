"""Mamba2: a linear kind with a scalar decay per head and keys shared by groups of heads."""

from kernels_pallas.mamba2.gpu import fits as fits_gpu
from kernels_pallas.mamba2.gpu import mamba2 as mamba2_gpu
from kernels_pallas.mamba2.xla import Mamba2Weights, mamba2
from kernels_pallas.op import Op

MAMBA2 = Op("mamba2", {"xla": mamba2, "gpu": mamba2_gpu}, {"gpu": fits_gpu})

__all__ = ["MAMBA2", "Mamba2Weights"]
