"""Softmax attention with grouped queries: a full kind."""

from kernels_pallas.gqa.gpu import fits as fits_gpu
from kernels_pallas.gqa.gpu import gqa as gqa_gpu
from kernels_pallas.gqa.xla import GQAWeights, gqa
from kernels_pallas.op import Op

GQA = Op("gqa", {"xla": gqa, "gpu": gqa_gpu}, {"gpu": fits_gpu})

__all__ = ["GQA", "GQAWeights"]
