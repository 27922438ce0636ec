"""From per-token losses to one number, over denominators that the caller counts on the whole optimizer mini-batch."""

import torch
from torch import Tensor

from vapo_async.config.algorithm import LossAggregation
from vapo_async.objectives.checks import check_mask, check_same_shape


def aggregate(per_token: Tensor, mask: Tensor, how: LossAggregation, denominator: Tensor | float) -> Tensor:
    """This micro-batch's share of the mini-batch's loss: shares of all micro-batches and ranks add up to the whole.

    ``token``: Σ_{i,t} x_{i,t} / tokens (DAPO, VAPO). ``sequence``: Σ_i mean_t(x_i) / sequences, empty rows left out
    (PPO and GRPO for language models).

    Args:
        per_token: [B, T].
        mask: [B, T] bool; entries outside are never read.
        how: the aggregation.
        denominator: tokens or sequences of the global optimizer mini-batch; 0 counts as 1, as there is nothing to sum.

    Returns:
        scalar.
    """
    check_same_shape(2, per_token=per_token, mask=mask)
    check_mask(mask)
    kept = torch.where(mask, per_token, 0.0)
    match how:
        case LossAggregation.token:
            total = kept.sum()
        case LossAggregation.sequence:
            total = (kept.sum(1) / mask.sum(1).clamp_min(1)).sum()
    return total / at_least_one(denominator, total)


def denominator_of(mask: Tensor, how: LossAggregation) -> Tensor:
    """What :func:`aggregate` divides by if ``mask`` [B, T] is the whole mini-batch: tokens, or rows with tokens."""
    check_mask(mask)
    return mask.sum() if how is LossAggregation.token else mask.any(1).sum()


def at_least_one(denominator: Tensor | float, like: Tensor) -> Tensor | float:
    """``denominator`` with 0 replaced by 1, in the dtype of ``like``; ``ValueError`` for a negative number."""
    if isinstance(denominator, Tensor):
        return torch.where(denominator == 0, 1, denominator).to(like.dtype)
    if not denominator >= 0:
        raise ValueError(f"a denominator must not be negative, got {denominator}")
    return denominator or 1
