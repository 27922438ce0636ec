"""The recurrence of :mod:`vapo_async.objectives.scan` as one Triton kernel: x is read once and y written once."""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def scan_rows(x: Tensor, coefficient: Tensor) -> Tensor:
    """y_t = x_t + c_t · y_{t+1}; x [B, T], coefficient [B, T] or [B, 1] of the same dtype. No gradient."""
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    c = coefficient.expand(x.shape)
    if not x.numel():
        return y
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():  # Triton launches on the current device
        _kernel[(x.shape[0],)](x, c, y, x.shape[1], *c.stride(), BLOCK=BLOCK)
    return y


@triton.jit
def _combine(c_later, y_later, c, x):  # type: ignore[no-untyped-def]
    return c * c_later, x + c * y_later


@triton.jit
def _kernel(x_ptr, c_ptr, y_ptr, steps, c_row, c_step, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """One program per row: blocks from the row's end to its start, each an associative scan, a carry in between."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    carry = tl.zeros((1,), x_ptr.dtype.element_ty)
    for done in range(0, steps, BLOCK):
        t = steps - 1 - done - lane  # backwards, so that the scan itself runs forwards
        x = tl.load(x_ptr + row * steps + t, mask=t >= 0, other=0.0)
        c = tl.load(c_ptr + row * c_row + t * c_step, mask=t >= 0, other=0.0)
        power, y = tl.associative_scan((c, x), 0, _combine)
        y += power * carry
        tl.store(y_ptr + row * steps + t, y, mask=t >= 0)
        carry = tl.sum(tl.where(lane == BLOCK - 1, y, 0.0), 0, keep_dims=True)
