"""Softmax attention with grouped queries: a full kind."""

from kernels_pallas.gqa.xla import GQAWeights, gqa
from kernels_pallas.op import Op

GQA = Op("gqa", {"xla": gqa})

__all__ = ["GQA", "GQAWeights"]
