"""Short causal convolution with a carried tail: a part of other kinds, and between two gates a linear kind itself."""

from kernels_pallas.op import Op
from kernels_pallas.short_conv.xla import gated_short_conv

SHORT_CONV = Op("short_conv", {"xla": gated_short_conv})

__all__ = ["SHORT_CONV"]
