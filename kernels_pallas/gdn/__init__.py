"""Gated delta rule: a linear kind with a scalar decay and a delta update."""

from kernels_pallas.gdn.gpu import fits as fits_gpu
from kernels_pallas.gdn.gpu import gdn as gdn_gpu
from kernels_pallas.gdn.tpu import fits as fits_tpu
from kernels_pallas.gdn.tpu import gdn as gdn_tpu
from kernels_pallas.gdn.xla import SHARES, GDNWeights, gdn
from kernels_pallas.op import Op

GDN = Op("gdn", {"xla": gdn, "tpu": gdn_tpu, "gpu": gdn_gpu}, SHARES, {"tpu": fits_tpu, "gpu": fits_gpu})

__all__ = ["GDN", "GDNWeights"]
