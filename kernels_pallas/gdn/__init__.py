"""Gated delta rule: a linear kind with a scalar decay and a delta update."""

from kernels_pallas.gdn.xla import GDNWeights, gdn
from kernels_pallas.op import Op

GDN = Op("gdn", {"xla": gdn})

__all__ = ["GDN", "GDNWeights"]
