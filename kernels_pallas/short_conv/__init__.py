"""Short causal convolution with a carried tail: a part of other kinds, and between two gates a linear kind itself."""

from kernels_pallas.op import Op
from kernels_pallas.short_conv.tpu import fits as fits_tpu
from kernels_pallas.short_conv.tpu import gated_short_conv as gated_short_conv_tpu
from kernels_pallas.short_conv.xla import SHARES, gated_short_conv

SHORT_CONV = Op("short_conv", {"xla": gated_short_conv, "tpu": gated_short_conv_tpu}, SHARES, {"tpu": fits_tpu})

__all__ = ["SHORT_CONV"]
