"""The critic's loss per token."""

import torch
from torch import Tensor

from vapo_async.objectives.checks import check_above, check_same_shape
from vapo_async.objectives.settings import Coefficient


def value_loss(
    value: Tensor, target: Tensor, old_value: Tensor | None = None, clip: Coefficient | None = None
) -> Tensor:
    """½ (V − R)² per token; with ``clip`` = c, ½ max((V − R)², (V_old + clip(V − V_old, −c, c) − R)²).

    Args:
        value: V, any shape.
        target: R, the same shape; a constant.
        old_value: V at the start of the batch, the same shape; needed with ``clip``.
        clip: range > 0; None = off.

    Returns:
        the per-token loss, differentiable in ``value``.
    """
    check_same_shape(value=value, target=target)
    target = target.detach()
    loss = (value - target).square()
    if clip is not None:
        if old_value is None:
            raise ValueError("value clipping needs old_value, the values at the start of the batch")
        check_above(0, clip=clip)
        check_same_shape(value=value, old_value=old_value)
        old_value = old_value.detach()
        loss = torch.maximum(loss, (old_value + (value - old_value).clamp(min=-clip).clamp(max=clip) - target).square())
    return 0.5 * loss
