"""Two small kernels behind the LM-head gradients.

* `sum_rows_kernel`: dX[t] = sum of dY[r] over the loss rows r with row_index[r] = t. One program per (t,
column tile)
  walks its rows in a fixed order, so the sum is fp32 and bitwise repeatable, without atomics; a t without
  rows is 0.
* `scale_kernel`: x *= g in place, g a device scalar; does nothing where g is 1, which the host need not know.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_H = 1024
BLOCK_SCALE = 4096


@triton.jit
def sum_rows_kernel(
    rows,  # [R, H]
    order,  # [R] int64: loss rows sorted by the hidden row they belong to
    starts,  # [T + 1] int64: the slice of `order` of each hidden row
    out,  # [T, H]
    H,
    BLOCK: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_h = o_h < H
    first = tl.load(starts + i_t)
    last = tl.load(starts + i_t + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(first, last):
        i_r = tl.load(order + i)
        total += tl.load(rows + i_r * H + o_h, mask=m_h, other=0.0).to(tl.float32)
    tl.store(out + i_t * H + o_h, total.to(out.dtype.element_ty), mask=m_h)


@triton.jit
def scale_kernel(x, factor, size, BLOCK: tl.constexpr):
    b_factor = tl.load(factor).to(tl.float32)
    if b_factor != 1.0:
        o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_x = tl.load(x + o, mask=o < size, other=0.0).to(tl.float32)
        tl.store(x + o, (b_x * b_factor).to(x.dtype.element_ty), mask=o < size)


def sum_rows(rows: Tensor, row_index: Tensor, out: Tensor) -> None:
    """out [T, H] = for each t the sum of rows [R, H] whose row_index is t; all contiguous."""
    length, width = out.shape
    if out.numel() == 0:
        return
    index, order = torch.sort(row_index, stable=True)
    starts = torch.searchsorted(index, torch.arange(length + 1, device=out.device, dtype=index.dtype))
    grid = (length, triton.cdiv(width, BLOCK_H))
    sum_rows_kernel[grid](rows, order, starts, out, width, BLOCK=BLOCK_H, num_warps=4, num_stages=2)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x *= factor [] in place, without asking the device what factor is."""
    if x.numel():
        scale_kernel[(triton.cdiv(x.numel(), BLOCK_SCALE),)](
            x, factor, x.numel(), BLOCK=BLOCK_SCALE, num_warps=8
        )
    return x
