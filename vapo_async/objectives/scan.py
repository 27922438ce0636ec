"""The first-order linear recurrence behind every discounted sum: y_t = x_t + c_t · y_{t+1}, in O(T) work and memory.

Used where a gradient is wanted and on GPUs; elsewhere :mod:`vapo_async.objectives.recursion` is faster.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vapo_async.objectives.checks import describe

BLOCK = 8
"""Steps that one block takes one after another; the blocks are computed side by side."""


def reverse_scan(x: Tensor, coefficient: Tensor) -> Tensor:
    """y_t = x_t + c_t · y_{t+1} over the last dimension, y = 0 past the end.

    Args:
        x: [B, T], float32 or float64. Compute in float64 where T is large: 0.999999, rounded to float32 as a
            coefficient, is off by 1e-3 after 32768 steps.
        coefficient: [B, T], or [B, 1] for one per row; finite, a constant (no gradient flows into it).

    Returns:
        [B, T] of ``x``'s dtype; differentiable in ``x``, any number of times.
    """
    if x.ndim != 2 or tuple(coefficient.shape) not in (tuple(x.shape), (x.shape[0], 1)):
        raise ValueError(
            f"expected x of shape [B, T] and coefficient of shape [B, T] or [B, 1], got "
            f"{describe(x=x, coefficient=coefficient)}"
        )
    result: Tensor = _ReverseScan.apply(x, coefficient.detach().to(x.dtype))
    return result


class ActionScan:
    """The recurrence along the actions of rows: it passes through holes in the mask and stops at ends.

    Args:
        mask: [B, T] bool, the actions.
        ends: [B, T] bool, the last step of each trajectory; None = a row is one trajectory.
    """

    def __init__(self, mask: Tensor, ends: Tensor | None) -> None:
        self.mask = mask
        self.ends = ends

    def following(self, x: Tensor) -> Tensor:
        """``x`` of the trajectory's next action, 0 after its last: [B, T] float64; not read outside the mask."""
        x = torch.where(self.mask, x, 0.0).double()
        after = pad(reverse_scan(x, self._through(0.0))[:, 1:], (0, 1))
        return after if self.ends is None else torch.where(self.ends, 0.0, after)

    def sums(self, x: Tensor, factor: Tensor) -> Tensor:
        """y_i = x_i + factor_i · y_{i+1} over the actions i of each trajectory, [B, T].

        ``x`` [B, T] float64 is not read outside the mask; ``factor`` is [B, 1] or [B, T]. The result holds anything
        outside the mask.
        """
        return reverse_scan(torch.where(self.mask, x, 0.0), self._through(factor))

    def _through(self, at_actions: Tensor | float) -> Tensor:
        """What of step t + 1 flows back to t, [B, T] float64: all in holes, nothing across an end."""
        one = torch.ones((), dtype=torch.float64, device=self.mask.device)
        coefficient = torch.where(self.mask, at_actions, one)
        return coefficient if self.ends is None else torch.where(self.ends, 0.0, coefficient)


class _ReverseScan(torch.autograd.Function):
    """Its adjoint is the same recurrence in the other direction, g_s = y'_s + c_{s−1} · g_{s−1}."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, coefficient: Tensor) -> Tensor:
        ctx.save_for_backward(coefficient)
        kernel = _cuda_kernel() if x.is_cuda else None
        return _scan(x, coefficient) if kernel is None else kernel(x, coefficient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (c,) = ctx.saved_tensors
        into = c if c.shape[1] == 1 else pad(c[:, :-1], (1, 0))
        return reverse_scan(grads[0].flip(1), into.flip(1)).flip(1), None


@cache
def _cuda_kernel() -> Callable[[Tensor, Tensor], Tensor] | None:
    """The Triton kernel, None where Triton is not installed."""
    if find_spec("triton") is None:
        return None
    from vapo_async.objectives.scan_triton import scan_rows

    return scan_rows


def _scan(x: Tensor, c: Tensor) -> Tensor:
    """Scans blocks of steps side by side, then their first results with this same function, then adds what follows."""
    rows, steps = x.shape
    if not x.numel():
        return torch.zeros_like(x)
    size = min(BLOCK, steps)
    blocks = -(-steps // size)
    y = _blocked(x, blocks, size)
    y_steps = y.unbind()
    if c.shape[1] == 1:
        power = c.t().expand(size, rows).cumprod(0).flip(0)[..., None]
        for k in reversed(range(size - 1)):
            y_steps[k].addcmul_(c, y_steps[k + 1])
    else:
        power = _blocked(c, blocks, size)
        power_steps = power.unbind()
        for k in reversed(range(size - 1)):
            y_steps[k].addcmul_(power_steps[k], y_steps[k + 1])
            power_steps[k].mul_(power_steps[k + 1])  # now the product of the block's coefficients from k on
    if blocks > 1:
        after = _scan(y[0], power[0])[:, 1:]
        y[:, :, :-1].addcmul_(power if c.shape[1] == 1 else power[:, :, :-1], after)
    return y.permute(1, 2, 0).reshape(rows, blocks * size)[:, :steps]


def _blocked(x: Tensor, blocks: int, size: int) -> Tensor:
    """A copy of [B, T] as [size, B, blocks]: step k of all blocks is contiguous."""
    rows, steps = x.shape
    if steps < blocks * size:
        x = pad(x, (0, blocks * size - steps))
    return x.reshape(rows, blocks, size).permute(2, 0, 1).clone(memory_format=torch.contiguous_format)
