"""Multi-head latent attention: a full kind over a compressed cache."""

from kernels_pallas.mla.xla import MLAWeights, mla
from kernels_pallas.op import Op

MLA = Op("mla", {"xla": mla})

__all__ = ["MLA", "MLAWeights"]
