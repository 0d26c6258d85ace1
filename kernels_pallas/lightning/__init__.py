"""Lightning attention: a linear kind with a constant decay per head."""

from kernels_pallas.lightning.xla import LightningWeights, lightning
from kernels_pallas.op import Op

LIGHTNING = Op("lightning", {"xla": lightning})

__all__ = ["LIGHTNING", "LightningWeights"]
