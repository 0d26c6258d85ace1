"""Attention of one new token per row over a static cache, in Triton: what `demo_sampler.py` runs on a GPU.

Each program serves one row and one key/value head, and reads only the keys that the row has, so that rows of different
lengths share a batch at no cost. It does not know the model, the sampling, or who fills the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Rows of the query tile: the smallest that the matrix units take. A key/value head serves fewer query heads than that;
# the rest is masked, and costs nothing that shows, since the time goes into reading keys and values.
QUERY_TILE = 16
KEY_BLOCK = 64


@triton.jit
def _attend_kernel(
    q_ptr,
    cache_ptr,
    position_ptr,
    out_ptr,
    q_row_stride,
    scale,
    S: tl.constexpr,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    K: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(position_ptr + row) + 1
    q_index = tl.arange(0, QUERY_TILE)
    k_index = tl.arange(0, K)
    key_index = tl.arange(0, KEY_BLOCK)
    q_offset = (head * SHARE + q_index)[:, None] * K + k_index[None, :]
    q_mask = q_index[:, None] < SHARE
    q = tl.load(q_ptr + row * q_row_stride + q_offset, mask=q_mask, other=0.0)
    keys_ptr = cache_ptr + (row * 2 * G + head) * S * K
    values_ptr = keys_ptr + G * S * K

    peak = tl.full([QUERY_TILE], float("-inf"), tl.float32)
    total = tl.zeros([QUERY_TILE], tl.float32)
    weighted = tl.zeros([QUERY_TILE, K], tl.float32)
    for start in range(0, length, KEY_BLOCK):
        seen = start + key_index < length
        offset = (start + key_index)[:, None] * K + k_index[None, :]
        keys = tl.load(keys_ptr + offset, mask=seen[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(keys)) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_peak[:, None])
        decay = tl.exp(peak - new_peak)
        values = tl.load(values_ptr + offset, mask=seen[:, None], other=0.0)
        weighted = weighted * decay[:, None] + tl.dot(weights.to(values.dtype), values)
        total = total * decay + tl.sum(weights, axis=1)
        peak = new_peak
    out = weighted / total[:, None]
    out_row = out_ptr + row * G * SHARE * K
    tl.store(out_row + q_offset, out.to(out_ptr.dtype.element_ty), mask=q_mask)


def attend(q_BHK: torch.Tensor, cache_BJSK: torch.Tensor, position_B: torch.Tensor) -> torch.Tensor:
    """Softmax attention of the token at `position_B` over the cache rows 0 to `position_B`, inclusive.

    `cache_BJSK` is contiguous; its axis J holds the G key heads and then the G value heads. `q_BHK` may be a slice of
    wider rows, but its last two axes are contiguous. Returns B H K in the dtype of the query.
    """
    B, H, K = q_BHK.shape
    _, J, S, _ = cache_BJSK.shape
    G = J // 2
    if q_BHK.stride(1) != K or q_BHK.stride(2) != 1 or not cache_BJSK.is_contiguous():
        raise ValueError(f"wanted contiguous heads and cache, got query strides {q_BHK.stride()}; copy them first")
    out_BHK = torch.empty((B, H, K), dtype=q_BHK.dtype, device=q_BHK.device)
    _attend_kernel[(B, G)](
        q_BHK, cache_BJSK, position_B, out_BHK, q_BHK.stride(0), K**-0.5,
        S=S, G=G, SHARE=H // G, K=K, QUERY_TILE=QUERY_TILE, KEY_BLOCK=KEY_BLOCK, num_warps=4,
    )  # fmt: skip
    return out_BHK
