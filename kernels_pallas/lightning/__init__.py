"""Lightning attention: a linear kind with a constant decay per head."""

from kernels_pallas.lightning.gpu import fits as fits_gpu
from kernels_pallas.lightning.gpu import lightning as lightning_gpu
from kernels_pallas.lightning.tpu import fits as fits_tpu
from kernels_pallas.lightning.tpu import lightning as lightning_tpu
from kernels_pallas.lightning.xla import SHARES, LightningWeights, lightning
from kernels_pallas.op import Op

LIGHTNING = Op(
    "lightning",
    {"xla": lightning, "tpu": lightning_tpu, "gpu": lightning_gpu},
    SHARES,
    {"tpu": fits_tpu, "gpu": fits_gpu},
)

__all__ = ["LIGHTNING", "LightningWeights"]
