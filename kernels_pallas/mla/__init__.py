"""Multi-head latent attention: a full kind over a compressed cache."""

from kernels_pallas.mla.gpu import fits as fits_gpu
from kernels_pallas.mla.gpu import mla as mla_gpu
from kernels_pallas.mla.tpu import fits as fits_tpu
from kernels_pallas.mla.tpu import in_registers
from kernels_pallas.mla.tpu import mla as mla_tpu
from kernels_pallas.mla.xla import SHARES, MLAWeights, mla
from kernels_pallas.op import Op

MLA = Op(
    "mla",
    {"xla": mla, "tpu": mla_tpu, "gpu": mla_gpu},
    SHARES,
    {"tpu": fits_tpu, "gpu": fits_gpu},
    {"tpu": in_registers},
)

__all__ = ["MLA", "MLAWeights"]
