"""Short causal convolution with a carried tail."""

from kernels_pallas.op import Op
from kernels_pallas.short_conv.xla import short_conv

SHORT_CONV = Op("short_conv", {"xla": short_conv})

__all__ = ["SHORT_CONV"]
