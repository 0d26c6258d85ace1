"""Multi-head latent attention: a full kind over a compressed cache."""

from kernels_pallas.mla.gpu import fits as fits_gpu
from kernels_pallas.mla.gpu import mla as mla_gpu
from kernels_pallas.mla.xla import MLAWeights, mla
from kernels_pallas.op import Op

MLA = Op("mla", {"xla": mla, "gpu": mla_gpu}, {"gpu": fits_gpu})

__all__ = ["MLA", "MLAWeights"]
