"""Kimi delta attention: a linear kind with a decay per channel and a delta update."""

from kernels_pallas.kda.decay import BoundedDecay, Decay, SoftplusDecay
from kernels_pallas.kda.gpu import fits as fits_gpu
from kernels_pallas.kda.gpu import kda as kda_gpu
from kernels_pallas.kda.tpu import fits as fits_tpu
from kernels_pallas.kda.tpu import kda as kda_tpu
from kernels_pallas.kda.xla import SHARES, KDAWeights, kda
from kernels_pallas.op import Op

KDA = Op("kda", {"xla": kda, "tpu": kda_tpu, "gpu": kda_gpu}, SHARES, {"tpu": fits_tpu, "gpu": fits_gpu})

__all__ = ["KDA", "BoundedDecay", "Decay", "KDAWeights", "SoftplusDecay"]
