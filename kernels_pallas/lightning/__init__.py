"""Lightning attention: a linear kind with a constant decay per head."""

from kernels_pallas.lightning.gpu import fits as fits_gpu
from kernels_pallas.lightning.gpu import lightning as lightning_gpu
from kernels_pallas.lightning.xla import LightningWeights, lightning
from kernels_pallas.op import Op

LIGHTNING = Op("lightning", {"xla": lightning, "gpu": lightning_gpu}, {"gpu": fits_gpu})

__all__ = ["LIGHTNING", "LightningWeights"]
