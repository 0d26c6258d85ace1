"""Mamba2: a linear kind with a scalar decay per head and keys shared by groups of heads."""

from kernels_pallas.mamba2.gpu import fits as fits_gpu
from kernels_pallas.mamba2.gpu import mamba2 as mamba2_gpu
from kernels_pallas.mamba2.tpu import fits as fits_tpu
from kernels_pallas.mamba2.tpu import mamba2 as mamba2_tpu
from kernels_pallas.mamba2.xla import SHARES, Mamba2Weights, mamba2
from kernels_pallas.op import Op

MAMBA2 = Op("mamba2", {"xla": mamba2, "tpu": mamba2_tpu, "gpu": mamba2_gpu}, SHARES, {"tpu": fits_tpu, "gpu": fits_gpu})

__all__ = ["MAMBA2", "Mamba2Weights"]
