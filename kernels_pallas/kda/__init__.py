"""Kimi delta attention: a linear kind with a decay per channel and a delta update."""

from kernels_pallas.kda.decay import BoundedDecay, Decay, SoftplusDecay
from kernels_pallas.kda.xla import KDAWeights, kda
from kernels_pallas.op import Op

KDA = Op("kda", {"xla": kda})

__all__ = ["KDA", "BoundedDecay", "Decay", "KDAWeights", "SoftplusDecay"]
