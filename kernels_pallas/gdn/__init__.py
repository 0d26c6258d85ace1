"""Gated delta rule: a linear kind with a scalar decay and a delta update."""

from kernels_pallas.gdn.gpu import fits as fits_gpu
from kernels_pallas.gdn.gpu import gdn as gdn_gpu
from kernels_pallas.gdn.xla import GDNWeights, gdn
from kernels_pallas.op import Op

GDN = Op("gdn", {"xla": gdn, "gpu": gdn_gpu}, {"gpu": fits_gpu})

__all__ = ["GDN", "GDNWeights"]
