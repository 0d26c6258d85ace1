"""Softmax attention with grouped queries: a full kind."""

from kernels_pallas.gqa.gpu import fits as fits_gpu
from kernels_pallas.gqa.gpu import gqa as gqa_gpu
from kernels_pallas.gqa.tpu import fits as fits_tpu
from kernels_pallas.gqa.tpu import gqa as gqa_tpu
from kernels_pallas.gqa.xla import SHARES, GQAWeights, gqa
from kernels_pallas.op import Op

GQA = Op("gqa", {"xla": gqa, "tpu": gqa_tpu, "gpu": gqa_gpu}, SHARES, {"tpu": fits_tpu, "gpu": fits_gpu})

__all__ = ["GQA", "GQAWeights"]
